"""The best beams of each prompt as a group of rollouts: the candidates of OpenOneRec (arXiv 2512.24762) and
ReRe (arXiv 2510.12211), with the log-probs that a policy gradient needs.

Shapes: as in sampling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recast_cli.core.beam_search import search
from recast_cli.core.guide import Guide, grow_distinct, guided_walks
from recast_cli.core.sampling import Rollouts
from recast_cli.core.trie import Exclusion, Trie
from recast_cli.core.walk import TreeWalk, decoding_mode


def beam_group(
    model: Any,
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    num_rollouts: int,
    *,
    pad_token_id: int,
    exclusion: Exclusion | None = None,
    token_budget: int | None = None,
) -> Rollouts:
    """The G answers of `beam_search.beam_search` at that width, best first, log-probs at temperature 1.

    The prompts are read once; the answers found are then walked a second time for their log-probs.

    Args:
        model, trie, level_offsets, prompts, pad_token_id, exclusion, token_budget: As in `sampling.sample`.
        num_rollouts: G, at least 1.

    Raises:
        ValueError: as `beam_search`.
    """
    if num_rollouts < 1:
        raise ValueError(f"num_rollouts must be at least 1, found {num_rollouts}")
    shape, width = (len(prompts), num_rollouts), min(num_rollouts, trie.num_items)
    group = Rollouts(
        codes_BGL=torch.full((*shape, trie.num_levels), -1, dtype=torch.int64),
        items_BG=torch.full(shape, -1, dtype=torch.int64),
        log_probs_BGL=torch.full((*shape, trie.num_levels), torch.nan),
        trie_log_probs_BGL=torch.full((*shape, trie.num_levels), torch.nan),
    )
    args = (model, trie, level_offsets, prompts, pad_token_id, [exclusion], token_budget)
    with decoding_mode(model):
        for rows_B, walk, guides in guided_walks(*args, num_answers=width):
            ((codes_BWL, items_BW, _),) = search(walk, guides, width)
            walk.rewind()
            full_BWL, trie_BWL = _force(walk, guides[0], codes_BWL)
            group.codes_BGL[rows_B, :width] = codes_BWL.cpu()
            group.items_BG[rows_B, :width] = items_BW.cpu()
            group.log_probs_BGL[rows_B, :width] = full_BWL.cpu()
            group.trie_log_probs_BGL[rows_B, :width] = trie_BWL.cpu()
    return group


def _force(walk: TreeWalk, guide: Guide, codes_BWL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Full and trie log-probs (B, W, L) of given answers; NaN for missing ones (-1)."""
    missing_BW1 = codes_BWL[..., :1] < 0
    codes_BWL = torch.where(missing_BW1, codes_BWL[:, :1], codes_BWL)  # walked as copies of the best
    nodes_BW = slots_BW = torch.zeros_like(codes_BWL[..., 0])
    full, among = [], []
    for level, codes_BW in enumerate(codes_BWL.unbind(dim=-1)):
        scores = guide.scores(level, walk.logits_BSV)
        choices_BWD, open_BWD = guide.choices(level, nodes_BW)
        all_BWD = scores.of(slots_BW, choices_BWD).masked_fill(~open_BWD, -torch.inf)
        full.append(scores.of(slots_BW, codes_BW[..., None]))
        among.append(full[-1] - all_BWD.logsumexp(dim=-1, keepdim=True))
        if level + 1 < codes_BWL.shape[-1]:
            nodes_BW = guide.trie.find(level, nodes_BW, codes_BW)
            _, slots_BW = grow_distinct(walk, guide, level, slots_BW, codes_BW)
    full_BWL, trie_BWL = (torch.cat(levels, dim=-1) for levels in (full, among))
    return full_BWL.masked_fill(missing_BW1, torch.nan), trie_BWL.masked_fill(missing_BW1, torch.nan)
