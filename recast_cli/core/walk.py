"""Next-token logits of many short answers to each prompt, from one reading of the prompt.

A walk over a tree: the prompts of a micro-batch are read once; then, level by level, the partial answers of a
prompt are fed as tokens of the prompt's own row, all at one position, under a mask that lets each see the
prompt and its own ancestors only. The prompt's keys and values are never copied per answer.

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
from recast_cli.core.trie import Trie
from recast_cli.core.walkable import attention_of, require_walkable, require_whole_cache

TOKEN_BUDGET = 16384  # of a micro-batch: padded prompts plus answers


class TreeWalk:
    """Prompts of one micro-batch and the answers grown under them; call it inside `decoding_mode`.

    Attributes:
        logits_BSV: Next-token logits of each slot, as the model gives them; at first the slot is the prompt.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_token_id: int) -> None:
        """Read the prompts.

        Raises:
            ValueError: the model has sliding-window attention, or keeps no cache.
        """
        parameter = next(model.parameters())
        self.model, self.device, self.dtype = model, parameter.device, parameter.dtype
        longest = max(len(prompt) for prompt in prompts)
        ids_BP = torch.tensor([[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=self.device)
        positions_BP = torch.arange(longest, device=self.device) - (longest - lengths_B1)
        self.is_token_BP = positions_BP >= 0
        self.next_position_B1 = lengths_B1
        self.ancestors_BSA = self.is_token_BP.new_zeros(len(prompts), 1, 0)
        output = model(
            input_ids=ids_BP.to(self.device),
            attention_mask=self.is_token_BP.long(),
            position_ids=positions_BP.clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits_BSV, self.cache = output.logits[:, -1:], output.past_key_values
        require_whole_cache(self.cache)
        self._read = self.logits_BSV, self.ancestors_BSA, self.next_position_B1

    def rewind(self) -> None:
        """Forget the answers and stand at the prompts again, which need not be read twice."""
        self.cache.crop(self.is_token_BP.shape[1])
        self.logits_BSV, self.ancestors_BSA, self.next_position_B1 = self._read

    def grow(self, tokens_BS: torch.Tensor, parents_BS: torch.Tensor) -> None:
        """Feed one token per new slot, each below a slot of the last round; `logits_BSV` are then theirs."""
        num_prompts, num_slots = tokens_BS.shape
        parents = parents_BS[..., None].expand(-1, -1, self.ancestors_BSA.shape[2])
        itself = torch.eye(num_slots, dtype=torch.bool, device=self.device).expand(num_prompts, -1, -1)
        self.ancestors_BSA = torch.cat([self.ancestors_BSA.gather(1, parents), itself], dim=2)
        prompt = self.is_token_BP[:, None].expand(-1, num_slots, -1)
        visible = torch.cat([prompt, self.ancestors_BSA], dim=2)[:, None]
        output = self.model(
            input_ids=tokens_BS,
            attention_mask=visible if attention_of(self.model) == "sdpa" else self._added(visible),
            position_ids=self.next_position_B1.expand(-1, num_slots),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.logits_BSV, self.cache = output.logits, output.past_key_values
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
    """

    trie: Trie
    offsets: Sequence[int]
    exclusion: Exclusion | None
    rows_B: torch.Tensor

    def log_probs(self, level: int, logits_BSV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Full-vocabulary log-softmax at `temperature` of the level's codes, float32 (B, S, K)."""
        logits_BSV = logits_BSV.float() / temperature
        codes_BSK = logits_BSV[..., self.offsets[level] :][..., : self.trie.codebook_sizes[level]]
        return codes_BSK - logits_BSV.logsumexp(dim=-1, keepdim=True)

    def forbidden(self, level: int, nodes_BS: torch.Tensor) -> torch.Tensor:
        """Codes that may not follow each node, bool (B, S, K)."""
        requests_R = None
        if self.exclusion is not None:
            requests_R = self.rows_B[:, None].expand_as(nodes_BS).reshape(-1)
        mask_RK = self.trie.mask(level, nodes_BS.reshape(-1), self.exclusion, requests_R)
        return ~mask_RK.view(*nodes_BS.shape, -1)


def guided_walks(
    model: Any,
    trie: Trie,
    offsets: Sequence[int],
    prompts: Sequence[Sequence[int]],
    pad_token_id: int,
    exclusions: Sequence[Exclusion | None],
    token_budget: int,
    *,
    num_answers: int,
) -> Iterator[tuple[torch.Tensor, TreeWalk, list[Guide]]]:
    """Rows, walk and guides (one per exclusion) of each micro-batch; `num_answers`: most slots of a prompt.

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
    ends = [offset + size for offset, size in zip(offsets, trie.codebook_sizes, strict=True)]
    for rows_B in micro_batches(prompts, num_answers * (trie.num_levels - 1), token_budget):
        walk = TreeWalk(model, [prompts[row] for row in rows_B.tolist()], pad_token_id)
        vocabulary = walk.logits_BSV.shape[-1]
        if min(offsets) < 0 or max(ends) > vocabulary:
            raise ValueError(f"codes use token ids {min(offsets)}..{max(ends) - 1} of {vocabulary}")
        trie = trie.to(walk.device)
        exclusions = [exclusion and exclusion.to(walk.device) for exclusion in exclusions]
        rows_there = rows_B.to(walk.device)
        yield rows_B, walk, [Guide(trie, offsets, exclusion, rows_there) for exclusion in exclusions]


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
    walk.grow(codes_BG.gather(1, members_BS) + guide.offsets[level], parents_BG.gather(1, members_BS))
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
