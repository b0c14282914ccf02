"""A training run: warm start and RL, each one verl job, and what a run directory holds."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recast_cli.artifacts import (
    atomic_dir,
    atomic_text,
    file_sha256,
    identity,
    load_manifest,
    require_parent,
    write_manifest,
)
from recast_cli.errors import ArtifactError, DataError, EnvironmentFault
from recast_cli.recipe import Recipe, dump_recipe
from recast_cli.training import verl_args
from recast_cli.training.process import run_verl

OnStep = Callable[[dict[str, Any]], None]
PACKAGES = ("verl-recast", "verl", "torch", "transformers", "ray", "tensordict", "TransferQueue", "numpy")


@dataclass(frozen=True)
class Inputs:
    """The parents of a run, checked."""

    data: Path
    tokenizer: Path
    dataset: dict[str, Any]
    tokenizer_manifest: dict[str, Any]

    @classmethod
    def load(cls, recipe: Recipe) -> Inputs:
        """Read both manifests and refuse a tokenizer of another dataset."""
        data, tokenizer = Path(recipe.data), Path(recipe.tokenizer)
        dataset, tokenizer_manifest = load_manifest(data, "dataset"), load_manifest(tokenizer, "tokenizer")
        require_parent(tokenizer_manifest, dataset, tokenizer, data)
        return cls(data, tokenizer, dataset, tokenizer_manifest)

    @property
    def num_levels(self) -> int:
        return int(self.tokenizer_manifest["num_levels"])

    @property
    def item_tokens(self) -> int:
        """Tokens of one item in a prompt: begin, L codes, end."""
        return self.num_levels + 2

    @property
    def prompt_length(self) -> int:
        """Most tokens of a prompt: a full history and the `<|sid_begin|>` that asks for the next item."""
        return int(self.dataset["params"]["history"]) * self.item_tokens + 1

    @property
    def parents(self) -> dict[str, str]:
        return {"dataset": identity(self.dataset), "tokenizer": identity(self.tokenizer_manifest)}


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def git_state() -> str | None:
    """Commit of the working directory's repository, marked `+` if it has changes; None outside of one."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if dirty else "")


# -- warm start ------------------------------------------------------------------------------------------


def warm_start_dir(recipe: Recipe) -> Path:
    return Path(recipe.warm_start.out) if recipe.warm_start.out else Path(recipe.out) / "warm_start"


def warm_start_facts(recipe: Recipe) -> dict[str, Any]:
    """What decides a warm start; recorded and compared before reuse."""
    return {"seed": recipe.seed, "params": recipe.warm_start.model_dump(exclude={"out"})}


def find_warm_start(recipe: Recipe, inputs: Inputs) -> dict[str, Any] | None:
    """Manifest of a finished warm start with the same parents and parameters, else None.

    Raises:
        ArtifactError: the folder holds something else.
    """
    folder = warm_start_dir(recipe)
    if not folder.exists():
        return None
    manifest = load_manifest(folder, "warm-start")
    wanted = {**warm_start_facts(recipe), "parents": inputs.parents}
    if any(manifest.get(key) != value for key, value in wanted.items()):
        raise ArtifactError(
            f"{folder} holds a warm start of other data or settings",
            "remove it or choose another warm_start.out",
        )
    return manifest


