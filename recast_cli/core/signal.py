"""Signal statistics of full groups, before anything is dropped (see docs/concepts/method.md)."""

from __future__ import annotations

import numpy as np


def group_statistics(
    rewards_BG: np.ndarray,
    scores_BG: np.ndarray,
    codes_BGL: np.ndarray,
    valid_BG: np.ndarray,
    present_BG: np.ndarray | None = None,
) -> dict[str, float]:
    """How much a batch of groups could teach GRPO.

    Args:
        present_BG: True where a rollout exists (ragged groups); absent ones count nowhere. Default: all.

    Returns:
        `all_zero`, `single_hit`, `multi_hit`: fractions of groups with 0, 1 and more than 1 hits (sum to 1);
        `hit_rate`: fraction of rollouts that hit; `mean_score`: mean structural score; `invalid`: fraction of
        rollouts without a semantic ID of the catalogue; `duplicate`: fraction of valid rollouts whose
        semantic ID an earlier rollout of the group already had. Empty input gives zeros.
    """
    num_groups, num_rollouts = rewards_BG.shape
    if num_groups == 0 or num_rollouts == 0:
        names = ("all_zero", "single_hit", "multi_hit", "hit_rate", "mean_score", "invalid", "duplicate")
        return dict.fromkeys(names, 0.0)
    present_BG = np.ones_like(valid_BG, dtype=bool) if present_BG is None else present_BG
    valid_BG = valid_BG & present_BG
    num_present = max(1, int(present_BG.sum()))
    hits_B = ((rewards_BG > 0) & present_BG).sum(axis=1)
    distinct = sum(len(np.unique(codes_BGL[b][valid_BG[b]], axis=0)) for b in range(num_groups))
    num_valid = int(valid_BG.sum())
    return {
        "all_zero": float((hits_B == 0).mean()),
        "single_hit": float((hits_B == 1).mean()),
        "multi_hit": float((hits_B > 1).mean()),
        "hit_rate": float(hits_B.sum()) / num_present,
        "mean_score": float(np.where(present_BG, scores_BG, 0.0).sum()) / num_present,
        "invalid": 1.0 - num_valid / num_present,
        "duplicate": (num_valid - distinct) / num_valid if num_valid else 0.0,
    }
