"""Repair, contrast and drop in one call, for trainers that answer with bare codes (docs/guides).

The verl plugin does the same on its own batches, where answers may hold text round the semantic ID.

Shapes: B groups (prompts), G rollouts of a group, T targets of a prompt, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recast_cli.core.contrast import pair_advantages, select_pairs
from recast_cli.core.scoring import score_rollouts
from recast_cli.core.seeding import hash64, tie_keys
from recast_cli.core.signal import group_statistics


@dataclass(frozen=True)
class Pairs:
    """What is left of B groups.

    Attributes:
        kept_B2: Places of i+ and i- in the group; of a skipped group, any two.
        repaired_B: True where i+ is an anchor, which takes the place of the rollout that stood there.
        codes_B2L: Codes of the two; of an anchor, those of a target.
        advantages_B2: +w and -w, in full for every token; 0 in a skipped group.
        trainable_B: False where a group is skipped: every rollout hit, or there is but one.
        signal: `group_statistics` of the groups as sampled, and `all_zero_after_repair`.
    """

    kept_B2: np.ndarray
    repaired_B: np.ndarray
    codes_B2L: np.ndarray
    advantages_B2: np.ndarray
    trainable_B: np.ndarray
    signal: dict[str, float]


def pad_targets(
    targets: Sequence[Sequence[tuple[int, ...]]], num_levels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of every prompt's targets as targets_BTL, and mask_BT, True where there is one.

    Raises:
        ValueError: a prompt without a target, or a target of another length than L.
    """
    for b, sids in enumerate(targets):
        if not sids or any(len(codes) != num_levels for codes in sids):
            raise ValueError(
                f"prompt {b} has targets {list(sids)}, needed at least one, of {num_levels} codes"
            )
    mask_BT = np.arange(max(map(len, targets), default=0)) < np.array([[len(sids)] for sids in targets])
    targets_BTL = np.full((*mask_BT.shape, num_levels), -1, dtype=np.int64)
    targets_BTL[mask_BT] = [codes for sids in targets for codes in sids]
    return targets_BTL, mask_BT


def choose_pairs(
    codes_BGL: np.ndarray,
    valid_BG: np.ndarray,
    targets: Sequence[Sequence[tuple[int, ...]]],
    index_B: np.ndarray,
    *,
    seed: int,
    step: int,
    w_positive: float = 1.0,
    w_negative: float = 1.0,
    present_BG: np.ndarray | None = None,
) -> Pairs:
    """The pair of each group and its advantages (ReCast, arXiv 2604.22169; see docs/concepts/method.md).

    Args:
        codes_BGL: Codes of the rollouts; ignored where `valid_BG` is False.
        valid_BG: True where a rollout holds a semantic ID.
        targets: Codes of each prompt's targets; the anchor is one of them, drawn by the seed.
        index_B: The row's own number. With `seed` and `step` it decides ties, so that runs repeat.
        present_BG: False where a group has no such rollout (distinct ones of a small catalogue).

    Raises:
        ValueError: see `pad_targets`.
    """
    num_groups, width, num_levels = codes_BGL.shape
    targets_BTL, mask_BT = pad_targets(targets, num_levels)
    rewards_BG, scores_BG = score_rollouts(codes_BGL, targets_BTL, mask_BT, valid_BG)
    signal = group_statistics(rewards_BG, scores_BG, codes_BGL, valid_BG, present_BG)
    keys_BG = tie_keys(seed, step, index_B, width)
    chosen = select_pairs(rewards_BG, scores_BG, keys_BG, valid_BG=valid_BG, present_BG=present_BG)

    repaired = np.flatnonzero(chosen.anchor_B >= 0)
    places = (repaired, chosen.anchor_B[repaired])
    drawn_B = hash64(seed, step, index_B) % mask_BT.sum(axis=1).astype(np.uint64)
    codes_BGL, rewards_BG = codes_BGL.copy(), rewards_BG.copy()
    codes_BGL[places] = targets_BTL[repaired, drawn_B[repaired].astype(np.int64)]
    rewards_BG[places] = 1.0
    signal["all_zero_after_repair"] = float((rewards_BG.sum(axis=1) == 0).mean())

    kept_B2 = np.stack([chosen.positive_B, chosen.negative_B], axis=1) % width  # none is -1: the last one
    rows_B1 = np.arange(num_groups)[:, None]
    weights_B2 = pair_advantages(rewards_BG[rows_B1, kept_B2], w_positive=w_positive, w_negative=w_negative)
    advantages_B2 = np.where(chosen.trainable_B[:, None], weights_B2, 0.0)
    return Pairs(
        kept_B2=kept_B2,
        repaired_B=chosen.anchor_B >= 0,
        codes_B2L=codes_BGL[rows_B1, kept_B2],
        advantages_B2=advantages_B2,
        trainable_B=chosen.trainable_B,
        signal=signal,
    )
