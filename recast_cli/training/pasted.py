"""What of a recipe's overrides goes into a launch script that is there already."""

from __future__ import annotations

# Beginnings of what a recipe says about the method, its rollouts and its actor. What is left belongs to a
# run: its folders, log, schedule, checkpoints and processes, of which somebody's launch script has its own.
PASTED = (
    "algorithm.",
    "actor_rollout_ref.model.",
    "actor_rollout_ref.actor.",
    "actor_rollout_ref.ref.",
    "actor_rollout_ref.rollout.",
    "data.train_files",
    "data.val_files",
    "data.train_batch_size",
    "data.max_",
    "trainer.device",
    "trainer.v1.",
)
PLUGIN = (
    "algorithm.",
    "actor_rollout_ref.actor.use_dynamic_bsz",
    "actor_rollout_ref.rollout.name",
    "actor_rollout_ref.rollout.custom",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    "actor_rollout_ref.rollout.logprobs_mode",
    "actor_rollout_ref.rollout.calculate_log_probs",
    "trainer.v1.",
)
SIZE = (
    "actor_rollout_ref.rollout.tensor_model_parallel_size"  # 1 for the SID engine; of vLLM the script's own
)


def pasted(arguments: list[str], *, plugin_only: bool) -> list[str]:
    """The overrides of `rl_arguments` that go into a launch script that is there already.

    Args:
        plugin_only: Only those without which there would be no ReCast in it.
    """
    kept: tuple[str, ...] = PASTED
    if plugin_only:
        on_one_device = "actor_rollout_ref.rollout.name=recast_sid" in arguments
        kept = (*PLUGIN, SIZE) if on_one_device else PLUGIN
    return [argument for argument in arguments if argument.lstrip("+").startswith(kept)]
