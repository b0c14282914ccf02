"""Next-token logits of many short answers to each prompt, from one reading of the prompt.

A walk over a tree: the prompts of a micro-batch are read once, what all of them begin with once for all of
them; then, level by level, the partial answers of a prompt are fed as tokens of the prompt's own row, all at
one position, under a mask that lets each see the prompt and its own ancestors only. The prompt's keys and
values are never copied per answer, and the output head gives the columns that somebody asks for.

Works with any Hugging Face style causal LM that has full attention, and takes positions and a mask per token
(sdpa, eager); walkable.py refuses the others.

Shapes: B prompts, P prompt tokens (left-padded), S slots (partial answers of one prompt), A answer tokens in
the cache, L levels, K codes of a level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from recast_cli.core.exclusion import Exclusion
from recast_cli.core.output_head import chosen, only_columns
from recast_cli.core.trie import Trie
from recast_cli.core.walkable import attention_of, require_walkable, require_whole_cache

# Most tokens of a micro-batch, padded prompts plus answers; a CPU is fastest while they stay in its caches.
TOKEN_BUDGET = {"cpu": 6144, "cuda": 65536}
# Reading apart what prompts have in common must save so many tokens: about what a call costs.
LEAST_SAVED = 512


class TreeWalk:
    """Prompts of one micro-batch and the answers grown under them; call it inside `decoding_mode`.

    Attributes:
        logits_BSV: Next-token logits of each slot, as the model gives them, in the columns that were asked
            for; at first the slot is the prompt.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        pad_token_id: int,
        *,
        columns: slice | None = None,
    ) -> None:
        """Read the prompts.

        Args:
            columns: Token ids whose logits are wanted; None: all.

        Raises:
            ValueError: the model has sliding-window attention, or keeps no cache.
        """
        parameter = next(model.parameters())
        self.model, self.device, self.dtype = model, parameter.device, parameter.dtype
        num_common = _num_common(prompts)
        longest = max(len(prompt) for prompt in prompts) - num_common
        pads = [[pad_token_id] * (longest + num_common - len(prompt)) for prompt in prompts]
        ids_BP = torch.tensor(
            [pad + list(prompt[num_common:]) for pad, prompt in zip(pads, prompts, strict=True)]
        )
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)
        positions_BP = torch.arange(longest, device=self.device) + lengths_B1 - longest
        common_BP = torch.ones(len(prompts), num_common, dtype=torch.bool, device=self.device)
        self.is_token_BP = torch.cat([common_BP, positions_BP >= num_common], dim=1)
        self.next_position_B1 = lengths_B1
        self.ancestors_BSA = self.is_token_BP.new_zeros(len(prompts), 1, 0)
        with only_columns(model, columns):
            output = model(
                input_ids=ids_BP.to(self.device),
                attention_mask=self.is_token_BP.long(),
                position_ids=positions_BP.clamp(min=0),
                past_key_values=self._read_common(prompts[0][:num_common], len(prompts)),
                use_cache=True,
                logits_to_keep=1,
            )
        self.logits_BSV, self.cache = chosen(output.logits[:, -1:], columns), output.past_key_values
        require_whole_cache(self.cache)
        self._read = self.logits_BSV, self.ancestors_BSA, self.next_position_B1

    def _read_common(self, tokens: Sequence[int], num_prompts: int) -> Any:
        """Keys and values of what all prompts begin with, read once and repeated; None of nothing."""
        if not tokens:
            return None
        ids = torch.tensor([list(tokens)], device=self.device)
        cache = self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        require_whole_cache(cache)
        cache.batch_repeat_interleave(num_prompts)
        return cache

    def rewind(self) -> None:
        """Forget the answers and stand at the prompts again, which need not be read twice."""
        self.cache.crop(self.is_token_BP.shape[1])
        self.logits_BSV, self.ancestors_BSA, self.next_position_B1 = self._read

    def grow(
        self, tokens_BS: torch.Tensor, parents_BS: torch.Tensor, *, columns: slice | None = None
    ) -> None:
        """Feed one token per new slot, each below a slot of the last round; `logits_BSV` are then theirs."""
        num_prompts, num_slots = tokens_BS.shape
        parents = parents_BS[..., None].expand(-1, -1, self.ancestors_BSA.shape[2])
        itself = torch.eye(num_slots, dtype=torch.bool, device=self.device).expand(num_prompts, -1, -1)
        self.ancestors_BSA = torch.cat([self.ancestors_BSA.gather(1, parents), itself], dim=2)
        prompt = self.is_token_BP[:, None].expand(-1, num_slots, -1)
        visible = torch.cat([prompt, self.ancestors_BSA], dim=2)[:, None]
        with only_columns(self.model, columns):
            output = self.model(
                input_ids=tokens_BS,
                attention_mask=visible if attention_of(self.model) == "sdpa" else self._added(visible),
                position_ids=self.next_position_B1.expand(-1, num_slots),
                past_key_values=self.cache,
                use_cache=True,
            )
        self.logits_BSV, self.cache = chosen(output.logits, columns), output.past_key_values
        self.next_position_B1 = self.next_position_B1 + 1

    def _added(self, visible: torch.Tensor) -> torch.Tensor:
        """Mask to be added, as eager attention does: a bool one would hide nothing there."""
        zeros = torch.zeros_like(visible, dtype=self.dtype)
        return zeros.masked_fill_(~visible, torch.finfo(self.dtype).min)


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
    token_budget = token_budget or TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cpu"])
    _require_codes(model, trie, offsets)
    trie = trie.to(device)
    exclusions = [exclusion and exclusion.to(device) for exclusion in exclusions]
    columns = None if full else _codes_of(0, trie, offsets)
    for rows_B in micro_batches(prompts, num_answers * (trie.num_levels - 1), token_budget):
        walk = TreeWalk(model, [prompts[row] for row in rows_B.tolist()], pad_token_id, columns=columns)
        rows_there = rows_B.to(device)
        yield rows_B, walk, [Guide(trie, offsets, exclusion, rows_there, full) for exclusion in exclusions]


