"""The trie of a large catalogue, beside a dictionary of prefixes as `prefix_allowed_tokens_fn` is written.

    python benchmarks/trie_masks.py

A million random semantic IDs of 3 codes, out of 256 and out of 8,192: seconds to build, seconds for the masks
of 2,048 rows at each level, bytes an item. One thread, processor seconds; arms take turns. The masks must be
the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from timing import compared, in_turns

from recast_cli.core.trie import Trie

RESULT = Path(__file__).parent / "results" / "trie_masks.json"
NUM_ITEMS, NUM_ROWS, LEVELS = 1_000_000, 2048, 3
SIZES = (256, 8192)  # codes a level


def make_codes(num_items: int, size: int) -> np.ndarray:
    drawn = np.random.default_rng(1).choice(size**LEVELS, num_items, replace=False)
    return np.stack(np.unravel_index(drawn, (size,) * LEVELS), axis=1)


Children = dict[tuple[int, ...], list[int]]


def build_dictionary(codes_NL: np.ndarray) -> Children:
    """The codes that follow each prefix."""
    children: dict[tuple[int, ...], set[int]] = {}
    for codes in codes_NL.tolist():
        for level in range(LEVELS):
            children.setdefault(tuple(codes[:level]), set()).add(codes[level])
    return {prefix: list(found) for prefix, found in children.items()}


def dictionary_masks(children: Children, answers_RL: np.ndarray, size: int) -> list[torch.Tensor]:
    """What may follow the first codes of each answer, level by level: (R, K)."""
    masks = []
    for level in range(LEVELS):
        mask_RK = torch.zeros((len(answers_RL), size), dtype=torch.bool)
        for row, prefix in enumerate(map(tuple, answers_RL[:, :level].tolist())):
            mask_RK[row, children[prefix]] = True
        masks.append(mask_RK)
    return masks


def trie_masks(trie: Trie, answers_RL: torch.Tensor) -> list[torch.Tensor]:
    nodes_R = torch.zeros(len(answers_RL), dtype=torch.int64)
    masks = []
    for level in range(LEVELS):
        masks.append(trie.mask(level, nodes_R))
        nodes_R = trie.child(level, nodes_R, answers_RL[:, level])
    return masks


def bytes_per_item(trie: Trie) -> dict[str, float]:
    """Of what masks need, and of the item ids at the leaves."""
    walked = sum(array.nbytes for arrays in (trie.ptr, trie.codes) for array in arrays)
    return {"masks": walked / trie.num_items, "item_ids": trie.leaf_item.nbytes / trie.num_items}


def measure(
    size: int, repeats: int, num_items: int = NUM_ITEMS
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Seconds of both arms to build and to mask, and bytes an item."""
    codes_NL = make_codes(num_items, size)
    answers_RL = codes_NL[np.random.default_rng(2).integers(0, num_items, NUM_ROWS)]
    built: dict[str, Any] = {}

    def build() -> None:
        built["recast"] = Trie.from_codes(codes_NL, (size,) * LEVELS)

    def build_other() -> None:
        built["dictionary"] = build_dictionary(codes_NL)

    build_seconds = in_turns({"recast": build, "dictionary": build_other}, min(repeats, 2))
    trie, children = built["recast"], built["dictionary"]
    answers = torch.from_numpy(answers_RL)
    arms = {
        "recast": lambda: trie_masks(trie, answers),
        "dictionary": lambda: dictionary_masks(children, answers_RL, size),
    }
    mask_seconds = in_turns(arms, repeats)
    for ours, theirs in zip(arms["recast"](), arms["dictionary"](), strict=True):
        assert torch.equal(ours, theirs)
    return {"build": build_seconds, "masks": mask_seconds}, bytes_per_item(trie)


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    torch.set_num_threads(1)
    start = record.before()
    found: dict[str, dict[str, Any]] = {}
    for size in SIZES:
        seconds, memory = measure(size, args.repeats)
        found[str(size)] = {name: compared(each) for name, each in seconds.items()} | {"bytes": memory}
        for name in seconds:
            ours, theirs = (found[str(size)][name][arm] for arm in ("recast", "dictionary"))
            print(f"{size:5} codes, {name:5} {ours['median_s']:.4f} s, dictionary {theirs['ratio']:.1f}x")
        print(f"{size:5} codes, {memory['masks']:.1f} bytes an item, and {memory['item_ids']:.0f} for its id")
    record.write(args.result, start, {"items": NUM_ITEMS, "rows": NUM_ROWS, "codes": found})


if __name__ == "__main__":
    main()
