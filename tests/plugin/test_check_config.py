"""What trainer mode `recast` refuses, on a real verl config."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import verl
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from verl_recast.check_config import check_config

GOOD = (
    "algorithm.adv_estimator=recast",
    "trainer.v1.trainer_mode=recast",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=4",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "trainer.n_gpus_per_node=1",
)

ENGINE = "actor_rollout_ref.rollout.name=recast_sid"
SID_ENGINE = (ENGINE, "+actor_rollout_ref.rollout.custom={tokenizer: some/folder}")


def config(*overrides: str) -> DictConfig:
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides=[*GOOD, *overrides])


def arm(name: str, estimator: str) -> tuple[str, str]:
    return f"+algorithm.recast.arm={name}", f"algorithm.adv_estimator={estimator}"


MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"


def test_accepts_a_config_that_it_is_made_for() -> None:
    check_config(config())
    check_config(config("+algorithm.recast.w_negative=0", "actor_rollout_ref.rollout.n=2"))
    check_config(config(f"{MICRO}=4"))
    check_config(config(f"{MICRO}=3", "actor_rollout_ref.actor.use_dynamic_bsz=True"))


def test_accepts_every_arm_with_an_estimator_that_fits_it() -> None:
    check_config(config(*arm("contrast-only", "recast"), "algorithm.filter_groups.enable=True"))
    check_config(config(*arm("repair-only", "grpo"), f"{MICRO}=16"))  # 4 prompts of 4 rollouts are kept
    check_config(config(*arm("repair-only", "rloo")))
    check_config(config(*arm("stock", "grpo"), "algorithm.rollout_correction.rollout_is=token"))
    check_config(config(*arm("stock", "grpo"), "algorithm.use_kl_in_reward=True"))


def test_shared_prompts_need_an_engine_that_reads_whole_rows() -> None:
    custom = "+actor_rollout_ref.rollout.custom={share_prompt: true, tokenizer: t}"
    check_config(config(custom))
    for override, message in (
        ("actor_rollout_ref.actor.use_prefix_grouper=True", "use_prefix_grouper is True, needs False"),
        ("actor_rollout_ref.actor.pad_to_length=True", "actor.pad_to_length is True, needs False"),
        ("actor_rollout_ref.ref.fsdp_config.pad_to_length=True", "ref.fsdp_config.pad_to_length is True"),
    ):
        with pytest.raises(ValueError, match=rf"custom\.share_prompt: .*{message}"):
            check_config(config(custom, override))


def test_one_forward_pass_an_update_needs_one_update_a_batch_and_nobody_else_who_asks() -> None:
    prefix = "actor_rollout_ref"
    good = (
        f"+{prefix}.rollout.custom={{on_policy: true, tokenizer: t}}",
        f"{prefix}.rollout.calculate_log_probs=False",
        f"{prefix}.actor.ppo_mini_batch_size=8",
    )
    check_config(config(*good))
    check_config(config(*good, *arm("stock", "grpo")))
    for override, message in (
        (f"{prefix}.actor.ppo_mini_batch_size=4", "ppo_mini_batch_size is 4, needs data.train_batch_size=8"),
        (f"{prefix}.actor.ppo_epochs=2", "ppo_epochs is 2, needs 1"),
        (f"{prefix}.rollout.calculate_log_probs=True", "calculate_log_probs is True, needs False"),
        ("algorithm.use_kl_in_reward=True", "use_kl_in_reward is True, needs False"),
        ("algorithm.rollout_correction.rollout_is=token", "rollout_is is set, needs null"),
        ("algorithm.rollout_correction.rollout_rs=token", "rollout_rs is set, needs null"),
        (
            "algorithm.rollout_correction.bypass_mode=True",
            "bypass_mode is set, needs null",
        ),
    ):
        with pytest.raises(ValueError, match=rf"custom\.on_policy: .*{message}"):
            check_config(config(*good, override, *arm("stock", "grpo")))
    needed = r"trainer_mode is sync, actor_rollout_ref\.rollout\.custom\.on_policy needs recast"
    with pytest.raises(ValueError, match=needed):
        check_config(config(*good, "trainer.v1.trainer_mode=sync", "algorithm.adv_estimator=grpo"))


def test_a_masked_actor_needs_the_catalogue_and_whole_logits() -> None:
    custom = "+actor_rollout_ref.rollout.custom={masked_actor: true, tokenizer: t}"
    engine = "actor_rollout_ref.rollout.name=recast_sid"
    check_config(config(custom, engine))
    with pytest.raises(ValueError, match="calculate_log_probs is True, needs False"):
        check_config(config(custom))  # GOOD answers by vllm
    check_config(config(custom, "actor_rollout_ref.rollout.calculate_log_probs=False"))
    with pytest.raises(ValueError, match=r"custom\.masked_actor: .*custom\.tokenizer is None"):
        check_config(config("+actor_rollout_ref.rollout.custom={masked_actor: true}"))
    with pytest.raises(ValueError, match=r"model\.use_fused_kernels is True, needs False"):
        check_config(config(custom, engine, "actor_rollout_ref.model.use_fused_kernels=True"))
    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size is 2, needs 1"):
        sequence = "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=2"
        check_config(config(custom, engine, sequence))


def test_accepts_adapters_with_an_engine_of_verls_own_and_answers_of_one_length() -> None:
    lora = "actor_rollout_ref.model.lora_rank=8"
    check_config(config(lora))
    norm = "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm"
    check_config(config(norm, *SID_ENGINE))
    check_config(config(norm, "actor_rollout_ref.actor.loss_scale_factor=8"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((ENGINE,), "rollout.custom is {}, needs one of tokenizer (a folder"),
        (("actor_rollout_ref.rollout.name=recast_vllm",), "rollout.custom is {}, needs one of tokenizer"),
        (
            (ENGINE, "+actor_rollout_ref.rollout.custom={tokenizer: a, catalogue: b}"),
            "rollout.custom is {'tokenizer': 'a', 'catalogue': 'b'}, needs one of tokenizer",
        ),
        (
            (ENGINE, "+actor_rollout_ref.rollout.custom={catalogue: b, answer_prefix: x}"),
            "rollout.agent.agent_loop_manager_class is None, needs verl_recast.rollout.agent_loop.GroupLoop",
        ),
    ],
)
def test_a_catalogue_that_nobody_or_not_everybody_reads_is_refused(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_config(config(*overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.adv_estimator=grpo", "algorithm.adv_estimator is grpo, needs recast"),
        ("algorithm.use_kl_in_reward=True", "algorithm.use_kl_in_reward is True, needs False"),
        ("algorithm.filter_groups.enable=True", "algorithm.filter_groups.enable is True, needs False"),
        ("skip.rollout_tq.enable=True", "skip.rollout_tq.enable is True, needs False (rollouts that will be"),
        ("algorithm.rollout_correction.bypass_mode=True", "bypass_mode is True, needs False"),
        ("trainer.use_v1=False", "trainer.use_v1 is False, algorithm.adv_estimator=recast needs True"),
        ("trainer.v1.trainer_mode=sync", "trainer.v1.trainer_mode is sync, algorithm.adv_estimator=recast"),
        ("trainer.v1.trainer_mode=separate_async", "trainer_mode is separate_async, algorithm.adv_estimator"),
        (
            "trainer.v1.trainer_mode=colocate_async",
            "trainer_mode is colocate_async, algorithm.adv_estimator=recast needs recast: no other trainer "
            "repairs and selects, and an asynchronous one takes groups apart before they could be",
        ),
        ("algorithm.adv_estimator=gae", "algorithm.adv_estimator is gae, needs recast"),
        ("actor_rollout_ref.actor.strategy=megatron", "actor.strategy is megatron, needs fsdp or fsdp2"),
        (
            "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",
            "actor.loss_scale_factor is None, needs a number (data.max_response_length is usual)",
        ),
        ("+algorithm.recast.tie_rule=likeliest", "tie_rule is likeliest, needs one of seeded, most-probable"),
        ("+algorithm.recast.anchor_rule=last", "algorithm.recast.anchor_rule is last, needs one of seeded"),
        ("+algorithm.recast.loss_scale=full", "loss_scale is full, needs one of kept, full-batch"),
        ("+algorithm.recast.arm=both", "arm is both, needs one of recast, repair-only, contrast-only, stock"),
        ("+algorithm.recast.arm=repair-only", "algorithm.adv_estimator is recast, needs verl's own"),
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
        ("+algorithm.recast.w_negative=inf", "algorithm.recast.w_negative is inf, needs a number >= 0"),
        ("+algorithm.recast.w_negative=abc", "algorithm.recast.w_negative is 'abc', needs a number"),
        ("+algorithm.recast.w_negative=null", "algorithm.recast.w_negative is None, needs a number"),
        ("+algorithm.recast.seed=abc", "algorithm.recast.seed is 'abc', needs a whole number"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=0", "actor.ppo_mini_batch_size is 0, needs at least 1"),
    ],
)
def test_refuses_by_name_with_the_value_found_and_the_value_needed(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_config(config(override))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (*arm("repair-only", "grpo"), "algorithm.use_kl_in_reward=True"),
            "algorithm.use_kl_in_reward is True, needs False (use actor.use_kl_loss)",
        ),
        (
            (*arm("repair-only", "grpo"), "algorithm.filter_groups.enable=True"),
            "algorithm.filter_groups.enable is True, needs False (it evicts the groups that repair mends)",
        ),
        (
            (*arm("repair-only", "grpo"), "algorithm.rollout_correction.rollout_is=token"),
            "rollout_correction.rollout_is is token, needs null (anchors were not sampled)",
        ),
        (
            (*arm("repair-only", "grpo"), "+algorithm.recast.w_negative=0.5"),
            "w_negative 0.5, arm repair-only needs both 1: they weigh the pair",
        ),
        (
            (
                "+algorithm.recast.tie_rule=most-probable",
                "actor_rollout_ref.rollout.calculate_log_probs=False",
            ),
            "rollout.calculate_log_probs is False, needs True (algorithm.recast.tie_rule=most-probable",
        ),
        (
            ("actor_rollout_ref.model.lora_rank=8", "trainer.device=cpu"),
            "model.lora_rank is 8, needs 0 on the CPU platform",
        ),
        ((*arm("stock", "gae"),), "critic.enable is None, needs False or null, and an estimator without"),
        (
            (*arm("repair-only", "grpo"), f"{MICRO}=3"),
            "actor.ppo_micro_batch_size_per_gpu is 3, needs a divisor of 16, the rows",
        ),
        (
            (*SID_ENGINE, "actor_rollout_ref.model.lora_rank=8"),
            "model.lora_rank is 8, needs 0 (recast_sid takes whole weights, and verl's merging of adapters",
        ),
    ],
)
def test_refuses_what_does_not_fit_the_arm_or_the_engine(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_config(config(*overrides))
    assert message in str(caught.value)


# Run as a launch script does: main_ppo is __main__. Ray must not have started when it ends.
LAUNCH = """
import runpy, sys
import ray
def init(*args, **kwargs):
    raise SystemExit("Ray was started")
