"""Sampling of distinct items: Gumbel top-k over the catalogue by a beam search over its trie.

Kool et al. (arXiv 1903.06059): give each item its log-probability plus Gumbel noise and take the G largest:
that is drawing G items one after another without putting any back. The noise need not be drawn per item. A
node's perturbed log-prob is the maximum of its items', so it is drawn from the root down, the children
conditional on their parent, and a beam of width G loses none of the G largest. The policy is the model's at
the temperature, renormalised over the trie, and the result is exact whatever the size of the catalogue.

The noise of a node is a hash of its row's key and its place in the trie. So a draw depends neither on the
batch nor on G: the first items of a larger draw are the smaller one.

Shapes: as in sampling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recast_cli.core.guide import Guide, Scores, grow_distinct, guided_walks
from recast_cli.core.gumbel import as_signed, extend_hash, gumbel, with_maximum
from recast_cli.core.sampling import Rollouts, require_temperature
from recast_cli.core.trie import Exclusion, Trie
from recast_cli.core.walk import TreeWalk, decoding_mode


@dataclass(frozen=True)
class DistinctSamples(Rollouts):
    """Distinct rollouts in the order in which they were drawn; the last are missing where too few are open.

    Attributes:
        perturbed_BG: float64, log-prob under the trie plus the item's Gumbel noise, descending; -inf where
            missing.
    """

    perturbed_BG: torch.Tensor


def sample_distinct(
    model: Any,
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    keys_B: np.ndarray,
    num_rollouts: int,
    *,
    temperature: float = 1.0,
    pad_token_id: int,
    exclusion: Exclusion | None = None,
    full_vocabulary: bool = True,
    token_budget: int | None = None,
) -> DistinctSamples:
    """Draw G distinct items per prompt without replacement.

    Args:
        model, trie, level_offsets, prompts, temperature, pad_token_id, exclusion, full_vocabulary,
            token_budget: As in `sampling.sample`.
        keys_B: uint64, the seed of each prompt's draw: `seeding.hash64(seed, step, index_B)`.
        num_rollouts: G.

    Raises:
        ValueError: an argument out of bounds, an attention without masks, or logits that are not finite.
    """
    require_temperature(temperature)
    if len(keys_B) != len(prompts) or num_rollouts < 0:
        raise ValueError(f"{len(prompts)} prompts, found {len(keys_B)} keys and {num_rollouts} rollouts")
    shape = len(prompts), num_rollouts
    samples = DistinctSamples(
        codes_BGL=torch.full((*shape, trie.num_levels), -1, dtype=torch.int64),
        items_BG=torch.full(shape, -1, dtype=torch.int64),
        log_probs_BGL=torch.full((*shape, trie.num_levels), torch.nan),
        trie_log_probs_BGL=torch.full((*shape, trie.num_levels), torch.nan),
        perturbed_BG=torch.full(shape, -torch.inf, dtype=torch.float64),
    )
    width, signed_B = min(num_rollouts, trie.num_items), as_signed(keys_B)
    if not width:
        return samples
    args = (model, trie, level_offsets, prompts, pad_token_id, [exclusion], token_budget)
    with decoding_mode(model):
        for rows_B, walk, (guide,) in guided_walks(*args, num_answers=width, full=full_vocabulary):
            front = _search(walk, guide, signed_B[rows_B].to(walk.device), width, temperature)
            dead_BG = (front.perturbed_BS == -torch.inf).cpu()
            samples.codes_BGL[rows_B, :width] = front.codes_BSL.cpu().masked_fill(dead_BG[..., None], -1)
            samples.items_BG[rows_B, :width] = guide.trie.items(front.nodes_BS).cpu().masked_fill(dead_BG, -1)
            for name in ("log_probs", "trie_log_probs"):
                found = getattr(front, f"{name}_BSL").cpu().masked_fill(dead_BG[..., None], torch.nan)
                getattr(samples, f"{name}_BGL")[rows_B, :width] = found
            samples.perturbed_BG[rows_B, :width] = front.perturbed_BS.cpu()
    return samples


@dataclass(frozen=True)
class _Front:
    """The partial answers that a draw holds between two levels, the largest perturbed log-prob first.

    Attributes:
        slots_BS: Where the walk has each (where it had its parent, until the walk has grown).
        nodes_BS: Node of each.
        perturbed_BS: Its perturbed log-prob; -inf for a dead one, which is a copy of the first.
        codes_BSL, log_probs_BSL, trie_log_probs_BSL: Of the levels behind it.
    """

    slots_BS: torch.Tensor
    nodes_BS: torch.Tensor
    perturbed_BS: torch.Tensor
    codes_BSL: torch.Tensor
    log_probs_BSL: torch.Tensor
    trie_log_probs_BSL: torch.Tensor


def _search(walk: TreeWalk, guide: Guide, keys_B: torch.Tensor, width: int, temperature: float) -> _Front:
    nodes_B1 = torch.zeros(len(keys_B), 1, dtype=torch.int64, device=walk.device)
    nothing = nodes_B1[..., None][..., :0]
    front = _Front(nodes_B1, nodes_B1, gumbel(keys_B)[:, None], nothing, nothing.float(), nothing.float())
    for level in range(guide.trie.num_levels):
        scores = guide.scores(level, walk.logits_BSV, temperature)
        front = _extend(front, guide, level, scores, keys_B, width)
        if level + 1 < guide.trie.num_levels:
            _, slots_BS = grow_distinct(walk, guide, level, front.slots_BS, front.codes_BSL[..., -1])
            front = replace(front, slots_BS=slots_BS)
    return front


def _extend(
    front: _Front, guide: Guide, level: int, scores: Scores, keys_B: torch.Tensor, width: int
) -> _Front:
    """The `width` largest of all continuations, given what the walk says of the level's codes."""
    codes_BSD, open_BSD = guide.choices(level, front.nodes_BS)
    full_BSD = scores.of(front.slots_BS, codes_BSD)
    trie_BSD = full_BSD.masked_fill(~open_BSD, -torch.inf).log_softmax(dim=-1)
    places_BSD = extend_hash(keys_B[:, None, None], level, front.nodes_BS[..., None], codes_BSD)
    behind_BS1 = front.trie_log_probs_BSL.double().sum(dim=-1, keepdim=True)
    dead_BS = front.perturbed_BS == -torch.inf
    perturbed_BSD = with_maximum(
        behind_BS1 + trie_BSD.double() + gumbel(places_BSD), front.perturbed_BS.masked_fill(dead_BS, 0)
    ).masked_fill(dead_BS[..., None], -torch.inf)
    perturbed_BS, picks_BS = perturbed_BSD.flatten(1).topk(min(width, guide.trie.num_nodes[level + 1]), dim=1)
    if not bool(perturbed_BS[:, 0].isfinite().all()):
        raise ValueError("the model gave logits that are not finite")
    # A dead one copies the first, at -inf: it needs a node with children, and never comes back.
    picks_BS = torch.where(perturbed_BS > -torch.inf, picks_BS, picks_BS[:, :1])
    parents_BS, codes_BS = picks_BS // codes_BSD.shape[2], codes_BSD.flatten(1).gather(1, picks_BS)

    def grown(behind_BSL: torch.Tensor, new_BS: torch.Tensor) -> torch.Tensor:
        ancestors = behind_BSL.gather(1, parents_BS[..., None].expand(-1, -1, level))
        return torch.cat([ancestors, new_BS[..., None]], dim=2)

    return _Front(
        slots_BS=front.slots_BS.gather(1, parents_BS),
        nodes_BS=guide.trie.find(level, front.nodes_BS.gather(1, parents_BS), codes_BS),
        perturbed_BS=perturbed_BS,
        codes_BSL=grown(front.codes_BSL, codes_BS),
        log_probs_BSL=grown(front.log_probs_BSL, scores.known(full_BSD.flatten(1).gather(1, picks_BS))),
        trie_log_probs_BSL=grown(front.trie_log_probs_BSL, trie_BSD.flatten(1).gather(1, picks_BS)),
    )