def warm_start(
    recipe: Recipe,
    inputs: Inputs,
    *,
    score: Callable[[Path], dict[str, float]],
    on_step: OnStep | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train on the SFT windows and keep the epoch with the best validation NDCG@10.

    Args:
        score: Hugging Face folder -> validation metrics; `ndcg@10` decides, ties go to the earlier epoch.
        on_step: Called with verl's metrics of each step.
        on_epoch: Called with each epoch's number (from 1) and metrics.

    Returns:
        The warm start's manifest; the model lies in `warm_start_dir(recipe) / "model"`.
    """
    settings = recipe.warm_start
    rows = pq.read_metadata(inputs.tokenizer / "verl" / "sft.parquet").num_rows
    if rows < settings.batch_size:
        raise DataError(
            f"{rows} SFT windows are less than one batch of {settings.batch_size}",
            "set warm_start.batch_size",
        )
    folder = warm_start_dir(recipe).resolve()  # verl runs in another working directory
    log = folder.with_name(f"{folder.name}.log")  # outside the scratch folder: it must outlive a failure
    with atomic_dir(folder) as scratch:
        work = scratch / "work"
        work.mkdir()
        arguments = verl_args.sft_arguments(
            recipe,
            model=(inputs.tokenizer / "model").resolve(),
            train_file=(inputs.tokenizer / "verl" / "sft.parquet").resolve(),
            out=work / "checkpoints",
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            max_length=inputs.prompt_length - 1 + inputs.item_tokens,
        )
        run_sft(recipe, arguments, work, log, scratch / "metrics.jsonl", on_step)
        epochs = []
        for number, checkpoint in enumerate(hf_checkpoints(work / "checkpoints"), start=1):
            epochs.append((checkpoint, score(checkpoint)))
            if on_epoch is not None:
                on_epoch(number, epochs[-1][1])
        best = max(range(len(epochs)), key=lambda i: (epochs[i][1]["ndcg@10"], -i))
        shutil.move(epochs[best][0], scratch / "model")
        shutil.rmtree(work)
        shutil.move(log, scratch / "warm_start.log")
        facts = {"epochs": [metrics for _, metrics in epochs], "best_epoch": best + 1}
        return write_manifest(
            scratch,
            "warm-start",
            parents=inputs.parents,
            **warm_start_facts(recipe),
            versions=versions(),
            **facts,
        )


def run_sft(
    recipe: Recipe, arguments: list[str], work: Path, log: Path, metrics: Path, on_step: OnStep | None
) -> list[dict[str, Any]]:
    """verl's SFT trainer under torchrun."""
    launcher = ["torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={recipe.num_gpus}"]
    return run_verl(
        [*launcher, "-m", "verl.trainer.sft_trainer"],
        arguments,
        environment=verl_args.environment(recipe, metrics),
        cwd=work,
        log=log,
        metrics=metrics,
        on_step=on_step,
    )


def hf_checkpoints(folder: Path) -> list[Path]:
    """Hugging Face folders of verl's checkpoints, by step."""
    found = sorted(folder.glob("global_step_*"), key=lambda path: int(path.name.rsplit("_", 1)[1]))
    inner = [
        next((sub for sub in (step / "huggingface", step / "actor" / "huggingface") if sub.is_dir()), None)
        for step in found
    ]
    return [path for path in inner if path is not None]


# -- RL and continued SFT --------------------------------------------------------------------------------


def draw_rows(source: Path, num_rows: int, seed: int) -> pa.Table:
    """The RL rows of a run, in training order: a seeded shuffle of all rows, repeated if a run needs more.

    Every method of a study trains on the same prompts in the same order.
    """
    table = pq.read_table(source)
    if table.num_rows == 0:
        raise DataError(f"{source} holds no RL rows", "rerun recast prepare-data with more interactions")
    rng = np.random.default_rng(seed)
    rounds = -(-num_rows // table.num_rows)
    order = np.concatenate([rng.permutation(table.num_rows) for _ in range(rounds)])[:num_rows]
    return table.take(order)


def continued_sft_rows(rows: pa.Table) -> pa.Table:
    """RL rows as SFT rows: the history is context only, the target is learned."""
    messages = [
        [{**message, "role": "user"} for message in row["prompt"]]
        + [{"role": "assistant", "content": row["reward_model"]["ground_truth"]}]
        for row in rows.select(["prompt", "reward_model"]).to_pylist()
    ]
    return pa.table({"messages": messages})


def job(recipe: Recipe, inputs: Inputs, model: Path, out: Path) -> tuple[list[str], list[str]]:
    """Module and overrides of the recipe's main job, without running it."""
    rows = out / "rows.parquet"
    if recipe.method.name == "sft-continued":
        arguments = verl_args.sft_arguments(
            recipe,
            model=model.resolve(),
            train_file=rows.resolve(),
            out=(out / "checkpoints").resolve(),
            epochs=1,
            batch_size=recipe.rl.prompts_per_step,
            learning_rate=recipe.rl.learning_rate,
            max_length=inputs.prompt_length - 1 + inputs.item_tokens,
            steps=recipe.rl.steps,
            constant_rate=True,
        )
        return ["verl.trainer.sft_trainer"], arguments
    arguments = verl_args.rl_arguments(
        recipe,
        model=model.resolve(),
        train_file=rows.resolve(),
        val_file=(inputs.tokenizer / "verl" / "validation.parquet").resolve(),
        out=(out / "checkpoints").resolve(),
        prompt_length=inputs.prompt_length,
        num_levels=inputs.num_levels,
    )
    return ["verl.trainer.main_ppo"], arguments


def find_run(recipe: Recipe, inputs: Inputs) -> dict[str, Any] | None:
    """Manifest of a finished run of the same recipe and parents in `recipe.out`, else None.

    Raises:
        ArtifactError: the folder holds another run, or one that did not finish.
    """
    out = Path(recipe.out)
    if not (out / "recipe.yaml").exists():
        return None
    if not (out / "manifest.json").exists():
        raise ArtifactError(
            f"{out} holds a run that did not finish", "pass --overwrite or choose another out="
        )
    manifest = load_manifest(out, "run")
    if manifest["recipe"] != recipe.model_dump() or manifest["parents"] != inputs.parents:
        raise ArtifactError(
            f"{out} holds a run of another recipe or data", "pass --overwrite or choose another out="
        )
    return manifest


def train(recipe: Recipe, inputs: Inputs, model: Path, *, on_step: OnStep | None = None) -> dict[str, Any]:
    """Run the recipe's method from `model` and export the last checkpoint as `OUT/model`.

    Returns:
        The run's manifest.
    """
    out = Path(recipe.out)
    num_rows = recipe.rl.steps * recipe.rl.prompts_per_step
    rows = draw_rows(inputs.tokenizer / "verl" / "rl.parquet", num_rows, recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    _require_space(out, estimate(recipe, inputs)["weights_and_optimizer_bytes"])
    atomic_text(out / "recipe.yaml", dump_recipe(recipe))
    facts = {"seed": recipe.seed, "versions": versions(), "git": git_state(), "recipe": recipe.model_dump()}
    is_sft = recipe.method.name == "sft-continued"
    pq.write_table(continued_sft_rows(rows) if is_sft else rows, out / "rows.parquet")
    module, arguments = job(recipe, inputs, model, out)
    atomic_text(out / "command.txt", "\n".join(["python -m " + module[0], *arguments]) + "\n")
    log, metrics = out / "logs" / "train.log", (out / "metrics.jsonl").resolve()
    if is_sft:
        run_sft(recipe, arguments, out, log, metrics, on_step)
    else:
        environment = verl_args.environment(recipe, metrics)
        run_verl(
            module, arguments, environment=environment, cwd=out, log=log, metrics=metrics, on_step=on_step
        )
    last = hf_checkpoints(out / "checkpoints")[-1]
    shutil.copytree(last, out / "model", dirs_exist_ok=True)
    weights = sorted(model.glob("*.safetensors"))
    start = {"model": str(model), "sha256": {path.name: file_sha256(path) for path in weights}}
    return write_run(out, inputs, facts | {"start": start})


def _require_space(folder: Path, num_bytes: int) -> None:
    """Refuse to start on a disk that cannot hold one checkpoint, its export and the logs."""
    needed = 2 * num_bytes + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFault(
            f"{folder} has {free >> 20} MiB free, one checkpoint needs {needed >> 20} MiB",
            "free some space or choose another out=",
        )


def write_run(out: Path, inputs: Inputs, facts: dict[str, Any]) -> dict[str, Any]:
    """Close a run directory with its manifest; Hydra's own folder goes."""
    shutil.rmtree(out / "outputs", ignore_errors=True)
    return write_manifest(out, "run", parents=inputs.parents, **facts)


def estimate(recipe: Recipe, inputs: Inputs) -> dict[str, int]:
    """What a run will process at most: rollouts, rows and tokens that reach the actor, bytes of weights and
    AdamW."""
    groups = recipe.rl.steps * recipe.rl.prompts_per_step
    rollouts = 0 if recipe.method.name.startswith("sft") else groups * recipe.rl.group_size
    kept = {"recast": 2 * groups, "grpo": rollouts}.get(recipe.method.name, groups)
    weights = sum(path.stat().st_size for path in (inputs.tokenizer / "model").glob("*.safetensors"))
    return {
        "rollouts": rollouts,
        "actor_rows": kept,
        "actor_tokens_at_most": kept * (inputs.prompt_length + inputs.num_levels),
        "weights_and_optimizer_bytes": 4 * weights,  # weights, gradients and two moments, one precision
    }


def warm_start_steps(recipe: Recipe, inputs: Inputs) -> int:
    """Optimiser steps of the warm start."""
    rows = pq.read_metadata(inputs.tokenizer / "verl" / "sft.parquet").num_rows
    return rows // recipe.warm_start.batch_size * recipe.warm_start.epochs
