"""A training run: RL (or its supervised control) as one verl job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recast_cli.artifacts import weights_sha256, write_manifest
from recast_cli.errors import ArtifactError, DataError
from recast_cli.outputs import atomic_text
from recast_cli.provenance import git_state, versions
from recast_cli.recipe import CONTRASTING, Recipe, dump_recipe
from recast_cli.training import placement, run_directory, verl_args
from recast_cli.training.histories import add_histories
from recast_cli.training.inputs import Inputs
from recast_cli.training.process import OnStep, hf_checkpoints, read_metrics, require_space, run_verl
from recast_cli.training.resume import RESUMED_METRICS, join_metrics, rewind


def draw_rows(source: Path, num_rows: int, seed: int) -> pa.Table:
    """The RL rows of a run, in training order: a seeded shuffle of all rows, repeated if a run needs more.

    Every method of a study trains on the same prompts, the RL methods in this order (verl's SFT trainer
    shuffles once more).
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


def last_step(recipe: Recipe) -> int:
    """The step that verl counts to: an update of the control, else a step of RL, however many updates it
    makes."""
    control = recipe.method.name == "sft-continued"
    return recipe.rl.steps * (recipe.rl.updates_per_step if control else 1)


def num_records(recipe: Recipe) -> int:
    """Records that verl logs of a run: one per step, and with validations one more, of the start."""
    validates = recipe.rl.validate_every > 0 and recipe.method.name != "sft-continued"
    return last_step(recipe) + validates


def job(
    recipe: Recipe, inputs: Inputs, model: Path, out: Path, first: int = 0
) -> tuple[list[str], list[str]]:
    """What follows `python -m`, and the overrides, of the recipe's main job.

    Args:
        first: Step of the checkpoint in `out` to go on from; 0 begins.
    """
    rows = out / "rows.parquet"
    if recipe.method.name == "sft-continued":
        arguments = verl_args.sft_arguments(
            recipe,
            model=model.resolve(),
            train_file=rows.resolve(),
            out=(out / "checkpoints").resolve(),
            epochs=1,
            batch_size=recipe.rl.prompts_per_step // recipe.rl.updates_per_step,
            learning_rate=recipe.rl.learning_rate,
            max_length=inputs.example_length,
            steps=last_step(recipe),
        )
        return verl_args.sft_module(recipe), arguments
    arguments = verl_args.rl_arguments(
        recipe,
        model=model.resolve(),
        train_file=rows.resolve(),
        val_file=(inputs.tokenizer / "verl" / "validation.parquet").resolve(),
        out=(out / "checkpoints").resolve(),
        prompt_length=inputs.prompt_length,
        num_levels=inputs.num_levels,
        rollout_log=(out / "rollouts.jsonl").resolve(),
        resume_from=(out / "checkpoints" / f"global_step_{first}").resolve() if first else None,
    )
    return verl_args.RL_MODULE, arguments


