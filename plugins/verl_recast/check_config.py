"""Settings of a verl job under which the method would silently be something else."""

from __future__ import annotations

from typing import Any

from verl_recast import ROLLOUT_NAME, VLLM_ROLLOUT_NAME, masked_actor, on_policy, shared_prompts
from verl_recast.actor_options import wanted
from verl_recast.settings import ESTIMATOR, TRAINER_MODE, RecastSettings, RolloutSettings

ENGINES = (ROLLOUT_NAME, VLLM_ROLLOUT_NAME)
KEPT_PER_GROUP = 2


def check_config(config: Any) -> None:
    """Refuse, before any worker starts, settings under which the method would silently be something else.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    algorithm, worker = config.algorithm, config.actor_rollout_ref
    settings = RecastSettings.from_algorithm(algorithm)
    _check_arm(config, settings)
    if settings.repairs or settings.contrasts:
        needed = "False (use actor.use_kl_loss)"
        _require(not algorithm.use_kl_in_reward, "algorithm.use_kl_in_reward", True, needed)
    if settings.repairs:
        _check_repair(algorithm)
    _require(worker.rollout.n >= 2, "rollout.n", worker.rollout.n, "at least 2")
    critic = bool(config.critic.get("enable")) or algorithm.adv_estimator == "gae"
    needed = "False or null, and an estimator without values (advantages come from the group)"
    _require(not critic, "critic.enable", config.critic.get("enable"), needed)
    distilled = bool((config.get("distillation") or {}).get("enabled"))
    _require(not distilled, "distillation.enabled", distilled, "False (this trainer has no such loss)")
    if settings.contrasts:
        replayed = bool(((config.get("skip") or {}).get("rollout_tq") or {}).get("enable"))
        needed = "False (rollouts that will be dropped are stored without their prompt)"
        _require(not replayed, "skip.rollout_tq.enable", replayed, needed)
    _check_batches(config, KEPT_PER_GROUP if settings.contrasts else worker.rollout.n)
    _require(not worker.actor.shuffle, "actor.shuffle", True, "False (mini-batches are laid out by prompt)")
    _check_loss(worker)
    _check_rollout(worker.rollout)
    _check_lora(worker, config.trainer.get("device"))
    if wanted(worker, masked_actor.OPTION):
        masked_actor.require_maskable(worker)
    if wanted(worker, shared_prompts.OPTION):
        shared_prompts.require_shareable(worker)
    if wanted(worker, on_policy.OPTION):
        on_policy.require_one_update(config)
    if settings.tie_rule == "most-probable":
        needed = "True (algorithm.recast.tie_rule=most-probable compares sampling log-probs)"
        found = worker.rollout.calculate_log_probs
        _require(found, "rollout.calculate_log_probs", found, needed)


def _require(ok: bool, name: str, found: Any, needed: str) -> None:
    if not ok:
        raise ValueError(f"trainer_mode=recast: {name} is {found}, needs {needed}")


def _mode(config: Any) -> str | None:
    return (config.trainer.get("v1") or {}).get("trainer_mode")


def _check_arm(config: Any, settings: RecastSettings) -> None:
    """The estimator belongs to what the trainer keeps of a group."""
    mode, estimator = _mode(config), config.algorithm.adv_estimator
    v1 = config.trainer.get("use_v1", True)
    if not v1 or mode != TRAINER_MODE:
        found = f"trainer.v1.trainer_mode is {mode}" if v1 else "trainer.use_v1 is False"
        needed = TRAINER_MODE if v1 else "True"
        asks = f"algorithm.adv_estimator={ESTIMATOR}" if estimator == ESTIMATOR else "algorithm.recast"
        if wanted(config.actor_rollout_ref, on_policy.OPTION):
            asks = f"actor_rollout_ref.rollout.custom.{on_policy.OPTION}"
        raise ValueError(
            f"{found}, {asks} needs {needed}: no other trainer repairs and selects, and an asynchronous one "
            "takes groups apart before they could be"
        )
    if settings.contrasts:
        _require(estimator == ESTIMATOR, "algorithm.adv_estimator", estimator, ESTIMATOR)
    else:
        needed = f"verl's own, for example grpo (algorithm.recast.arm={settings.arm} keeps whole groups)"
        _require(estimator != ESTIMATOR, "algorithm.adv_estimator", estimator, needed)


def _check_repair(algorithm: Any) -> None:
    """What would undo a repair, or read something of an anchor that nobody sampled."""
    filtered = bool(algorithm.get("filter_groups") and algorithm.filter_groups.enable)
    needed = "False (it evicts the groups that repair mends)"
    _require(not filtered, "algorithm.filter_groups.enable", True, needed)
    correction = algorithm.get("rollout_correction") or {}
    name = "algorithm.rollout_correction"
    bypass = correction.get("bypass_mode", False)
    _require(not bypass, f"{name}.bypass_mode", True, "False (anchors have no sampling log-prob)")
    for key in ("rollout_is", "rollout_rs"):
        found = correction.get(key)
        _require(found is None, f"{name}.{key}", found, "null (anchors were not sampled)")


def _check_batches(config: Any, width: int) -> None:
    """Prompts divide into mini-batches, and what a mini-batch keeps into ranks and micro-batches.

    Args:
        width: Rows that a group keeps at most.
    """
    worker, batch = config.actor_rollout_ref, config.data.train_batch_size
    actor, prompts = worker.actor, worker.actor.ppo_mini_batch_size
    _require(prompts >= 1, "actor.ppo_mini_batch_size", prompts, "at least 1")
    _require(
        batch % prompts == 0, "data.train_batch_size", batch, f"a multiple of ppo_mini_batch_size={prompts}"
    )
    fsdp = actor.get("fsdp_config") or {}
    shared = max(section.get("ulysses_sequence_parallel_size", 1) for section in (actor, fsdp))
    ranks, kept = max(1, config.trainer.n_gpus_per_node * config.trainer.nnodes // shared), prompts * width
    needed = f"a multiple of the {ranks} ranks that share it (a group stays on one)"
    _require(prompts % ranks == 0, "actor.ppo_mini_batch_size", prompts, needed)
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


def _check_loss(worker: Any) -> None:
    """A loss whose scale would depend on the micro-batch; an engine that this trainer was not made for."""
    strategy = worker.actor.strategy
    _require(strategy in ("fsdp", "fsdp2"), "actor.strategy", strategy, "fsdp or fsdp2")
    ragged = worker.rollout.get("name") not in ENGINES
    unset = worker.actor.loss_agg_mode == "seq-mean-token-sum-norm" and worker.actor.loss_scale_factor is None
    needed = "a number (data.max_response_length is usual): it divides by the width of the micro-batch else"
    _require(not (unset and ragged), "actor.loss_scale_factor", None, needed)


def _check_rollout(rollout: Any) -> None:
    """Our engines answer with items of a catalogue, our agent loop asks no other engine."""
    name, manager = rollout.get("name"), str(rollout.agent.get("agent_loop_manager_class") or "")
    custom = dict(rollout.get("custom") or {})
    named = [key for key in ("tokenizer", "catalogue") if custom.get(key)]
    is_ours, asks_for_groups = name in ENGINES, manager.startswith("verl_recast.")
    if is_ours or len(named) > 1:
        needed = "one of tokenizer (a folder of recast build-tokenizer) and catalogue (a file made elsewhere)"
        _require(len(named) == 1, "rollout.custom", f"{custom}", needed)
    if is_ours or asks_for_groups:
        RolloutSettings.from_custom(custom)
        _require(rollout.temperature > 0, "rollout.temperature", rollout.temperature, "a number above 0")
    needed = f"{' or '.join(ENGINES)} (rollout.agent.agent_loop_manager_class is {manager})"
    _require(is_ours or not asks_for_groups, "rollout.name", name, needed)
    prefix = custom.get("answer_prefix")
    needed = f"verl_recast.rollout.agent_loop.GroupLoopManager (rollout.custom.answer_prefix is {prefix!r})"
    _require(bool(manager) or not prefix, "rollout.agent.agent_loop_manager_class", manager or None, needed)


def _check_lora(worker: Any, device: str | None) -> None:
    """Adapters reach a rollout engine merged into the weights, which verl can do where FSDP wraps them."""
    lora = worker.model.get("lora") or {}
    rank = lora.get("rank", 0) or worker.model.get("lora_rank", 0)
    if rank <= 0:
        return
    needed = "0 on the CPU platform (one rank is not wrapped, and verl merges adapters of FSDP modules only)"
    _require(device != "cpu", "model.lora_rank", rank, needed)
    name = worker.rollout.get("name")
    needed = f"0 ({name} takes whole weights, and verl's merging of adapters was never run with it)"
    _require(name not in ENGINES, "model.lora_rank", rank, needed)
