"""Beam groups from an engine that only samples: successive expansions, one request for each live beam.

vLLM's own beam search stands above the engine and knows no catalogue. Here a beam is a prompt that breaks off
inside a semantic ID; a request for one token, with the log-probs of the trie's children and no other, expands
it. The prompt itself is read once, where the engine caches prefixes.

Shapes: B prompts, W beams, L levels.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from recast_cli.core.sampling import Rollouts
from recast_cli.core.trie import Trie

MAX_LOGPROB_TOKENS = 128  # of one request (vLLM 0.24 to 0.28)


class Request(NamedTuple):
    """One question to the engine.

    Attributes:
        prompt: Token ids, with the codes that the beam has already.
        num_given: How many of them are those codes.
        tokens: Next tokens whose full-vocabulary log-probs are asked for.
    """

    prompt: list[int]
    num_given: int
    tokens: list[int]


Ask = Callable[[list[Request]], Awaitable[list[list[float]]]]  # a list of log-probs for each request


class _Beam(NamedTuple):
    score: np.float32
    node: int
    codes: tuple[int, ...]
    log_probs: tuple[float, ...]
    trie_log_probs: tuple[float, ...]


async def expand_beams(
    ask: Ask, trie: Trie, level_offsets: Sequence[int], prompts: Sequence[Sequence[int]], beam_width: int
) -> Rollouts:
    """What `beam_group` finds, in its order, with its order of equal ones.

    Args:
        ask: The engine; its log-probs are those before the mask, at temperature 1.
        trie: The catalogue, on the CPU.
        level_offsets: Token id of code 0 of each level.
        prompts: Token ids, after which the first code comes next.
        beam_width: W.
    """
    leaf_item = trie.leaf_item.tolist()
    fronts = [[_Beam(np.float32(0), 0, (), (), ())] for _ in prompts]
    for level in range(trie.num_levels):
        asked = list(_requests(trie, level_offsets, prompts, fronts, level))
        log_probs = await ask([request for _, _, request in asked])
        children: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for (b, w, request), found in zip(asked, log_probs, strict=True):
            children.setdefault((b, w), []).extend(zip(request.tokens, found, strict=True))
        grown: list[list[_Beam]] = [[] for _ in prompts]
        for (b, w), scored in children.items():
            grown[b] += _grow(fronts[b][w], scored, trie.ptr[level], level_offsets[level])
        is_last = level + 1 == trie.num_levels
        fronts = [
            sorted(beams, key=lambda beam: (-beam.score, leaf_item[beam.node] if is_last else beam.node))
            for beams in grown
        ]
        fronts = [beams[:beam_width] for beams in fronts]
    return _packed(fronts, leaf_item, trie.num_levels, beam_width)


def _grow(beam: _Beam, scored: list[tuple[int, float]], ptr: torch.Tensor, offset: int) -> Iterator[_Beam]:
    """A beam for each child; `scored` holds tokens and full-vocabulary log-probs of all of them."""
    total = np.logaddexp.reduce([log_prob for _, log_prob in scored])
    for lane, (token, log_prob) in enumerate(scored):
        yield _Beam(
            beam.score + np.float32(log_prob),
            int(ptr[beam.node]) + lane,
            (*beam.codes, token - offset),
            (*beam.log_probs, log_prob),
            (*beam.trie_log_probs, log_prob - float(total)),
        )


def _requests(
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    fronts: list[list[_Beam]],
    level: int,
) -> Iterator[tuple[int, int, Request]]:
    """Prompt number and beam number of each request, for all children of each live beam."""
    ptr, codes = trie.ptr[level].tolist(), trie.codes[level]
    for b, beams in enumerate(fronts):
        for w, beam in enumerate(beams):
            written = [offset + code for offset, code in zip(level_offsets, beam.codes, strict=False)]
            for first in range(ptr[beam.node], ptr[beam.node + 1], MAX_LOGPROB_TOKENS):
                end = min(first + MAX_LOGPROB_TOKENS, ptr[beam.node + 1])
                children = (codes[first:end].long() + level_offsets[level]).tolist()
                yield b, w, Request([*prompts[b], *written], level, children)


def _packed(fronts: list[list[_Beam]], leaf_item: list[int], num_levels: int, beam_width: int) -> Rollouts:
    shape = len(fronts), beam_width
    group = Rollouts(
        codes_BGL=torch.full((*shape, num_levels), -1, dtype=torch.int64),
        items_BG=torch.full(shape, -1, dtype=torch.int64),
        log_probs_BGL=torch.full((*shape, num_levels), torch.nan),
        trie_log_probs_BGL=torch.full((*shape, num_levels), torch.nan),
    )
    for b, front in enumerate(fronts):
        for w, beam in enumerate(front):
            group.codes_BGL[b, w] = torch.tensor(beam.codes)
            group.items_BG[b, w] = leaf_item[beam.node]
            group.log_probs_BGL[b, w] = torch.tensor(beam.log_probs)
            group.trie_log_probs_BGL[b, w] = torch.tensor(beam.trie_log_probs)
    return group
