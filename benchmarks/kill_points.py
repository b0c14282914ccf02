"""SIGKILL to everything of a run at ten seeded moments, one of them inside a checkpoint write; each goes on.

    python benchmarks/kill_points.py

A run here is warm start and RL on the CPU (one rank, float32). A moment is a step, drawn from all, and a
while after its record: up to what the next one takes, before the first step up to what warm start and launch
take. After each kill `recast train --resume` must end with the weights and rollouts of the run that nobody
killed, bit for bit. Tests hold two such moments (tests/plugin/test_verl_failures.py), whose apparatus this
uses.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import record
import torch

from recast_cli.training.process import read_metrics
from recast_cli.training.resume import last_checkpoint

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "plugin")]

from jobs import RECIPE, Job, recast, succeed, train_until, weights  # noqa: E402
from plugin_artifacts import write_artifacts  # noqa: E402


class Moment(NamedTuple):
    """So many seconds after the record of a step (0: after the start)."""

    step: int
    seconds: float


RESULT = Path(__file__).parent / "results" / "kill_points.json"
STEPS = 4


def train(folder: Path, name: str, *options: str) -> Job:
    return Job(*recast(folder, *command(name), *options, timeout=1200), folder / name)


def command(name: str) -> list[str]:
    return ["train", "recipe.yaml", f"out={name}", f"warm_start.out={name}-start", f"rl.steps={STEPS}"]


def same(one: Job, other: Job) -> dict[str, bool]:
    found, expected = weights(one.out / "model"), weights(other.out / "model")
    rollouts = [(job.out / "rollouts.jsonl").read_text(encoding="utf-8") for job in (one, other)]
    return {
        "weights": found.keys() == expected.keys()
        and all(torch.equal(tensor, found[name]) for name, tensor in expected.items()),
        "rollouts": rollouts[0] == rollouts[1],
    }


def kill(folder: Path, name: str, moment: Moment | None) -> dict[str, Any]:
    """Kill a run at a moment, or (None) inside its second checkpoint."""
    torn, log = folder / name / "checkpoints" / "global_step_2", folder / name / "metrics.jsonl"
    since: list[float] = []  # when the moment's step was seen in the log

    def reached() -> bool:
        if moment is None:
            return torn.is_dir()
        if not since and len(read_metrics(log)) >= moment.step:
            since.append(time.monotonic())
        return bool(since) and time.monotonic() - since[0] > moment.seconds

    killed = train_until(reached, command(name)[1:], folder)
    step = last_checkpoint(folder / name / "checkpoints")
    return {
        "moment": moment,
        "killed": killed.returncode == -9,
        "from_step": step,
        "inside_checkpoint": torn.is_dir() and step == 1,
    }


def kill_and_resume(folder: Path, name: str, moment: Moment | None, whole: Job) -> dict[str, Any]:
    """Kill a run and go on with it; a checkpoint that was finished first is tried again."""
    for attempt in range(5):
        out = f"{name}-{attempt}"
        found = kill(folder, out, moment)
        if moment is not None or found["inside_checkpoint"]:
            break
    resumed = train(folder, out, "--resume")
    if resumed.code:
        return found | {"weights": False, "rollouts": False, "stderr": resumed.stderr[-500:]}
    return found | same(resumed, whole)


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start, facts = record.before(), {"seed": args.seed, "steps": STEPS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, tokenizer = write_artifacts(folder)
        (folder / "recipe.yaml").write_text(RECIPE.format(data=data, tokenizer=tokenizer), encoding="utf-8")
        began = time.monotonic()
        whole = succeed(train(folder, "whole"))
        facts["uninterrupted_s"] = seconds = time.monotonic() - began
        rng = random.Random(args.seed)
        step_s = sum(each["timing_s/step"] for each in whole.metrics[1:]) / (STEPS - 1)
        before_s = seconds - STEPS * step_s
        drawn = sorted((rng.randrange(STEPS), rng.random()) for _ in range(args.points - 1))
        later = [Moment(step, share * (step_s if step else before_s)) for step, share in drawn]
        moments: list[Moment | None] = [None, *later]
        print(f"uninterrupted: {seconds:.0f} s")
        facts["points"] = []
        for number, moment in enumerate(moments):
            found = kill_and_resume(folder, f"killed-{number}", moment, whole)
            facts["points"].append(found)
            print(json.dumps(found), flush=True)
    points = facts["points"]
    # A run that ended before its moment proves nothing, a checkpoint that was whole nothing about torn ones.
    good = sum(
        found["killed"]
        and found["weights"]
        and found["rollouts"]
        and (found["moment"] is not None or found["inside_checkpoint"])
        for found in points
    )
    print(f"{good} of {len(points)} ended as the run that nobody killed")
    record.write(args.result, start, facts)
    sys.exit(good != len(points))


if __name__ == "__main__":
    main()
