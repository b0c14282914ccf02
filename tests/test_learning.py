"""The learning benchmark on one seed and about half its steps, which is what one core does in a few minutes:
RL raises the target's probability on rows that SFT has not seen."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.verl

ARMS = ["recast w-=0.25", "grpo kl=1"]


def test_log_prob_and_ndcg_rise_on_unseen_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    learning = importlib.import_module("learning")
    options = learning.options_of(steps=16)
    options["rl"]["share_prompt"] = True  # the same gradients, from a tenth of GRPO's tokens
    result = learning.study(tmp_path, [0], ARMS, options)
    for arm in ARMS:
        for metric in ("target_log_prob", "ndcg@10"):
            mean, low, high = result["difference"][arm][metric]
            assert 0 < low <= mean <= high, (arm, metric, low, mean, high)
    # The two parts of the log-prob are one sum, and so are its levels.
    for parts in (("catalogue_mass", "log_prob_in_catalogue"), ("level_1", "level_2", "level_3")):
        found = sum(result["difference"][ARMS[0]][part][0] for part in parts)
        assert found == pytest.approx(result["difference"][ARMS[0]]["target_log_prob"][0], abs=1e-4)
