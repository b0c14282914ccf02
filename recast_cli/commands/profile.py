"""`recast profile`: what the actor costs, stock GRPO against ReCast on the same rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast_cli.errors import ArtifactError, RecipeError

if TYPE_CHECKING:
    from recast_cli.profiling.profile import Launch
    from recast_cli.recipe import Recipe
    from recast_cli.training.inputs import Inputs


def profile(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML recipe, for example recipes/ml-100k/recast.yaml.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example threads=1.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for profile.json, .png, .html and logs.")] = Path(
        "runs/profile"
    ),
    model: Annotated[
        Path | None,
        typer.Option(help="Hugging Face folder. Default: the recipe's model, its warm start, or untrained."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Timed steps of each job. Default: 5.")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Fresh processes of each arm. Default: 2, in a sweep 1."),
    ] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="B. Default: the recipe's.")] = None,
    group_size: Annotated[int | None, typer.Option(min=2, help="G. Default: the recipe's.")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE,VALUE of prompt_length, group_size, batch, hidden_size or layers."),
    ] = None,
    from_run: Annotated[
        list[Path] | None,
        typer.Option(help="Instead of a recipe: a finished run, whose phases are shown; may be repeated."),
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write a Chrome trace of one more step, for each arm.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print profile.json (or the sweep's rows), no table.")
    ] = False,
) -> None:
    """Replay one recorded set of rollouts through stock GRPO and through ReCast, and compare the actor's
    cost.

    Both arms are real verl jobs with the recipe's settings, one optimiser step per step, each repeat in a
    fresh process: old log-probs, reference log-probs and update, ReCast's own selection included.

    Examples:

        \b
        recast profile recipes/ml-100k/recast.yaml

        \b
        recast profile recipes/ml-100k/recast.yaml --prompts 16 --group-size 32 --repeats 3 --out runs/cost

        \b
        recast profile recipes/ml-100k/recast.yaml rl.max_tokens_per_micro_batch=2048 --json

        \b
        recast profile recipes/ml-100k/recast.yaml --sweep prompt_length=64,256,1024 --prompts 4 --repeats 2

        \b
        recast profile --from-run runs/grpo --from-run runs/recast
    """
    import dataclasses
    import json
    import shutil

    from recast_cli.commands._profile_runs import show_runs
    from recast_cli.commands._profile_sweep import run_sweep
    from recast_cli.console import console, note, print_json, print_table, progress
    from recast_cli.models import require_start
    from recast_cli.outputs import atomic_text, refuse_inside
    from recast_cli.profiling import profile as stage
    from recast_cli.profiling import report
    from recast_cli.profiling.folder import new_folder
    from recast_cli.profiling.page import page
    from recast_cli.profiling.peak import matmul_peak
    from recast_cli.profiling.plot import plot
    from recast_cli.profiling.trace import merge
    from recast_cli.provenance import versions
    from recast_cli.recipe import load_recipe
    from recast_cli.training import placement
    from recast_cli.training.hydra_overrides import require_config
    from recast_cli.training.inputs import Inputs
    from recast_cli.training.run import draw_rows
    from recast_cli.training.verl_args import RL_MODULE

    if from_run or recipe is None:
        others = (overrides, model, steps, repeats, prompts, group_size, sweep)
        if recipe is not None or not from_run or trace or any(other is not None for other in others):
            raise RecipeError(
                "profile needs a recipe, or runs and nothing besides",
                "recast profile RECIPE, or recast profile --from-run RUN",
            )
        show_runs(from_run, out, json_output=json_output)
        return
    steps = steps or 5
    sizes = {"rl.prompts_per_step": prompts, "rl.group_size": group_size, "rl.mini_batch_prompts": "null"}
    given = [f"{name}={size}" for name, size in sizes.items() if size is not None]
    loaded = load_recipe(recipe, [*(overrides or []), *given])
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"--out {out} is a file, needed a folder", "choose another --out")
    traced = int(trace)
    settings = _settings(loaded, steps, traced)
    inputs = Inputs.load(settings)
    refuse_inside({"--out": out}, {"data=": inputs.data, "tokenizer=": inputs.tokenizer})
    start = model or _start_model(settings, inputs)
    require_start(start, inputs.tokenizer)
    placement.require_cores(settings)
    placement.require_gpu(settings)
    for method in stage.ARMS.values():
        require_config(RL_MODULE, _arguments(settings, inputs, start, method, out, {}))
    device, threads = placement.resolve_device(settings), placement.num_threads(settings)
    repeats = repeats or (1 if sweep else 2)
    if sweep:
        told = {"repeats": repeats, "traced": traced}
        run_sweep(settings, inputs, start, sweep, out, steps, **told, json_output=json_output)
        return
    rows = draw_rows(inputs.tokenizer / "verl" / "rl.parquet", settings.rl.prompts_per_step, settings.seed)
    peak_flops = matmul_peak(device, threads) * settings.num_gpus
    shutil.rmtree(out / "trace", ignore_errors=True)  # of an earlier profile
    with new_folder(out / "jobs") as scratch:
        recording = _record(settings, inputs, start, rows, scratch)
    jobs = out / "jobs"
    recording = dataclasses.replace(recording, path=jobs / recording.path.name)
    with progress("profile", 2 * repeats * settings.rl.steps) as advance:
        launch = _launcher(settings, inputs, start, rows, lambda _: advance(1))
        runs = stage.replay(recording, launch, jobs, steps=steps, repeats=repeats, traced=traced)
    result = stage.summarise(
        runs,
        recording,
        json.loads((start / "config.json").read_text(encoding="utf-8")),
        peak_flops=peak_flops,
        facts={
            "group_size": settings.rl.group_size,
            "max_tokens_per_micro_batch": settings.rl.max_tokens_per_micro_batch,
            "threads": threads,
            "device": device,
            "seed": settings.seed,
            "rl_rows": inputs.rl_rows,
            "versions": versions(),
            "recipe": loaded.model_dump(),
        },
    )
    stage.save(result, out)
    for arm in stage.ARMS if trace else ():
        merge(jobs / f"{arm}-{repeats}" / "trace", out / "trace" / f"{arm}.json.gz")
    plot(result, out / "profile.png")
    lines, table = report.lines(result), report.table(result)
    described = "seconds and memory of each phase"
    text = page("What the actor costs", lines, out / "profile.png", described, table)
    atomic_text(out / "profile.html", text)
    if json_output:
        print_json(result)
    else:
        print_table("Cost of a step: median (min-max)", *table)
        for line in lines:
            console().print(line)
    note(f"wrote {out / 'profile.json'}, {out / 'profile.png'} and {out / 'profile.html'}")


def _settings(recipe: Recipe, steps: int, traced: int) -> Recipe:
    """The recipe with the profile's sizes: every step is one mini-batch, so one optimiser step."""
    from recast_cli.profiling.collect import num_steps

    rl = {
        "steps": num_steps(steps, traced),
        # How rollouts were drawn costs the actor nothing: they are recorded once, by the SID engine.
        "sampling": "iid",
        "top_p": 1.0,
        "exclude_history": False,
        "on_policy": False,  # all three passes are measured; that option leaves the first one out
    }
    return recipe.model_copy(update={"rollout": "sid", "rl": recipe.rl.model_copy(update=rl)})


