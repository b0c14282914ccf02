"""Where the kept rows of a step go: PPO mini-batches, and their order over ranks.

Pure functions over row numbers; a *row* is a rollout of the step, a *group* the rollouts of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from recast_cli.core.contrast import Selection


def kept_rows(selection: Selection, rows_BG: np.ndarray, *, contrast: bool) -> dict[int, list[int]]:
    """Row numbers that each group keeps, by group number, in ascending order of groups.

    Args:
        rows_BG: Row number of each rollout, -1 where one is missing.
        contrast: Keep i+ and i- of the groups that have both; else every rollout of every group.
    """
    if not contrast:
        return {b: rows_G[rows_G >= 0].tolist() for b, rows_G in enumerate(rows_BG)}
    return {
        b: [int(rows_BG[b, selection.positive_B[b]]), int(rows_BG[b, selection.negative_B[b]])]
        for b in np.flatnonzero(selection.trainable_B).tolist()
    }


def minibatch_order(
    counts: Mapping[int, int], num_groups: int, minibatch_prompts: int, width: int, dp_size: int
) -> tuple[list[int], int]:
    """Where each kept row goes, so that every PPO mini-batch holds the rows of its own prompts.

    Prompts are cut into mini-batches first; inside one, skipped and ragged groups leave holes that masked
    padding rows fill, those of a ragged group right behind it. Rows are laid out rank-major: the dispatcher
    gives rank k the k-th contiguous block, whose i-th slice is its share of mini-batch i. So every group is
    on one rank.

    Args:
        counts: Rows that each group kept, by group number (0..num_groups-1, ascending).
        num_groups: Prompts of the step.
        minibatch_prompts: Prompts of a PPO mini-batch.
        width: Most rows that a group keeps.
        dp_size: Data-parallel ranks.

    Returns:
        A permutation of the kept rows (numbered group by group) followed by the padding rows, and how many
        padding rows it counts on.
    """
    num_minibatches = math.ceil(num_groups / minibatch_prompts)
    size = minibatch_prompts * width
    if minibatch_prompts % dp_size:
        raise ValueError(
            f"a mini-batch has {minibatch_prompts} prompts, which {dp_size} data-parallel ranks "
            f"cannot share: set actor.ppo_mini_batch_size to a multiple of {dp_size}"
        )
    widest = max(counts.values(), default=0)
    if widest > width:
        raise ValueError(f"a group has {widest} rows, rollout.n is {width}: agent loops must return one each")
    slots: list[list[int]] = [[] for _ in range(num_minibatches)]
    total, next_padding = 0, sum(counts.values())
    for group, count in counts.items():
        missing = width - count
        padding = range(next_padding, next_padding + missing)
        slots[group // minibatch_prompts] += [*range(total, total + count), *padding]
        total, next_padding = total + count, next_padding + missing
    used = [rows for rows in slots if rows]  # a mini-batch without any signal is no update at all
    for rows in used:
        missing = size - len(rows)
        rows += range(next_padding, next_padding + missing)
        next_padding += missing
    share = size // dp_size
    order = [
        row for rank in range(dp_size) for rows in used for row in rows[rank * share : (rank + 1) * share]
    ]
    return order, next_padding - total
