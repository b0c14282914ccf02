"""What trainer mode `recast` refuses, on a real verl config."""

from __future__ import annotations

from pathlib import Path

import pytest
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from verl_recast.check_config import check_config

GOOD = (
    "algorithm.adv_estimator=recast",
    "actor_rollout_ref.rollout.n=4",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "trainer.n_gpus_per_node=1",
)


def config(*overrides: str) -> DictConfig:
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides=[*GOOD, *overrides])


def test_accepts_a_config_that_it_is_made_for() -> None:
    check_config(config())
    check_config(config("+algorithm.recast.w_negative=0", "actor_rollout_ref.rollout.n=2"))
    micro = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
    check_config(config(f"{micro}=4"))
    check_config(config(f"{micro}=3", "actor_rollout_ref.actor.use_dynamic_bsz=True"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator is grpo, needs recast"),
        ("algorithm.use_kl_in_reward=True", "algorithm.use_kl_in_reward is True, needs False"),
        ("algorithm.filter_groups.enable=True", "algorithm.filter_groups.enable is True, needs False"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode is True, needs False"),
        (
            "algorithm.rollout_correction.rollout_is=token",
            "rollout_correction.rollout_is is token, needs null",
        ),
        (
            "algorithm.rollout_correction.rollout_rs=seq_mean_k1",
            "rollout_correction.rollout_rs is seq_mean_k1, needs null",
        ),
        ("actor_rollout_ref.rollout.n=1", "rollout.n is 1, needs at least 2"),
        (
            "data.train_batch_size=6",
            "data.train_batch_size is 6, needs a multiple of ppo_mini_batch_size=4",
        ),
        (
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3",
            "actor.ppo_micro_batch_size_per_gpu is 3, needs a divisor of 8, the rows",
        ),
        (
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16",
            "ref.log_prob_micro_batch_size_per_gpu is 16, needs a divisor of 8, the rows",
        ),
        ("critic.enable=True", "critic.enable is True, needs False or null"),
        ("actor_rollout_ref.actor.shuffle=True", "actor.shuffle is True, needs False"),
        ("+algorithm.recast.w=1", "algorithm.recast has unknown key 'w'"),
        ("+algorithm.recast.w_negative=-1", "algorithm.recast.w_negative is -1, needs a number >= 0"),
    ],
)
def test_refuses_by_name_with_the_value_found_and_the_value_needed(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_config(config(override))
    assert message in str(caught.value)
