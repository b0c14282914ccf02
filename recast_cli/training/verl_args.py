"""From a recipe to verl's command lines: pure functions, nothing is started here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from recast_cli.recipe import CONTRASTING, REPAIRING, RL, Recipe
from recast_cli.training.hydra_overrides import overrides, quoted
from recast_cli.training.placement import packs_rows, resolve_device

LOOP_MANAGER = "verl_recast.rollout.agent_loop.GroupLoopManager"

HYDRA_DIR = "logs/hydra"  # below the job's working directory

# A row of verl's that fills a mini-batch up (`padding_utils.SYNTHETIC_PADDING_SEQ_LEN`); one must fit.
PADDING_ROW_TOKENS = 128
MICRO_BATCH_TOKENS = (
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
)

# What follows `python -m`.
RL_MODULE = ["verl.trainer.main_ppo"]


def sft_module(recipe: Recipe) -> list[str]:
    """verl's SFT trainer under torchrun."""
    launcher = ["torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={recipe.num_gpus}"]
    return [*launcher, "-m", "verl.trainer.sft_trainer"]


def _cpu_engine(prefix: str) -> dict[str, Any]:
    return {
        f"{prefix}.model_dtype": "fp32",
        f"+{prefix}.mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        f"{prefix}.use_torch_compile": False,
    }


def sft_arguments(
    recipe: Recipe,
    *,
    model: Path,
    train_file: Path,
    out: Path,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    max_length: int,
    steps: int | None = None,
) -> list[str]:
    """Overrides of `verl.trainer.sft_trainer`: the warm start's schedule with one Hugging Face checkpoint per
    epoch, or with `steps` the schedule of RL with one at the end."""
    device = resolve_device(recipe)
    packed = packs_rows(device)
    warm = recipe.warm_start
    options: dict[str, Any] = {
        "data.train_files": quoted(train_file),
        "data.train_batch_size": batch_size,
        "data.use_dynamic_bsz": True,
        "data.max_token_len_per_gpu": max(max_length, warm.max_tokens_per_micro_batch),
        "data.max_length": max_length,
        "data.truncation": "error",
        "data.num_workers": 0,
        "data.custom_cls.path": "pkg://verl_recast.sft_dataset",
        "data.custom_cls.name": "ItemSFTDataset",
        "model.path": quoted(model),
        "model.use_remove_padding": packed,
        "model.enable_gradient_checkpointing": device != "cpu",
        "+model.override_config.attn_implementation": "flash_attention_2" if packed else "sdpa",
        "optim.lr": learning_rate,
        "optim.weight_decay": warm.weight_decay if steps is None else recipe.rl.weight_decay,
        # verl's RL trainer moves the rate once a step, its SFT trainer at every update
        "optim.lr_warmup_steps": -1 if steps is None else recipe.rl.warmup_steps * recipe.rl.updates_per_step,
        "optim.lr_warmup_steps_ratio": warm.warmup_ratio if steps is None else 0.0,
        "optim.lr_scheduler_type": "cosine" if steps is None else "constant",
        "checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        "trainer.default_local_dir": quoted(out),
        "trainer.project_name": "recast",
        "trainer.experiment_name": "sft",
        "trainer.total_epochs": epochs,
        "trainer.total_training_steps": steps,
        "trainer.logger": ["console", "file"],
        "trainer.seed": recipe.seed,
        "trainer.save_freq": "after_each_epoch" if steps is None else -1,
        "trainer.test_freq": -1,
        "trainer.resume_mode": "disable",
        "trainer.device": device,
        "trainer.n_gpus_per_node": recipe.num_gpus,
        "hydra.run.dir": HYDRA_DIR,
    }
    if device == "cpu":
        options |= _cpu_engine("engine")
    return overrides(options | recipe.verl_sft)


