"""Beam search over the semantic IDs of a catalogue: what ranks items.

The answers of a prompt are walked as a tree (walk.py), so a prompt is read once and answers with a common
prefix share its tokens, between searches too. The model's generation_config is never read: a checkpoint's
top_k or repetition penalty must not leak in. Scores are float32.

Shapes: B prompts, W beams, S slots (distinct partial answers of a prompt, padded with copies of slot 0),
D codes below a node, C = S x D candidates of a prompt, L levels, K codes of a level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recast_cli.core.guide import Guide, Scores, grow_distinct, guided_walks
from recast_cli.core.trie import Exclusion, Trie
from recast_cli.core.walk import TreeWalk, decoding_mode


@dataclass(frozen=True)
class Beams:
    """Best answers of each prompt, on the CPU, best first, equal scores by item row.

    Attributes:
        codes_BWL: int64 codes, -1 where fewer than W items are allowed.
        items_BW: int64 item rows, -1 likewise.
        scores_BW: float32 sums of full-vocabulary log-softmax, -inf likewise.
    """

    codes_BWL: torch.Tensor
    items_BW: torch.Tensor
    scores_BW: torch.Tensor


def beam_search(
    model: Any,
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    beam_width: int,
    *,
    pad_token_id: int,
    exclusion: Exclusion | None = None,
    token_budget: int | None = None,
) -> Beams:
    """W best answers per prompt: sum of full-vocabulary log-softmax, disallowed -inf, no length penalty.

    A beam as wide as the catalogue is exact. At a narrower one, equal scores at the cut survive in order of
    their codes, at the last level in order of their item rows.

    Args:
        model, trie, level_offsets, prompts, pad_token_id, exclusion, token_budget: As in `sampling.sample`.
        beam_width: W, both the width and the number of answers.

    Raises:
        ValueError: an argument out of bounds, an attention without masks, or logits that are not finite.
    """
    (beams,), _ = beam_searches(
        model,
        trie,
        level_offsets,
        prompts,
        beam_width,
        pad_token_id=pad_token_id,
        exclusions=[exclusion],
        token_budget=token_budget,
    )
    return beams


def beam_searches(
    model: Any,
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    beam_width: int,
    *,
    pad_token_id: int,
    exclusions: Sequence[Exclusion | None],
    given_BL: np.ndarray | torch.Tensor | None = None,
    token_budget: int | None = None,
) -> tuple[list[Beams], torch.Tensor]:
    """`beam_search` under each exclusion and the log-probs of given answers, from one reading of the prompts.

    Args:
        exclusions: One search each; None closes nothing.
        given_BL: int64 codes of one answer per prompt; nothing is asked of the trie.

    Returns:
        Beams of each search, and the float32 full-vocabulary log-softmax of each given code (B, L), empty
        (0, L) where none is given.

    Raises:
        ValueError: as `beam_search`.
    """
    if beam_width < 1:
        raise ValueError(f"beam_width must be at least 1, found {beam_width}")
    shape, width = (len(prompts), beam_width), min(beam_width, trie.num_items)
    found = [
        Beams(
            codes_BWL=torch.full((*shape, trie.num_levels), -1, dtype=torch.int64),
            items_BW=torch.full(shape, -1, dtype=torch.int64),
            scores_BW=torch.full(shape, -torch.inf),
        )
        for _ in exclusions
    ]
    given_BL = torch.as_tensor(np.empty((0, trie.num_levels), np.int64) if given_BL is None else given_BL)
    if bool(((given_BL < 0) | (given_BL >= torch.tensor(trie.codebook_sizes))).any()):
        raise ValueError(f"codes of a given answer lie outside 0..K-1 of their levels: {trie.codebook_sizes}")
    log_probs_BL = torch.zeros(given_BL.shape)
    args = (model, trie, level_offsets, prompts, pad_token_id, exclusions, token_budget)
    with decoding_mode(model):
        for rows_B, walk, guides in guided_walks(*args, num_answers=width * len(exclusions)):
            for beams, (codes, items, scores) in zip(found, search(walk, guides, width), strict=True):
                beams.codes_BWL[rows_B, :width] = codes.cpu()
                beams.items_BW[rows_B, :width] = items.cpu()
                beams.scores_BW[rows_B, :width] = scores.cpu()
            if len(given_BL):
                walk.rewind()
                log_probs_BL[rows_B] = _force(walk, guides[0], given_BL[rows_B].to(walk.device)).cpu()
    return found, log_probs_BL


@dataclass(frozen=True)
class _Front:
    """What one search holds between two levels.

    Attributes:
        slots_BS: Where the walk has each beam (where it had its parent, until the walk has grown).
        nodes_BS, scores_BS, codes_BSL: Of each beam, as far as it has come; a dead beam scores -inf.
    """

    slots_BS: torch.Tensor
    nodes_BS: torch.Tensor
    scores_BS: torch.Tensor
    codes_BSL: torch.Tensor

    def extend(self, guide: Guide, level: int, scores: Scores, width: int) -> _Front:
        """The best `width` of all continuations, given what the walk says of the level's codes."""
        codes_BSD, open_BSD = guide.choices(level, self.nodes_BS)
        log_probs_BSD = scores.of(self.slots_BS, codes_BSD).masked_fill(~open_BSD, -torch.inf)
        candidates_BC = (self.scores_BS[..., None] + log_probs_BSD).flatten(1)
        scores_BS, picks_BS = candidates_BC.topk(min(width, guide.trie.num_nodes[level + 1]), dim=1)
        if not bool(scores_BS[:, 0].isfinite().all()):
            raise ValueError("the model gave logits that are not finite")
        _settle_ties(guide, level, self.nodes_BS, codes_BSD, candidates_BC, scores_BS, picks_BS)
        # A dead beam copies the best one, at -inf: it needs a node with children, and never comes back.
        picks_BS = torch.where(scores_BS > -torch.inf, picks_BS, picks_BS[:, :1])
        parents_BS, codes_BS = picks_BS // codes_BSD.shape[2], codes_BSD.flatten(1).gather(1, picks_BS)
        ancestors = self.codes_BSL.gather(1, parents_BS[..., None].expand(-1, -1, level))
        return _Front(
            slots_BS=self.slots_BS.gather(1, parents_BS),
            nodes_BS=guide.trie.find(level, self.nodes_BS.gather(1, parents_BS), codes_BS),
            scores_BS=scores_BS,
            codes_BSL=torch.cat([ancestors, codes_BS[..., None]], dim=2),
        )

    def ranked(self, guide: Guide) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes (B, W, L), items (B, W) and scores (B, W), best first; equal scores by item row."""
        dead_BS = self.scores_BS == -torch.inf
        items_BS = guide.trie.items(self.nodes_BS).masked_fill(dead_BS, -1)
        codes_BSL = self.codes_BSL.masked_fill(dead_BS[..., None], -1)
        order_BS = items_BS.argsort(dim=1, stable=True)
        by_score_BS = self.scores_BS.gather(1, order_BS).argsort(dim=1, descending=True, stable=True)
        order_BS = order_BS.gather(1, by_score_BS)
        codes_BWL = codes_BSL.gather(1, order_BS[..., None].expand_as(codes_BSL))
        return codes_BWL, items_BS.gather(1, order_BS), self.scores_BS.gather(1, order_BS)


def search(
    walk: TreeWalk, guides: Sequence[Guide], width: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Codes (B, W, L), items (B, W) and scores (B, W) under each guide; shared beams are fed once."""
    root_B1 = torch.zeros(len(walk.logits_BSV), 1, dtype=torch.int64, device=walk.device)
    fronts = [_Front(root_B1, root_B1, root_B1.float(), root_B1[..., None][..., :0]) for _ in guides]
    num_levels = guides[0].trie.num_levels
    for level in range(num_levels):
        scores = guides[0].scores(level, walk.logits_BSV)
        fronts = [
            front.extend(guide, level, scores, width) for front, guide in zip(fronts, guides, strict=True)
        ]
        if level + 1 < num_levels:
            parents = torch.cat([front.slots_BS for front in fronts], dim=1)
            codes = torch.cat([front.codes_BSL[..., -1] for front in fronts], dim=1)
            _, slots = grow_distinct(walk, guides[0], level, parents, codes)
            each = slots.chunk(len(fronts), dim=1)
            fronts = [replace(front, slots_BS=slots_BS) for front, slots_BS in zip(fronts, each, strict=True)]
    return [front.ranked(guide) for front, guide in zip(fronts, guides, strict=True)]


