"""One real profile, small: two verl jobs on a synthetic dataset (one to four minutes)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from profiles import recast, traced

from recast_cli.errors import EnvironmentFault
from recast_cli.profiling.profile import Job, replay
from recast_cli.profiling.record import Recording


def test_a_place_inside_an_input_is_refused(workspace: Path) -> None:
    done = recast(workspace, "profile", "recipe.yaml", "--out", "data/profile")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[0] == "error: --out data/profile lies inside data= data"
    assert not (workspace / "data" / "profile").exists()


def test_weights_that_cannot_be_read_leave_no_folder(workspace: Path, tmp_path: Path) -> None:
    model = shutil.copytree(workspace / "tokenizer" / "model", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    out = tmp_path / "out"
    done = recast(workspace, "profile", "recipe.yaml", "--model", str(model), "--out", str(out))
    assert done.returncode == 2, done.stderr
    assert f"error: {model} cannot be loaded" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verl.bogus=1"], "verl.trainer.main_ppo refuses an override of the recipe"),
        (["--sweep", "batch=2", "verl.bogus=1"], "verl.trainer.main_ppo refuses an override of the recipe"),
        (["--out", "recipe.yaml"], "--out recipe.yaml is a file, needed a folder"),
        (["--group-size", "99999999999"], "rl.prompts_per_step times rl.group_size is"),
        (["--sweep", "prompt_length=4094"], "asks for 4097 tokens with the answer, the model reads 4096"),
        (["--sweep", "batch=x"], "--sweep batch=x has a value that is no whole number"),
        (["--sweep", "batch=2", "rl.masked_actor=true"], "rl.masked_actor is true, needed false"),
        (["--sweep", "group_size=99999999999"], "needed at most 1,000,000,000"),
        (["--sweep", "layers=1", "--sweep", "prompt_length=4094"], "asks for 4097 tokens with the answer"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    workspace: Path, arguments: list[str], message: str
) -> None:
    done = recast(workspace, "profile", "recipe.yaml", "--out", "refused", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert not (workspace / "refused").exists()


@pytest.mark.verl
def test_both_arms_replay_the_same_rollouts(workspace: Path) -> None:
    options = ["--prompts", "3", "--group-size", "4", "--steps", "1", "--repeats", "1", "--out", "out"]
    done = recast(workspace, "profile", "recipe.yaml", *options, "--trace", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((workspace / "out" / "profile.json").read_text())
    assert (workspace / "out" / "profile.png").stat().st_size > 10_000
    html = (workspace / "out" / "profile.html").read_text(encoding="utf-8")
    assert "3 prompts of" in html and "<td>actor update, s</td>" in html

    # what either job stored in verl's queue in four steps (warm-up, timed, traced, memory): one batch
    digests = []
    for arm in ("stock-1", "recast-1"):
        lines = (workspace / "out" / "jobs" / arm / "replayed.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["rollouts"] for record in records] == [3 * 4] * 4
        digests += [record["sha256"] for record in records]
    assert len(set(digests)) == 1

    cost, arms = result["cost"], result["arms"]
    trainable = cost["kept"]["trainable_groups"]
    assert trainable >= 1
    assert cost["kept"]["samples"] == 2 * trainable, "exactly two samples of each trainable group"
    for phase in ("old_log_prob", "ref_log_prob", "actor_update"):
        assert arms["stock"]["rows"][phase] == 3 * 4
        assert arms["recast"]["rows"][phase] == 2 * trainable, "dropped before the actor sees them"

    # tokens by hand: the recorded prompts and 3 codes for each of the 4 rollouts
    with np.load(workspace / "out" / "jobs" / "rollouts.npz") as recording:
        assert recording["codes_BGL"].shape == (3, 4, 3)
    prompt_tokens = result["setting"]["prompt_tokens_mean"] * 3
    assert arms["stock"]["tokens"]["old_log_prob"] == pytest.approx(4 * (prompt_tokens + 3 * 3))
    for phase in ("old_log_prob", "ref_log_prob", "actor_update"):
        for arm in arms.values():
            assert 0 < arm["mfu"][phase] < 2
            assert arm["worker_seconds"][phase]["median"] < arm["seconds"][phase]["median"]
            assert arm["peak_bytes"][phase] > 0
    assert arms["stock"]["seconds"]["actor_total"]["count"] == 1
    assert "hook" in arms["recast"]["seconds"]
    assert "hook" not in arms["stock"]["seconds"]

    for arm in arms:
        assert traced(workspace / "out" / "trace" / f"{arm}.json.gz") == [
            "old_log_prob",
            "ref_log_prob",
            "actor_update",
            "optimizer",
        ]


def launcher(digests: dict[str, str]) -> Callable[[Job], list[dict[str, Any]]]:
    """A job that writes what a real one writes; `digests` says which rollouts an arm saw."""

    def launch(job: Job) -> list[dict[str, Any]]:
        calls = [
            {"phase": phase, "call": number, "rank": 0, "wall_s": 1.0, "cpu_s": 1.0}
            | {
                "resident_bytes": 1,
                "peak_bytes": 1,
                "rows": 1,
                "tokens": 1,
                "read_tokens": 1,
                "square_tokens": 1,
            }
            for phase in ("old_log_prob", "actor_update", "optimizer")
            for number in (1, 2, 3)
        ]
        replayed = [{"step": 1, "rollouts": 1, "sha256": digests[job.arm]}]
        for path, lines in ((job.environment["RECAST_MEASURE"], calls), (job.custom["log"], replayed)):
            Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return [{"timing_s/old_log_prob": 1.0, "timing_s/update_actor": 1.0}] * 3

    return launch


def test_arms_take_turns(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "rollouts.npz", [5], 10)
    runs = replay(recording, launcher({"stock": "a", "recast": "a"}), tmp_path / "jobs", steps=1, repeats=2)
    assert [run.arm for run in runs] == ["stock", "recast", "recast", "stock"]


def test_arms_that_saw_other_rollouts_are_not_compared(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "rollouts.npz", [5], 10)
    with pytest.raises(EnvironmentFault, match="replayed 2 different sets of rollouts"):
        replay(recording, launcher({"stock": "a", "recast": "b"}), tmp_path / "jobs", steps=1, repeats=1)


def test_a_missing_model_is_the_users_mistake(workspace: Path) -> None:
    done = recast(workspace, "profile", "recipe.yaml", "--model", "nowhere", "--out", "other")
    assert done.returncode == 2
    assert "error: model nowhere has no config.json" in done.stderr