def rl_arguments(
    recipe: Recipe,
    *,
    model: Path,
    train_file: Path,
    val_file: Path,
    out: Path,
    prompt_length: int,
    num_levels: int,
    rollout_log: Path | None,
    resume_from: Path | None = None,
) -> list[str]:
    """Overrides of `verl.trainer.main_ppo` for the recipe's method.

    Args:
        rollout_log: File for one line per batch of rollouts; None writes none.
        resume_from: A checkpoint of the same run (`global_step_N`) to go on from.
    """
    tokens = max(recipe.rl.max_tokens_per_micro_batch, prompt_length + num_levels, PADDING_ROW_TOKENS)
    options: dict[str, Any] = {
        "data.train_files": quoted(train_file),
        "data.val_files": quoted(val_file),
        "data.train_batch_size": recipe.rl.prompts_per_step,
        "data.max_prompt_length": prompt_length,
        "data.max_response_length": num_levels,
        "data.filter_overlong_prompts": False,
        "data.truncation": "error",
        "data.shuffle": False,  # rows are drawn by the launcher, so that every method sees the same ones
        "data.dataloader_num_workers": 0,
        **_actor_options(recipe, model, num_levels),
        **_rollout_options(recipe, prompt_length, num_levels, rollout_log),
        **dict.fromkeys(MICRO_BATCH_TOKENS, tokens),
        **_trainer_options(recipe, out),
        **_method_options(recipe),
    }
    if resume_from is not None:
        options |= {
            "trainer.resume_mode": "resume_path",
            "trainer.resume_from_path": quoted(resume_from),
            "trainer.val_before_train": False,  # the start was validated the first time
        }
    return overrides(options | recipe.verl)


def _actor_options(recipe: Recipe, model: Path, num_levels: int) -> dict[str, Any]:
    """Model, loss, optimiser and micro-batches of actor and reference."""
    rl, device = recipe.rl, resolve_device(recipe)
    packed = packs_rows(device)
    shared, actor, ref = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "ref"))
    options = {
        f"{shared}.path": quoted(model),
        f"{shared}.use_remove_padding": packed,
        f"{shared}.enable_gradient_checkpointing": device != "cpu",
        f"+{shared}.override_config.attn_implementation": "flash_attention_2" if packed else "sdpa",
        f"{actor}.ppo_mini_batch_size": rl.mini_batch_prompts or rl.prompts_per_step,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.optim.lr": rl.learning_rate,
        f"{actor}.optim.lr_warmup_steps": rl.warmup_steps,
        f"{actor}.optim.weight_decay": rl.weight_decay,
        f"{actor}.use_kl_loss": rl.kl_coef > 0,
        f"{actor}.kl_loss_coef": rl.kl_coef,
        f"{actor}.kl_loss_type": "low_var_kl",
        f"{actor}.clip_ratio_low": rl.clip_low,
        f"{actor}.clip_ratio_high": rl.clip_high,
        f"{actor}.loss_agg_mode": rl.loss_agg_mode,
        f"{actor}.loss_scale_factor": num_levels if rl.loss_agg_mode == "seq-mean-token-sum-norm" else None,
        f"{actor}.entropy_coeff": rl.entropy_coef,
        f"{actor}.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        f"{actor}.data_loader_seed": recipe.seed,
        f"{ref}.log_prob_use_dynamic_bsz": True,
    }
    if device == "cpu":
        options |= _cpu_engine(f"{actor}.fsdp_config") | _cpu_engine(f"{ref}.fsdp_config")
        options[f"{actor}.use_torch_compile"] = False
    return options


