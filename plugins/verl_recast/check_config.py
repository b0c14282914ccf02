"""Settings of a verl job under which the method would silently be something else."""

from __future__ import annotations

from typing import Any

from verl_recast import estimator
from verl_recast.settings import RecastSettings

KEPT_PER_GROUP = 2


def check_config(config: Any) -> None:
    """Refuse, before any worker starts, settings under which the method would silently be something else.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    algorithm, worker = config.algorithm, config.actor_rollout_ref
    _require(
        algorithm.adv_estimator == estimator.NAME,
        "algorithm.adv_estimator",
        algorithm.adv_estimator,
        estimator.NAME,
    )
    _require(
        not algorithm.use_kl_in_reward, "algorithm.use_kl_in_reward", True, "False (use actor.use_kl_loss)"
    )
    filtered = bool(algorithm.get("filter_groups") and algorithm.filter_groups.enable)
    needed = "False (it evicts the groups that repair mends)"
    _require(not filtered, "algorithm.filter_groups.enable", True, needed)
    _check_correction(algorithm.get("rollout_correction") or {})
    _require(worker.rollout.n >= 2, "rollout.n", worker.rollout.n, "at least 2")
    critic = bool(config.critic.get("enable"))
    needed = "False or null (advantages come from the pair, not from values)"
    _require(not critic, "critic.enable", critic, needed)
    distilled = bool((config.get("distillation") or {}).get("enabled"))
    _require(not distilled, "distillation.enabled", distilled, "False (this trainer has no such loss)")
    _check_batches(config)
    _require(not worker.actor.shuffle, "actor.shuffle", True, "False (mini-batches are laid out by prompt)")
    RecastSettings.from_algorithm(algorithm)


def _require(ok: bool, name: str, found: Any, needed: str) -> None:
    if not ok:
        raise ValueError(f"trainer_mode=recast: {name} is {found}, needs {needed}")


def _check_correction(correction: Any) -> None:
    """Corrections from rollout to actor need a sampling log-prob, and anchors have none."""
    bypass = correction.get("bypass_mode", False)
    name = "algorithm.rollout_correction"
    _require(not bypass, f"{name}.bypass_mode", True, "False (anchors have no sampling log-prob)")
    for key in ("rollout_is", "rollout_rs"):
        found = correction.get(key)
        _require(found is None, f"{name}.{key}", found, "null (anchors were not sampled)")


def _check_batches(config: Any) -> None:
    """Prompts divide into mini-batches, and what a mini-batch keeps into ranks and micro-batches."""
    worker, batch = config.actor_rollout_ref, config.data.train_batch_size
    actor, prompts = worker.actor, worker.actor.ppo_mini_batch_size
    _require(
        batch % prompts == 0, "data.train_batch_size", batch, f"a multiple of ppo_mini_batch_size={prompts}"
    )
    ranks, kept = config.trainer.n_gpus_per_node * config.trainer.nnodes, prompts * KEPT_PER_GROUP
    needed = f"a number whose kept rows ({KEPT_PER_GROUP} a prompt) {ranks} ranks can share"
    _require(kept % ranks == 0, "actor.ppo_mini_batch_size", prompts, needed)
    sections = [("actor.ppo", actor.use_dynamic_bsz, actor.ppo_micro_batch_size_per_gpu)]
    for part in ("rollout", "ref"):
        section = worker[part]
        sections.append(
            (f"{part}.log_prob", section.log_prob_use_dynamic_bsz, section.log_prob_micro_batch_size_per_gpu)
        )
    for name, dynamic, size in sections:
        _require(
            dynamic or not size or kept // ranks % size == 0,
            f"{name}_micro_batch_size_per_gpu",
            size,
            f"a divisor of {kept // ranks}, the rows that a mini-batch keeps on each rank "
            "(or dynamic micro-batches)",
        )
