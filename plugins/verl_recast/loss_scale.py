"""What verl's losses divide by when rollouts were dropped (`algorithm.recast.loss_scale`).

`seq-mean-*` losses divide by `global_batch_size`, which the trainer sends with the batch; `token-mean`
divides by tokens that the worker counts itself, and is dealt with here; `token-sum` does not divide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_recast.groups import Groups


def require_one_divisor(actor: Any, response_lengths: Sequence[int]) -> None:
    """verl's `seq-mean-token-sum-norm` divides by the width that a micro-batch happens to have.

    Args:
        actor: verl's actor config.
        response_lengths: Response tokens of each kept row.

    Raises:
        ValueError: answers of different lengths, and no `loss_scale_factor` that stands for all of them.
    """
    unset = actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None
    if unset and len(set(response_lengths)) > 1:
        raise ValueError(
            f"actor.loss_agg_mode=seq-mean-token-sum-norm got answers of {min(response_lengths)} to "
            f"{max(response_lengths)} tokens, needs one divisor for all: set actor.loss_scale_factor "
            "(data.max_response_length is usual)"
        )


def dropped_tokens(
    kept: Mapping[int, Sequence[int]], tokens_BG: np.ndarray, rows_BG: np.ndarray, minibatch_prompts: int
) -> dict[int, int]:
    """Response tokens that each PPO mini-batch lost to the drop, on the first row that it kept.

    With them added, what verl counts as the tokens of a mini-batch are those of its whole groups, and a mean
    over tokens has the scale it would have if the dropped rollouts were there with zero advantages.

    Args:
        kept: See `kept_rows`.
        tokens_BG: Response tokens of each rollout after repair, 0 where one is missing.
        rows_BG: Row number of each rollout.
        minibatch_prompts: Prompts of a PPO mini-batch.
    """
    tokens_of_row = dict(zip(rows_BG.ravel().tolist(), tokens_BG.ravel().tolist(), strict=True))
    lost: dict[int, int] = {}
    for first in range(0, len(tokens_BG), minibatch_prompts):
        groups = range(first, min(first + minibatch_prompts, len(tokens_BG)))
        rows = [row for b in groups for row in kept.get(b, ())]
        if rows:
            whole = int(tokens_BG[first : first + minibatch_prompts].sum())
            lost[rows[0]] = whole - sum(tokens_of_row[row] for row in rows)
    return lost


def count_dropped_tokens(
    batch: KVBatchMeta, groups: Groups, kept: Mapping[int, Sequence[int]], minibatch_prompts: int
) -> None:
    """Let verl's mean over tokens divide by those of the whole groups.

    verl divides policy, KL and entropy loss alike by the sum of `loss_mask` over the mini-batch and its
    ranks, and reads that column for nothing else in RL (`response_mask` says which tokens are learned). So
    one kept row of each mini-batch says how many tokens are not there.
    """
    lost = dropped_tokens(kept, groups.tokens_BG, groups.rows_BG, minibatch_prompts)
    keys = [batch.keys[row] for row in lost]
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["loss_mask"])
    masks = [mask.clone() for mask in data["loss_mask"].unbind()]
    for mask, count in zip(masks, lost.values(), strict=True):
        mask[0] += count
    nested = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
    fields = TensorDict({"loss_mask": nested}, batch_size=len(masks))
    tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields)
