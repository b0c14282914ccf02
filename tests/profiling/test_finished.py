"""Phases of finished runs, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from profiles import recast

from recast_cli.artifacts import write_manifest
from recast_cli.errors import ArtifactError
from recast_cli.profiling.finished import read_run, table


def write_run(folder: Path, steps: list[dict[str, float]], method: str = "recast") -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": n, "data": step}) for n, step in enumerate(steps, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rl = {"prompts_per_step": 4, "group_size": 8}  # of an older version: nothing of shared prompts
    write_manifest(folder, "run", recipe={"rl": rl, "method": {"name": method}}, start={})
    return folder


def step(gen: float, hook: float, update: float, whole: float, tokens: int = 100) -> dict[str, float]:
    found = {"gen": gen, "recast_hook": hook, "update_actor": update, "step": whole}
    return {f"timing_s/{name}": seconds for name, seconds in found.items()} | {
        "perf/total_num_tokens": tokens
    }


def test_the_first_step_and_records_without_one_are_left_out(tmp_path: Path) -> None:
    validation = {"val-core/ndcg@10": 0.5}
    steps = [step(9, 9, 9, 99), step(1, 0.5, 2, 4), step(3, 0.5, 3, 8), step(2, 0.5, 7, 10)]
    run = read_run(write_run(tmp_path / "run", [validation, *steps]))
    # medians of 1 3 2, of .5, of 2 3 7; what is left of 4, 8 and 10 is .5, 1.5 and .5
    assert run["seconds"]["gen"] == 2 and run["seconds"]["recast_hook"] == 0.5
    assert run["seconds"]["update_actor"] == 3 and run["seconds"]["other"] == 0.5
    assert run["seconds"]["ref"] == 0  # no KL term, no reference
    assert (run["step_s"], run["step_s_range"], run["timed_steps"]) == (8, [4, 10], 3)
    assert (run["method"], run["share_prompt"], run["actor_tokens"]) == ("recast", False, 100)


def test_runs_side_by_side(tmp_path: Path) -> None:
    slow = read_run(write_run(tmp_path / "slow", [step(1, 0, 1, 2), step(4, 0, 12, 16)], "grpo"))
    fast = read_run(write_run(tmp_path / "fast", [step(1, 1, 1, 3), step(2, 1, 1, 4)]))
    headers, cells = table([slow, fast])
    assert headers[1:] == ["slow", "fast"]
    rows = {row[0]: row[1:] for row in cells}
    assert rows["rollouts"] == ["4.000 (25%)", "2.000 (50%)"]
    assert rows["first / this"] == ["1.00x", "4.00x"]
    assert rows["method"] == ["grpo", "recast"]


def test_a_run_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds 1 records of steps, needed two steps of RL"):
        read_run(write_run(tmp_path / "short", [step(1, 1, 1, 3)]))
    sft = write_run(tmp_path / "sft", [])
    (sft / "metrics.jsonl").unlink()
    write_manifest(sft, "run", recipe={"rl": {}, "method": {"name": "sft"}}, start={})
    with pytest.raises(ArtifactError, match="holds 0 records"):
        read_run(sft)


def test_the_command(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [step(1, 1, 1, 3)] * 3)
    done = recast(tmp_path, "profile", "--from-run", "a", "--from-run", "a", "--out", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert [run["step_s"] for run in json.loads(done.stdout)] == [3, 3]
    assert json.loads((tmp_path / "out" / "runs.json").read_text())["runs"] == json.loads(done.stdout)
    assert (tmp_path / "out" / "runs.png").stat().st_size > 5_000
    assert "<td>actor update</td>" in (tmp_path / "out" / "runs.html").read_text(encoding="utf-8")
    for options, message in (
        ([], "error: profile needs a recipe, or runs and nothing besides"),
        (["recipe.yaml", "--from-run", "a"], "error: profile needs a recipe"),
        (["--from-run", "a", "--trace"], "error: profile needs a recipe"),
        (["--from-run", "nowhere"], "error: no run in nowhere"),
    ):
        done = recast(tmp_path, "profile", *options, "--out", "other")
        assert done.returncode == 2 and message in done.stderr
        assert not (tmp_path / "other").exists()
