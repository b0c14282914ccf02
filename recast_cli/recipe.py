"""Recipes: one short YAML file per method, validated as a whole.

`extends: base.yaml` reads another recipe first, `key=value` overrides come last. Every violation is
reported at once; unknown keys are errors.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from recast_cli.errors import RecipeError
from recast_cli.layered_yaml import read_layers
from recast_cli.nested import dotted, flat

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# A shell expands the ~ of `out=~/runs` only where a word begins with it; YAML never does.
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]

# What verl's V1 trainer starts on Ray, one CPU each: TransferQueue's controller and storage unit, task
# runner, agent loop worker, reward worker. Each training worker's bundle asks for 3 more. With fewer it waits
# for ever without a word.
RAY_CPUS_SHARED, RAY_CPUS_PER_GPU = 5, 3
# Options of verl that start more of them than the one that RAY_CPUS_SHARED counts.
RAY_CPU_EACH = (
    "transfer_queue.backend.SimpleStorage.num_data_storage_units",
    "rollout.agent.num_workers",
    "reward.num_workers",
)
# Options of verl that a recipe has a checked field for -> that field.
OWN_OPTIONS = {
    "ray_init.num_cpus": "ray_cpus",
    "trainer.n_gpus_per_node": "num_gpus",
    "trainer.device": "device",
    "trainer.default_local_dir": "out",
    "verl.trainer.total_training_steps": "rl.steps",
    "verl.trainer.save_freq": "rl.save_every",
    "verl.trainer.test_freq": "rl.validate_every",
    "verl.actor_rollout_ref.rollout.n": "rl.group_size",
    "verl.actor_rollout_ref.model.path": "model",
    "verl.actor_rollout_ref.rollout.top_p": "rl.top_p",
    "verl.actor_rollout_ref.rollout.calculate_log_probs": "rl.sampled_log_probs",
    "verl.data.train_files": "data",
    "verl.data.train_batch_size": "rl.prompts_per_step",
    "verl.algorithm.adv_estimator": "method.name",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class WarmStart(Section):
    """Supervised warm start; the epoch with the best validation NDCG@10 (history removed) is kept."""

    out: Folder | None = Field(
        None, description="folder, shared by recipes that start alike; default RUN/warm_start"
    )
    epochs: Positive = 8
    batch_size: Positive = 64
    learning_rate: Rate = 1e-3
    weight_decay: Weight = 0.1
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    max_tokens_per_micro_batch: Positive = 8192


class RL(Section):
    """Reinforcement learning under verl. Defaults are the paper's where it states them."""

    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 60
    prompts_per_step: Positive = 16
    mini_batch_prompts: Positive | None = Field(
        None, description="prompts per update; default prompts_per_step"
    )
    group_size: Annotated[int, Field(ge=2)] = 32
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    sampling: Literal["iid", "without-replacement", "beam"] = Field(
        "iid", description="how a group is drawn: independently, distinct items, or the best beams"
    )
    top_p: Rate = Field(1.0, description="mass of the nucleus that each code is drawn from (sampling iid)")
    exclude_history: bool = Field(
        False, description="no rollout answers an item that the user had before the target"
    )
    masked_actor: bool = Field(
        False,
        description="log-probs of actor and reference renormalised over the trie, as rollouts are drawn",
    )
    sampled_log_probs: bool = Field(
        True,
        description="log-probs of rollouts over the whole vocabulary, which verl compares with the actor's; "
        "without them engine sid computes the logits of codes alone",
    )
    on_policy: bool = Field(
        False,
        description="one update a step: old log-probs come out of its own forward pass",
    )
    share_prompt: bool = Field(False, description="actor and reference read the prompt of a group once")
    learning_rate: Rate = 2e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Weight = 0.1
    kl_coef: Weight = 0.001
    clip_low: Rate = 0.2
    clip_high: Rate = 0.28
    loss_agg_mode: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"
    ] = "token-mean"
    entropy_coef: Weight = 0.0
    max_tokens_per_micro_batch: Positive = 8192
    validate_every: int = Field(-1, ge=-1, description="steps between validations in verl's log; -1: none")
    validate_beams: Positive = Field(10, description="answers of a validation prompt, the best of them first")
    save_every: int = Field(-1, ge=-1, description="steps between checkpoints; -1 saves the last step only")

    @model_validator(mode="after")
    def _divides(self) -> RL:
        if self.prompts_per_step % (self.mini_batch_prompts or self.prompts_per_step):
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} is no multiple of "
                f"mini_batch_prompts {self.mini_batch_prompts}"
            )
        return self

    @model_validator(mode="after")
    def _updates_once(self) -> RL:
        if self.on_policy and self.updates_per_step > 1:
            raise ValueError(
                f"on_policy needs one update a step, mini_batch_prompts {self.mini_batch_prompts} makes "
                f"{self.updates_per_step}: the second one meets another policy"
            )
        if self.on_policy and self.sampled_log_probs:
            raise ValueError(
                "on_policy needs sampled_log_probs false: the actor has no log-probs to compare them with"
            )
        return self

    @model_validator(mode="after")
    def _samples(self) -> RL:
        if self.sampling != "iid" and self.top_p != 1:
            raise ValueError(f"top_p {self.top_p:g} is an option of sampling iid, not of {self.sampling}")
        if self.sampling == "beam" and self.temperature != 1:
            raise ValueError(
                f"temperature {self.temperature:g} needs to be 1 with sampling beam: beams are ranked by the "
                "model's own probabilities"
            )
        return self

    @property
    def updates_per_step(self) -> int:
        """PPO mini-batches of a step, one optimiser step each."""
        return self.prompts_per_step // (self.mini_batch_prompts or self.prompts_per_step)


