"""The directory of a run: when it is reused, refused, replaced or removed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recast_cli.artifacts import load_manifest, weights_sha256
from recast_cli.errors import ArtifactError, EnvironmentFault
from recast_cli.nested import differences
from recast_cli.recipe import Recipe
from recast_cli.training import warm_start
from recast_cli.training.inputs import Inputs
from recast_cli.training.process import DAMAGED, hf_checkpoints, read_metrics
from recast_cli.training.resume import RESUMED_METRICS, last_checkpoint


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
    # The last two: scratch of another process, and of one that was killed while it wrote its first file.
    ours = (start, f"{start}.log", f".{start}.", ".command.txt.")
    foreign = [path for path in sorted(out.iterdir()) if not path.name.startswith(ours)]
    if foreign:
        raise ArtifactError(
            f"{out} holds {foreign[0].name} and is no run directory, needed an empty or a new folder",
            "choose another out=",
        )


def find(
    recipe: Recipe, inputs: Inputs, model: Path | None, *, resume: bool = False
) -> dict[str, Any] | None:
    """Manifest of a finished run of the same recipe, parents and start model in `recipe.out`, else None.

    Args:
        model: The start; None leaves it out, for a look before it is made.
        resume: A run that did not finish may be there: it must be of the same recipe, parents and model.

    Raises:
        ArtifactError: the folder holds another run, one that did not finish, or other files.
    """
    out = Path(recipe.out)
    _bring_back(out)
    require_room(recipe)
    if not (out / "command.txt").exists():
        return None
    if (out / "manifest.json").exists():
        manifest = load_manifest(out, "run")
        _require_same(out, manifest["parents"], manifest, recipe, inputs, model)
        return manifest
    step, origin = last_checkpoint(out / "checkpoints"), out / ORIGIN
    if not resume or (made_a_step(out) and not origin.exists()):  # the latter is of an older version
        can = step and origin.exists()
        go_on = f"pass --resume to go on from step {step}, --overwrite" if can else "pass --overwrite"
        raise ArtifactError(f"{out} holds a run that did not finish", f"{go_on} or choose another out=")
    if origin.exists():
        parents, facts = _read_origin(origin)
        _require_same(out, parents, facts, recipe, inputs, model)
    return None


def _read_origin(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Parents and facts of a run that has no manifest yet."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parents, facts = dict(found["parents"]), dict(found["facts"])
        facts["recipe"], facts["start"] = dict(facts["recipe"]), dict(facts["start"])
    except (ValueError, KeyError, TypeError) as exc:
        raise ArtifactError(
            f"{path} does not say what the run there began from ({exc!r:.80})",
            DAMAGED,
        ) from exc
    return parents, facts


def _require_same(
    out: Path,
    parents: dict[str, str],
    facts: dict[str, Any],
    recipe: Recipe,
    inputs: Inputs,
    model: Path | None,
) -> None:
    """Refuse a run in `out` of another recipe, parents or start model."""
    hint = "pass --overwrite or choose another out="
    found = _as_read_now(facts["recipe"])
    if found != recipe:
        there = facts["recipe"] if found is None else found.model_dump()
        changed = differences(there, recipe.model_dump())
        raise ArtifactError(f"{out} holds a run of another recipe: {changed}", hint)
    other = [name for name, found in inputs.parents.items() if parents.get(name) != found]
    if other:
        folder = getattr(recipe, "data" if other[0] == "dataset" else other[0])
        raise ArtifactError(f"{out} holds a run of another {other[0]} than {folder}", hint)
    if model is not None and facts["start"].get("sha256") != weights_sha256(model):
        raise ArtifactError(
            f"{out} holds a run that started from another model than {model}",
            "pass --overwrite or choose another out=",
        )


def _as_read_now(found: dict[str, Any]) -> Recipe | None:
    """A run's recipe, keys that it did not know yet at their defaults; None if it has keys that are gone."""
    try:
        return Recipe.model_validate(found)
    except ValidationError:
        return None


# What a run writes into its directory; the marker of a run comes last.
FOLDERS = ("checkpoints", "model", "logs")
ORIGIN = "origin.json"  # what identifies a run while it has no manifest yet
LOGS = ("metrics.jsonl", RESUMED_METRICS, "rollouts.jsonl")
FILES = ("manifest.json", *LOGS, "rows.parquet", ORIGIN, "recipe.yaml", "command.txt")


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
def replacing(out: Path, start: Path) -> Iterator[None]:
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