def _force(walk: TreeWalk, guide: Guide, codes_BL: torch.Tensor) -> torch.Tensor:
    """Log-probs (B, L) of one answer per prompt, each code given those before it."""
    log_probs = []
    for level, codes_B1 in enumerate(codes_BL.split(1, dim=1)):
        scores = guide.scores(level, walk.logits_BSV)
        log_probs.append(scores.of(torch.zeros_like(codes_B1), codes_B1[..., None])[..., 0])
        if level + 1 < codes_BL.shape[1]:
            walk.grow(codes_B1 + guide.offsets[level], torch.zeros_like(codes_B1))
    return torch.cat(log_probs, dim=1)


def _settle_ties(
    guide: Guide,
    level: int,
    nodes_BS: torch.Tensor,
    codes_BSD: torch.Tensor,
    candidates_BC: torch.Tensor,
    scores_BW: torch.Tensor,
    picks_BW: torch.Tensor,
) -> None:
    """Refill picks where equal scores straddle the cut (topk takes any): by node, at leaves by item row."""
    cut_B1 = scores_BW[:, -1:]
    straddles_B = ((candidates_BC >= cut_B1).sum(dim=1) > scores_BW.shape[1]) & (cut_B1[:, 0] > -torch.inf)
    codes_BC, num_lanes = codes_BSD.flatten(1), codes_BSD.shape[2]
    for row in straddles_B.nonzero()[:, 0].tolist():  # rare: scores of trained models hardly ever tie
        tied_R = (candidates_BC[row] == cut_B1[row]).nonzero()[:, 0]
        keys_R = guide.trie.find(level, nodes_BS[row, tied_R // num_lanes], codes_BC[row, tied_R])
        if level + 1 == guide.trie.num_levels:
            keys_R = guide.trie.items(keys_R)
        num_above = int((scores_BW[row] > cut_B1[row]).sum())
        picks_BW[row, num_above:] = tied_R[keys_R.argsort()][: scores_BW.shape[1] - num_above]
