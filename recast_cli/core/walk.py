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
from typing import Any

import torch

from recast_cli.core.output_head import chosen, only_columns
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


def _num_common(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, as far as reading them once for all is worth a call of its own."""
    # In order of their tokens the first and the last are the most unlike.
    first, last = min(map(list, prompts)), max(map(list, prompts))
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


def budget_of(device: str, chosen: int | None = None) -> int:
    """Most tokens of a micro-batch: what was chosen, or what suits a kind of device."""
    return chosen or TOKEN_BUDGET.get(device, TOKEN_BUDGET["cpu"])


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
