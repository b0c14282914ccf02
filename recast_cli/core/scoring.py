"""Hit reward and structural score of predicted semantic IDs (ReCast, arXiv 2604.22169; see
docs/concepts/method.md).

Shapes: B prompts, G rollouts, T targets of a prompt, L levels.
"""

from __future__ import annotations

import numpy as np


def prefix_value(matched: np.ndarray | int, num_levels: int) -> np.ndarray:
    """phi: 10^(m - L) for a common prefix of m >= 1 codes, else 0. For L = 3: 1, 0.1, 0.01, 0."""
    matched = np.asarray(matched)
    return np.where(matched > 0, 10.0 ** (matched - float(num_levels)), 0.0)


def matched_levels(codes_BGL: np.ndarray, targets_BTL: np.ndarray) -> np.ndarray:
    """Length of the common prefix of every rollout with every target: int array (B, G, T)."""
    equal_BGTL = codes_BGL[:, :, None, :] == targets_BTL[:, None, :, :]
    return np.cumprod(equal_BGTL, axis=-1).sum(axis=-1)


def score_rollouts(
    codes_BGL: np.ndarray, targets_BTL: np.ndarray, target_mask_BT: np.ndarray, valid_BG: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sparse hit reward and structural score of rollouts that carry one semantic ID each.

    The structural score only selects; it is never a reward.

    Args:
        codes_BGL: Codes of the rollouts; ignored where `valid_BG` is False.
        targets_BTL: Codes of the targets, padded to T.
        target_mask_BT: True where a target counts.
        valid_BG: True where the rollout holds a semantic ID.

    Returns:
        rewards_BG (1 for a hit, else 0) and scores_BG (max over targets of phi), float64. Both are 0 for a
        rollout without a semantic ID and for a prompt without a target.
    """
    num_levels = codes_BGL.shape[-1]
    phi_BGT = prefix_value(matched_levels(codes_BGL, targets_BTL), num_levels)
    phi_BGT = np.where(target_mask_BT[:, None, :] & valid_BG[:, :, None], phi_BGT, 0.0)
    scores_BG = phi_BGT.max(axis=-1, initial=0.0)
    return (scores_BG == 1.0).astype(np.float64), scores_BG


def score_sets(predictions: list[tuple[int, ...]], targets: list[tuple[int, ...]]) -> tuple[float, float]:
    """Reward and structural score of one rollout that may hold several semantic IDs.

    P and T are sets: duplicates collapse. r = 1 if they share a semantic ID; u is the mean over p in P of
    the maximum over t in T of phi(p, t); both are 0 if either set is empty.
    """
    distinct, wanted = set(predictions), set(targets)
    if not distinct or not wanted:
        return 0.0, 0.0

    def best(codes: tuple[int, ...]) -> float:
        values = []
        for target in wanted:
            matched = next(
                (i for i, pair in enumerate(zip(codes, target, strict=True)) if pair[0] != pair[1]),
                len(target),
            )
            values.append(float(prefix_value(matched, len(target))))
        return max(values)

    return float(bool(distinct & wanted)), sum(best(codes) for codes in distinct) / len(distinct)
