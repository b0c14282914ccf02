"""What a rollout brings along: the history of its row, and how probable it was.

Shapes: N rollouts, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

HISTORY = "history"  # in a row's extra_info: item rows, in the catalogue's order

# In the extra_fields of a sampled rollout: what nobody can say of an anchor.
SAMPLED_FIELDS = ("trie_log_probs", "catalogue_mass")


def take_histories(rows: list[dict[str, Any]]) -> None:
    """Move each row's history from `extra_info` beside it, where it is no part of the row's G records."""
    for row in rows:
        extra_info = dict(row.get("extra_info") or {})
        history = extra_info.pop(HISTORY, None)
        row["extra_info"] = extra_info
        row[HISTORY] = None if history is None else [int(item) for item in history]


def require_histories(rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The histories that `take_histories` found, of which none may be missing.

    Raises:
        ValueError: a row without one: its rollouts could repeat what the user had.
    """
    lacking = next((row for row in rows if row[HISTORY] is None), None)
    if lacking is not None:
        raise ValueError(
            f"row with extra_info.index {lacking['index']} has no extra_info.{HISTORY}, needed with "
            "rollout.custom.exclude_history: the row numbers of its items in semantic_ids.parquet"
        )
    return [row[HISTORY] for row in rows]


def sampled_fields(log_probs_NL: np.ndarray, trie_log_probs_NL: np.ndarray) -> list[dict[str, Any]]:
    """Of each rollout `trie_log_probs`, and `catalogue_mass`: the share of the model's probability that the
    mask left in, product over the levels; each where the sampler knew what it takes."""
    full_N, trie_N = (values.astype(np.float64).sum(axis=1) for values in (log_probs_NL, trie_log_probs_NL))
    found = []
    for log_probs, mass in zip(trie_log_probs_NL.tolist(), np.exp(full_N - trie_N).tolist(), strict=True):
        fields: dict[str, Any] = {}
        if not any(map(math.isnan, log_probs)):
            fields["trie_log_probs"] = log_probs
            if not math.isnan(mass):
                fields["catalogue_mass"] = mass
        found.append(fields)
    return found


def mean_catalogue_mass(extra_fields: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`catalogue_mass`: mean over the rollouts that say one; nothing if none does."""
    masses = [fields["catalogue_mass"] for fields in extra_fields if "catalogue_mass" in fields]
    return {"catalogue_mass": float(np.mean(masses))} if masses else {}
