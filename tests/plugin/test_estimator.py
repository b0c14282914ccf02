"""The `recast` estimator through verl's own registry and `compute_advantage`, and its settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage

from verl_recast import estimator
from verl_recast.settings import ARMS, RecastSettings

REWARDS = torch.tensor([[0, 0, 1.0], [0, 0, 0], [0, 0, 0], [0, 1.0, 0]])  # i+, i-, i-, i+ (2 tokens long)
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0]])


def advantages(algorithm: dict | None) -> torch.Tensor:
    batch = {"token_level_rewards": REWARDS, "response_mask": MASK}
    data = DataProto.from_dict(batch, non_tensors={"uid": np.array(["a", "a", "b", "b"], dtype=object)})
    config = None if algorithm is None else OmegaConf.create(algorithm)
    data = compute_advantage(data, adv_estimator="recast", config=config)
    assert torch.equal(data.batch["returns"], data.batch["advantages"])
    return data.batch["advantages"]


def test_the_papers_weights_give_plus_and_minus_one_to_every_token_that_counts() -> None:
    expected = torch.tensor([[1.0, 1, 1], [-1, -1, -1], [0, 0, 0], [1, 1, 0]])
    assert torch.equal(advantages({}), expected)
    assert torch.equal(advantages(None), expected)
    assert torch.equal(advantages({"recast": None}), expected)


def test_weights_are_given_in_full_and_not_divided_by_the_length() -> None:
    found = advantages({"recast": {"w_positive": 2, "w_negative": 0.25}})
    assert torch.equal(found, torch.tensor([[2.0, 2, 2], [-0.25, -0.25, -0.25], [0, 0, 0], [2, 2, 0]]))


def test_a_negative_weight_of_zero_learns_from_the_positive_alone() -> None:
    found = advantages({"recast": {"w_negative": 0}})
    assert torch.equal(found, torch.tensor([[1.0, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 0]]))


def test_a_whole_group_is_refused_since_nothing_selected_from_it() -> None:
    """verl's own trainer with this estimator would push every rollout by w: no method at all."""
    three = torch.tensor([[0, 0, 1.0], [0, 0, 0], [0, 0, 0], [0, 1.0, 0]])
    data = DataProto.from_dict(
        {"token_level_rewards": three, "response_mask": torch.ones(4, 3)},
        non_tensors={"uid": np.array(["a", "a", "a", "b"], dtype=object)},
    )
    with pytest.raises(ValueError, match="got 3 rollouts of a group, needs the 2 that"):
        compute_advantage(data, adv_estimator="recast", config=OmegaConf.create({}))
    # masked padding rows of one group are no rollouts
    data.batch["response_mask"] = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]])
    compute_advantage(data, adv_estimator="recast", config=OmegaConf.create({}))


def test_registers_once_under_its_name() -> None:
    estimator.register()
    estimator.register()  # verl itself refuses a second function under one name
    assert core_algos.get_adv_estimator_fn("recast") is estimator.recast_advantage
    with pytest.raises(ValueError, match="recast"):
        core_algos.register_adv_est("recast")(lambda: None)


def test_settings_default_to_the_paper() -> None:
    paper = RecastSettings.from_algorithm({})
    assert (paper.arm, paper.repairs, paper.contrasts) == ("recast", True, True)
    assert (paper.w_positive, paper.w_negative, paper.loss_scale, paper.seed) == (1, 1, "kept", 0)
    section = OmegaConf.create({"recast": {"w_negative": 0.5, "seed": 7}})
    assert RecastSettings.from_algorithm(section) == RecastSettings(w_negative=0.5, seed=7)
    parts = {arm: (RecastSettings(arm=arm).repairs, RecastSettings(arm=arm).contrasts) for arm in ARMS}
    assert parts == {
        "recast": (True, True),
        "repair-only": (True, False),
        "contrast-only": (False, True),
        "stock": (False, False),
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"w_postive": 1}, "unknown key 'w_postive', known: .*w_positive"),
        ({"w_negative": -0.5}, "w_negative is -0.5, needs a number >= 0"),
        ({"w_positive": float("nan")}, "w_positive is nan, needs a number >= 0"),
    ],
)
def test_settings_refuse(section: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecastSettings.from_algorithm({"recast": section})
