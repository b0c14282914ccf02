"""Sampling of semantic IDs inside a catalogue: what rollouts are made of.

The answers of a prompt are walked as a tree (walk.py), so a prompt is read once and answers with a common
prefix share its tokens. The model's generation_config is never read: a checkpoint's top_k or repetition
penalty must not leak in. Probabilities are float32, draws float64.

Shapes: B prompts, G rollouts, S slots (distinct partial answers of a prompt, padded with copies of slot 0),
L levels, D codes below a node, K codes of a level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recast_cli.core.guide import Guide, grow_distinct, guided_walks
from recast_cli.core.trie import Exclusion, Trie
from recast_cli.core.walk import TreeWalk, decoding_mode


@dataclass(frozen=True)
class Rollouts:
    """Answers to each prompt, on the CPU; a missing one (where a group asks for distinct items and too few
    are open) has -1 and NaN.

    Attributes:
        codes_BGL: int64 codes.
        items_BG: int64 item rows; -1 also for codes that are no item, which only a broken mask lets through.
        log_probs_BGL: float32 full-vocabulary log-softmax at the temperature (what an actor computes), NaN
            where the full vocabulary was not asked for.
        trie_log_probs_BGL: float32, the same renormalised over the allowed codes (what a masked one does).
    """

    codes_BGL: torch.Tensor
    items_BG: torch.Tensor
    log_probs_BGL: torch.Tensor
    trie_log_probs_BGL: torch.Tensor


@dataclass(frozen=True)
class Samples(Rollouts):
    """Independent rollouts.

    Attributes:
        drawn_log_probs_BGL: float32, of the distribution that was drawn from: the trie's, renormalised over
            the nucleus where `top_p` is below 1.
    """

    drawn_log_probs_BGL: torch.Tensor


def sample(
    model: Any,
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    uniforms_BGL: np.ndarray | torch.Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    pad_token_id: int,
    exclusion: Exclusion | None = None,
    full_vocabulary: bool = True,
    token_budget: int | None = None,
) -> Samples:
    """Draw G answers per prompt by inverse CDF: a draw depends on its prompt and uniforms, not on the batch.

    Args:
        model: Causal LM; put into eval mode for the call.
        trie: The catalogue, best on the model's device already.
        level_offsets: Token id of code 0 of each level.
        prompts: B lists of token ids; the next token is the first code.
        uniforms_BGL: float64 in [0, 1).
        temperature: Divides the logits; positive.
        top_p: Each code is drawn from the nucleus of the allowed ones, see `nucleus`; 1 leaves all in.
        pad_token_id: Any token id; fills the left of shorter prompts.
        exclusion: Items closed to single prompts; request i is prompt i.
        full_vocabulary: Without it `log_probs_BGL` are NaN, and the output head gives the logits of a level's
            codes alone: the draws need no more.
        token_budget: Most tokens (padded prompts plus answers) read at once; one prompt is the least. Default
            by device.

    Raises:
        ValueError: an argument out of bounds, an attention without masks, or logits that are not finite.
    """
    uniforms_BGL = _checked_uniforms(uniforms_BGL, len(prompts), trie.num_levels)
    shape = uniforms_BGL.shape
    require_temperature(temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], found {top_p}")
    samples = Samples(
        codes_BGL=torch.full(shape, -1, dtype=torch.int64),
        items_BG=torch.full(shape[:2], -1, dtype=torch.int64),
        log_probs_BGL=torch.zeros(shape),
        trie_log_probs_BGL=torch.zeros(shape),
        drawn_log_probs_BGL=torch.zeros(shape),
    )
    if not shape[1]:
        return samples
    args = (model, trie, level_offsets, prompts, pad_token_id, [exclusion], token_budget)
    with decoding_mode(model):
        for rows_B, walk, (guide,) in guided_walks(*args, num_answers=shape[1], full=full_vocabulary):
            codes, items, full, renormalised, drawn = _sample(
                walk, guide, uniforms_BGL[rows_B], temperature, top_p
            )
            samples.codes_BGL[rows_B] = codes.cpu()
            samples.items_BG[rows_B] = items.cpu()
            samples.log_probs_BGL[rows_B] = full.cpu()
            samples.trie_log_probs_BGL[rows_B] = renormalised.cpu()
            samples.drawn_log_probs_BGL[rows_B] = drawn.cpu()
    return samples


def require_temperature(temperature: float) -> None:
    """Refuse what no distribution has.

    Raises:
        ValueError: not positive and finite.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")


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
    walk: TreeWalk, guide: Guide, uniforms_BGL: torch.Tensor, temperature: float, top_p: float
) -> tuple[torch.Tensor, ...]:
    """Codes (B, G, L), items (B, G), full-vocabulary, trie and drawn log-probabilities (B, G, L)."""
    num_levels, uniforms_BGL = guide.trie.num_levels, uniforms_BGL.to(walk.device)
    batch_B1 = torch.arange(len(uniforms_BGL), device=walk.device)[:, None]
    nodes_BG = slots_BG = torch.zeros(uniforms_BGL.shape[:2], dtype=torch.int64, device=walk.device)
    nodes_BS = nodes_BG[:, :1]
    codes, log_probs, trie_log_probs, drawn_log_probs = [], [], [], []
    for level in range(num_levels):
        scores = guide.scores(level, walk.logits_BSV, temperature)
        codes_BSD, open_BSD = guide.choices(level, nodes_BS)
        every_BS = torch.arange(nodes_BS.shape[1], device=walk.device).expand_as(nodes_BS)
        full_BSD = scores.of(every_BS, codes_BSD)
        trie_BSD = full_BSD.masked_fill(~open_BSD, -torch.inf).log_softmax(dim=-1)
        drawn_BSD = nucleus(trie_BSD, top_p)
        picks = batch_B1, slots_BG, _draw(drawn_BSD, slots_BG, uniforms_BGL[..., level])
        codes_BG = codes_BSD[picks]
        codes.append(codes_BG)
        log_probs.append(scores.known(full_BSD[picks]))
        trie_log_probs.append(trie_BSD[picks])
        drawn_log_probs.append(drawn_BSD[picks])
        nodes_BG = guide.trie.find(level, nodes_BG, codes_BG)
        if level + 1 < num_levels:
            members_BS, slots_BG = grow_distinct(walk, guide, level, slots_BG, codes_BG)
            nodes_BS = nodes_BG.gather(1, members_BS)
    return (
        torch.stack(codes, dim=-1),
        guide.trie.items(nodes_BG),
        torch.stack(log_probs, dim=-1),
        torch.stack(trie_log_probs, dim=-1),
        torch.stack(drawn_log_probs, dim=-1),
    )


