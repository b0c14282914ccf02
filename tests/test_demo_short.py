"""What `make demo-short` left behind, and that a second run reuses it. CI runs this after the demo."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.demo

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("runs") / "demo-short"
ARMS = {"warm_start", "rl", "grpo", "sft_continued"}


def read() -> dict[str, Any]:
    return json.loads((ROOT / RUN / "summary.json").read_text(encoding="utf-8"))


def test_the_summary_holds_every_number_it_promises() -> None:
    summary = read()
    for part in ("evaluation", "evaluation_history_kept", "validation", "validation_history_kept"):
        assert set(summary[part]) == ARMS
        for metrics in summary[part].values():
            for metric in ("hr", "ndcg", "recall", "pass", "mrr", "coverage"):
                for k in (1, 5, 10, 20, 50):
                    assert 0 <= metrics[f"{metric}@{k}"] <= 1
            assert metrics["hr@1"] <= metrics["hr@10"] and metrics["ndcg@10"] <= metrics["hr@10"]
            assert metrics["target_log_prob"] < 0
    for arm in summary["difference"].values():
        assert all(low <= mean <= high for mean, low, high in arm.values())
    assert summary["invalid_items"] == 0
    assert summary["num_users"] == 943 and summary["num_items"] == 1349
    signal = summary["signal"]
    assert math.isclose(signal["all_zero"] + signal["single_hit"] + signal["multi_hit"], 1)
    assert signal["all_zero"] > 0.5 and signal["all_zero_after_repair"] == 0
    assert summary["rollouts"] == {"rl": 2 * 4 * 32, "grpo": 2 * 4 * 32}


def test_the_actor_of_recast_costs_less() -> None:
    cost = read()["cost"]
    for phase in ("actor_update", "old_log_prob", "ref_log_prob", "actor_total", "peak_memory"):
        assert cost["ratio"][phase] > 1
    tokens, mfu = cost["tokens"], cost["mfu"]
    assert cost["ratio"]["tokens"] == pytest.approx(32 / 2)  # two of a group's 32 rollouts, of equal length
    assert set(tokens) == set(mfu) == {"stock", "recast"}
    for arm in mfu.values():
        assert all(0 < share < 1.5 for share in arm.values())


def test_eight_gigabytes_are_enough() -> None:
    assert 1 << 30 < read()["peak_memory_bytes"] < 8_000_000_000


def test_a_second_run_reuses_everything_and_says_so() -> None:
    before = read()
    kept = {path: path.stat().st_mtime_ns for path in (ROOT / RUN).rglob("*.safetensors")}
    command = [sys.executable, "-m", "recast_cli.main", "demo", "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": reused, same") == 2, done.stderr  # dataset and tokenizer
    # the warm start by its own command and by three runs, these runs, eight evaluations, the profile
    assert done.stderr.count("reusing") == 4 + 3 + 8 + 1, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (ROOT / RUN).rglob("*.safetensors")} == kept
    again = read()
    assert again == before  # the seconds and the memory of making it as well
