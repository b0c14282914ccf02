"""`recast verl-args`: a recipe's overrides, to paste into somebody's launch script."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verl_args(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, for example recipes/ml-100k/recast.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example rl.group_size=16.")
    ] = None,
    plugin_only: Annotated[
        bool, typer.Option("--plugin-only", help="Only the lines that name the plugin.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print what a recipe adds to a launch script of `python -m verl.trainer.main_ppo`, ready to paste.

    Method, rollouts, actor and data, one override a line. The folders, log, schedule and processes of the run
    stay those of the script; `recast train RECIPE --dry-run` prints a complete command.

    Examples:

        \b
        recast verl-args recipes/ml-100k/recast.yaml

        \b
        recast verl-args recipes/ml-100k/recast.yaml method.w_negative=0.25 --plugin-only

        \b
        recast verl-args recipes/ml-100k/recast.yaml --json > overrides.json
    """
    import shlex

    from recast_cli.console import note, print_json
    from recast_cli.errors import RecipeError
    from recast_cli.models import require_start
    from recast_cli.recipe import load_recipe
    from recast_cli.training import placement, warm_start
    from recast_cli.training import verl_args as launch
    from recast_cli.training.hydra_overrides import require_config
    from recast_cli.training.inputs import Inputs
    from recast_cli.training.pasted import pasted

    settings = load_recipe(recipe, overrides or [])
    if settings.method.name.startswith("sft"):
        raise RecipeError(
            f"method.name is {settings.method.name}, which main_ppo does not run",
            "name a method of RL, for example method.name=recast; `recast train --dry-run` prints all jobs",
        )
    if settings.rl.exclude_history:
        raise RecipeError(
            "rl.exclude_history is true, needed false: the rows of the tokenizer artifact have no histories",
            "`recast train` adds them; in rows of your own, as extra_info.history (docs/concepts/method.md)",
        )
    inputs = Inputs.load(settings)
    inputs.require_rl_rows()
    if settings.model:
        require_start(Path(settings.model), inputs.tokenizer)
    model = Path(settings.model) if settings.model else warm_start.folder_of(settings) / "model"
    rows = inputs.tokenizer.resolve() / "verl"
    arguments = launch.rl_arguments(
        settings,
        model=model.resolve(),
        train_file=rows / "rl.parquet",
        val_file=rows / "validation.parquet",
        out=Path(settings.out).resolve(),
        prompt_length=inputs.prompt_length,
        num_levels=inputs.num_levels,
        rollout_log=None,
    )
    require_config(launch.RL_MODULE, arguments)
    lines = pasted(arguments, plugin_only=plugin_only)
    environment = {"VERL_PLATFORM": "cpu"} if placement.resolve_device(settings) == "cpu" else {}
    if json_output:
        print_json({"module": launch.RL_MODULE[-1], "overrides": lines, "environment": environment})
        return
    print(" \\\n".join(f"    {shlex.quote(line)}" for line in lines))
    for name, value in environment.items():
        note(f"the script needs this too: export {name}={shlex.quote(value)}")
    if not model.exists() and not plugin_only:
        note(
            f"{model} is not there yet: make it with `recast train {recipe} method.name=sft`, or name model="
        )