def train(
    recipe: Recipe,
    inputs: Inputs,
    model: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> dict[str, Any]:
    """Run the recipe's method from `model` and export the last checkpoint as `OUT/model`.

    Args:
        model: Folder of the model to start from.
        overwrite: Replace the run that is there; it is kept if the new one makes no step.
        resume: Go on with the unfinished run that is there (`run_directory.find` has looked at it).
        on_step: Called with verl's metrics of each step, of those made earlier too.

    Returns:
        The run's manifest.
    """
    out = Path(recipe.out)
    if overwrite:
        with run_directory.replacing(out, model):
            return train(recipe, inputs, model, on_step=on_step)
    run_directory.require_room(recipe)
    first = rewind(out) if resume else 0
    if recipe.method.name == "sft-continued" and first < last_step(recipe):
        first = 0  # a job of seconds, which saves at its end
    every, left = recipe.rl.save_every, max(recipe.rl.steps - first, 0)
    num_checkpoints = -(-left // every) if every > 0 else min(left, 1)
    require_space(out, (num_checkpoints + 1) * inputs.checkpoint_bytes(recipe.model))  # and the export
    if resume and not first:  # nothing of it can be gone on with
        run_directory.remove(out)
    out.mkdir(parents=True, exist_ok=True)
    log = out.with_name(f"{out.name}.log")  # beside the run, as the warm start's: it must outlive a failure
    try:
        facts = _begin(recipe, inputs, model, first)
        if first and on_step is not None:
            for record in read_metrics(out / "metrics.jsonl"):
                on_step(record)
        if first < last_step(recipe):
            _run_job(recipe, inputs, model, first, log, on_step)
    except BaseException:
        if not run_directory.made_a_step(out):  # there is nothing to keep
            run_directory.remove(out)
        raise
    _export(recipe, log)
    return close(out, inputs, facts)


def _export(recipe: Recipe, log: Path) -> None:
    """The model of the last checkpoint, and the logs, where they stay."""
    out = Path(recipe.out)
    join_metrics(out)
    (out / "logs").mkdir(exist_ok=True)
    if log.exists():  # a resumed run may have been killed after this
        shutil.move(log, out / "logs" / "train.log")
    checkpoints = hf_checkpoints(out / "checkpoints")
    if not checkpoints:
        raise ArtifactError(
            f"{out} has no checkpoint after {recipe.rl.steps} steps, needed one to export",
            "leave trainer.save_freq to rl.save_every",
        )
    shutil.copytree(checkpoints[-1], out / "model", dirs_exist_ok=True)


def _begin(recipe: Recipe, inputs: Inputs, model: Path, first: int) -> dict[str, Any]:
    """Write what identifies a run before it starts, or note that it goes on; the facts of its manifest."""
    out = Path(recipe.out)
    origin = out / run_directory.ORIGIN
    if first:
        facts = json.loads(origin.read_text(encoding="utf-8"))["facts"]
        now = {"step": first, "versions": versions(), "git": git_state()}
        facts["resumed"] = [*facts.get("resumed", []), now]
    else:
        module, arguments = job(recipe, inputs, model, out)
        atomic_text(out / "command.txt", "\n".join(["python -m " + " ".join(module), *arguments]) + "\n")
        facts = {
            "seed": recipe.seed,
            "versions": versions(),
            "git": git_state(),
            "recipe": recipe.model_dump(),
            # Now: a warm start may be made anew while this runs.
            "start": {"model": str(model), "sha256": weights_sha256(model)},
        }
        atomic_text(out / "recipe.yaml", dump_recipe(recipe))
    atomic_text(origin, json.dumps({"parents": inputs.parents, "facts": facts}))
    return facts


def _run_job(
    recipe: Recipe, inputs: Inputs, model: Path, first: int, log: Path, on_step: OnStep | None
) -> None:
    """The verl job itself, from the checkpoint of step `first` on."""
    out, is_sft = Path(recipe.out), recipe.method.name == "sft-continued"
    num_rows = recipe.rl.steps * recipe.rl.prompts_per_step
    rows = draw_rows(inputs.tokenizer / "verl" / "rl.parquet", num_rows, recipe.seed)
    if is_sft:
        rows = continued_sft_rows(rows)
    elif recipe.rl.exclude_history:
        rows = add_histories(rows, inputs.data)
    pq.write_table(rows, out / "rows.parquet")
    module, arguments = job(recipe, inputs, model, out, first)
    metrics = (out / (RESUMED_METRICS if first else "metrics.jsonl")).resolve()
    run_verl(
        module,
        arguments,
        environment=placement.environment(recipe, metrics),
        cwd=out,
        log=log,
        metrics=metrics,
        ray_cpus=0 if is_sft else recipe.ray_cpus_needed(),
        on_step=on_step,
        append=first > 0,
    )


def close(out: Path, inputs: Inputs, facts: dict[str, Any]) -> dict[str, Any]:
    """Close a run directory with its manifest. Checkpoints and logs may be deleted later to save disk."""
    origin = run_directory.ORIGIN
    leave_out = ("checkpoints", "logs", origin)
    manifest = write_manifest(out, "run", parents=inputs.parents, leave_out=leave_out, **facts)
    (out / origin).unlink(missing_ok=True)  # its facts are in the manifest
    return manifest


def estimate(recipe: Recipe, inputs: Inputs) -> dict[str, int]:
    """What a run will process at most: rollouts, rows and tokens that reach the actor, bytes of weights and
    AdamW."""
    groups = recipe.rl.steps * recipe.rl.prompts_per_step
    length = inputs.prompt_length + inputs.num_levels
    if recipe.method.name.startswith("sft"):
        length = inputs.example_length
    whole = groups * recipe.rl.group_size
    rollouts, rows = {
        "sft-continued": (0, groups),
        "sft": (0, inputs.num_sft_rows * recipe.warm_start.epochs),
    }.get(recipe.method.name, (whole, 2 * groups if recipe.method.name in CONTRASTING else whole))
    return {
        "rollouts": rollouts,
        "actor_rows": rows,
        "actor_tokens_at_most": rows * length,
        "weights_and_optimizer_bytes": inputs.checkpoint_bytes(recipe.model),
    }
