"""The picture is drawn, with and without a reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recast_cli.profiling.collect import most_memory, spread
from recast_cli.profiling.plot import plot


def arm(scale: float, phases: list[str], *extra: str) -> dict[str, Any]:
    return {
        "seconds": {p: spread([scale, 2 * scale]) for p in [*phases, *extra, "actor_total"]},
        "peak_bytes": dict.fromkeys(phases, int(scale * 1e7)),
        "resident_bytes": dict.fromkeys(phases, 10_000_000),
    }


@pytest.mark.parametrize("phases", [["old_log_prob", "actor_update"], ["ref_log_prob", "actor_update"]])
def test_a_picture_is_written(tmp_path: Path, phases: list[str]) -> None:
    arms = {"stock": arm(8, phases), "recast": arm(0.5, phases, "hook")}
    ratio = {**dict.fromkeys([*phases, "actor_total"], 16.0)}
    ratio["peak_memory"] = most_memory(arms["stock"]) / most_memory(arms["recast"])
    setting = {"prompts": 2, "group_size": 4, "prompt_tokens_mean": 50.0, "parameters": 10**6}
    result = {"arms": arms, "cost": {"ratio": ratio}, "setting": {**setting, "device": "cpu", "threads": 1}}
    plot(result, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