def _codes_of(level: int, trie: Trie, offsets: Sequence[int]) -> slice:
    return slice(offsets[level], offsets[level] + trie.codebook_sizes[level])


def _require_codes(model: Any, trie: Trie, offsets: Sequence[int]) -> None:
    """Refuse codes that the model has no token for."""
    head = model.get_output_embeddings()
    vocabulary = len(head.weight)
    last = max(_codes_of(level, trie, offsets).stop for level in range(trie.num_levels)) - 1
    if min(offsets) < 0 or last >= vocabulary:
        raise ValueError(f"codes use token ids {min(offsets)}..{last} of {vocabulary}")


def _num_common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, as far as reading them once for all is worth a call of its own."""
    first, last = (
        min(map(list, prompts)),
        max(map(list, prompts)),
    )  # in order of their tokens: the most unlike
    most = min(map(len, prompts)) - 1  # each keeps its last token, whose logits are wanted
    num = next((place for place in range(most) if first[place] != last[place]), most)
    return num if num * (len(prompts) - 1) >= LEAST_SAVED else 0


@contextmanager
def decoding_mode(model: Any) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode is restored.

    Raises:
        ValueError: a model that no tree can be walked in, see walkable.py.
    """
    require_walkable(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def micro_batches(
    prompts: Sequence[Sequence[int]], num_answer_tokens: int, token_budget: int
) -> list[torch.Tensor]:
    """Rows of each micro-batch: prompts of like length together, so that little is padding.

    Args:
        prompts: Lists of token ids.
        num_answer_tokens: Tokens that all answers of one prompt will feed.
        token_budget: Most tokens of a micro-batch, padding and answers counted; one prompt is the least.

    Raises:
        ValueError: an empty prompt.
    """
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} is empty")
    batches: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lengths.__getitem__):  # ascending: the newest is the longest
        if not batches or (len(batches[-1]) + 1) * (lengths[row] + num_answer_tokens) > token_budget:
            batches.append([])
        batches[-1].append(row)
    return [torch.tensor(batch) for batch in batches]


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
