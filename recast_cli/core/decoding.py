"""Answers of a causal language model kept inside a catalogue: sampling and beam search over semantic IDs.

Both walk the answers of a prompt as a tree (walk.py), so a prompt is read once and answers with a common
prefix share its tokens. The model's generation_config is never read: a checkpoint's top_k or repetition
penalty must not leak into constrained search. Probabilities are float32, draws float64.

Shapes: B prompts, G rollouts, W beams, S slots (distinct partial answers of a prompt, padded with copies of
slot 0), C = S x K candidates of a prompt, L levels, K codes of a level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from recast_cli.core.trie import Exclusion, Trie
from recast_cli.core.walk import Guide, TreeWalk, decoding_mode, guided_walks

TOKEN_BUDGET = 16384


@dataclass(frozen=True)
class Samples:
    """Rollouts of each prompt, on the CPU.

    Attributes:
        codes_BGL: int64, the codes drawn.
        items_BG: int64 item rows; -1 for codes that are no item, which only a broken mask can let through.
        log_probs_BGL: float32 full-vocabulary log-softmax at the temperature (what an actor computes).
        trie_log_probs_BGL: float32, the same renormalised over the allowed codes (what was drawn from).
    """

    codes_BGL: torch.Tensor
    items_BG: torch.Tensor
    log_probs_BGL: torch.Tensor
    trie_log_probs_BGL: torch.Tensor


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


def sample(
    model: Any,
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    uniforms_BGL: np.ndarray | torch.Tensor,
    *,
    temperature: float = 1.0,
    pad_token_id: int,
    exclusion: Exclusion | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> Samples:
    """Draw G answers per prompt by inverse CDF: a draw depends on its prompt and uniforms, not on the batch.

    Args:
        model: Causal LM; put into eval mode for the call.
        trie: The catalogue, best on the model's device already.
        level_offsets: Token id of code 0 of each level.
        prompts: B lists of token ids; the next token is the first code.
        uniforms_BGL: float64 in [0, 1).
        temperature: Divides the logits; positive.
        pad_token_id: Any token id; fills the left of shorter prompts.
        exclusion: Items closed to single prompts; request i is prompt i.
        token_budget: Most tokens (padded prompts plus answers) read at once; one prompt is the least.

    Raises:
        ValueError: an argument out of bounds, an attention without masks, or logits that are not finite.
    """
    uniforms_BGL = _checked_uniforms(uniforms_BGL, len(prompts), trie.num_levels)
    shape = uniforms_BGL.shape
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")
    samples = Samples(
        codes_BGL=torch.full(shape, -1, dtype=torch.int64),
        items_BG=torch.full(shape[:2], -1, dtype=torch.int64),
        log_probs_BGL=torch.zeros(shape),
        trie_log_probs_BGL=torch.zeros(shape),
    )
    if not shape[1]:
        return samples
    args = (model, trie, level_offsets, prompts, pad_token_id, [exclusion], token_budget)
    with decoding_mode(model):
        for rows_B, walk, (guide,) in guided_walks(*args, num_answers=shape[1]):
            codes, items, full, renormalised = _sample(walk, guide, uniforms_BGL[rows_B], temperature)
            samples.codes_BGL[rows_B] = codes.cpu()
            samples.items_BG[rows_B] = items.cpu()
            samples.log_probs_BGL[rows_B] = full.cpu()
            samples.trie_log_probs_BGL[rows_B] = renormalised.cpu()
    return samples


def beam_search(
    model: Any,
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    beam_width: int,
    *,
    pad_token_id: int,
    exclusion: Exclusion | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> Beams:
    """W best answers per prompt: sum of full-vocabulary log-softmax, disallowed -inf, no length penalty.

    A beam as wide as the catalogue is exact. At a narrower one, equal scores at the cut survive in order of
    their codes, at the last level in order of their item rows.

    Args:
        model, trie, level_offsets, prompts, pad_token_id, exclusion, token_budget: As in `sample`.
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
    token_budget: int = TOKEN_BUDGET,
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
    log_probs_BL = torch.zeros(given_BL.shape)
    args = (model, trie, level_offsets, prompts, pad_token_id, exclusions, token_budget)
    with decoding_mode(model):
        for rows_B, walk, guides in guided_walks(*args, num_answers=width * len(exclusions)):
            for beams, (codes, items, scores) in zip(found, _search(walk, guides, width), strict=True):
                beams.codes_BWL[rows_B, :width] = codes.cpu()
                beams.items_BW[rows_B, :width] = items.cpu()
                beams.scores_BW[rows_B, :width] = scores.cpu()
            if len(given_BL):
                walk.rewind()
                log_probs_BL[rows_B] = _force(walk, guides[0], given_BL[rows_B].to(walk.device)).cpu()
    return found, log_probs_BL


