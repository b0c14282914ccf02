"""`recast profile --sweep`: the actor's cost over settings, four arms at each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast_cli.errors import RecipeError

if TYPE_CHECKING:
    from recast_cli.profiling.sweep import Arm, Launch, Point
    from recast_cli.recipe import Recipe
    from recast_cli.training.inputs import Inputs
    from recast_cli.vocabulary import Vocabulary

ACTOR_ALONE = "verl_recast.actor_alone"
MOST_TOKENS = 10**9  # of a batch of rows read alone


def run_sweep(
    settings: Recipe,
    inputs: Inputs,
    model: Path,
    texts: Sequence[str],
    out: Path,
    steps: int,
    *,
    repeats: int,
    traced: int,
    json_output: bool,
) -> None:
    """Measure every point of a sweep, print the rows, and write sweep.json, sweep.png and sweep.html.

    Args:
        model: For the points that name no size.
        texts: `NAME=VALUE,VALUE`, see `parse_points`.
        steps, repeats, traced: Timed steps of a process, processes of an arm, and 1 for one more step that is
            traced.

    Raises:
        RecipeError: a sweep that cannot be read, or is longer than what the model reads.
    """
    from recast_cli.console import note, print_json, print_table
    from recast_cli.outputs import atomic_text
    from recast_cli.profiling import sweep_report as report
    from recast_cli.profiling import trace
    from recast_cli.profiling.folder import new_folder
    from recast_cli.profiling.profile import machine
    from recast_cli.profiling.sweep import Point, parse_points
    from recast_cli.provenance import versions
    from recast_cli.training import placement

    default = Point(inputs.prompt_length, settings.rl.group_size, settings.rl.prompts_per_step)
    points = _sized(parse_points(texts, default), model)
    _require_runnable(points, settings, model, inputs.num_levels)
    device, threads = placement.resolve_device(settings), placement.num_threads(settings)
    compared = "cpu_s" if device == "cpu" else "s"
    with new_folder(out / "jobs"):
        pass  # what the processes are told holds the folder's name: they start when it is in its place
    for name in ("sweep.json", "sweep.png", "sweep.html"):  # of an earlier sweep, whose jobs are gone
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "trace", ignore_errors=True)
    rows = report.with_ratios(
        _measure(settings, inputs, model, points, (out / "jobs").resolve(), steps, repeats, traced), compared
    )
    result = {
        "rows": rows,
        "setting": {
            "device": device,
            "threads": threads,
            "compared": "processor time" if device == "cpu" else "time",
            "timed_steps": steps * repeats,
            "seed": settings.seed,
            "max_tokens_per_micro_batch": settings.rl.max_tokens_per_micro_batch,
            **machine(),
            "versions": versions(),
        },
    }
    atomic_text(out / "sweep.json", json.dumps(result, indent=2) + "\n")
    report.plot(rows, out / "sweep.png")
    atomic_text(out / "sweep.html", report.page(result, out / "sweep.png"))
    if json_output:
        print_json(rows)
    else:
        print_table("Cost of a step, one worker alone", *report.table(rows))
    if traced:
        for folder in sorted((out / "jobs").glob(f"point-*/*-{repeats}/trace")):
            point, arm = folder.parts[-3], folder.parts[-2].removesuffix(f"-{repeats}")
            trace.merge(folder, out / "trace" / f"{point}-{arm}.json.gz")
    note(f"wrote {out / 'sweep.json'}, {out / 'sweep.png'} and {out / 'sweep.html'}")


def _config(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / "config.json").read_text(encoding="utf-8")))


def _sized(points: Sequence[Point], model: Path) -> list[Point]:
    """A point that names one size of the model has the other one of the model as it is."""
    from dataclasses import replace

    config = _config(model)
    sizes = {"hidden_size": config.get("hidden_size"), "layers": config.get("num_hidden_layers")}
    found = []
    for point in points:
        named = {name: getattr(point, name) for name in sizes if getattr(point, name) is not None}
        found.append(replace(point, **{**sizes, **named}) if named else point)
    return found


def _require_runnable(points: Sequence[Point], settings: Recipe, model: Path, num_levels: int) -> None:
    """Refuse, before anything is measured, a point that no worker could run.

    Raises:
        RecipeError: naming the point's field, the value found and the value needed.
    """
    from recast_cli.tokenizer.model import MAX_POSITIONS

    if settings.rl.masked_actor:
        raise RecipeError(
            "rl.masked_actor is true, needed false: the answers of a sweep are random codes, no items",
            "profile without --sweep",
        )
    own = _config(model).get("max_position_embeddings")
    for point in points:
        most = own if point.layers is None else MAX_POSITIONS
        longest = point.prompt_length + num_levels
        if most is not None and longest > most:
            raise RecipeError(
                f"--sweep prompt_length asks for {longest} tokens with the answer, the model reads {most}",
                f"--sweep prompt_length={most - num_levels} at most",
            )
        if point.batch % settings.num_gpus:
            raise RecipeError(
                f"--sweep batch holds {point.batch}, needed a multiple of num_gpus {settings.num_gpus}",
                "choose another",
            )
        tokens = point.batch * point.group_size * longest
        if tokens > MOST_TOKENS:
            raise RecipeError(
                f"--sweep asks for a batch of {tokens:,} tokens, needed at most {MOST_TOKENS:,}",
                "lower batch, group_size or prompt_length",
            )


def _measure(
    settings: Recipe,
    inputs: Inputs,
    model: Path,
    points: Sequence[Point],
    folder: Path,
    steps: int,
    repeats: int,
    traced: int,
) -> list[dict[str, Any]]:
    """A row for each arm of each point."""
    from recast_cli.console import progress
    from recast_cli.core.cost import ModelShape
    from recast_cli.profiling import sweep
    from recast_cli.profiling.collect import num_steps
    from recast_cli.profiling.peak import matmul_peak
    from recast_cli.training import placement
    from recast_cli.vocabulary import Vocabulary

    known = Vocabulary.load(inputs.tokenizer / "vocabulary.json")
    peak_flops = matmul_peak(placement.resolve_device(settings), placement.num_threads(settings))
    total = len(points) * len(sweep.ARMS) * repeats * num_steps(steps, traced)
    rows = []
    with progress("sweep", total) as advance:
        for number, point in enumerate(points):
            place = folder / f"point-{number + 1}"
            place.mkdir()
            chosen, vocabulary = _model(point, model, known, place / "model", settings.seed)
            codes = sweep.Codes(vocabulary.level_offsets, vocabulary.codebook_sizes)
            rows += sweep.run_point(
                point,
                codes,
                ModelShape.from_config(_config(chosen)),
                _launcher(settings, chosen, codes.num_levels, steps, traced, lambda _: advance(1)),
                place,
                steps=steps,
                repeats=repeats,
                seed=settings.seed,
                peak_flops=peak_flops * settings.num_gpus,
                traced=traced,
            )
    return rows


def _model(point: Point, model: Path, known: Vocabulary, folder: Path, seed: int) -> tuple[Path, Vocabulary]:
    """The model as it is, or one from scratch with the point's sizes and as many codes; its vocabulary."""
    from recast_cli.data.prompts import CHAT_TEMPLATE
    from recast_cli.tokenizer.model import write_scratch_model

    if point.hidden_size is None or point.layers is None:
        return model, known
    folder.mkdir()
    facts = write_scratch_model(
        folder,
        known.codebook_sizes,
        chat_template=CHAT_TEMPLATE,
        seed=seed,
        hidden_size=point.hidden_size,
        num_layers=point.layers,
    )
    return folder, facts.vocabulary


