"""Tracked allocations against bytes counted by hand, and what the worker writes about a call."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from verl.utils import tensordict_utils as tu

from verl_recast import measure
from verl_recast.measure import AllocationTracker, phase, phase_name, wrap
from verl_recast.shared_prompts import SHARED

KB = 1000 * 4  # 1000 float32


def test_allocations_and_frees() -> None:
    tracker = AllocationTracker()
    with tracker:
        a = torch.ones(1000)
        assert (tracker.current, tracker.peak) == (KB, KB)
        b = a * 2
        assert (tracker.current, tracker.peak) == (2 * KB, 2 * KB)
        del a
        assert (tracker.current, tracker.peak) == (KB, 2 * KB)
        view = b.view(10, 100)[2:]
        b.add_(1)
        assert tracker.current == KB, "views and in-place results take nothing"
        del b
        assert tracker.current == KB, "the view holds the storage"
        del view
        assert tracker.current == 0
        c = torch.zeros(1500, dtype=torch.float64)
        assert (tracker.current, tracker.peak) == (3 * KB, 3 * KB)
        del c
        d = torch.ones(1)
        assert (tracker.current, tracker.peak) == (4, 3 * KB)
        del d
    assert (tracker.current, tracker.peak) == (0, 3 * KB)


def test_what_was_there_before_does_not_count() -> None:
    weight, data = torch.ones(1000), torch.ones(1000)
    tracker = AllocationTracker()
    with tracker:
        first, second = weight.view(10, 100), data.view(10, 100)
        weight.mul_(2)
        assert tracker.current == 0
        del first, second


def test_the_parts_of_a_jagged_tensor_count() -> None:
    jagged = torch.nested.as_nested_tensor([torch.ones(400), torch.ones(600)], layout=torch.jagged)
    tracker = AllocationTracker()
    with tracker:
        values = jagged.values()
        assert tracker.current == 0
        double = jagged * 2
        assert tracker.current == KB, "offsets are shared"
        del values, double
    assert tracker.current == 0


def test_what_only_autograd_holds_counts_until_the_backward_pass() -> None:
    x = torch.ones(1000, requires_grad=True)
    tracker = AllocationTracker()
    with tracker:
        loss = x.exp().sin().sum()  # sin keeps the result of exp, sum keeps nothing
        assert tracker.peak == KB + KB + 4
        assert tracker.current == KB + 4
        # at most exp's result, the cosine and their gradient's product, the loss and its own gradient
        loss.backward()
        assert tracker.peak == 3 * KB + 4 + 4
        assert tracker.current == KB + 4, "x.grad and the loss"
    assert x.grad is not None


def engine() -> types.SimpleNamespace:
    """What `phase` looks at of a verl engine: 6 weights and a bias of 2, with AdamW's two moments."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return types.SimpleNamespace(module=module, optimizer=optimizer)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECAST_MEASURE", str(tmp_path / "log"))
    monkeypatch.setattr(measure, "_calls", type(measure._calls)())
    return tmp_path / "log"


def test_a_call_is_described(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECAST_MEASURE_MEMORY_FROM", "2")
    # The third row only fills up the batch: nothing in it is learned.
    ids = torch.nested.as_nested_tensor([torch.arange(n) for n in (3, 5, 128)], layout=torch.jagged)
    masks = [torch.ones(2), torch.ones(1), torch.zeros(2)]
    masks_nested = torch.nested.as_nested_tensor(masks, layout=torch.jagged)
    data = tu.get_tensordict({"input_ids": ids, "loss_mask": masks_nested}, {})
    for _ in range(2):
        made = engine()
        with phase("actor_update", made.module, data, made.optimizer):
            kept = torch.ones(1000)
    trained = engine()
    trained.module(torch.ones(1, 3)).sum().backward()
    with phase("optimizer", trained.module, optimizer=trained.optimizer):
        del kept
    first, second, optimizer = [json.loads(line) for line in log.read_text().splitlines()]
    assert (first["phase"], first["call"], second["call"]) == ("actor_update", 1, 2)
    assert (optimizer["phase"], optimizer["call"]) == ("optimizer", 1), "every phase counts its own calls"
    assert (first["rows"], first["tokens"], first["square_tokens"]) == (2, 3 + 5, 9 + 25)
    assert first["padding_rows"] == 1
    assert "peak_bytes" not in first, "a timed call is not tracked"
    assert second["peak_bytes"] == KB
    weights, moments, counters = 8 * 4, 2 * 8 * 4, 2 * 4
    assert second["resident_bytes"] == weights + moments + counters
    assert optimizer["resident_bytes"] == weights + moments + counters + 8 * 4, "and gradients"
    assert first["wall_s"] > 0


def test_a_shared_prompt_is_read_once(log: Path) -> None:
    """Rows 1 and 3 have the prompt 7 8, row 2 another; the last only fills up the batch."""
    rows = [[7, 8, 1], [8, 7, 5, 2], [7, 8, 3, 4], [0] * 9]
    answers = [[1], [2], [3, 4], [0]]
    columns = {
        "input_ids": rows,
        "responses": answers,
        "loss_mask": [[int(any(answer))] * len(answer) for answer in answers],
    }
    nested = {
        name: torch.nested.as_nested_tensor(list(map(torch.tensor, column)), layout=torch.jagged)
        for name, column in columns.items()
    }
    with phase("actor_update", engine().module, tu.get_tensordict(nested, {SHARED: True})):
        pass
    found = json.loads(log.read_text())
    assert (found["rows"], found["padding_rows"]) == (3, 1)
    assert found["tokens"] == (2 + 1 + 2) + (3 + 1)
    assert found["read_tokens"] == (1 + 1) + (1 + 2) + (1 + 1)
    assert found["square_tokens"] == (2 * 2 + 2 * 2 * 3 + 1 + 4) + (3 * 3 + 2 * 3 * 1 + 1)


def test_every_engine_below_a_wrapped_class_is_measured(log: Path) -> None:
    class Engine:
        def __init__(self, *, reference: bool) -> None:
            self.module = torch.nn.Linear(3, 2)
            self.engine_config, self.optimizer = types.SimpleNamespace(forward_only=reference), None

        def forward_backward_batch(self, data: Any, loss: Any, forward_only: bool = False) -> tuple[Any, ...]:
            return loss, forward_only

        def optimizer_step(self) -> float:
            return 0.5

    class Special(Engine):
        pass

    wrap(Engine)
    actor, reference = Special(reference=False), Special(reference=True)
    assert reference.forward_backward_batch(None, "loss", forward_only=True) == ("loss", True)
    assert actor.forward_backward_batch(None, "loss", True) == ("loss", True)
    assert actor.forward_backward_batch(None, "loss") == ("loss", False)
    assert actor.optimizer_step() == 0.5
    phases = [json.loads(line)["phase"] for line in log.read_text().splitlines()]
    assert phases == ["ref_log_prob", "old_log_prob", "actor_update", "optimizer"]


def test_nothing_is_written_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECAST_MEASURE", raising=False)
    monkeypatch.chdir(tmp_path)
    with phase("actor_update", None, None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_phase_names() -> None:
    assert phase_name(reference=True, forward_only=True) == "ref_log_prob"
    assert phase_name(reference=False, forward_only=True) == "old_log_prob"
    assert phase_name(reference=False, forward_only=False) == "actor_update"
