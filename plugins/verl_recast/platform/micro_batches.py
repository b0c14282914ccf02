"""Micro-batches for an engine that pads: rows of like length together.

verl balances the real tokens of its dynamic micro-batches, so each mixes long rows with short ones. That
is right where rows are packed without padding, on a GPU. The CPU has no variable-length attention kernel,
every micro-batch is padded to its longest row, and about half of the work would be padding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch.nested import nested_tensor_from_jagged
from verl.utils import tensordict_utils as tu
from verl.workers.engine import utils

from recast_cli.core.runs import runs

# What one more forward and backward call costs beside its tokens, as tokens of a 1 M parameter model (about
# 10 ms of dispatch on two cores). Larger models weigh it less, and want fewer tokens per call anyway.
CALL_TOKENS = 256


def by_length(lengths_N: np.ndarray, max_tokens: int, call_tokens: int = CALL_TOKENS) -> list[np.ndarray]:
    """Split rows into micro-batches of like length with few padded tokens and calls.

    Rows are taken longest first; the cuts between lengths minimise the sum of `rows * longest + call_tokens`
    over the micro-batches (dynamic programme over the distinct lengths; the least there is where `max_tokens`
    does not bind, else each piece is split evenly).

    Args:
        lengths_N: Tokens of each row.
        max_tokens: Most tokens of a micro-batch, padding included.

    Returns:
        Row numbers of each micro-batch; every row is in exactly one.

    Raises:
        ValueError: a row is longer than `max_tokens`.
    """
    if int(lengths_N.max()) > max_tokens:
        raise ValueError(f"a row of {int(lengths_N.max())} tokens, needs max_tokens of at least that")
    order = np.argsort(-lengths_N, kind="stable")
    longest_U, first_U = np.unique(-lengths_N[order], return_index=True)
    longest_U = -longest_U
    ends_U = np.append(first_U[1:], len(order))
    rows_per_call_U = max_tokens // longest_U
    # best[j]: least cost of the rows of the j longest lengths; start[j]: where their last micro-batch begins.
    best, start = np.zeros(len(longest_U) + 1), np.zeros(len(longest_U) + 1, dtype=np.int64)
    for j in range(1, len(longest_U) + 1):
        rows = ends_U[j - 1] - first_U[:j]
        calls = -(-rows // rows_per_call_U[:j])
        cost = best[:j] + rows * longest_U[:j] + calls * call_tokens
        start[j] = int(cost.argmin())
        best[j] = cost[start[j]]
    parts: list[np.ndarray] = []
    j = len(longest_U)
    while j > 0:
        i = int(start[j])
        rows = order[first_U[i] : ends_U[j - 1]]
        parts = np.array_split(rows, -(-len(rows) // rows_per_call_U[i])) + parts
        j = i
    return parts


def prepare(data: TensorDict, dp_group: Any = None, **_: Any) -> tuple[list[Any], list[list[int]] | None]:
    """`verl.workers.engine.utils.prepare_micro_batches` for padded rows; same arguments and result."""
    if not tu.get_non_tensor_data(data=data, key="use_dynamic_bsz", default=True):
        return utils.prepare_micro_batches(data, dp_group)
    lengths = data["input_ids"].offsets().diff().numpy()
    return take(data, by_length(lengths, int(data["max_token_len_per_gpu"])), dp_group)


def take(
    data: TensorDict, parts: list[np.ndarray], dp_group: Any
) -> tuple[list[TensorDict], list[list[int]]]:
    """Micro-batches of the rows in each part, as many on every rank; what verl expects of them.

    Returns:
        The micro-batches, and the row numbers of each.
    """
    parts = _equal_count(parts, dp_group)
    return _select(data, parts), [rows.tolist() for rows in parts]


def _select(data: TensorDict, parts: list[np.ndarray]) -> list[TensorDict]:
    """Rows of a batch, part by part."""
    jagged = {
        name: rows_of(column, parts)
        for name, column in data.items()
        if isinstance(column, torch.Tensor) and column.is_nested
    }
    rest = data.exclude(*jagged)
    selected = []
    for number, rows in enumerate(parts):
        part = tu.index_select_tensor_dict(rest, torch.from_numpy(rows))
        for name, pieces in jagged.items():
            part[name] = pieces[number]
        # It says where it is, so that the engine does not move it there column by column, string by string.
        selected.append(part.auto_device_())
    return selected


def rows_of(column: Any, parts: list[np.ndarray]) -> list[Any]:
    """Rows of a contiguous jagged tensor, part by part, as jagged tensors.

    To take it apart into a tensor a row and join some of them again costs more than a forward pass where
    prompts are shared (docs/log.md).
    """
    values, offsets_B, dim = column.values(), column.offsets().cpu().numpy(), column._ragged_idx - 1
    assert column.lengths() is None and offsets_B[-1] == values.shape[dim], "the tensor has holes"
    sizes_B, pieces = np.diff(offsets_B), []
    for rows in parts:
        sizes = sizes_B[rows]
        found = runs(offsets_B[rows], sizes), np.append(0, sizes.cumsum())
        places, offsets = (torch.from_numpy(array).to(values.device) for array in found)
        # Of a tensor that does not know its longest row, torch pads every row to the length of them all.
        piece = nested_tensor_from_jagged(
            values.index_select(dim, places),
            offsets,
            jagged_dim=dim + 1,
            min_seqlen=int(sizes.min()),
            max_seqlen=int(sizes.max()),
        )
        pieces.append(piece)
    return pieces


def _equal_count(parts: list[np.ndarray], dp_group: Any) -> list[np.ndarray]:
    """The same number of micro-batches on every rank: sharded ranks meet in each forward call."""
    if dp_group is None or torch.distributed.get_world_size(dp_group) == 1:
        return parts
    # Every rank learns of the smallest one: an error must reach all of them, or the others wait for ever.
    extremes = torch.tensor([len(parts), -sum(map(len, parts))])
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=dp_group)
    count, fewest_rows = int(extremes[0]), -int(extremes[1])
    if count > fewest_rows:
        raise ValueError(f"a rank has {fewest_rows} rows, needs at least {count}, one for each micro-batch")
    while len(parts) < count:
        widest = max(range(len(parts)), key=lambda k: len(parts[k]))
        parts[widest : widest + 1] = np.array_split(parts[widest], 2)
    return parts