ray.init = init
sys.argv = ["main_ppo", *sys.argv[1:]]
runpy.run_module("verl.trainer.main_ppo", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("overrides", "ending"),
    [
        (
            ("algorithm.adv_estimator=recast",),
            "adv_estimator=recast needs recast: no other trainer",
        ),
        (("algorithm.adv_estimator=grpo",), "Ray was started"),
        (("algorithm.adv_estimator=grpo", "+algorithm.recast.seed=3"), "Ray was started"),
        (
            ("algorithm.adv_estimator=grpo", "+algorithm.recast.arm=repair-only"),
            "trainer.v1.trainer_mode is sync, algorithm.recast needs recast: no other trainer repairs",
        ),
        ((*GOOD, *SID_ENGINE), "Ray was started"),
        ((*GOOD, ENGINE), "rollout.custom is {}, needs one of tokenizer"),
    ],
)
def test_main_ppo_refuses_before_ray_starts(
    overrides: tuple[str, ...], ending: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = f"actor_rollout_ref.model.path={tokenizer_folder / 'model'}"
    needed = ("actor_rollout_ref.rollout.name=recast_sid", "trainer.device=cpu", model, f"{MICRO}=4")
    parts = ("rollout", "ref")
    needed += tuple(f"actor_rollout_ref.{part}.log_prob_micro_batch_size_per_gpu=4" for part in parts)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *needed, *overrides],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert ending in done.stderr, done.stderr[-2000:]
    assert ("Ray was started" in done.stderr) == (ending == "Ray was started")
