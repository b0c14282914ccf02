"""`recast train`: warm start and RL from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from recast_cli.recipe import Recipe
    from recast_cli.training.inputs import Inputs


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, for example recipes/ml-100k/recast.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example rl.steps=20.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print command and config, start nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in OUT; with method sft, the warm start.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in OUT from its last checkpoint.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the run's manifest as JSON.")] = False,
) -> None:
    """Train a recommender: supervised warm start, then RL under stock verl.

    The warm start keeps the epoch with the best validation NDCG@10. A warm start or run already there, of the
    same recipe and data, is reused. RL that was cut short goes on with --resume from its last checkpoint
    (rl.save_every), on one CPU rank to the very weights it would have had.

    Examples:

        \b
        recast train recipes/ml-100k/recast.yaml

        \b
        recast train recipes/ml-100k/recast.yaml rl.steps=20 method.w_negative=0 out=runs/short

        \b
        recast train recipes/ml-100k/grpo.yaml --dry-run
    """
    from recast_cli.artifacts import load_manifest
    from recast_cli.console import note, print_json
    from recast_cli.errors import RecipeError
    from recast_cli.models import require_start
    from recast_cli.outputs import exclusive, refuse_inside
    from recast_cli.recipe import load_recipe
    from recast_cli.training import placement, process, run_directory, warm_start
    from recast_cli.training.hydra_overrides import require_config
    from recast_cli.training.inputs import Inputs
    from recast_cli.training.resume import last_checkpoint

    if overwrite and resume:
        raise RecipeError("--overwrite and --resume are both given", "leave one of them out")
    settings = load_recipe(recipe, overrides or [])
    inputs = Inputs.load(settings)
    if settings.method.name != "sft":
        inputs.require_rl_rows()
    if settings.model:
        require_start(Path(settings.model), inputs.tokenizer)
    placement.require_cores(settings)
    out = Path(settings.out)
    places = {"out=": out, "warm_start.out=": warm_start.folder_of(settings)}
    # A later --overwrite of a parent would take the run with it.
    refuse_inside(places, {"data=": inputs.data, "tokenizer=": inputs.tokenizer})
    is_warm_start = settings.method.name == "sft"
    renew = overwrite and is_warm_start
    make_start = not settings.model and (renew or warm_start.find(settings, inputs) is None)
    if resume and is_warm_start:
        raise RecipeError(
            "--resume goes on with RL, method sft is the warm start alone", "leave it out: it begins anew"
        )
    first = last_checkpoint(out / "checkpoints") if resume else 0
    jobs = _jobs(settings, inputs, make_start=make_start, first=first)
    for module, arguments in jobs.values():
        require_config(module, arguments)
    if dry_run:
        _show(settings, inputs, jobs, json_output=json_output)
        return
    placement.require_gpu(settings)
    placement.require_engine(settings)
    run_directory.require_room(settings)  # before a warm start of minutes, as the next
    if not overwrite and not is_warm_start:
        run_directory.find(settings, inputs, None, resume=resume)
    if make_start and not settings.method.name.startswith("sft"):  # else the job itself asks at once
        process.require_cluster(settings.ray_cpus_needed())
    model = _start_model(settings, inputs, overwrite=renew)
    if is_warm_start:
        manifest = load_manifest(warm_start.folder_of(settings), "warm-start")
    else:
        with exclusive(out):
            found = None if overwrite else run_directory.find(settings, inputs, model, resume=resume)
            if found is not None:
                note(f"reusing the finished run in {out}")
            manifest = found or _run(settings, inputs, model, overwrite=overwrite, resume=resume)
        model = out / "model"
    if json_output:
        print_json(manifest)
    else:
        note(f"model: {model}")


def _start_model(settings: Recipe, inputs: Inputs, *, overwrite: bool) -> Path:
    """Folder of the model that RL starts from: named by the recipe, or the warm start, made if need be."""
    from recast_cli.console import note
    from recast_cli.outputs import exclusive
    from recast_cli.training import warm_start

    if settings.model:
        return Path(settings.model)
    folder = warm_start.folder_of(settings)
    with exclusive(folder, lambda: note(f"waiting for another process to make {folder}")):
        if not overwrite and warm_start.find(settings, inputs) is not None:
            note(f"reusing the warm start in {folder}")
        else:
            _warm_up(settings, inputs, overwrite=overwrite)
    return folder / "model"


def _warm_up(settings: Recipe, inputs: Inputs, *, overwrite: bool) -> None:
    """Make the warm start and show how each epoch validates."""
    from recast_cli.console import note, print_table, progress
    from recast_cli.evaluation.evaluate import evaluate_model
    from recast_cli.training import placement, warm_start

    rows: list[list[Any]] = []

    def score(model: Path) -> dict[str, float]:
        import torch

        note(f"validating epoch {len(rows) + 1}/{settings.warm_start.epochs}")
        torch.set_num_threads(placement.num_threads(settings))
        device = placement.resolve_device(settings)
        return evaluate_model(
            model, inputs.tokenizer, inputs.data, "validation", modes=("history_removed",), device=device
        ).means()

    steps = warm_start.num_steps(settings, inputs)
    with progress("warm start", steps) as advance:
        manifest = warm_start.train(
            settings,
            inputs,
            score=score,
            overwrite=overwrite,
            on_step=lambda _: advance(1),
            on_epoch=lambda number, found: rows.append([number, found["ndcg@10"], found["hr@10"]]),
        )
    best = manifest["best_epoch"]
    title = f"Warm start, validation, history removed (best epoch: {best}; RL rows: {inputs.rl_rows})"
    print_table(title, ["epoch", "ndcg@10", "hr@10"], rows)


def _run(settings: Recipe, inputs: Inputs, model: Path, *, overwrite: bool, resume: bool) -> dict[str, Any]:
    from recast_cli.console import note, progress
    from recast_cli.training import run
    from recast_cli.training.resume import last_checkpoint

    if resume:
        step = last_checkpoint(Path(settings.out) / "checkpoints")
        note(f"going on from step {step}" if step else "no checkpoint to go on from: starting anew")
    with progress(settings.method.name, run.num_records(settings)) as advance:
        return run.train(
            settings, inputs, model, overwrite=overwrite, resume=resume, on_step=lambda _: advance(1)
        )


Job = tuple[list[str], list[str]]  # what follows `python -m`, and the overrides


def _jobs(settings: Recipe, inputs: Inputs, *, make_start: bool, first: int) -> dict[str, Job]:
    """The verl jobs that are to run.

    Args:
        make_start: The warm start is one of them.
        first: Step of the checkpoint that RL goes on from; 0 begins.
    """
    from recast_cli.training import run, warm_start

    start = warm_start.folder_of(settings)
    jobs = {}
    if make_start:
        # The real run works in a scratch folder beside `start`, which replaces it when all is done.
        jobs["warm start"] = warm_start.job(settings, inputs, (start / "work").resolve())
    if settings.method.name != "sft":
        model = Path(settings.model) if settings.model else start / "model"
        jobs[settings.method.name] = run.job(settings, inputs, model, Path(settings.out), first)
    return jobs


def _show(settings: Recipe, inputs: Inputs, jobs: dict[str, Job], *, json_output: bool) -> None:
    """The exact verl commands, the resolved recipe and what the run will process."""
    import shlex

    from recast_cli.console import note, print_json
    from recast_cli.recipe import dump_recipe
    from recast_cli.training import placement, run, warm_start

    out, start = Path(settings.out), warm_start.folder_of(settings)
    commands = {name: ["python", "-m", *module, *arguments] for name, (module, arguments) in jobs.items()}
    environments = {
        name: placement.environment(
            settings, ((start if name == "warm start" else out) / "metrics.jsonl").resolve()
        )
        for name in jobs
    }
    estimate = run.estimate(settings, inputs)
    if json_output:
        print_json(
            {
                "commands": commands,
                "environments": environments,
                "recipe": settings.model_dump(),
                "estimate": estimate,
            }
        )
        return
    for name, command in commands.items():
        exports = [f"{key}={shlex.quote(value)}" for key, value in environments[name].items()]
        folder = start / "work" if name == "warm start" else out
        print(f"# {name} ({folder / 'rows.parquet'} is drawn first)")
        words = 2 + len(jobs[name][0])
        first = shlex.join(command[:words])
        print(" \\\n  ".join([*exports, first, *map(shlex.quote, command[words:])]))
        print()
    print(dump_recipe(settings), end="")
    note("estimate: " + ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in estimate.items()))
