"""Signal statistics of full groups, before anything is dropped (see docs/concepts/method.md)."""

from __future__ import annotations

import numpy as np


def group_statistics(
    rewards_BG: np.ndarray, scores_BG: np.ndarray, codes_BGL: np.ndarray, valid_BG: np.ndarray
) -> dict[str, float]:
    """How much a batch of groups could teach GRPO.

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
    hits_B = (rewards_BG > 0).sum(axis=1)
    distinct = sum(len(np.unique(codes_BGL[b][valid_BG[b]], axis=0)) for b in range(num_groups))
    num_valid = int(valid_BG.sum())
    return {
        "all_zero": float((hits_B == 0).mean()),
        "single_hit": float((hits_B == 1).mean()),
        "multi_hit": float((hits_B > 1).mean()),
        "hit_rate": float((rewards_BG > 0).mean()),
        "mean_score": float(scores_BG.mean()),
        "invalid": float(1.0 - valid_BG.mean()),
        "duplicate": (num_valid - distinct) / num_valid if num_valid else 0.0,
    }