# The arms of the paper's ablation; GRPO is verl's own trainer, without any of it.
CONTRASTING = ("recast", "contrast-only")
REPAIRING = ("recast", "repair-only")
_OPTION_OF = {
    "w_positive": CONTRASTING,
    "w_negative": CONTRASTING,
    "tie_rule": CONTRASTING,
    "loss_scale": CONTRASTING,
    "anchor_rule": REPAIRING,
}


class Method(Section):
    """What is done with the rollouts of a group."""

    name: Literal["recast", "repair-only", "contrast-only", "grpo", "sft-continued", "sft"] = "recast"
    w_positive: Weight = Field(1.0, description="advantage of the strongest positive (contrast)")
    w_negative: Weight = Field(1.0, description="minus the advantage of the hardest negative (contrast)")
    tie_rule: Literal["seeded", "most-probable"] = Field(
        "seeded", description="which of equally hard negatives is kept (contrast)"
    )
    anchor_rule: Literal["seeded", "first"] = Field(
        "seeded", description="which of several targets an anchor is built from (repair)"
    )
    loss_scale: Literal["kept", "full-batch"] = Field(
        "kept", description="average the loss over what is kept, or over the whole groups (contrast)"
    )

    @model_validator(mode="after")
    def _options_count(self) -> Method:
        for option, methods in _OPTION_OF.items():
            found = getattr(self, option)
            if self.name not in methods and found != type(self).model_fields[option].default:
                shown = f"{found:g}" if isinstance(found, float) else found
                raise ValueError(
                    f"{option} {shown} is an option of {' and '.join(methods)}, not of {self.name}"
                )
        return self


