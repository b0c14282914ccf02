"""Supervised warm start: verl's SFT trainer on the windows, and the epoch that validates best."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recast_cli.artifacts import is_artifact, load_manifest, write_manifest
from recast_cli.errors import ArtifactError, DataError
from recast_cli.nested import differences, dotted
from recast_cli.outputs import atomic_dir
from recast_cli.provenance import versions
from recast_cli.recipe import Recipe
from recast_cli.training import placement, verl_args
from recast_cli.training.inputs import Inputs
from recast_cli.training.process import OnStep, hf_checkpoints, require_space, run_verl


def folder_of(recipe: Recipe) -> Path:
    """Where the recipe's warm start lies; its model is `folder_of(recipe) / "model"`."""
    return Path(recipe.warm_start.out) if recipe.warm_start.out else Path(recipe.out) / "warm_start"


def facts(recipe: Recipe) -> dict[str, Any]:
    """What decides a warm start; recorded and compared before reuse."""
    params = recipe.warm_start.model_dump(exclude={"out"})
    return {"seed": recipe.seed, "params": params, "verl_sft": recipe.verl_sft}


def find(recipe: Recipe, inputs: Inputs) -> dict[str, Any] | None:
    """Manifest of a finished warm start with the same parents and parameters, else None.

    Raises:
        ArtifactError: the folder holds something else.
    """
    folder = folder_of(recipe)
    if not folder.exists():
        return None
    manifest = load_manifest(folder, "warm-start")
    wanted = {**facts(recipe), "parents": inputs.parents}
    found = {key: manifest.get(key) for key in wanted}
    found["verl_sft"] = dotted(found["verl_sft"] or {})  # an older version kept sections nested
    if found != wanted:
        changed = differences(found, wanted)
        raise ArtifactError(
            f"{folder} holds a warm start of other data or settings: {changed}",
            "choose another warm_start.out, or make it anew: --overwrite with a recipe of method sft",
        )
    return manifest


def num_steps(recipe: Recipe, inputs: Inputs) -> int:
    """Optimiser steps of all epochs."""
    return inputs.num_sft_rows // recipe.warm_start.batch_size * recipe.warm_start.epochs


def best_of(epochs: Sequence[Mapping[str, float]]) -> int:
    """Number (from 0) of the epoch with the best validation `ndcg@10`; ties go to the earlier."""
    return max(range(len(epochs)), key=lambda number: (epochs[number]["ndcg@10"], -number))


def shuffled(rows: pa.Table, seed: int) -> pa.Table:
    """The rows in an order of the seed's own."""
    return rows.take(np.random.default_rng(seed).permutation(rows.num_rows))


def job(recipe: Recipe, inputs: Inputs, work: Path) -> tuple[list[str], list[str]]:
    """What follows `python -m`, and the overrides, of a job that reads and writes below `work`."""
    settings = recipe.warm_start
    arguments = verl_args.sft_arguments(
        recipe,
        model=(inputs.tokenizer / "model").resolve(),
        train_file=work / "rows.parquet",
        out=work / "checkpoints",
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        max_length=inputs.example_length,
    )
    return verl_args.sft_module(recipe), arguments


def train(
    recipe: Recipe,
    inputs: Inputs,
    *,
    score: Callable[[Path], dict[str, float]],
    overwrite: bool = False,
    on_step: OnStep | None = None,
    on_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train on the SFT windows and keep the epoch with the best validation NDCG@10.

    Args:
        score: Hugging Face folder -> validation metrics; `ndcg@10` decides, ties go to the earlier epoch.
        overwrite: Replace a warm start that is there, once the new one is done.
        on_step: Called with verl's metrics of each step.
        on_epoch: Called with each epoch's number (from 1) and metrics.

    Returns:
        The warm start's manifest.
    """
    settings = recipe.warm_start
    if inputs.num_sft_rows < settings.batch_size:
        raise DataError(
            f"{inputs.num_sft_rows} SFT windows are less than one batch of {settings.batch_size}",
            "set warm_start.batch_size",
        )
    require_space(folder_of(recipe), (settings.epochs + 1) * inputs.checkpoint_bytes())
    folder = folder_of(recipe).resolve()  # verl runs in another working directory
    log = folder.with_name(f"{folder.name}.log")  # outside the scratch folder: it must outlive a failure
    if overwrite and folder.exists() and not is_artifact(folder, "warm-start"):
        raise ArtifactError(f"{folder} holds no warm start", "choose another warm_start.out")
    with atomic_dir(folder, replace=overwrite) as scratch:
        work = scratch / "work"
        work.mkdir()
        module, arguments = job(recipe, inputs, work)
        # verl shuffles every epoch, by a seed that is always 0: the rows' own order makes ours count.
        pq.write_table(shuffled(pq.read_table(inputs.sft_rows), recipe.seed), work / "rows.parquet")
        metrics = scratch / "metrics.jsonl"
        environment = placement.environment(recipe, metrics)
        run_verl(
            module, arguments, environment=environment, cwd=work, log=log, metrics=metrics, on_step=on_step
        )
        epochs = []
        for number, checkpoint in enumerate(hf_checkpoints(work / "checkpoints"), start=1):
            epochs.append((checkpoint, score(checkpoint)))
            if on_epoch is not None:
                on_epoch(number, epochs[-1][1])
        best = best_of([found for _, found in epochs])
        shutil.move(epochs[best][0], scratch / "model")
        shutil.rmtree(work)
        shutil.move(log, scratch / "warm_start.log")
        return write_manifest(
            scratch,
            "warm-start",
            parents=inputs.parents,
            leave_out=("warm_start.log",),
            **facts(recipe),
            versions=versions(),
            epochs=[found for _, found in epochs],
            best_epoch=best + 1,
        )
