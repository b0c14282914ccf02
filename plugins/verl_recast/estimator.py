"""Advantage estimator `recast`: +w for the positive, -w for the negative of a group, nothing else.

Selection has already happened when verl calls it: the trainer hook leaves each group its pair {i+, i-}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from recast_cli.core.contrast import pair_advantages
from verl_recast.settings import ESTIMATOR, RecastSettings


def recast_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    index: Sequence[str] = (),
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give +w (reward > 0) or -w in full to every response token (ReCast, arXiv 2604.22169).

    Args:
        token_level_rewards: Shape (N, T); the task reward sits on one token of each row.
        response_mask: Shape (N, T), 1 where a token counts.
        config: verl's `algorithm` section; `algorithm.recast` holds the weights.
        index: Group of each row.

    Returns:
        Advantages and returns, both of shape (N, T), zero where the mask is zero.

    Raises:
        ValueError: a whole group arrived: this is another trainer, which selects nothing.
    """
    counted = response_mask.sum(dim=-1).tolist()
    sizes = Counter(group for group, tokens in zip(index, counted, strict=False) if tokens)
    if sizes and max(sizes.values()) > 2:
        raise ValueError(
            f"algorithm.adv_estimator={ESTIMATOR} got {max(sizes.values())} rollouts of a group, needs the 2 "
            "that trainer.v1.trainer_mode=recast selects: set it"
        )
    settings = RecastSettings.from_algorithm(config)
    advantage_N = pair_advantages(
        token_level_rewards.sum(dim=-1).cpu().numpy(),
        w_positive=settings.w_positive,
        w_negative=settings.w_negative,
    )
    advantages = torch.from_numpy(advantage_N).to(token_level_rewards)[:, None] * response_mask
    return advantages, advantages


def register() -> None:
    """Register with verl; safe to call twice (verl refuses a second function under one name)."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est

    if ESTIMATOR not in ADV_ESTIMATOR_REGISTRY:
        register_adv_est(ESTIMATOR)(recast_advantage)
