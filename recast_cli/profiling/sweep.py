"""`recast profile --sweep`: one actor worker alone, over prompt lengths, group sizes, batches, model sizes.

Each point runs four arms on the same rollouts: stock and ReCast, each with rows read alone and with the
prompt of a group read once. An arm is a process with verl's own workers (`verl_recast.actor_alone`); queue,
Ray and trainer have no part in it, `recast profile` without a sweep measures them.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from recast_cli.artifacts import read_json_lines
from recast_cli.core.cost import ModelShape, Work
from recast_cli.errors import RecipeError
from recast_cli.profiling.collect import TIMERS, in_turns, num_steps, phase_flops, timed_of, worker_calls

PHASES = tuple(TIMERS)
# Rows that an engine without packing reads in one call: more of them are no faster, and page faults slow
# stock down (docs/concepts/cost.md).
ROWS_PER_CALL = 4
HIT_EVERY = 7  # groups of which one has a hit: about 85 % have none


@dataclass(frozen=True)
class Arm:
    """A method and how its rows are read."""

    method: str
    shares: bool

    @property
    def kept(self) -> str:
        """What `verl_recast.actor_alone` keeps of a group."""
        return "pairs" if self.method == "recast" else "groups"


ARMS = {
    "stock": Arm("grpo", False),
    "stock_shared": Arm("grpo", True),
    "recast": Arm("recast", False),
    "recast_shared": Arm("recast", True),
}


@dataclass(frozen=True)
class Point:
    """One setting of a sweep; `hidden_size` and `layers` are None for the model as it is."""

    prompt_length: int
    group_size: int
    batch: int
    hidden_size: int | None = None
    layers: int | None = None

    def rows(self, arm: Arm) -> int:
        """Rows that the arm keeps of a group."""
        return 2 if arm.kept == "pairs" else self.group_size

    def work(self, arm: Arm, num_levels: int) -> Work:
        """What one pass over the batch asks of the model."""
        answers = [num_levels] * self.rows(arm)
        if arm.shares:
            group = Work.of_group(self.prompt_length, answers)
        else:
            group = Work.of_rows([self.prompt_length + num_levels] * len(answers))
        return Work(*(self.batch * value for value in (group.tokens, group.read_tokens, group.square_tokens)))

    def group_tokens(self, arm: Arm, num_levels: int) -> int:
        """Tokens of one group, in a call of its own."""
        return replace(self, batch=1).work(arm, num_levels).tokens


LEAST = {"prompt_length": 1, "group_size": 2, "batch": 1, "hidden_size": 64, "layers": 1}


def parse_points(texts: Sequence[str], default: Point) -> list[Point]:
    """Every combination of `name=value,value` texts, the last name fastest.

    Raises:
        RecipeError: a name that is no field of `Point`, or comes twice; a value that is no number, or too
            small.
    """
    names = [field.name for field in fields(Point)]
    axes: dict[str, list[int]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in names or name in axes:
            found = f"--sweep {name} comes twice" if name in axes else f"--sweep {name or text!r} is unknown"
            raise RecipeError(f"{found}, needed one of {', '.join(names)}, each once", "--sweep batch=4,8")
        try:
            axes[name] = list(dict.fromkeys(int(value) for value in values.split(",")))
        except ValueError as exc:
            raise RecipeError(
                f"--sweep {text} has a value that is no whole number", f"--sweep {name}=8,16"
            ) from exc
        smallest = min(axes[name])
        if smallest < LEAST[name]:
            raise RecipeError(f"--sweep {name} holds {smallest}, needed at least {LEAST[name]}", "raise it")
        odd = next((value for value in axes[name] if name == "hidden_size" and value % 64), None)
        if odd is not None:
            raise RecipeError(
                f"--sweep hidden_size holds {odd}, needed a multiple of 64", "heads are 32 wide"
            )
    combinations = itertools.product(*axes.values())
    return [replace(default, **dict(zip(axes, values, strict=True))) for values in combinations]


@dataclass(frozen=True)
class Codes:
    """Of the codes: token id of the first one of each level, and how many there are."""

    level_offsets: Sequence[int]
    codebook_sizes: Sequence[int]

    @property
    def num_levels(self) -> int:
        return len(self.level_offsets)


def write_rollouts(point: Point, codes: Codes, seed: int, path: Path) -> None:
    """Prompts and rollouts of random codes; every `HIT_EVERY`th group has a hit, the first one too.

    What the tokens are costs nothing. That groups have hits matters little, but an update without any
    gradient would be none.
    """
    rng = np.random.default_rng(seed)
    offsets_L, sizes_L = np.array(codes.level_offsets), np.array(codes.codebook_sizes)
    levels_BP = rng.integers(0, len(sizes_L), (point.batch, point.prompt_length))
    prompts_BP = offsets_L[levels_BP] + rng.integers(0, sizes_L[levels_BP])
    targets_BL = rng.integers(0, sizes_L, (point.batch, len(sizes_L)))
    codes_BGL = rng.integers(0, sizes_L, (point.batch, point.group_size, len(sizes_L)))
    codes_BGL[::HIT_EVERY, 0] = targets_BL[::HIT_EVERY]
    columns = {"prompts_BP": prompts_BP, "codes_BGL": codes_BGL, "targets_BL": targets_BL}
    np.savez(path, allow_pickle=False, **columns, level_offsets=offsets_L)


# Runs one arm of a point in a folder: its records, a step each, and the file of the worker's measurements.
Launch = Callable[[Point, Arm, Path, Mapping[str, Any]], tuple[list[dict[str, Any]], Path]]


def run_point(
    point: Point,
    codes: Codes,
    shape: ModelShape,
    launch: Launch,
    folder: Path,
    *,
    steps: int,
    repeats: int,
    seed: int,
    peak_flops: float,
    traced: int = 0,
) -> list[dict[str, Any]]:
    """One row of the result for each arm.

    Args:
        folder: There already; keeps rollouts, logs and measurements, in ARM-REPEAT.
        steps: Timed steps of each process of an arm.
        repeats: Processes of an arm, arms in turns as in `profile.replay`; their steps are pooled.
        peak_flops: Operations per second that make a utilisation of 1.
        traced: As in `profile.replay`.
    """
    write_rollouts(point, codes, seed, folder / "rollouts.npz")
    timed: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    measured: dict[str, Path] = {}  # of the last process
    for repeat, name in in_turns(ARMS, repeats):
        arm = ARMS[name]
        spec = {
            "rollouts": str(folder / "rollouts.npz"),
            "kept": arm.kept,
            "steps": num_steps(steps, traced),
            # One whole group in a call: what a group takes, however many a micro-batch has room for.
            "memory_tokens": point.group_tokens(arm, codes.num_levels),
        }
        records, measured[name] = launch(point, arm, folder / f"{name}-{repeat + 1}", spec)
        timed[name] += timed_of(records, steps)
    return [
        {
            "arm": name,
            **vars(point),
            **_cost(timed[name], measured[name], point.work(arm, codes.num_levels), shape, peak_flops),
        }
        for name, arm in ARMS.items()
    ]


def _cost(
    timed: Sequence[dict[str, Any]], measured: Path, work: Work, shape: ModelShape, peak_flops: float
) -> dict[str, Any]:
    phases = [phase for phase in PHASES if f"{phase}_s" in timed[0]]
    flops = {phase: phase_flops(phase, shape, work) for phase in phases}
    memory = {phase: calls[-1] for phase, calls in worker_calls(read_json_lines(measured)).items()}
    found: dict[str, Any] = {"ref_log_prob_s": None}  # without a KL term there is none
    for phase in phases:
        for kind in ("s", "cpu_s"):
            values = [record[f"{phase}_{kind}"] for record in timed]
            found[f"{phase}_{kind}"] = statistics.median(values)
            found[f"{phase}_{kind}_range"] = [min(values), max(values)]
        found[f"{phase}_peak_bytes"] = memory[phase]["peak_bytes"]
        found[f"{phase}_mfu"] = flops[phase] / found[f"{phase}_s"] / peak_flops
    return {
        **found,
        "peak_memory_bytes": max(memory[phase]["peak_bytes"] for phase in phases),
        "resident_bytes": memory["actor_update"]["resident_bytes"],
        "tokens": work.tokens,
        "flops": sum(flops.values()),
        "timed_steps": len(timed),
    }
