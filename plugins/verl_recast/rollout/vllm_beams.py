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

from recast_cli.core.beam_search import Beams
from recast_cli.core.trie import Trie

MAX_LOGPROB_TOKENS = 128  # of one request (vLLM 0.24 to 0.28)

# Prompts with the tokens whose full-vocabulary log-probs are asked for, to one list of log-probs each.
Ask = Callable[[list[tuple[list[int], list[int]]]], Awaitable[list[list[float]]]]


class _Beam(NamedTuple):
    score: np.float32
    node: int
    codes: tuple[int, ...]


async def expand_beams(
    ask: Ask, trie: Trie, level_offsets: Sequence[int], prompts: Sequence[Sequence[int]], beam_width: int
) -> Beams:
    """What `beam_search` finds, with its scores and its order of equal ones.

    Args:
        ask: The engine; its log-probs are those before the mask, at temperature 1.
        trie: The catalogue, on the CPU.
        level_offsets: Token id of code 0 of each level.
        prompts: Token ids; each ends with `<|sid_begin|>`.
        beam_width: W.
    """
    leaf_item = trie.leaf_item.tolist()
    fronts = [[_Beam(np.float32(0), 0, ())] for _ in prompts]
    for level in range(trie.num_levels):
        grown: list[list[_Beam]] = [[] for _ in prompts]
        asked = list(_requests(trie, level_offsets, prompts, fronts, level))
        log_probs = await ask([(request, tokens) for _, _, _, request, tokens in asked])
        for (b, beam, first, _, tokens), found in zip(asked, log_probs, strict=True):
            for lane, (token, log_prob) in enumerate(zip(tokens, found, strict=True)):
                codes = (*beam.codes, token - level_offsets[level])
                grown[b].append(_Beam(beam.score + np.float32(log_prob), first + lane, codes))
        is_last = level + 1 == trie.num_levels
        fronts = [
            sorted(beams, key=lambda beam: (-beam.score, leaf_item[beam.node] if is_last else beam.node))
            for beams in grown
        ]
        fronts = [beams[:beam_width] for beams in fronts]
    return _packed(fronts, leaf_item, trie.num_levels, beam_width)


def _requests(
    trie: Trie,
    level_offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    fronts: list[list[_Beam]],
    level: int,
) -> Iterator[tuple[int, _Beam, int, list[int], list[int]]]:
    """Prompt number, beam, first child node, tokens to read and child tokens to score of each request."""
    ptr, codes = trie.ptr[level].tolist(), trie.codes[level]
    for b, beams in enumerate(fronts):
        for beam in beams:
            written = [offset + code for offset, code in zip(level_offsets, beam.codes, strict=False)]
            for first in range(ptr[beam.node], ptr[beam.node + 1], MAX_LOGPROB_TOKENS):
                end = min(first + MAX_LOGPROB_TOKENS, ptr[beam.node + 1])
                children = (codes[first:end].long() + level_offsets[level]).tolist()
                yield b, beam, first, [*prompts[b], *written], children


def _packed(fronts: list[list[_Beam]], leaf_item: list[int], num_levels: int, beam_width: int) -> Beams:
    shape = len(fronts), beam_width
    beams = Beams(
        codes_BWL=torch.full((*shape, num_levels), -1, dtype=torch.int64),
        items_BW=torch.full(shape, -1, dtype=torch.int64),
        scores_BW=torch.full(shape, -torch.inf),
    )
    for b, front in enumerate(fronts):
        for w, beam in enumerate(front):
            beams.codes_BWL[b, w] = torch.tensor(beam.codes)
            beams.items_BW[b, w] = leaf_item[beam.node]
            beams.scores_BW[b, w] = float(beam.score)
    return beams