def nucleus(log_probs_BSD: torch.Tensor, top_p: float) -> torch.Tensor:
    """Log-probs renormalised over the smallest set of codes whose mass reaches `top_p`, -inf outside it.

    Holtzman et al., arXiv 1904.09751. The most probable code is always in; equal codes join in code order.
    """
    if top_p >= 1:
        return log_probs_BSD
    sorted_BSD, order_BSD = log_probs_BSD.sort(dim=-1, descending=True, stable=True)
    probs_BSD = sorted_BSD.double().exp()
    outside_BSD = probs_BSD.cumsum(dim=-1) - probs_BSD >= top_p
    outside_BSD = torch.empty_like(outside_BSD).scatter_(-1, order_BSD, outside_BSD)
    return log_probs_BSD.masked_fill(outside_BSD, -torch.inf).log_softmax(dim=-1)


def _draw(log_probs_BSD: torch.Tensor, slots_BG: torch.Tensor, uniforms_BG: torch.Tensor) -> torch.Tensor:
    """Inverse CDF in float64: place of the first possible code whose cumulated probability exceeds it."""
    probs_BSD = log_probs_BSD.double().exp()
    # 0 exceeds no uniform: a code of probability 0 stays out, whatever a parallel sum rounds to.
    cdf_BSD = probs_BSD.cumsum(dim=-1).masked_fill(probs_BSD == 0, 0)
    total_BS1 = cdf_BSD.amax(dim=-1, keepdim=True)
    if not bool((total_BS1 > 0).all()):
        raise ValueError("the model gave logits that are not finite")
    index_BG1 = slots_BG[..., None]
    # A float64 below 1 times the total rounds to less than the total, so some code always exceeds.
    reached_BG1 = uniforms_BG[..., None] * total_BS1.gather(1, index_BG1)
    exceeds_BGD = cdf_BSD.gather(1, index_BG1.expand(-1, -1, cdf_BSD.shape[-1])) > reached_BG1
    return exceeds_BGD.byte().argmax(dim=-1)
