"""Repair and contrast: which two rollouts of a group the actor is updated on (ReCast, arXiv 2604.22169).

Search wide, update two. A group whose rollouts all miss is repaired with an anchor built from the target;
then only the strongest positive and the hardest negative are kept.

Shapes: B groups (prompts), G rollouts of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Selection:
    """What to do with each group; every array has length B and -1 means none.

    Attributes:
        anchor_B: Rollout that the anchor replaces (only in all-zero groups).
        positive_B: i+, the strongest positive; equal to `anchor_B` in a repaired group.
        negative_B: i-, the hardest negative.
        all_zero_B: True where no rollout hit, before any repair.
        trainable_B: True where both i+ and i- exist. The rest are skipped: a group that hits everywhere has
            no legal negative, an all-zero group that cannot be repaired has no positive.
    """

    anchor_B: np.ndarray
    positive_B: np.ndarray
    negative_B: np.ndarray
    all_zero_B: np.ndarray

    @property
    def trainable_B(self) -> np.ndarray:
        return (self.positive_B >= 0) & (self.negative_B >= 0)


def _first(order_keys: tuple[np.ndarray, ...], allowed_BG: np.ndarray) -> np.ndarray:
    """Rollout with the largest key among the allowed ones, -1 where none is; keys compare left to right.

    Lexicographic: an earlier key decides, a later one breaks its ties.
    """
    alive_BG = allowed_BG.copy()
    for key_BG in order_keys:
        ranked = np.unique(key_BG, return_inverse=True)[1].reshape(key_BG.shape)  # any dtype to int ranks
        best_B1 = np.where(alive_BG, ranked, -1).max(axis=1, keepdims=True)
        alive_BG &= ranked == best_B1
    return np.where(alive_BG.any(axis=1), alive_BG.argmax(axis=1), -1)


def select_pairs(
    rewards_BG: np.ndarray,
    scores_BG: np.ndarray,
    tie_keys_BG: np.ndarray,
    *,
    present_BG: np.ndarray | None = None,
    valid_BG: np.ndarray | None = None,
    lends_BG: np.ndarray | None = None,
    log_probs_BG: np.ndarray | None = None,
    repair: bool = True,
) -> Selection:
    """Choose anchor, positive and negative of every group.

    Repair (only where sum_i r_i = 0): the anchor replaces the rollout with the lowest structural score,
    which keeps G. Contrast: i+ = argmax r, i- = argmax u among r = 0. The paper leaves ties open; they go to
    the larger `tie_keys_BG`, a seeded hash. A rollout without a semantic ID is replaced before a valid one
    of equal score, and is a negative only if no valid miss exists.

    A group is ragged where `present_BG` is False. One with a single rollout is never trainable: an anchor in
    its place has no negative beside it.

    Args:
        rewards_BG: Task reward, 0 for a miss.
        scores_BG: Structural score u.
        tie_keys_BG: Distinct keys inside a group (see `seeding.tie_keys`).
        present_BG: True where a rollout exists (ragged groups); default all.
        valid_BG: True where a rollout holds a semantic ID; default all.
        lends_BG: True where an anchor may take a rollout's place; default all. A thought that broke off
            cannot lend its text: the next-lowest score is taken, and where nobody lends an all-zero group is
            left without a positive.
        log_probs_BG: Sampling log-prob of each rollout's semantic ID. Given, the most probable of equally
            hard negatives is taken, the one the policy confuses most; NaN (not known) loses to any number.
            Default: the seeded hash alone decides.
        repair: False leaves all-zero groups without a positive (the ablation arm "contrast only").
    """
    present_BG = np.ones_like(rewards_BG, dtype=bool) if present_BG is None else present_BG.astype(bool)
    valid_BG = present_BG if valid_BG is None else valid_BG.astype(bool) & present_BG
    hit_BG = (rewards_BG > 0) & present_BG
    all_zero_B = ~hit_BG.any(axis=1)

    may_lend_BG = present_BG if lends_BG is None else lends_BG.astype(bool) & present_BG
    may_lend_BG = may_lend_BG & all_zero_B[:, None] & repair
    anchor_B = _first((-scores_BG, ~valid_BG, tie_keys_BG), may_lend_BG)
    is_anchor_BG = np.arange(rewards_BG.shape[1])[None, :] == anchor_B[:, None]

    natural_B = _first((rewards_BG, tie_keys_BG), hit_BG)
    positive_B = np.where(anchor_B >= 0, anchor_B, natural_B)
    confusable = () if log_probs_BG is None else (np.nan_to_num(log_probs_BG, nan=-np.inf),)
    hardness = (valid_BG, scores_BG, *confusable, tie_keys_BG)
    negative_B = _first(hardness, present_BG & ~hit_BG & ~is_anchor_BG)
    return Selection(anchor_B, positive_B, negative_B, all_zero_B)


def pair_advantages(rewards: np.ndarray, *, w_positive: float = 1.0, w_negative: float = 1.0) -> np.ndarray:
    """Advantage of kept rollouts: +w for i+ (reward > 0), -w for i-; given in full to every response
    token."""
    return np.where(np.asarray(rewards) > 0, w_positive, -w_negative)
