"""A training run: RL (or its supervised control) as one verl job, and what a run directory holds."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recast_cli.artifacts import load_manifest, weights_sha256, write_manifest
from recast_cli.errors import ArtifactError, DataError, EnvironmentFault
from recast_cli.outputs import atomic_text
from recast_cli.provenance import git_state, versions
from recast_cli.recipe import Recipe, dump_recipe
from recast_cli.training import placement, verl_args, warm_start
from recast_cli.training.inputs import Inputs
from recast_cli.training.process import OnStep, hf_checkpoints, read_metrics, require_space, run_verl


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


def num_records(recipe: Recipe) -> int:
    """Records that verl logs of a run: one per RL step, and one per update of the control, which makes as
    many."""
    control = recipe.method.name == "sft-continued"
    return recipe.rl.steps * (recipe.rl.updates_per_step if control else 1)


def job(recipe: Recipe, inputs: Inputs, model: Path, out: Path) -> tuple[list[str], list[str]]:
    """What follows `python -m`, and the overrides, of the recipe's main job."""
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
            steps=num_records(recipe),
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
    )
    return verl_args.RL_MODULE, arguments


def require_room(recipe: Recipe) -> None:
    """Refuse an `out` with files that are no run of ours, or that cannot be made.

    Raises:
        ArtifactError: naming a file that a run must not be mixed with, or the warm start in a run's way.
        EnvironmentFault: the folder to make it in is no folder, or not writable.
    """
    out = Path(recipe.out)
    start_dir = warm_start.folder_of(recipe).resolve()
    taken = (out, *(out / name for name in FOLDERS))
    if recipe.method.name != "sft" and start_dir in [path.resolve() for path in taken]:
        raise ArtifactError(
            f"warm_start.out {warm_start.folder_of(recipe)} is where the run in {out} writes, "
            "needed another folder",
            "leave warm_start.out out for one of its own",
        )
    place = next(path for path in (out.resolve(), *out.resolve().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = "cannot be written" if place.is_dir() else "is a file, needed a folder"
        raise EnvironmentFault(f"out= {out}: {place} {found}", "choose another out=")
    if (out / "command.txt").exists() or not out.exists():
        return
    start = warm_start.folder_of(recipe).name
    ours = (start, f"{start}.log", f".{start}.")  # the last: a scratch folder of another process
    foreign = [path for path in sorted(out.iterdir()) if not path.name.startswith(ours)]
    if foreign:
        raise ArtifactError(
            f"{out} holds {foreign[0].name} and is no run directory, needed an empty or a new folder",
            "choose another out=",
        )


def find(recipe: Recipe, inputs: Inputs, model: Path | None) -> dict[str, Any] | None:
    """Manifest of a finished run of the same recipe, parents and start model in `recipe.out`, else None.

    Args:
        model: The start; None leaves it out, for a look before it is made.

    Raises:
        ArtifactError: the folder holds another run, one that did not finish, or other files.
    """
    out = Path(recipe.out)
    _bring_back(out)
    require_room(recipe)
    if not (out / "command.txt").exists():
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
    if model is not None and manifest["start"]["sha256"] != weights_sha256(model):
        raise ArtifactError(
            f"{out} holds a run that started from another model than {model}",
            "pass --overwrite or choose another out=",
        )
    return manifest


# What a run writes into its directory; the marker of a run comes last.
FOLDERS = ("checkpoints", "model", "logs")
FILES = ("manifest.json", "metrics.jsonl", "rollouts.jsonl", "rows.parquet", "recipe.yaml", "command.txt")


def remove(out: Path) -> None:
    """Remove what a run wrote, and nothing else (a warm start beside it is an artifact of its own)."""
    if not (out / "command.txt").exists():
        return
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's files are in it
        out.rmdir()


def made_a_step(out: Path) -> bool:
    """Whether a run left anything of worth."""
    return bool(read_metrics(out / "metrics.jsonl") or hf_checkpoints(out / "checkpoints"))


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _bring_back(out: Path) -> None:
    """Undo a replacement that ended, perhaps killed, with the old run set aside and no new one in its place.

    `command.txt` leaves first and comes back last: a kill at any moment is made good by the next call.
    """
    aside = _aside(out)
    if (out / "command.txt").exists() or not aside.is_dir():
        return
    out.mkdir(exist_ok=True)  # it may be gone, empty as it was
    for name in (*FOLDERS, *FILES):
        if (aside / name).exists():
            (aside / name).rename(out / name)
    aside.rmdir()


@contextlib.contextmanager
def _replacing(out: Path, start: Path) -> Iterator[None]:
    """Set the run in `out` aside; it comes back if the one that replaces it ends before its first step.

    Raises:
        ArtifactError: the model `start`, which the next run needs, would go with it.
    """
    if any(start.resolve().is_relative_to((out / name).resolve()) for name in FOLDERS):
        raise ArtifactError(
            f"--overwrite would remove the start model {start}", "choose another out= or copy the model"
        )
    aside = _aside(out)
    if aside.is_dir() and not made_a_step(out):  # it was killed
        remove(out)
    _bring_back(out)
    if not (out / "command.txt").exists():
        yield
        return
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name in reversed((*FOLDERS, *FILES)):
        if (out / name).exists():
            (out / name).rename(aside / name)
    try:
        yield
    finally:
        _bring_back(out)
        shutil.rmtree(aside, ignore_errors=True)


def train(
    recipe: Recipe, inputs: Inputs, model: Path, *, overwrite: bool = False, on_step: OnStep | None = None
) -> dict[str, Any]:
    """Run the recipe's method from `model` and export the last checkpoint as `OUT/model`.

    Args:
        model: Folder of the model to start from.
        overwrite: Replace the run that is there; it is kept if the new one makes no step.
        on_step: Called with verl's metrics of each step.

    Returns:
        The run's manifest.
    """
    if overwrite:
        with _replacing(Path(recipe.out), model):
            return train(recipe, inputs, model, on_step=on_step)
    out = Path(recipe.out)
    num_rows = recipe.rl.steps * recipe.rl.prompts_per_step
    rows = draw_rows(inputs.tokenizer / "verl" / "rl.parquet", num_rows, recipe.seed)
    require_room(recipe)
    every = recipe.rl.save_every
    num_checkpoints = -(-recipe.rl.steps // every) if every > 0 else 1
    require_space(out, (num_checkpoints + 1) * inputs.checkpoint_bytes(recipe.model))  # and the export
    out.mkdir(parents=True, exist_ok=True)
    module, arguments = job(recipe, inputs, model, out)
    facts = {
        "seed": recipe.seed,
        "versions": versions(),
        "git": git_state(),
        "recipe": recipe.model_dump(),
        # Now: a warm start may be made anew while this runs.
        "start": {"model": str(model), "sha256": weights_sha256(model)},
    }
    is_sft = recipe.method.name == "sft-continued"
    metrics = (out / "metrics.jsonl").resolve()
    log = out.with_name(f"{out.name}.log")  # beside the run, as the warm start's: it must outlive a failure
    try:
        atomic_text(out / "command.txt", "\n".join(["python -m " + " ".join(module), *arguments]) + "\n")
        atomic_text(out / "recipe.yaml", dump_recipe(recipe))
        pq.write_table(continued_sft_rows(rows) if is_sft else rows, out / "rows.parquet")
        run_verl(
            module,
            arguments,
            environment=placement.environment(recipe, metrics),
            cwd=out,
            log=log,
            metrics=metrics,
            ray_cpus=0 if is_sft else recipe.ray_cpus_needed(),
            on_step=on_step,
        )
    except BaseException:
        if not made_a_step(out):  # there is nothing to keep
            remove(out)
        raise
    (out / "logs").mkdir(exist_ok=True)
    shutil.move(log, out / "logs" / "train.log")
    checkpoints = hf_checkpoints(out / "checkpoints")
    if not checkpoints:
        raise ArtifactError(
            f"{out} has no checkpoint after {recipe.rl.steps} steps, needed one to export",
            "leave trainer.save_freq to rl.save_every",
        )
    shutil.copytree(checkpoints[-1], out / "model", dirs_exist_ok=True)
    return close(out, inputs, facts)


def close(out: Path, inputs: Inputs, facts: dict[str, Any]) -> dict[str, Any]:
    """Close a run directory with its manifest. Checkpoints and logs may be deleted later to save disk."""
    return write_manifest(out, "run", parents=inputs.parents, leave_out=("checkpoints", "logs"), **facts)


def estimate(recipe: Recipe, inputs: Inputs) -> dict[str, int]:
    """What a run will process at most: rollouts, rows and tokens that reach the actor, bytes of weights and
    AdamW."""
    groups = recipe.rl.steps * recipe.rl.prompts_per_step
    length = inputs.prompt_length + inputs.num_levels
    if recipe.method.name.startswith("sft"):
        length = inputs.example_length
    rollouts, rows = {
        "recast": (groups * recipe.rl.group_size, 2 * groups),
        "grpo": (groups * recipe.rl.group_size, groups * recipe.rl.group_size),
        "sft-continued": (0, groups),
        "sft": (0, inputs.num_sft_rows * recipe.warm_start.epochs),
    }[recipe.method.name]
    return {
        "rollouts": rollouts,
        "actor_rows": rows,
        "actor_tokens_at_most": rows * length,
        "weights_and_optimizer_bytes": inputs.checkpoint_bytes(recipe.model),
    }