def _start_model(settings: Recipe, inputs: Inputs) -> Path:
    """The recipe's model, else its finished warm start, else the tokenizer's untrained model."""
    from recast_cli.console import note
    from recast_cli.training import warm_start

    if settings.model:
        return Path(settings.model)
    if warm_start.find(settings, inputs) is not None:
        return warm_start.folder_of(settings) / "model"
    note("no warm start yet: profiling the untrained model (the cost does not depend on what it has learned)")
    return inputs.tokenizer / "model"


def _record(settings: Recipe, inputs: Inputs, model: Path, rows: Any, folder: Path) -> Any:
    from recast_cli.profiling.record import record
    from recast_cli.training.placement import resolve_device

    return record(
        model,
        inputs.tokenizer,
        rows,
        settings.rl.group_size,
        folder / "rollouts.npz",
        seed=settings.seed,
        temperature=settings.rl.temperature,
        device=resolve_device(settings),
    )


def _launcher(settings: Recipe, inputs: Inputs, model: Path, rows: Any, on_step: Any) -> Launch:
    """How to run one arm."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from recast_cli.profiling.profile import Job
    from recast_cli.training import placement
    from recast_cli.training.process import run_verl
    from recast_cli.training.verl_args import RL_MODULE

    def launch(job: Job) -> list[dict[str, Any]]:
        train_file, metrics = job.folder / "rows.parquet", job.folder / "metrics.jsonl"
        pq.write_table(pa.concat_tables([rows] * settings.rl.steps), train_file)
        return run_verl(
            RL_MODULE,
            _arguments(settings, inputs, model, job.method, job.folder, job.custom),
            environment={**placement.environment(settings, metrics), **job.environment},
            cwd=job.folder,
            log=job.folder / "verl.log",
            metrics=metrics,
            ray_cpus=settings.ray_cpus_needed(),
            on_step=on_step,
        )

    return launch


def _arguments(
    settings: Recipe, inputs: Inputs, model: Path, method: str, folder: Path, custom: dict[str, str]
) -> list[str]:
    """Those of `recast train`, but for the replaying agent loop and no checkpoint."""
    from recast_cli.profiling.profile import MANAGER
    from recast_cli.training import verl_args
    from recast_cli.training.hydra_overrides import quoted

    paths = {"tokenizer": str(inputs.tokenizer.resolve()), **custom}
    wanted = {name: True for name in ("masked_actor", "share_prompt") if getattr(settings.rl, name)}
    verl = {
        **settings.verl,
        "+actor_rollout_ref.rollout.custom": {key: quoted(path) for key, path in paths.items()} | wanted,
        "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": MANAGER,
        "trainer.save_freq": -1,
    }
    chosen = settings.method.model_copy(update={"name": method})
    rows = folder / "rows.parquet"
    return verl_args.rl_arguments(
        settings.model_copy(update={"method": chosen, "verl": verl}),
        model=model.resolve(),
        train_file=rows,
        val_file=rows,
        out=folder / "checkpoints",
        prompt_length=inputs.prompt_length,
        num_levels=inputs.num_levels,
        rollout_log=None,
    )
