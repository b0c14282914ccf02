"""What an evaluation leaves behind: means with intervals, one row per user, and what was measured."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from recast_cli.core.ranking import Interval
from recast_cli.errors import ArtifactError
from recast_cli.host import nearest_parent
from recast_cli.outputs import atomic_file

FORMAT_VERSION = 1
MODES = ("history_removed", "history_kept")
EVALUATION, USERS = "evaluation.json", "users.parquet"


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_model`.

    Attributes:
        facts: Split, counts, identities of dataset, tokenizer, trie and model, options, versions.
        arms: arm (`model`, `popularity`, `item_knn`) -> mode (`history_removed`, `history_kept`) -> metric
            -> value; means over users carry an interval, catalogue-wide numbers are plain.
        users: One row per evaluated row: index, user_id, target, target_log_prob, rank_removed, rank_kept
            (1-based, null beyond the beam), top_removed, top_kept, and both ranks of every baseline.
    """

    facts: dict[str, Any]
    arms: dict[str, dict[str, dict[str, Interval | float]]]
    users: pl.DataFrame

    def metric(self, name: str, *, mode: str = "history_removed", arm: str = "model") -> float:
        """One number, e.g. `metric("ndcg@10")`."""
        value = self.arms[arm][mode][name]
        return value.mean if isinstance(value, Interval) else value

    def means(self, *, mode: str = "history_removed", arm: str = "model") -> dict[str, float]:
        """All numbers of one arm in one mode."""
        return {name: self.metric(name, mode=mode, arm=arm) for name in self.arms[arm][mode]}

    def to_json(self) -> dict[str, Any]:
        """The facts, and `metrics` and `intervals` (95 %, [low, high]) by mode, arm and name; NaN is null."""
        modes = list(self.arms["model"])
        metrics = {mode: {arm: self.means(mode=mode, arm=arm) for arm in self.arms} for mode in modes}
        intervals = {
            mode: {
                arm: {name: [v.low, v.high] for name, v in values[mode].items() if isinstance(v, Interval)}
                for arm, values in self.arms.items()
            }
            for mode in modes
        }
        document = {
            "format_version": FORMAT_VERSION,
            **self.facts,
            "metrics": metrics,
            "intervals": intervals,
        }
        return _without_nan(document)

    def save(self, out: Path) -> tuple[Path, Path]:
        """Write `evaluation.json` and `users.parquet` into a folder, or `X.json` and `X.users.parquet`.

        Returns:
            The two paths. The JSON goes first and comes last: where it is, both are of one evaluation.
        """
        paths = require_place(out)
        document = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        with atomic_file(paths[0]) as text, atomic_file(paths[1]) as table:
            self.users.write_parquet(table)
            text.write_text(document, encoding="utf-8")
            paths[0].unlink(missing_ok=True)  # only now: a full disk has said so by then
        return paths


def require_place(out: Path) -> tuple[Path, Path]:
    """Where an evaluation goes: (JSON, table of users).

    Raises:
        ArtifactError: what is there is no evaluation, or nothing can be written there.
    """
    single = out.suffix == ".json"
    paths = (out, out.with_suffix(".users.parquet")) if single else (out / EVALUATION, out / USERS)
    hint = "choose another --out"
    folder = nearest_parent(paths[0].parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArtifactError(f"--out {out} cannot be written: {folder} is no folder that may be", hint)
    there = [path for path in paths if path.exists()]
    try:
        ours = not there or {"format_version", "metrics"} <= json.loads(paths[0].read_text("utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise ArtifactError(f"{there[0]} is there already and no evaluation", hint)
    return paths


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
