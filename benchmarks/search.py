"""Rollouts and beams under a trie: what the tree of answers saves, beside Hugging Face `generate`.

    python benchmarks/search.py

Qwen3 of width 128 with 4 layers and random weights, a vocabulary of 1,000, 2,000 items of 3 codes out of 256,
64 prompts, 32 answers each, one thread. Seconds are processor seconds, medians; arms take turns.

1. Beams: `transformers.generate` with 32 beams and `prefix_allowed_tokens_fn`, all 64 prompts in one call and
   in calls of the size at which it is fastest, and `beam_search`. The answers must be the same items.
2. Samples: every rollout read alone by our own code (one prompt, one answer, micro-batches of the size at
   which that is fastest), against groups that share their prompt; the token bound is what both read.
3. What else is saved: a text that all prompts begin with; logits of the codes alone in a large vocabulary.
4. The catalogue: 1,000 items against 1,000,000, with 256 codes a level and with 8,192.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from timing import compared, in_turns
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from recast_cli.core.beam_search import Beams, beam_search
from recast_cli.core.sampling import Samples, sample
from recast_cli.core.trie import Trie

RESULT = Path(__file__).parent / "results" / "search.json"
PROMPTS, GROUP, LEVELS = 64, 32, 3
WORDS = 200  # token ids below the codes: what prompts are made of
PAD = 0


def make_model(vocabulary: int = 1000) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.08,  # answers of a group differ, and some are alike, as in training
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3ForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def make_catalogue(num_items: int, size: int = 256) -> tuple[np.ndarray, Trie, list[int]]:
    """Distinct random codes, their trie, and the token id of code 0 of each level."""
    rng = np.random.default_rng(1)
    drawn = rng.choice(size**LEVELS, num_items, replace=False)
    codes_NL = np.stack(np.unravel_index(drawn, (size,) * LEVELS), axis=1)
    offsets = [WORDS + level * size for level in range(LEVELS)]
    return codes_NL, Trie.from_codes(codes_NL, [size] * LEVELS), offsets


def make_prompts(length: int, *, common: int = 0) -> list[list[int]]:
    """64 random prompts of `length` tokens, of which all share the first `common`."""
    rng = np.random.default_rng(2)
    start = rng.integers(0, WORDS, common).tolist()
    return [start + rng.integers(0, WORDS, length - common).tolist() for _ in range(PROMPTS)]


# -- 1. beams ------------------------------------------------------------------------------------------------


def hugging_face_beams(
    model: Any, codes_NL: np.ndarray, offsets: Sequence[int], prompts: list[list[int]], chunk: int
) -> torch.Tensor:
    """Tokens of the best 32 answers of each prompt (B, G, L)."""
    children: dict[tuple[int, ...], set[int]] = {}
    for tokens in (codes_NL + np.asarray(offsets)).tolist():
        for level in range(LEVELS):
            children.setdefault(tuple(tokens[:level]), set()).add(tokens[level])
    allowed = {prefix: sorted(tokens) for prefix, tokens in children.items()}
    length = len(prompts[0])
    options = GenerationConfig(
        num_beams=GROUP,
        num_return_sequences=GROUP,
        max_new_tokens=LEVELS,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=True,
        pad_token_id=PAD,
    )
    found = []
    with torch.inference_mode():
        for ids in torch.tensor(prompts).split(chunk):
            answers = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=options,
                prefix_allowed_tokens_fn=lambda _, row: allowed[tuple(row[length:].tolist())],
            )
            found.append(answers[:, length:])
    return torch.cat(found).view(len(prompts), GROUP, LEVELS)


def same_answers(found_BGL: torch.Tensor, beams: Beams, offsets: Sequence[int]) -> int:
    """Prompts whose 32 answers are the same items."""
    ours_BGL = beams.codes_BWL + torch.tensor(list(offsets))
    pairs = zip(found_BGL.tolist(), ours_BGL.tolist(), strict=True)
    return sum({*map(tuple, theirs)} == {*map(tuple, ours)} for theirs, ours in pairs)


def beams(repeats: int, *, chunks: Sequence[int] = (4, 16, PROMPTS)) -> dict[str, Any]:
    model, prompts = make_model(), make_prompts(64)
    codes_NL, trie, offsets = make_catalogue(2000)

    def ours() -> Beams:
        return beam_search(model, trie, offsets, prompts, GROUP, pad_token_id=PAD)

    arms: dict[str, Callable[[], Any]] = {"recast": ours}
    for chunk in chunks:
        arms[f"hugging face, {chunk} prompts a call"] = partial(
            hugging_face_beams, model, codes_NL, offsets, prompts, chunk
        )
    seconds = in_turns(arms, repeats)
    rows = compared(seconds)
    same = same_answers(hugging_face_beams(model, codes_NL, offsets, prompts, 16), ours(), offsets)
    for name, row in rows.items():
        print(f"beams    {name:36} {row['median_s']:7.3f} s {row['ratio']:6.1f}x")
    print(f"         the same 32 items for {same} of {PROMPTS} prompts", flush=True)
    return {"prompt_length": 64, "arms": rows, "prompts_with_the_same_items": same}


# -- 2. samples ----------------------------------------------------------------------------------------------


def tokens_read(samples: Samples, length: int) -> tuple[int, int]:
    """Tokens that a model reads for the groups: as trees behind their prompts, and rollout by rollout."""
    codes_BGL = samples.codes_BGL.tolist()
    nodes = sum(len({tuple(row[:n]) for row in group}) for group in codes_BGL for n in range(1, LEVELS))
    return PROMPTS * length + nodes, PROMPTS * GROUP * (length + LEVELS - 1)


def samples(length: int, repeats: int, *, budgets: Sequence[int] = (1024, 4096, 16384)) -> dict[str, Any]:
    model, prompts = make_model(), make_prompts(length)
    _, trie, offsets = make_catalogue(2000)
    uniforms_BGL = torch.rand(PROMPTS, GROUP, LEVELS, dtype=torch.float64, generator=torch.manual_seed(3))
    alone = prompts * GROUP  # no two of a call alike: nothing in common that could be read once

    def grouped() -> Samples:
        return sample(model, trie, offsets, prompts, uniforms_BGL, pad_token_id=PAD)

    def apart(token_budget: int) -> Samples:
        draws = uniforms_BGL.transpose(0, 1).reshape(-1, 1, LEVELS)
        return sample(model, trie, offsets, alone, draws, pad_token_id=PAD, token_budget=token_budget)

    arms: dict[str, Callable[[], Any]] = {"recast": grouped}
    for budget in budgets:
        arms[f"rollouts alone, {budget} tokens a call"] = partial(apart, budget)
    seconds = in_turns(arms, repeats)
    together, alone_tokens = tokens_read(grouped(), length)
    rows, bound = compared(seconds), alone_tokens / together
    share = min(row["ratio"] for name, row in rows.items() if name != "recast") / bound
    for name, row in rows.items():
        print(f"samples  {length:4} {name:31} {row['median_s']:7.3f} s {row['ratio']:6.1f}x")
    print(f"         token bound {bound:.1f}, {share:.0%} of it over the fastest of them", flush=True)
    return {"prompt_length": length, "arms": rows, "token_bound": bound, "share_of_bound": share}


# -- 3. what else is not read, or not multiplied -------------------------------------------------------------


def savings(repeats: int) -> dict[str, Any]:
    uniforms_BGL = torch.rand(PROMPTS, GROUP, LEVELS, dtype=torch.float64, generator=torch.manual_seed(3))
    _, trie, offsets = make_catalogue(2000)

    def drawing(model: Any, prompts: list[list[int]], **options: Any) -> Callable[[], Samples]:
        return lambda: sample(model, trie, offsets, prompts, uniforms_BGL, pad_token_id=PAD, **options)

    small, large = make_model(), make_model(32_000)
    found = {}
    for name, base, arm in (
        (
            "40 of 64 tokens in common",
            drawing(small, make_prompts(64, common=40)),
            drawing(small, make_prompts(64)),
        ),
        (
            "logits of the codes alone, 32,000 tokens",
            drawing(large, make_prompts(64), full_vocabulary=False),
            drawing(large, make_prompts(64)),
        ),
    ):
        found[name] = compared(in_turns({"recast": base, "without": arm}, repeats))
        print(f"savings  {name:45} {found[name]['without']['ratio']:6.2f}x", flush=True)
    return found


# -- 4. the catalogue's size ---------------------------------------------------------------------------------


def sizes(repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    uniforms_BGL = torch.rand(PROMPTS, GROUP, LEVELS, dtype=torch.float64, generator=torch.manual_seed(3))
    prompts = make_prompts(64)
    for size in (256, 8192):
        model = make_model(WORDS + LEVELS * size)
        tries = {num_items: make_catalogue(num_items, size)[1:] for num_items in (1000, 1_000_000)}

        def drawing(num_items: int, model: Any = model, tries: Any = tries) -> Callable[[], Samples]:
            trie, offsets = tries[num_items]
            return lambda: sample(model, trie, offsets, prompts, uniforms_BGL, pad_token_id=PAD)

        def searching(num_items: int, model: Any = model, tries: Any = tries) -> Callable[[], Beams]:
            trie, offsets = tries[num_items]
            return lambda: beam_search(model, trie, offsets, prompts, GROUP, pad_token_id=PAD)

        for name, arm in (("samples", drawing), ("beams", searching)):
            rows = compared(in_turns({"recast": arm(1000), "1,000,000 items": arm(1_000_000)}, repeats))
            found[f"{name}, {size} codes"] = rows
            many = rows["1,000,000 items"]
            print(
                f"sizes    {name}, {size} codes: {many['median_s']:.3f} s, {many['ratio']:.2f}x 1,000 items"
            )
    return found


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    start = record.before()
    facts = {
        "beams": beams(args.repeats),
        "samples": [samples(length, args.repeats) for length in (60, 512)],
        "savings": savings(args.repeats + 2),
        "sizes": sizes(args.repeats + 2),
    }
    record.write(args.result, start, {"prompts": PROMPTS, "group": GROUP, **facts})


if __name__ == "__main__":
    main()
