"""From what a job wrote (verl's metrics, the worker's measurements, the replay log) to the cost of each
phase."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from recast_cli.artifacts import read_json_lines
from recast_cli.core.cost import ModelShape, Work, forward_flops, train_flops
from recast_cli.profiling import trace

# Phase -> verl's timer of it.
TIMERS = {
    "old_log_prob": "timing_s/old_log_prob",
    "ref_log_prob": "timing_s/ref",
    "actor_update": "timing_s/update_actor",
}
HOOK = "timing_s/recast_hook"
WORK = tuple(field.name for field in fields(Work))
WARM_UP = 1  # steps
MEMORY = 1  # steps at the end that track memory


def num_steps(timed: int, traced: int = 0) -> int:
    """Steps of a job: warm-up, timed, traced, memory."""
    return WARM_UP + timed + traced + MEMORY


def measured_steps(folder: Path, timed: int, traced: int) -> dict[str, str]:
    """What a worker is told of the steps of a job (`verl_recast.measure`)."""
    found = {
        "RECAST_MEASURE": str(folder / "measured.jsonl"),
        "RECAST_MEASURE_MEMORY_FROM": str(WARM_UP + timed + traced + 1),
    }
    if traced:
        found |= {trace.FOLDER: str(folder / "trace"), trace.CALL: str(WARM_UP + timed + 1)}
    return found


def in_turns(arms: Iterable[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Repeat and arm of each process, back and forth: a drift of the machine meets every arm."""
    order = list(arms)
    for repeat in range(repeats):
        yield from ((repeat, arm) for arm in order[:: 1 if repeat % 2 == 0 else -1])


_Record = TypeVar("_Record")


def timed_of(records: Sequence[_Record], steps: int) -> Sequence[_Record]:
    """What was recorded of the timed steps, of one record a step."""
    return records[WARM_UP : WARM_UP + steps]


@dataclass(frozen=True)
class Run:
    """One job: one arm, one repeat. Seconds are of the timed steps, in order.

    Attributes:
        seconds: Phase, `hook` and `actor_total` -> seconds as verl's trainer sees them: dispatch, data
            transfer and the worker's work.
        worker_seconds: Phase -> seconds inside the worker's engine alone (the slowest rank).
        worker_cpu_seconds: The same in processor time, summed over threads and ranks.
        rows, work: Phase -> what one step processes, all ranks together.
        peak_bytes, resident_bytes: Phase -> of the step that tracks memory (the largest rank).
        rollouts: Digests of the replayed rollouts, one per distinct set (so: one).
        signal: The hook's `signal/*` metrics of the last step; empty for stock.
    """

    arm: str
    seconds: dict[str, list[float]]
    worker_seconds: dict[str, list[float]]
    worker_cpu_seconds: dict[str, list[float]]
    rows: dict[str, int]
    work: dict[str, Work]
    peak_bytes: dict[str, int]
    resident_bytes: dict[str, int]
    rollouts: frozenset[str]
    signal: dict[str, float]


def read_run(
    arm: str, metrics: Sequence[dict[str, Any]], measured: Path, replayed: Path, steps: int, traced: int = 0
) -> Run:
    """Cut off warm-up, traced and memory step and bring both levels of timing together.

    Args:
        metrics: verl's records, one per step: warm-up, `steps` timed ones, traced ones, memory.
        measured: The worker's file (`RECAST_MEASURE`).
        replayed: The replay log.
        steps, traced: Timed steps, and those behind them that were traced.
    """
    assert len(metrics) == num_steps(steps, traced), f"{len(metrics)} steps in the metrics of {arm}"
    timed = timed_of(metrics, steps)
    phases = [phase for phase, timer in TIMERS.items() if timer in timed[0]]
    seconds = {phase: [record[TIMERS[phase]] for record in timed] for phase in phases}
    if HOOK in timed[0]:
        seconds["hook"] = [record[HOOK] for record in timed]
    seconds["actor_total"] = np.sum(list(seconds.values()), axis=0).tolist()
    calls = worker_calls(read_json_lines(measured))
    worker = {phase: calls[phase] for phase in phases}
    for phase, found in worker.items():
        assert len(found) == len(metrics), f"{len(found)} {phase} calls in {len(metrics)} steps of {arm}"

    def timed_calls(key: str) -> dict[str, list[float]]:
        return {phase: [c[key] for c in timed_of(found, steps)] for phase, found in worker.items()}

    def last_call(key: str) -> dict[str, int]:
        return {phase: found[-1][key] for phase, found in worker.items()}

    return Run(
        arm=arm,
        seconds=seconds,
        worker_seconds=timed_calls("wall_s"),
        worker_cpu_seconds=timed_calls("cpu_s"),
        rows=last_call("rows"),
        work={phase: Work(**{name: found[-1][name] for name in WORK}) for phase, found in worker.items()},
        peak_bytes=last_call("peak_bytes"),
        resident_bytes=last_call("resident_bytes"),
        rollouts=frozenset(line["sha256"] for line in read_json_lines(replayed)),
        signal={name: value for name, value in metrics[-1].items() if name.startswith("signal/")},
    )