def _launcher(
    settings: Recipe,
    model: Path,
    num_levels: int,
    steps: int,
    traced: int,
    on_step: Callable[[Any], None],
) -> Launch:
    """How to run one arm of a point: verl's worker alone, with the arguments of `recast train`."""
    from recast_cli.profiling.collect import measured_steps
    from recast_cli.profiling.sweep import ROWS_PER_CALL
    from recast_cli.training import placement, verl_args
    from recast_cli.training.process import run_verl

    def launch(
        point: Point, arm: Arm, folder: Path, spec: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], Path]:
        folder.mkdir()
        folder = folder.resolve()
        recipe = _recipe(settings, point, arm, ROWS_PER_CALL * (point.prompt_length + num_levels))
        arguments = verl_args.rl_arguments(
            recipe,
            model=model.resolve(),
            train_file=folder / "none.parquet",
            val_file=folder / "none.parquet",
            out=folder / "checkpoints",
            prompt_length=point.prompt_length,
            num_levels=num_levels,
            rollout_log=None,
        )
        (folder / "spec.json").write_text(json.dumps({**spec, "arguments": arguments}, indent=2))
        metrics = folder / "seconds.jsonl"
        told = measured_steps(folder, steps, traced)
        ranks = f"--nproc_per_node={settings.num_gpus}"
        records = run_verl(
            ["torch.distributed.run", "--standalone", ranks, "-m", ACTOR_ALONE],
            [str(folder / "spec.json")],
            environment={**placement.environment(recipe, metrics), **told},
            cwd=folder,
            log=folder / "verl.log",
            metrics=metrics,
            on_step=on_step,
        )
        return records, Path(told["RECAST_MEASURE"])

    return launch


def _recipe(settings: Recipe, point: Point, arm: Arm, row_tokens: int) -> Recipe:
    """The recipe at a point: the arm's method, and micro-batches of its own kind."""
    from recast_cli.training.placement import packs_rows, resolve_device

    rl: dict[str, Any] = {
        "prompts_per_step": point.batch,
        "group_size": point.group_size,
        "share_prompt": arm.shares,
    }
    if not arm.shares and not packs_rows(resolve_device(settings)):
        rl["max_tokens_per_micro_batch"] = row_tokens
    method = settings.method.model_copy(update={"name": arm.method})
    return settings.model_copy(update={"method": method, "rl": settings.rl.model_copy(update=rl)})
