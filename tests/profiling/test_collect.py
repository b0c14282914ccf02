"""Reading what a job wrote, and every ratio, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recast_cli.core.cost import ModelShape, Work
from recast_cli.profiling.collect import (
    Run,
    arm_cost,
    most_memory,
    ratio_ranges,
    ratios,
    read_run,
    spread,
    worker_ratios,
)

# matmul_parameters = 1 * (4 * 2 * (4 + 2)) + 3 * 4 * 8 + 4 * 10 = 184
SHAPE = ModelShape(num_layers=1, width=4, num_heads=2, num_kv_heads=1, head_dim=2, mlp_width=8, vocab_size=10)


def step(old: float, ref: float, update: float, **more: float) -> dict[str, Any]:
    return {"timing_s/old_log_prob": old, "timing_s/ref": ref, "timing_s/update_actor": update, **more}


def call(phase: str, number: int, wall: float, *, rank: int = 0, **more: Any) -> dict[str, Any]:
    sizes = {} if phase == "optimizer" else {"rows": 2, "tokens": 5, "read_tokens": 5, "square_tokens": 13}
    base = {"phase": phase, "call": number, "rank": rank, "wall_s": wall, "cpu_s": 2 * wall}
    return {**base, "resident_bytes": 100, **sizes, **more}


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recast_run(folder: Path) -> Run:
    """Warm-up, two timed steps, memory step; two ranks in the actor update."""
    metrics = [
        step(9.0, 9.0, 9.0, **{"timing_s/recast_hook": 9.0}),
        step(1.0, 2.0, 3.0, **{"timing_s/recast_hook": 0.5}),
        step(1.5, 2.5, 3.5, **{"timing_s/recast_hook": 0.25}),
        step(99.0, 99.0, 99.0, **{"timing_s/recast_hook": 99.0, "signal/kept_samples": 4}),
    ]
    lines = []
    for number, wall in enumerate([8.0, 0.5, 1.0, 50.0], start=1):
        tracked = number == 4
        for phase, peak in (("old_log_prob", 30), ("ref_log_prob", 20)):
            lines.append(call(phase, number, wall, **({"peak_bytes": peak} if tracked else {})))
        for rank in (0, 1):
            more = {"peak_bytes": 70 + rank} if tracked else {}
            lines.append(call("actor_update", number, 2 * wall + rank, rank=rank, **more))
            after = {"peak_bytes": 50} if tracked else {}
            lines.append(call("optimizer", number, 0.125, rank=rank, **{**after, "resident_bytes": 140}))
    replayed = [{"step": s, "rollouts": 8, "sha256": "same"} for s in range(1, 5)]
    return read_run(
        "recast", metrics, write(folder / "measured", lines), write(folder / "replayed", replayed), 2
    )


def test_a_run_is_read(tmp_path: Path) -> None:
    run = recast_run(tmp_path)
    assert run.seconds == {
        "old_log_prob": [1.0, 1.5],
        "ref_log_prob": [2.0, 2.5],
        "actor_update": [3.0, 3.5],
        "hook": [0.5, 0.25],
        "actor_total": [0.5 + 1.0 + 2.0 + 3.0, 0.25 + 1.5 + 2.5 + 3.5],
    }
    # the slower rank, and the optimiser's step on top
    assert run.worker_seconds["actor_update"] == [2 * 0.5 + 1 + 0.125, 2 * 1.0 + 1 + 0.125]
    assert run.worker_seconds["old_log_prob"] == [0.5, 1.0]
    # both ranks' processor time: 2 * (1.0 + 2.0) and the optimisers' 2 * (0.125 + 0.125)
    assert run.worker_cpu_seconds["actor_update"][0] == 2 * (1.0 + 2.0) + 2 * (0.125 + 0.125)
    assert run.work["old_log_prob"] == run.work["ref_log_prob"] == Work(5, 5, 13)
    assert run.work["actor_update"] == Work(10, 10, 26)
    assert run.rows["actor_update"] == 4
    assert run.peak_bytes == {"old_log_prob": 30, "ref_log_prob": 20, "actor_update": 40 + 50}, (
        "the optimiser's 50 on top of 40 of gradients are more than the 71 of the passes"
    )
    assert run.resident_bytes["actor_update"] == 100, "gradients are part of the peak, not resident"
    assert run.rollouts == {"same"}
    assert run.signal == {"signal/kept_samples": 4}


def test_a_short_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="1 steps"):
        read_run("stock", [step(1, 1, 1)], tmp_path / "x", tmp_path / "y", 2)


def test_spread() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0]) == {
        "median": 2.5,
        "min": 1.0,
        "max": 4.0,
        "q1": 1.75,
        "q3": 3.25,
        "count": 4,
    }


def plain_run(arm: str, scale: float, tokens: int, peak: int, **hook: list[float]) -> Run:
    phases = {"old_log_prob": 1.0, "ref_log_prob": 2.0, "actor_update": 4.0}
    seconds = {phase: [value * scale, value * scale] for phase, value in phases.items()}
    total = [7.0 * scale + sum(values[0] for values in hook.values())] * 2
    return Run(
        arm=arm,
        seconds={**seconds, **hook, "actor_total": total},
        worker_seconds={phase: [value / 2 for value in values] for phase, values in seconds.items()},
        worker_cpu_seconds=seconds,
        rows=dict.fromkeys(phases, 2),
        work=dict.fromkeys(phases, Work(tokens, tokens, 0)),
        peak_bytes={"old_log_prob": 10, "ref_log_prob": 10, "actor_update": peak},
        resident_bytes={"old_log_prob": 50, "ref_log_prob": 20, "actor_update": 50},
        rollouts=frozenset({"x"}),
        signal={},
    )


def test_cost_of_an_arm() -> None:
    cost = arm_cost([plain_run("stock", 1.0, 10, 70), plain_run("stock", 3.0, 10, 90)], SHAPE, 1e4)
    assert cost["flops"]["old_log_prob"] == 2 * 184 * 10
    assert cost["flops"]["actor_update"] == 3 * 2 * 184 * 10
    assert cost["seconds"]["actor_update"]["median"] == (4.0 + 12.0) / 2
    assert cost["worker_seconds"]["old_log_prob"]["median"] == (0.5 + 1.5) / 2
    assert cost["mfu"]["old_log_prob"] == pytest.approx(3680 / 1.0 / 1e4, rel=1e-12)
    assert cost["peak_bytes"]["actor_update"] == 90, "the worse of the repeats"
    assert most_memory(cost) == 90 + 50
    assert [repeat["actor_update"] for repeat in cost["repeats"]] == [4.0, 12.0]


def test_ratios() -> None:
    stock = arm_cost([plain_run("stock", 8.0, 80, 350), plain_run("stock", 10.0, 80, 350)], SHAPE, 1e4)
    hook = {"hook": [0.5, 0.5]}
    recast = arm_cost(
        [plain_run("recast", 0.5, 5, 50, **hook), plain_run("recast", 1.0, 5, 30, **hook)], SHAPE, 1e4
    )
    found = ratios(stock, recast)
    assert found["actor_update"] == (4 * 9.0) / (4 * 0.75)
    assert found["old_log_prob"] == found["ref_log_prob"] == 12.0
    assert found["actor_total"] == (7 * 9.0) / ((7 * 0.5 + 0.5 + 7 * 1.0 + 0.5) / 2), (
        "the hook is on recast's side"
    )
    assert found["tokens"] == found["flops"] == 16.0
    assert found["peak_memory"] == (350 + 50) / (50 + 50)
    assert ratio_ranges(stock, recast)["actor_update"] == [10.0, 16.0]
    assert worker_ratios(stock, recast)["old_log_prob"] == 12.0


def test_without_a_reference_there_is_no_ratio_for_it() -> None:
    stock, recast = (arm_cost([plain_run(arm, 1.0, 5, 1)], SHAPE, 1.0) for arm in ("stock", "recast"))
    for cost in (stock, recast):
        for part in ("seconds", "worker_seconds", "peak_bytes"):
            del cost[part]["ref_log_prob"]
    assert "ref_log_prob" not in ratios(stock, recast)