class Recipe(Section):
    """One training run."""

    data: Folder = Field(description="folder of recast prepare-data")
    tokenizer: Folder = Field(description="folder of recast build-tokenizer")
    out: Folder = Field(description="run directory")
    model: Folder | None = Field(
        None, description="Hugging Face folder to start RL from instead of a warm start"
    )
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="torch threads per worker; 0 takes every core"
    )
    ray_cpus: Annotated[int, Field(ge=RAY_CPUS_SHARED + RAY_CPUS_PER_GPU)] = Field(
        16, description="logical CPUs that Ray may hand out"
    )
    num_gpus: Positive = 1
    rollout: Literal["sid", "vllm"] = Field(
        "sid", description="engine of the rollouts: our own, or vLLM with the catalogue's trie"
    )
    warm_start: WarmStart = WarmStart()
    rl: RL = RL()
    method: Method = Method()
    verl: dict[str, Any] = Field(
        default_factory=dict, description="further overrides of verl.trainer.main_ppo, passed as they are"
    )
    verl_sft: dict[str, Any] = Field(
        default_factory=dict, description="the same for verl.trainer.sft_trainer (warm start, sft-continued)"
    )

    @field_validator("verl", "verl_sft")
    @classmethod
    def _as_overrides(cls, values: dict[str, Any]) -> dict[str, Any]:
        return dotted(values)

    @model_validator(mode="after")
    def _bounded(self) -> Recipe:
        rl = self.rl
        for name, size, most in (
            ("rl.prompts_per_step times rl.group_size", rl.prompts_per_step * rl.group_size, 10**7),
            ("rl.steps times rl.prompts_per_step", rl.steps * rl.prompts_per_step, 10**8),
        ):
            if size > most:
                raise ValueError(f"{name} is {size}, needed at most {most}")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.method.name == "sft" and self.model:
            raise ValueError(f"method sft is the warm start alone, and model names a start: {self.model}")
        for key, value in (*flat(self.verl, "verl."), *flat(self.verl_sft, "verl_sft.")):
            for name, instead in OWN_OPTIONS.items():
                if key.endswith(name):
                    raise ValueError(f"{key} is {value}: set {instead} instead, which is checked")
            if key.endswith(("model.lora_rank", "model.lora.rank")) and value:
                raise ValueError(
                    f"{key} is {value}, needs 0: verl saves adapters as no model that can be loaded"
                )
            if key.endswith("trainer.logger") and "file" not in str(value):
                raise ValueError(f"{key} is {value}, needed file in it: recast reads the steps from there")
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> Recipe:
        if self.rollout == "vllm" and self.rl.sampling == "without-replacement":
            raise ValueError("rl.sampling without-replacement needs rollout sid, found vllm")
        if self.rollout == "vllm" and self.rl.exclude_history:
            raise ValueError("rl.exclude_history true needs rollout sid, found vllm")
        likeliest = self.method.tie_rule == "most-probable"
        if likeliest and not self.rl.sampled_log_probs:
            raise ValueError("method.tie_rule most-probable needs rl.sampled_log_probs true, found false")
        if likeliest and self.rollout == "vllm" and not self.vllm_log_probs:
            raise ValueError(
                "method.tie_rule most-probable needs rollout sid, or with vllm rl.temperature 1 and rl."
                f"masked_actor false, found {self.rl.temperature:g} and {str(self.rl.masked_actor).lower()}"
            )
        return self

    @property
    def vllm_log_probs(self) -> bool:
        """Whether vLLM's log-probs, full vocabulary at temperature 1, are what the actor computes."""
        return self.rl.sampled_log_probs and self.rl.temperature == 1 and not self.rl.masked_actor

    @model_validator(mode="after")
    def _enough_cpus(self) -> Recipe:
        needed = self.ray_cpus_needed()
        if self.ray_cpus < needed:
            raise ValueError(
                f"ray_cpus {self.ray_cpus} is too few for num_gpus {self.num_gpus}: verl needs {needed} "
                "and would wait for ever (they are logical CPUs, the machine may have fewer)"
            )
        return self

    def ray_cpus_needed(self) -> int:
        """Logical CPUs that verl's processes reserve, with the recipe's own overrides of their numbers."""
        counts = {key.lstrip("+"): int(value) for key, value in flat(self.verl) if str(value).isdigit()}
        more = sum(max(count - 1, 0) for key, count in counts.items() if key.endswith(RAY_CPU_EACH))
        workers = self.num_gpus * counts.get("trainer.nnodes", 1)
        return RAY_CPUS_SHARED + RAY_CPUS_PER_GPU * workers + more


SECTIONS: dict[str, type[BaseModel]] = {"warm_start": WarmStart, "rl": RL, "method": Method}


def load_recipe(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read, merge and validate a recipe.

    Raises:
        RecipeError: listing every violation, each with its field, the value found and the value needed.
    """
    try:
        return Recipe.model_validate(read_layers(Path(path), overrides))
    except RecursionError:
        raise RecipeError(f"{path} holds a mapping that holds itself", "write it without an alias") from None
    except ValidationError as exc:
        problems, section = [], ""
        for error in exc.errors():
            field = ".".join(str(part) for part in error["loc"]) or "recipe"
            if error["type"] == "extra_forbidden":
                problems.append(f"{field}: unknown key")
                section = section or str(error["loc"][0] if len(error["loc"]) > 1 else "")
            elif error["type"] == "missing":
                problems.append(f"{field}: missing")
            elif error["type"] == "value_error":  # a check of ours, of a section as a whole
                problems.append(f"{field}: {error['msg'].removeprefix('Value error, ')}")
            else:
                problems.append(
                    f"{field}: found {error['input']!r}, {error['msg'][0].lower()}{error['msg'][1:]}"
                )
        keys = SECTIONS.get(section, Recipe).model_fields
        of = f" of {section}" if section in SECTIONS else ""
        raise RecipeError(f"{path}: " + "; ".join(problems), f"known keys{of}: " + ", ".join(keys)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
