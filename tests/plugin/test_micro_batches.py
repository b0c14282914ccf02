"""Micro-batches of padded rows: the least cost, inside the limit, and verl puts the results back in order."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import run_fresh
from hypothesis import given
from hypothesis import strategies as st
from verl.utils import tensordict_utils as tu
from verl.workers.engine.utils import postprocess_batch_func

from verl_recast.platform.micro_batches import by_length, prepare, rows_of


def cost(lengths: list[list[int]], call_tokens: int) -> int:
    return sum(len(part) * max(part) + call_tokens for part in lengths)


def cheapest(lengths: list[int], max_tokens: int, call_tokens: int) -> int:
    """Every way to cut the rows, longest first, into runs: slow and plain."""
    lengths, best = sorted(lengths, reverse=True), None
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        parts = [[lengths[0]]]
        for cut, length in zip(cuts, lengths[1:], strict=True):
            if cut:
                parts.append([length])
            else:
                parts[-1].append(length)
        if all(len(part) * part[0] <= max_tokens for part in parts):
            found = cost(parts, call_tokens)
            best = found if best is None else min(best, found)
    assert best is not None
    return best


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=9),
    st.integers(0, 30),
    st.integers(12, 60),
)
def test_every_row_once_inside_the_limit_at_the_least_cost(
    lengths: list[int], call_tokens: int, max_tokens: int
) -> None:
    parts = by_length(np.array(lengths), max_tokens, call_tokens)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    found = [[lengths[row] for row in part] for part in parts]
    assert all(len(part) * max(part) <= max_tokens for part in found)
    if (
        len(lengths) * max(lengths) <= max_tokens
    ):  # where the limit does not bind the cuts are the best there are
        assert cost(found, call_tokens) == cheapest(lengths, max_tokens, call_tokens)


def test_cuts_by_hand() -> None:
    # Two rows of 100 and two of 10. One call: 4 x 100 + 50 = 450; two: 2 x 100 + 50 + 2 x 10 + 50 = 320.
    assert [part.tolist() for part in by_length(np.array([10, 100, 10, 100]), 1000, 50)] == [[1, 3], [0, 2]]
    # A call that costs 200 is worth 180 tokens of padding.
    assert [part.tolist() for part in by_length(np.array([10, 100, 10, 100]), 1000, 200)] == [[1, 3, 0, 2]]
    # At most 3 rows of 100 in 300 tokens: 4 rows make two calls of two.
    assert [len(part) for part in by_length(np.full(4, 100), 300, 50)] == [2, 2]


def test_row_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 101 tokens, needs max_tokens of at least that"):
        by_length(np.array([5, 101]), 100)


def test_results_come_back_in_the_order_of_the_rows() -> None:
    rows = [torch.arange(length) + 100 * i for i, length in enumerate([3, 9, 3, 5, 9, 1])]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    data = tu.get_tensordict(
        {"input_ids": nested}, non_tensor_dict={"use_dynamic_bsz": True, "max_token_len_per_gpu": 18}
    )
    batches, indices = prepare(data)
    assert len(batches) > 1 and indices is not None
    output = [{"model_output": {"doubled": batch["input_ids"] * 2}} for batch in batches]
    restored = postprocess_batch_func(output, indices, data)["model_output"]["doubled"]
    assert [row.tolist() for row in restored.unbind()] == [(row * 2).tolist() for row in rows]


def test_columns_of_every_kind_follow_their_rows() -> None:
    jagged = torch.nested.as_nested_tensor([torch.arange(n) + n for n in (2, 6, 2)], layout=torch.jagged)
    data = tu.get_tensordict(
        {"input_ids": jagged, "dense": torch.tensor([[10], [11], [12]]), "uid": ["a", "b", "c"]},
        non_tensor_dict={"use_dynamic_bsz": True, "max_token_len_per_gpu": 6, "temperature": 0.5},
    )
    batches, indices = prepare(data)
    assert indices == [[1], [0, 2]]
    assert [batch["dense"].tolist() for batch in batches] == [[[11]], [[10], [12]]]
    assert [list(batch["uid"]) for batch in batches] == [["b"], ["a", "c"]]
    assert [batch["temperature"] for batch in batches] == [0.5, 0.5]
    assert [row.tolist() for row in batches[1]["input_ids"].unbind()] == [[2, 3], [2, 3]]


@pytest.mark.parametrize("ragged_idx", [1, 2])
def test_rows_of_a_jagged_column_are_those_that_verl_takes(ragged_idx: int) -> None:
    """verl takes them apart row by row and joins them; a multi-modal model has positions jagged in dim 2."""
    sizes, parts = [2, 5, 1, 3], [np.array([3, 0, 3]), np.array([2])]
    each = [torch.arange(3 * n).view((3, n) if ragged_idx == 2 else (3 * n,)) + 100 * n for n in sizes]
    column = tu.nested_tensor_from_tensor_list(each, ragged_idx=ragged_idx)
    for rows, found in zip(parts, rows_of(column, parts), strict=True):
        assert found._ragged_idx == ragged_idx
        assert [row.tolist() for row in found.unbind()] == [each[row].tolist() for row in rows]


def test_rows_of_a_jagged_column_pad_to_their_own_longest() -> None:
    column = torch.nested.as_nested_tensor([torch.full((n,), n) for n in (4, 2, 1)], layout=torch.jagged)
    (found,) = rows_of(column, [np.array([2, 1])])
    assert found.to_padded_tensor(0).tolist() == [[1, 0], [2, 2]]


def _rank(rank: int, folder: str, lengths: list[list[int]]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(lengths)
    )
    rows = [torch.arange(length) for length in lengths[rank]]
    data = tu.get_tensordict(
        {"input_ids": torch.nested.as_nested_tensor(rows, layout=torch.jagged)},
        non_tensor_dict={"use_dynamic_bsz": True, "max_token_len_per_gpu": 300},
    )
    try:
        _, indices = prepare(data, torch.distributed.group.WORLD)
        found = str(sorted(len(part) for part in indices or []))
    except ValueError as exc:
        found = str(exc)
    Path(folder, str(rank)).write_text(found)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        # 3 rows of 300 need three calls; the other rank splits its 5 short rows into as many.
        ([[300, 300, 300], [4, 4, 4, 4, 4]], ["[1, 1, 1]", "[1, 2, 2]"]),
        # 2 rows cannot be split in three, and both ranks must learn of it.
        ([[300, 300, 300], [4, 4]], ["a rank has 2 rows, needs at least 3, one for each micro-batch"] * 2),
    ],
)
def test_every_rank_makes_as_many_calls(tmp_path: Path, lengths: list[list[int]], found: list[str]) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path), lengths), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == found


def test_fixed_micro_batches_stay_verls() -> None:
    nested = torch.nested.as_nested_tensor([torch.arange(n) for n in (3, 9, 3, 5)], layout=torch.jagged)
    data = tu.get_tensordict(
        {"input_ids": nested}, non_tensor_dict={"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2}
    )
    batches, indices = prepare(data)
    assert indices is None
    assert [b["input_ids"].offsets().diff().tolist() for b in batches] == [[3, 9], [3, 5]]


def test_the_cpu_engine_uses_them_and_another_platform_does_not() -> None:
    program = """
import json, sys
import verl.workers.engine
from verl.workers.engine.fsdp import transformer_impl
json.dump(transformer_impl.prepare_micro_batches.__module__, open(sys.argv[1], "w"))
"""
    assert run_fresh(program, VERL_PLATFORM="cpu")[0] == "verl_recast.platform.micro_batches"
    assert run_fresh(program)[0] == "verl.workers.engine.utils"
