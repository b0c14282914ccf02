"""Real verl jobs whose rollouts come from vLLM's CPU build, through the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import GROUP, PROMPTS, RECIPE, STEPS, Job, kill_all, start, succeed, train, wait_for, weights

from recast_cli.training.process import read_metrics

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

BEAMS = 7


@pytest.fixture(scope="module")
def workspace(artifacts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm_jobs")
    text = RECIPE.format(data=artifacts[0], tokenizer=artifacts[1]).replace("ray_cpus: 8", "ray_cpus: 16")
    text += f"  validate_every: {STEPS}\n  validate_beams: {BEAMS}\n"
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recast_job(workspace: Path) -> Job:
    return succeed(train(workspace, "recast", "rollout=vllm"))


@pytest.fixture(scope="module")
def sid_job(workspace: Path, recast_job: Job) -> Job:
    """The SID engine, from the warm start of `recast_job`."""
    return succeed(train(workspace, "sid", "rl.steps=1", "rl.validate_every=1"))


def log_of(job: Job, partition: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (job.out / "rollouts.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["partition"] == partition]


def test_vllm_answers_with_items_from_the_weights_of_the_step(recast_job: Job, workspace: Path) -> None:
    """At the learning rate of these jobs an old weight in vLLM shows in the second step's log-probs."""
    lines = log_of(recast_job, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["rollouts"] == PROMPTS * GROUP
        assert line["invalid"] == 0
    steps = [found for found in recast_job.metrics if "training/rollout_probs_diff_max" in found]
    assert len(steps) == STEPS
    for found in steps:
        assert found["training/rollout_probs_diff_valid"] == 1
        assert found["training/rollout_probs_diff_max"] < 1e-5
    start, end = weights(workspace / "warm_start" / "model"), weights(recast_job.out / "model")
    assert max(float((start[name] - end[name]).abs().max()) for name in start) > 1e-3


def test_recast_repairs_and_drops_over_vllm_as_over_the_sid_engine(recast_job: Job) -> None:
    steps = [found for found in recast_job.metrics if "signal/kept_samples" in found]
    assert len(steps) == STEPS
    for found in steps:
        assert found["signal/all_zero_after_repair"] == 0
        assert found["signal/kept_samples"] == 2 * (PROMPTS - found["signal/skipped_groups"])


def test_validation_of_the_start_has_the_beams_of_the_sid_engine(recast_job: Job, sid_job: Job) -> None:
    """A hash over all prompts, tokens and rewards, in order of rank."""
    found, expected = (log_of(job, "val")[0] for job in (recast_job, sid_job))
    assert found["step"] == expected["step"] == 0
    assert found["rollouts"] == found["prompts"] * BEAMS > BEAMS
    masses = [line.pop("catalogue_mass") for line in (found, expected)]  # of 1e-5 log-probs
    assert masses[0] == pytest.approx(masses[1], rel=1e-4)
    assert found == expected
    names = [name for name in sid_job.metrics[0] if name.startswith("val-core/")]
    assert {name.rsplit("/", 1)[1].split("@")[0] for name in names} == {"pass", "recall", "ndcg"}
    for name in names:
        assert recast_job.metrics[0][name] == pytest.approx(sid_job.metrics[0][name], abs=1e-9)


def test_an_engine_that_dies_ends_the_run_with_its_name(recast_job: Job, workspace: Path) -> None:
    """A request that it was answering, weights that it was taking, a call: whatever is under way then."""
    out = workspace / "dying"
    options = ["rollout=vllm", "rl.steps=200", "rl.save_every=200", "rl.validate_every=-1"]
    child = start(workspace, "train", "recipe.yaml", "out=dying", *options)
    try:
        wait_for(lambda: bool(read_metrics(out / "metrics.jsonl")), child)
        below = psutil.Process(child.pid).children(recursive=True)
        servers = [each for each in below if " ".join(each.cmdline()).startswith("ray::TrieVLLMServer")]
        assert len(servers) == 1
        engines = servers[0].children(recursive=True)
        assert engines
        for engine in engines:
            engine.kill()
        _, stderr = child.communicate(timeout=180)  # and does not hang
    finally:
        kill_all(child)
    assert child.returncode == 2
    lines = [line for line in stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2 and any(name in lines[0] for name in ("EngineDeadError", "TrieVLLMServer")), (
        stderr[-2000:]
    )
    assert lines[1] == "hint: read dying.log"
