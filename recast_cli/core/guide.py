"""What a catalogue says about a walk over answers: which logits are codes of a level, and which may follow.

Shapes: as in walk.py; M slots of a walk where S counts answers; D codes below a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recast_cli.core.exclusion import Exclusion
from recast_cli.core.trie import Trie
from recast_cli.core.walk import TreeWalk, budget_of, micro_batches


@dataclass(frozen=True)
class Guide:
    """What the catalogue says about a micro-batch: which logits are codes of a level, which are allowed.

    Attributes:
        trie, exclusion: The catalogue, on the model's device.
        offsets: Token id of code 0 of each level.
        rows_B: Request of each prompt.
        full: The walk's logits are those of the whole vocabulary, else of the level's codes alone.
    """

    trie: Trie
    offsets: Sequence[int]
    exclusion: Exclusion | None
    rows_B: torch.Tensor
    full: bool = True

    def columns(self, level: int) -> slice | None:
        """Token ids of the level's codes where only those are wanted; None: all."""
        return None if self.full else _codes_of(level, self.trie, self.offsets)

    def scores(self, level: int, logits_BSV: torch.Tensor, temperature: float = 1.0) -> Scores:
        """What the walk's logits say of the level's codes."""
        logits_BSV = logits_BSV.float()
        if temperature != 1:
            logits_BSV = logits_BSV / temperature
        if not self.full:
            return Scores(logits_BSV, None)
        chosen_BSK = logits_BSV[..., _codes_of(level, self.trie, self.offsets)]
        return Scores(chosen_BSK, logits_BSV.logsumexp(dim=-1, keepdim=True))

    def choices(self, level: int, nodes_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes below each node, int64 (B, S, D), and which of them may follow, bool (B, S, D)."""
        requests_R = None
        if self.exclusion is not None:
            requests_R = self.rows_B[:, None].expand_as(nodes_BS).reshape(-1)
        found = self.trie.choices(level, nodes_BS.reshape(-1), self.exclusion, requests_R)
        codes_BSD, open_BSD = (array_RD.view(*nodes_BS.shape, -1) for array_RD in found)
        return codes_BSD, open_BSD


@dataclass(frozen=True)
class Scores:
    """Of the codes of one level at each slot M of a walk.

    Attributes:
        logits_BMK: float32, at the temperature.
        total_BM1: Their log-sum-exp over the vocabulary; None where nobody knows it.
    """

    logits_BMK: torch.Tensor
    total_BM1: torch.Tensor | None

    def of(self, slots_BS: torch.Tensor, codes_BSD: torch.Tensor) -> torch.Tensor:
        """Log-probs (B, S, D) of codes after slots; without a total, up to a number for each slot."""
        batch_B1 = torch.arange(len(slots_BS), device=slots_BS.device)[:, None]
        logits_BSD = self.logits_BMK[batch_B1[..., None], slots_BS[..., None], codes_BSD]
        return logits_BSD if self.total_BM1 is None else logits_BSD - self.total_BM1[batch_B1, slots_BS]

    def known(self, log_probs: torch.Tensor) -> torch.Tensor:
        """What `of` gave, where it is a log-softmax over the vocabulary; else NaN."""
        return log_probs if self.total_BM1 is not None else torch.full_like(log_probs, torch.nan)


def guided_walks(
    model: Any,
    trie: Trie,
    offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    exclusions: Sequence[Exclusion | None],
    token_budget: int | None,
    *,
    num_answers: int,
    full: bool = True,
) -> Iterator[tuple[torch.Tensor, TreeWalk, list[Guide]]]:
    """Rows, walk and guides (one per exclusion) of each micro-batch.

    Args:
        num_answers: Most slots of a prompt.
        full: As in `Guide`.

    Raises:
        ValueError: offsets, exclusions, prompts or model that do not fit.
    """
    for exclusion in exclusions:
        if exclusion is not None and exclusion.num_requests != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts, but an exclusion for {exclusion.num_requests} requests"
            )
    if len(offsets) != trie.num_levels:
        raise ValueError(f"{len(offsets)} level offsets, but the trie has {trie.num_levels} levels")
    device = next(model.parameters()).device
    _require_codes(model, trie, offsets)
    trie = trie.to(device)
    exclusions = [exclusion and exclusion.to(device) for exclusion in exclusions]
    columns = None if full else _codes_of(0, trie, offsets)
    budget = budget_of(device.type, token_budget)
    for rows_B in micro_batches(prompts, num_answers * (trie.num_levels - 1), budget):
        walk = TreeWalk(model, [prompts[row] for row in rows_B.tolist()], pad_token_id, columns=columns)
        rows_there = rows_B.to(device)
        yield rows_B, walk, [Guide(trie, offsets, exclusion, rows_there, full) for exclusion in exclusions]


def _codes_of(level: int, trie: Trie, offsets: Sequence[int]) -> slice:
    return slice(offsets[level], offsets[level] + trie.codebook_sizes[level])


def _require_codes(model: Any, trie: Trie, offsets: Sequence[int]) -> None:
    """Refuse codes that the model has no token for."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is None:
        raise ValueError(f"{type(model).__name__} has no output head with a weight for each token")
    vocabulary = len(weight)
    last = max(_codes_of(level, trie, offsets).stop for level in range(trie.num_levels)) - 1
    if min(offsets) < 0 or last >= vocabulary:
        raise ValueError(f"codes use token ids {min(offsets)}..{last} of {vocabulary}")


def grow_distinct(
    walk: TreeWalk, guide: Guide, level: int, parents_BG: torch.Tensor, codes_BG: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed each distinct code below its parent slot once; a member of each new slot, each answer's slot."""
    # Told apart by codes, not by node: all answers that are no item would share node -1.
    members_BS, slots_BG = distinct(parents_BG * guide.trie.codebook_sizes[level] + codes_BG)
    tokens_BS = codes_BG.gather(1, members_BS) + guide.offsets[level]
    walk.grow(tokens_BS, parents_BG.gather(1, members_BS), columns=guide.columns(level + 1))
    return members_BS, slots_BG


def distinct(keys_BG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A member of each distinct key of a row (B, S), padded with the first's; the slot of each key (B, G)."""
    sorted_BG, order_BG = keys_BG.sort(dim=1)
    is_new_BG = torch.ones_like(sorted_BG, dtype=torch.bool)
    is_new_BG[:, 1:] = sorted_BG[:, 1:] != sorted_BG[:, :-1]
    rank_BG = is_new_BG.cumsum(dim=1) - 1
    slots_BG = torch.empty_like(rank_BG).scatter_(1, order_BG, rank_BG)
    members_BS = order_BG[:, :1].repeat(1, int(rank_BG[:, -1].max()) + 1)
    members_BS.scatter_(1, rank_BG, order_BG)  # equal keys are one answer: any may stand for it
    return members_BS, slots_BG
