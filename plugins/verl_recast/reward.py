"""Reward function for verl's own reward managers: `custom_reward_function.path=pkg://verl_recast.reward`.

Our agent loop scores from token ids and does not need it; stock agent loops and vLLM rollouts do. Special
tokens are dropped by verl's decode, which is why code tokens are ordinary added tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recast_cli.core.scoring import score_sets
from recast_cli.core.spelling import find_all


def parse_targets(ground_truth: str | Sequence[str]) -> list[tuple[int, ...]]:
    """Codes of each semantic ID in `reward_model.ground_truth`, which is one text or several."""
    texts = [ground_truth] if isinstance(ground_truth, str) else ground_truth
    return [sid for text in texts for sid in find_all(text)]


def require_targets(ground_truth: str | Sequence[str]) -> list[tuple[int, ...]]:
    """As `parse_targets`, for a row that cannot do without.

    Raises:
        ValueError: no semantic ID in it, or semantic IDs of different lengths.
    """
    targets = parse_targets(ground_truth)
    if not targets:
        raise ValueError(f"reward_model.ground_truth holds no semantic ID: {ground_truth!r}")
    if len({len(target) for target in targets}) > 1:
        raise ValueError(f"reward_model.ground_truth has semantic IDs of different lengths: {ground_truth!r}")
    return targets


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | Sequence[str],
    extra_info: dict[str, Any] | None = None,
    **_: Any,
) -> dict[str, float]:
    """Sparse hit reward of one response (ReCast, arXiv 2604.22169; see docs/concepts/method.md).

    Args:
        data_source: Unused; part of verl's interface.
        solution_str: Decoded response.
        ground_truth: Semantic-ID text of the target, or several.
        extra_info: Unused; part of verl's interface.

    Returns:
        `score` (1 for a hit, else 0), and the `structural_score` that selection reads; it is never a reward.
    """
    targets = parse_targets(ground_truth)
    num_levels = len(targets[0]) if targets else 0
    predictions = [sid for sid in find_all(solution_str) if len(sid) == num_levels]
    hit, structural = score_sets(predictions, targets)
    return {"score": hit, "hit": hit, "structural_score": structural}
