"""Real verl jobs that are killed, fail or cannot start; see jobs.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
from jobs import Job, kill_all, recast, start, train, train_until, wait_for, weights

from recast_cli.artifacts import load_manifest
from recast_cli.training.process import read_metrics

# One worker for all that may meet the Ray cluster which a test here starts.
pytestmark = [pytest.mark.verl, pytest.mark.xdist_group("jobs")]


@pytest.mark.parametrize("moment", ["in the second step", "inside the second checkpoint"])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    recast_job: Job, workspace: Path, moment: str
) -> None:
    """SIGKILL to all of it. The uninterrupted run of the same seed is `recast_job`."""
    for attempt in range(3):  # a machine that is busy elsewhere may let the checkpoint be finished first
        out = workspace / f"{moment.replace(' ', '-')}-{attempt}"
        torn, logged = out / "checkpoints" / "global_step_2", out / "metrics.jsonl"
        inside = "checkpoint" in moment
        killed = train_until(
            lambda: torn.is_dir() if inside else bool(read_metrics(logged)),  # noqa: B023
            ["recipe.yaml", f"out={out.name}"],
            workspace,
        )
        tracker = out / "checkpoints" / "latest_checkpointed_iteration.txt"
        if killed.returncode == -9 and tracker.read_text() == "1" and torn.is_dir() == inside:
            break
    else:
        pytest.fail(f"killed too late three times, last with {killed.returncode}")

    refused = train(workspace, out.name)
    assert refused.code == 2 and "pass --resume to go on from step 1" in refused.stderr
    other = train(workspace, out.name, "--resume", "method.w_negative=0.5")
    assert other.code == 2 and "holds a run of another recipe" in other.stderr
    code, stdout, stderr = recast(workspace, "train", "recipe.yaml", f"out={out.name}", "--resume")
    assert code == 0, stdout[-2000:] + stderr[-2000:]
    assert "going on from step 1" in stdout + stderr
    resumed, whole = weights(out / "model"), weights(recast_job.out / "model")
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    found = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in found] == [1, 2]
    rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    uncut = [json.loads(line) for line in (recast_job.out / "rollouts.jsonl").read_text().splitlines()]
    assert rollouts == uncut, "the same rollouts, each step once"
    manifest = load_manifest(out, "run")
    assert [entry["step"] for entry in manifest["resumed"]] == [1] and "origin.json" not in manifest["files"]


def test_failed_rollout_ends_the_run_with_its_cause(recast_job: Job, workspace: Path) -> None:
    job = train(workspace, "too-long", "verl.actor_rollout_ref.rollout.prompt_length=6")
    assert job.code == 2
    lines = [line for line in job.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2, job.stderr
    assert "prompt has 26 tokens, actor_rollout_ref.rollout.prompt_length is 6" in lines[0]
    assert "read too-long.log" in lines[1]
    assert "prompt has 26 tokens" in (workspace / "too-long.log").read_text(encoding="utf-8")
    assert not job.out.exists(), "no step was made: the next try needs no --overwrite"


@pytest.mark.parametrize(
    ("title", "named"),
    [
        ("ray::SIDServer", "recast_sid_server_0"),
        ("ray::RewardLoopWorker", "worker reward_loop_worker_0 died"),
    ],
)
def test_a_worker_that_dies_ends_the_run_with_its_name(
    recast_job: Job, workspace: Path, title: str, named: str
) -> None:
    out = workspace / title.removeprefix("ray::")
    options = [f"out={out.name}", "rl.steps=200", "rl.save_every=200"]
    child = start(workspace, "train", "recipe.yaml", *options)
    try:
        wait_for(lambda: bool(read_metrics(out / "metrics.jsonl")), child)
        victims = [
            process
            for process in psutil.Process(child.pid).children(recursive=True)
            if " ".join(process.cmdline()).startswith(title)
        ]
        assert len(victims) == 1
        victims[0].kill()
        _, stderr = child.communicate(timeout=90)  # and does not hang
    finally:
        kill_all(child)
    assert child.returncode == 2
    lines = [line for line in stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2 and named in lines[0], stderr[-2000:]
    assert lines[1] == f"hint: read {out.name}.log"


def test_plugin_that_failed_to_load_is_named(recast_job: Job, workspace: Path) -> None:
    """verl swallows what went wrong; all it shows is a platform it does not know."""
    broken = workspace / "broken" / "verl_recast"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')\n", encoding="utf-8")
    code, _, stderr = recast(workspace, "train", "recipe.yaml", "out=no-plugin", path=str(broken.parent))
    assert code == 2
    lines = [line for line in stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2, stderr
    assert "the plugin is not registered in verl (ImportError: broken on purpose" in lines[0]
    assert lines[1].startswith("hint: run `recast doctor`; the log is ")
    assert not (workspace / "no-plugin").exists()


def test_a_cluster_that_is_too_small_or_not_there_is_named_before_the_launch(
    recast_job: Job, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=6399", "--num-cpus=7"]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temp:  # a socket's path must be short
        options = ["--include-dashboard=false", f"--temp-dir={temp}", "--block"]
        # a group of its own, ended by its id: nobody else's Ray is touched
        head = subprocess.Popen([*start, *options], start_new_session=True, stdout=subprocess.PIPE, text=True)
        try:
            assert head.stdout is not None
            address = next(match[1] for line in head.stdout if (match := re.search("address='(.+)'", line)))
            monkeypatch.setenv("RAY_ADDRESS", address)
            small = train(workspace, "small-cluster")
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            head.communicate(timeout=60)
    assert small.code == 2
    assert f"RAY_ADDRESS={address} has 7 CPUs, verl needs 8" in small.stderr
    assert "hint: start it with --num-cpus=8" in small.stderr and not small.out.exists()
    absent = train(workspace, "no-cluster")
    assert absent.code == 2 and f"no Ray cluster answers at RAY_ADDRESS={address}" in absent.stderr
    assert not absent.out.exists()