def _checked_uniforms(
    uniforms_BGL: np.ndarray | torch.Tensor, num_prompts: int, num_levels: int
) -> torch.Tensor:
    uniforms_BGL = torch.as_tensor(uniforms_BGL, dtype=torch.float64)
    shape = tuple(uniforms_BGL.shape)
    if len(shape) != 3 or shape[0] != num_prompts or shape[2] != num_levels:
        raise ValueError(f"uniforms need shape ({num_prompts}, rollouts, {num_levels}), found {shape}")
    if not bool(((uniforms_BGL >= 0) & (uniforms_BGL < 1)).all()):
        raise ValueError("uniforms must lie in [0, 1)")
    return uniforms_BGL


def _sample(
    walk: TreeWalk, guide: Guide, uniforms_BGL: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, ...]:
    """Codes (B, G, L), items (B, G), full-vocabulary and trie log-probabilities (B, G, L)."""
    num_levels, uniforms_BGL = guide.trie.num_levels, uniforms_BGL.to(walk.device)
    batch_B1 = torch.arange(len(uniforms_BGL), device=walk.device)[:, None]
    nodes_BG = slots_BG = torch.zeros(uniforms_BGL.shape[:2], dtype=torch.int64, device=walk.device)
    nodes_BS = nodes_BG[:, :1]
    codes, log_probs, trie_log_probs = [], [], []
    for level in range(num_levels):
        full_BSK = guide.log_probs(level, walk.logits_BSV, temperature)
        trie_BSK = full_BSK.masked_fill(guide.forbidden(level, nodes_BS), -torch.inf).log_softmax(dim=-1)
        codes_BG = _draw(trie_BSK, slots_BG, uniforms_BGL[..., level])
        codes.append(codes_BG)
        log_probs.append(full_BSK[batch_B1, slots_BG, codes_BG])
        trie_log_probs.append(trie_BSK[batch_B1, slots_BG, codes_BG])
        nodes_BG = guide.trie.find(level, nodes_BG, codes_BG)
        if level + 1 < num_levels:
            members_BS, slots_BG = _grow(walk, guide, level, slots_BG, codes_BG)
            nodes_BS = nodes_BG.gather(1, members_BS)
    return (
        torch.stack(codes, dim=-1),
        guide.trie.items(nodes_BG),
        torch.stack(log_probs, dim=-1),
        torch.stack(trie_log_probs, dim=-1),
    )


def _draw(log_probs_BSK: torch.Tensor, slots_BG: torch.Tensor, uniforms_BG: torch.Tensor) -> torch.Tensor:
    """Inverse CDF in float64: the first possible code whose cumulative probability exceeds the uniform."""
    probs_BSK = log_probs_BSK.double().exp()
    # 0 exceeds no uniform: a code of probability 0 stays out, whatever a parallel sum rounds to.
    cdf_BSK = probs_BSK.cumsum(dim=-1).masked_fill(probs_BSK == 0, 0)
    total_BS1 = cdf_BSK.amax(dim=-1, keepdim=True)
    if not bool((total_BS1 > 0).all()):
        raise ValueError("the model gave logits that are not finite")
    index_BG1 = slots_BG[..., None]
    # A float64 below 1 times the total rounds to less than the total, so some code always exceeds.
    reached_BG1 = uniforms_BG[..., None] * total_BS1.gather(1, index_BG1)
    exceeds_BGK = cdf_BSK.gather(1, index_BG1.expand(-1, -1, cdf_BSK.shape[-1])) > reached_BG1
    return exceeds_BGK.byte().argmax(dim=-1)


