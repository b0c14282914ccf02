"""Scores of the groups that an engine answered with: hit, structural score, validity, verl's reward extras.

Shapes: B prompts, G rollouts, L levels.
"""

from __future__ import annotations

import numpy as np

from recast_cli.core.pairs import pad_targets
from recast_cli.core.scoring import score_rollouts
from verl_recast.catalogue import Catalogue
from verl_recast.validation import beam_info

Targets = list[list[tuple[int, ...]]]  # codes of each prompt's targets


def score_groups(
    catalogue: Catalogue, targets: Targets, codes_BGL: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hit, structural score and validity (membership in the catalogue) of every rollout, each (B, G).

    Args:
        codes_BGL: Spelled codes, as those of the targets are.

    Raises:
        ValueError: a target of another number of codes than the catalogue has levels.
    """
    targets_BTL, mask_BT = pad_targets(targets, catalogue.num_levels)
    members = catalogue.members
    valid_BG = np.array([[tuple(sid) in members for sid in group] for group in codes_BGL.tolist()])
    hits_BG, scores_BG = score_rollouts(codes_BGL, targets_BTL, mask_BT, valid_BG)
    return hits_BG, scores_BG, valid_BG


def reward_infos(hits_BG: np.ndarray, scores_BG: np.ndarray) -> list[list[dict[str, float]]]:
    """verl's reward extras of every rollout."""
    return [
        [{"hit": float(hit), "structural_score": float(score)} for hit, score in zip(*group, strict=True)]
        for group in zip(hits_BG, scores_BG, strict=True)
    ]


def with_ranks(
    infos: list[list[dict[str, float]]], targets: Targets, codes_BGL: np.ndarray, valid_BG: np.ndarray
) -> list[list[dict[str, float]]]:
    """The same with what exact ranking metrics need: the beams of a group come in descending order."""
    return [
        [
            info | beam_info(codes, rank, targets[b], valid=bool(valid_BG[b, rank]))
            for rank, (info, codes) in enumerate(zip(infos[b], codes_BGL[b].tolist(), strict=True))
        ]
        for b in range(len(infos))
    ]
