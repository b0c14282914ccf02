"""What a killed run leaves behind, and what of it a resumed one stands on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recast_cli.training.process import read_metrics
from recast_cli.training.resume import RESUMED_METRICS, TRACKER, join_metrics, last_checkpoint, rewind


def checkpoints(folder: Path, steps: list[int], tracker: str | None) -> Path:
    for step in steps:
        (folder / f"global_step_{step}" / "actor").mkdir(parents=True)
    if tracker is not None:
        folder.mkdir(exist_ok=True)
        (folder / TRACKER).write_text(tracker, encoding="utf-8")
    return folder


def log(path: Path, records: list[tuple[int, float]], torn: str = "") -> None:
    lines = [json.dumps({"step": step, "data": {"loss": loss}}) + "\n" for step, loss in records]
    path.write_text("".join(lines) + torn, encoding="utf-8")


@pytest.mark.parametrize(
    ("steps", "tracker", "expected"),
    [
        ([], None, 0),
        ([2], None, 0),  # killed inside the first checkpoint
        ([2, 4], "4", 4),
        ([2, 4, 6], "4", 4),  # killed inside the third
        ([2, 10], "10", 10),  # numbers, not texts
        ([2, 4], "", 4),  # killed while the tracker itself was written, which comes last
        ([2, 4], "6", 4),  # somebody deleted the newest
        ([6], "4", 0),  # or all but a torn one
    ],
)
def test_the_newest_whole_checkpoint(
    tmp_path: Path, steps: list[int], tracker: str | None, expected: int
) -> None:
    assert last_checkpoint(checkpoints(tmp_path / "checkpoints", steps, tracker)) == expected


def test_rewinding_removes_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    folder = checkpoints(tmp_path / "checkpoints", [2, 4], "2")
    log(tmp_path / "metrics.jsonl", [(1, 0.1), (2, 0.2), (3, 0.3)], torn='{"step": 4, "da')
    rollouts = [{"step": step, "sha256": f"{step}"} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in rollouts) + '{"st'
    (tmp_path / "rollouts.jsonl").write_text(text, encoding="utf-8")
    assert rewind(tmp_path) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["global_step_2", TRACKER]
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
    kept = (tmp_path / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2]
    assert rewind(tmp_path) == 2  # and again, as after a kill right here


def test_parts_of_the_log_become_one_in_which_each_step_stands_once(tmp_path: Path) -> None:
    log(tmp_path / "metrics.jsonl", [(1, 0.1), (2, 0.2), (3, 9.9)])
    log(tmp_path / RESUMED_METRICS, [(3, 0.3), (4, 0.4)])
    join_metrics(tmp_path)
    found = [(record["step"], record["loss"]) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert found == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert not (tmp_path / RESUMED_METRICS).exists()
    join_metrics(tmp_path / "nothing here")
    assert not (tmp_path / "nothing here").exists()