def _rollout_options(recipe: Recipe, prompt_length: int, num_levels: int, log: Path | None) -> dict[str, Any]:
    """The rollout engine and the agent loop that asks it."""
    rollout, device = "actor_rollout_ref.rollout", resolve_device(recipe)
    custom: dict[str, Any] = {"tokenizer": quoted(Path(recipe.tokenizer).resolve())}
    if log is not None:
        custom["log"] = quoted(log)
    # Only what differs from the engine's defaults: the command stays short.
    for name in ("sampling", "exclude_history", "masked_actor", "share_prompt", "on_policy"):
        if (chosen := getattr(recipe.rl, name)) != RL.model_fields[name].default:
            custom[name] = chosen
    options = {
        f"{rollout}.name": f"recast_{recipe.rollout}",
        f"+{rollout}.custom": custom,
        f"+{rollout}.agent.agent_loop_manager_class": LOOP_MANAGER,
        f"{rollout}.agent.num_workers": 1,
        f"{rollout}.n": recipe.rl.group_size,
        f"{rollout}.temperature": recipe.rl.temperature,
        f"{rollout}.top_p": recipe.rl.top_p,
        f"{rollout}.prompt_length": prompt_length,
        f"{rollout}.response_length": num_levels,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.log_prob_use_dynamic_bsz": True,
        f"{rollout}.dtype": "float32" if device == "cpu" else "bfloat16",
        f"{rollout}.seed": recipe.seed,
        f"{rollout}.val_kwargs.n": recipe.rl.validate_beams,
        f"{rollout}.val_kwargs.temperature": 0,
    }
    if not recipe.rl.sampled_log_probs:
        options[f"{rollout}.calculate_log_probs"] = False
    if recipe.rollout == "vllm":
        options |= {
            f"{rollout}.logprobs_mode": "raw_logprobs",
            f"{rollout}.calculate_log_probs": recipe.vllm_log_probs,
        }
    if recipe.rollout == "vllm" and device == "cpu":
        options[f"{rollout}.enforce_eager"] = True
    if recipe.rollout == "sid" or device == "cpu":
        options[f"{rollout}.free_cache_engine"] = False
    return options


def _trainer_options(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The loop, its checkpoints and log, and the processes it runs in."""
    rl, device = recipe.rl, resolve_device(recipe)
    options = {
        "reward.num_workers": 1,
        "trainer.v1.sampler.custom_sampler.path": "pkg://verl_recast.sampler",
        "trainer.v1.sampler.custom_sampler.name": "QuickReplayBuffer",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        "trainer.project_name": "recast",
        "trainer.experiment_name": recipe.method.name,
        "trainer.logger": ["console", "file"],
        "trainer.val_before_train": rl.validate_every > 0,
        "trainer.test_freq": rl.validate_every if rl.validate_every > 0 else -1,
        "trainer.total_training_steps": rl.steps,
        "trainer.total_epochs": 1,
        "trainer.save_freq": rl.save_every if rl.save_every > 0 else rl.steps,
        "trainer.resume_mode": "disable",
        "trainer.default_local_dir": quoted(out),
        "trainer.device": device,
        "trainer.n_gpus_per_node": recipe.num_gpus,
        "trainer.nnodes": 1,
        "hydra.run.dir": HYDRA_DIR,
    }
    if os.environ.get("RAY_ADDRESS"):  # a cluster that runs already has its own size, Ray refuses another
        return options | {"ray_kwargs.ray_init.num_cpus": None}
    options |= {
        # A Ray of the job's own, also where somebody has started another on this machine.
        "+ray_kwargs.ray_init.address": "local",
        "ray_kwargs.ray_init.num_cpus": recipe.ray_cpus,
        "+ray_kwargs.ray_init.include_dashboard": False,
    }
    if device == "cpu":
        options["+ray_kwargs.ray_init.num_gpus"] = recipe.num_gpus  # slots; the CPU platform calls them GPUs
    return options


def _method_options(recipe: Recipe) -> dict[str, Any]:
    """What makes a run one method and not another."""
    method = recipe.method
    seed = {"+algorithm.recast.seed": recipe.seed}  # of the rollouts too: every method draws alike
    if method.name not in (*CONTRASTING, *REPAIRING):
        mode = {"trainer.v1.trainer_mode": "sync"}
        if (
            recipe.rl.on_policy
        ):  # our trainer leaves the pass out, keeps whole groups and logs its own metrics
            mode = {"trainer.v1.trainer_mode": "recast", "+algorithm.recast.arm": "stock"}
        return {**mode, "algorithm.adv_estimator": "grpo", **seed}
    # A group that was only repaired is normalised like any other.
    estimator = "recast" if method.name in CONTRASTING else "grpo"
    options = {"trainer.v1.trainer_mode": "recast", "algorithm.adv_estimator": estimator}
    settings = {"arm": method.name, **method.model_dump(exclude={"name"})}
    return options | {f"+algorithm.recast.{name}": value for name, value in settings.items()} | seed
