"""The recast plugin for stock verl.

`pip install verl-recast` makes verl import this package in every process (entry point group `verl.plugins`).
Importing it only plants import hooks; each piece registers itself when verl imports the module it belongs to:

- estimator `recast`            algorithm.adv_estimator=recast
- trainer mode `recast`         trainer.v1.trainer_mode=recast
- rollout engine `recast_sid`   actor_rollout_ref.rollout.name=recast_sid
- rollout engine `recast_vllm`  actor_rollout_ref.rollout.name=recast_vllm
- masked actor                  actor_rollout_ref.rollout.custom.masked_actor=true
- shared prompts                actor_rollout_ref.rollout.custom.share_prompt=true
- one forward pass an update    actor_rollout_ref.rollout.custom.on_policy=true
- platform `cpu`                environment variable VERL_PLATFORM=cpu
- cost of each engine call      environment variable RECAST_MEASURE=FILE (`recast profile`)

A process that uses none of them is left as it was.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

# `wanted` stands here because a refused package can import nothing of its own later.
from verl_recast.actor_options import wanted
from verl_recast.band import HOST, problem, require_tested
from verl_recast.import_hooks import after_import

ROLLOUT_NAME = "recast_sid"
VLLM_ROLLOUT_NAME = "recast_vllm"


def _check_config_early() -> None:
    """main_ppo has verl check its config before it starts Ray: ours is checked there too, if it is for us."""
    from verl.utils import config as verl_config

    stock = verl_config.validate_config

    @functools.wraps(stock)
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> None:
        stock(config, *args, **kwargs)
        mode = (config.trainer.get("v1") or {}).get("trainer_mode")
        # The seed is of the rollouts too, which any trainer may have.
        asked = set(config.algorithm.get("recast") or {}) - {"seed"}
        estimator = config.algorithm.get("adv_estimator")
        one_pass = wanted(config.actor_rollout_ref, "on_policy")
        if "recast" in (mode, estimator) or asked or one_pass:
            require_tested(*HOST)
            from verl_recast.check_config import check_config

            check_config(config)

    verl_config.validate_config = validate_config


def _register_estimator() -> None:
    from verl_recast import estimator

    estimator.register()


def _register_trainer() -> None:
    from verl_recast import trainer  # noqa: F401  (its class decorator registers it)


def _register_replica() -> None:
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    def load_sid() -> type:
        from verl_recast.rollout.replica import SIDReplica

        return SIDReplica

    def load_vllm() -> type:
        from verl_recast.rollout.vllm_server import TrieVLLMReplica

        return TrieVLLMReplica

    RolloutReplicaRegistry.register(ROLLOUT_NAME, load_sid)
    RolloutReplicaRegistry.register(VLLM_ROLLOUT_NAME, load_vllm)


def _register_rollout() -> None:
    # verl has no public registry for the worker side of a rollout engine (0.9.1).
    from verl.workers.rollout import base

    adapters = {ROLLOUT_NAME: "replica.SIDRolloutAdapter", VLLM_ROLLOUT_NAME: "vllm_server.TrieVLLMAdapter"}
    for name, adapter in adapters.items():
        base._ROLLOUT_REGISTRY[(name, "async")] = f"verl_recast.rollout.{adapter}"


def _register_platform() -> None:
    from verl.plugin.platform import PlatformRegistry

    from verl_recast.platform import cpu

    if PlatformRegistry.get("cpu") is None:
        PlatformRegistry.register(platform="cpu")(cpu.PlatformCPU)
    if cpu.is_selected():
        cpu.fix_process_group_backend()
        after_import("verl.workers.engine", _register_engine)

        from verl_recast.platform import vllm_cpu

        vllm_cpu.answer_for_vllm()
        after_import("vllm.model_executor.layers.utils", vllm_cpu.keep_plain_weights)


def _register_engine() -> None:
    from verl_recast.platform import engine  # noqa: F401  (its class decorator registers it)


def _extend_workers() -> None:
    from verl.workers.engine_workers import ActorRolloutRefWorker

    from verl_recast import masked_actor, on_policy, shared_prompts

    on_policy.detach_workers(ActorRolloutRefWorker)
    masked_actor.mask_workers(ActorRolloutRefWorker)
    shared_prompts.share_workers(ActorRolloutRefWorker)


def _measure_engine() -> None:
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

    from verl_recast import measure

    measure.wrap(FSDPEngine)


after_import("verl.utils.config", _check_config_early)
if (refusal := problem("verl")) is not None:
    if os.environ.get("VERL_PLATFORM") == "cpu":
        # verl itself logs why a plugin did not load at DEBUG, and would go on to miss a platform.
        logging.getLogger(__name__).error(refusal)
    raise ImportError(refusal)  # nothing below is registered; whoever asks for a piece of ours fails
after_import("verl.plugin.platform", _register_platform)
after_import("verl.trainer.ppo.core_algos", _register_estimator)
after_import("verl.trainer.ppo.v1.trainer_sync", _register_trainer)
after_import("verl.workers.rollout.replica", _register_replica)
after_import("verl.workers.rollout.base", _register_rollout)
after_import("verl.workers.engine_workers", _extend_workers)
if os.environ.get("RECAST_MEASURE"):
    after_import("verl.workers.engine.fsdp.transformer_impl", _measure_engine)