def worker_calls(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Phase -> its calls in order, the ranks of a call brought together, the optimiser part of the update."""
    calls = _by_call(records)
    for update, optimizer in zip(calls["actor_update"], calls.pop("optimizer"), strict=True):
        for key in ("wall_s", "cpu_s"):
            update[key] += optimizer[key]
        # Above what was there before: gradients are made in the update, and stay while the optimiser works.
        made = optimizer["resident_bytes"] - update["resident_bytes"]
        update["peak_bytes"] = max(update["peak_bytes"], made + optimizer["peak_bytes"])
    return calls


def _by_call(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Phase -> its calls in order, the ranks of a call brought together."""
    groups: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["phase"]][record["call"]].append(record)
    sums = ("cpu_s", "rows", *WORK)
    return {
        phase: [
            {"wall_s": max(rank["wall_s"] for rank in ranks)}
            | {key: sum(rank.get(key, 0) for rank in ranks) for key in sums}
            | {key: max(rank.get(key, 0) for rank in ranks) for key in ("peak_bytes", "resident_bytes")}
            for _, ranks in sorted(calls.items())
        ]
        for phase, calls in groups.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles (linear interpolation) of a sample."""
    low, q1, median, q3, high = np.quantile(np.asarray(values, dtype=np.float64), [0, 0.25, 0.5, 0.75, 1])
    return {
        "median": float(median),
        "min": float(low),
        "max": float(high),
        "q1": float(q1),
        "q3": float(q3),
        "count": len(values),
    }


def phase_flops(phase: str, shape: ModelShape, work: Work) -> float:
    """Operations of a phase: the update goes backward too."""
    return (train_flops if phase == "actor_update" else forward_flops)(shape, work)


def arm_cost(runs: Sequence[Run], shape: ModelShape, peak_flops: float) -> dict[str, Any]:
    """Cost of one arm, the timed steps of all its repeats pooled.

    Args:
        runs: The arm's jobs.
        shape: For the estimate of operations.
        peak_flops: Operations per second that make a utilisation of 1.
    """
    first = runs[0]
    flops = {phase: phase_flops(phase, shape, work) for phase, work in first.work.items()}

    def pooled(name: str) -> dict[str, dict[str, float]]:
        keys = getattr(first, name)
        return {key: spread([value for run in runs for value in getattr(run, name)[key]]) for key in keys}

    worker = pooled("worker_seconds")
    return {
        "seconds": pooled("seconds"),
        "worker_seconds": worker,
        "worker_cpu_seconds": pooled("worker_cpu_seconds"),
        "rows": first.rows,
        "tokens": {phase: work.tokens for phase, work in first.work.items()},
        "flops": flops,
        "mfu": {phase: flops[phase] / worker[phase]["median"] / peak_flops for phase in flops},
        "peak_bytes": {phase: max(run.peak_bytes[phase] for run in runs) for phase in first.peak_bytes},
        "resident_bytes": first.resident_bytes,
        "repeats": [{key: float(np.median(v)) for key, v in run.seconds.items()} for run in runs],
    }


def most_memory(cost: dict[str, Any]) -> int:
    """Bytes at the worst moment of any phase: what was resident, and what the phase took on top."""
    return max(cost["peak_bytes"][phase] + cost["resident_bytes"][phase] for phase in cost["peak_bytes"])


def ratios(stock: dict[str, Any], recast: dict[str, Any]) -> dict[str, float]:
    """Stock over ReCast. Seconds: medians as the trainer sees them; `actor_total` holds the hook on
    ReCast's side. `tokens` and `flops` are summed over the phases, `peak_memory` is the worst phase."""
    phases = [phase for phase in (*TIMERS, "actor_total") if phase in stock["seconds"]]
    found = {p: stock["seconds"][p]["median"] / recast["seconds"][p]["median"] for p in phases}
    for name in ("tokens", "flops"):
        found[name] = sum(stock[name].values()) / sum(recast[name].values())
    found["peak_memory"] = most_memory(stock) / most_memory(recast)
    return found


def worker_ratios(stock: dict[str, Any], recast: dict[str, Any]) -> dict[str, float]:
    """Stock over ReCast inside the worker alone: what the drop saves before verl's own dispatch and
    transfer of data, which cost both arms about the same."""
    return {
        phase: found["median"] / recast["worker_seconds"][phase]["median"]
        for phase, found in stock["worker_seconds"].items()
    }


def ratio_ranges(stock: dict[str, Any], recast: dict[str, Any]) -> dict[str, list[float]]:
    """Lowest and highest ratio of the repeats' medians, repeat by repeat."""
    found = {}
    for phase in (*TIMERS, "actor_total"):
        if phase in stock["seconds"]:
            each = [a[phase] / b[phase] for a, b in zip(stock["repeats"], recast["repeats"], strict=True)]
            found[phase] = [min(each), max(each)]
    return found