def _grow(
    walk: TreeWalk, guide: Guide, level: int, parents_BG: torch.Tensor, codes_BG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed each distinct code below its parent slot once; a member of each new slot, each answer's slot."""
    # Told apart by codes, not by node: all answers that are no item would share node -1.
    members_BS, slots_BG = _distinct(parents_BG * guide.trie.codebook_sizes[level] + codes_BG)
    walk.grow(codes_BG.gather(1, members_BS) + guide.offsets[level], parents_BG.gather(1, members_BS))
    return members_BS, slots_BG


def _distinct(keys_BG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A member of each distinct key of a row (B, S), padded with the first's; the slot of each key (B, G)."""
    sorted_BG, order_BG = keys_BG.sort(dim=1)
    is_new_BG = torch.ones_like(sorted_BG, dtype=torch.bool)
    is_new_BG[:, 1:] = sorted_BG[:, 1:] != sorted_BG[:, :-1]
    rank_BG = is_new_BG.cumsum(dim=1) - 1
    slots_BG = torch.empty_like(rank_BG).scatter_(1, order_BG, rank_BG)
    members_BS = order_BG[:, :1].repeat(1, int(rank_BG[:, -1].max()) + 1)
    members_BS.scatter_(1, rank_BG, order_BG)  # equal keys are one answer: any may stand for it
    return members_BS, slots_BG


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

    def extend(self, guide: Guide, level: int, log_probs_BMK: torch.Tensor, width: int) -> _Front:
        """The best `width` of all continuations, given the log-probs of the level's codes at each slot."""
        size = log_probs_BMK.shape[-1]
        log_probs_BSK = log_probs_BMK.gather(1, self.slots_BS[..., None].expand(-1, -1, size))
        log_probs_BSK = log_probs_BSK.masked_fill(guide.forbidden(level, self.nodes_BS), -torch.inf)
        candidates_BC = (self.scores_BS[..., None] + log_probs_BSK).flatten(1)
        scores_BS, picks_BS = candidates_BC.topk(min(width, guide.trie.num_nodes[level + 1]), dim=1)
        if not bool(scores_BS[:, 0].isfinite().all()):
            raise ValueError("the model gave logits that are not finite")
        _settle_ties(guide, level, self.nodes_BS, candidates_BC, scores_BS, picks_BS)
        # A dead beam copies the best one, at -inf: it needs a node with children, and never comes back.
        picks_BS = torch.where(scores_BS > -torch.inf, picks_BS, picks_BS[:, :1])
        parents_BS, codes_BS = picks_BS // size, picks_BS % size
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


def _search(
    walk: TreeWalk, guides: Sequence[Guide], width: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Codes (B, W, L), items (B, W) and scores (B, W) under each guide; shared beams are fed once."""
    root_B1 = torch.zeros(len(walk.logits_BSV), 1, dtype=torch.int64, device=walk.device)
    fronts = [_Front(root_B1, root_B1, root_B1.float(), root_B1[..., None][..., :0]) for _ in guides]
    num_levels = guides[0].trie.num_levels
    for level in range(num_levels):
        log_probs_BMK = guides[0].log_probs(level, walk.logits_BSV)
        fronts = [
            front.extend(guide, level, log_probs_BMK, width)
            for front, guide in zip(fronts, guides, strict=True)
        ]
        if level + 1 < num_levels:
            parents = torch.cat([front.slots_BS for front in fronts], dim=1)
            codes = torch.cat([front.codes_BSL[..., -1] for front in fronts], dim=1)
            _, slots = _grow(walk, guides[0], level, parents, codes)
            each = slots.chunk(len(fronts), dim=1)
            fronts = [replace(front, slots_BS=slots_BS) for front, slots_BS in zip(fronts, each, strict=True)]
    return [front.ranked(guide) for front, guide in zip(fronts, guides, strict=True)]


def _force(walk: TreeWalk, guide: Guide, codes_BL: torch.Tensor) -> torch.Tensor:
    """Log-probs (B, L) of one answer per prompt, each code given those before it."""
    log_probs = []
    for level, codes_B1 in enumerate(codes_BL.split(1, dim=1)):
        log_probs_BK = guide.log_probs(level, walk.logits_BSV)[:, 0]
        log_probs.append(log_probs_BK.gather(1, codes_B1))
        if level + 1 < codes_BL.shape[1]:
            walk.grow(codes_B1 + guide.offsets[level], torch.zeros_like(codes_B1))
    return torch.cat(log_probs, dim=1)


def _settle_ties(
    guide: Guide,
    level: int,
    nodes_BS: torch.Tensor,
    candidates_BC: torch.Tensor,
    scores_BW: torch.Tensor,
    picks_BW: torch.Tensor,
) -> None:
    """Refill picks where equal scores straddle the cut (topk takes any): by node, at leaves by item row."""
    cut_B1 = scores_BW[:, -1:]
    straddles_B = ((candidates_BC >= cut_B1).sum(dim=1) > scores_BW.shape[1]) & (cut_B1[:, 0] > -torch.inf)
    size = guide.trie.codebook_sizes[level]
    for row in straddles_B.nonzero()[:, 0].tolist():  # rare: scores of trained models hardly ever tie
        tied_R = (candidates_BC[row] == cut_B1[row]).nonzero()[:, 0]
        keys_R = guide.trie.find(level, nodes_BS[row, tied_R // size], tied_R % size)
        if level + 1 == guide.trie.num_levels:
            keys_R = guide.trie.items(keys_R)
        num_above = int((scores_BW[row] > cut_B1[row]).sum())
        picks_BW[row, num_above:] = tied_R[keys_R.argsort()][: scores_BW.shape[1] - num_above]
