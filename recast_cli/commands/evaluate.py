"""`recast evaluate`: ranking metrics of a model over the whole catalogue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from recast_cli.evaluation.results import Evaluation

COLUMNS = ("hr@1", "hr@5", "hr@10", "hr@50", "ndcg@10", "mrr@10", "coverage@10", "invalid_share")
TITLES = {"history_removed": "history removed (headline)", "history_kept": "history kept"}
LABELS = {"model": "model", "popularity": "popularity", "item_knn": "item-kNN"}


def evaluate(
    tokenizer: Annotated[Path, typer.Option(help="Folder of `recast build-tokenizer`.")],
    data: Annotated[Path, typer.Option(help="Folder of `recast prepare-data`.")],
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder. Default: the untrained model of --tokenizer.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="validation (to choose settings on) or test (once).")
    ] = "validation",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for evaluation.json and users.parquet, or a name ending in .json."),
    ] = None,
    beam_width: Annotated[int, typer.Option(min=1, help="Beams; cutoffs above it are left out.")] = 50,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Popularity and item-kNN beside it.")
    ] = True,
    max_users: Annotated[
        int | None, typer.Option(min=1, help="Evaluate this many users, drawn by --seed.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens read at once. Default: 6144, on a GPU 65536.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Of the bootstrap intervals and of --max-users.")
    ] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print evaluation.json, no table.")] = False,
) -> None:
    """Rank the whole catalogue for every user of a split by constrained beam search, and measure it.

    Two tables, with items of the history removed and kept; definitions in docs/concepts/metrics.md. A
    95 % bootstrap interval over users stands beside every mean in the JSON.

    Examples:

        \b
        recast evaluate --data data/ml-100k --tokenizer data/ml-100k-tokenizer --model runs/demo/recast/model

        \b
        recast evaluate --data data/ml-100k --tokenizer data/ml-100k-tokenizer \\
            --model runs/demo/recast/model --split test --out runs/evaluation

        \b
        recast evaluate --data data/ml-100k --tokenizer data/ml-100k-tokenizer --max-users 100 --json
    """
    import torch

    from recast_cli.artifacts import load_manifest
    from recast_cli.console import note, print_json, progress
    from recast_cli.evaluation.evaluate import evaluate_model
    from recast_cli.evaluation.results import require_place
    from recast_cli.host import require_threads
    from recast_cli.outputs import refuse_inside

    if threads is not None:
        require_threads(threads)
        torch.set_num_threads(threads)
    refuse_inside({"--out": out}, {"--data": data, "--tokenizer": tokenizer, "--model": model})
    if out is not None:
        require_place(out)  # before minutes of ranking
    num_users = min(load_manifest(data, "dataset")["num_users"], max_users or 1 << 62)
    with progress(f"ranking for users of {split}", num_users) as advance:
        evaluation = evaluate_model(
            model or tokenizer / "model",
            tokenizer,
            data,
            split,
            beam_width=beam_width,
            baselines=baselines,
            max_users=max_users,
            batch_tokens=batch_tokens,
            seed=seed,
            progress=advance,
        )
    saved = evaluation.save(out) if out is not None else ()  # first: it took minutes
    if json_output:
        print_json(evaluation.to_json())
    else:
        print_evaluation(evaluation)
    if saved:
        note(f"wrote {saved[0]} and {saved[1]}")


def print_evaluation(evaluation: Evaluation) -> None:
    """Print a table per history mode on stdout, and what was measured below."""
    from recast_cli.console import console, print_table
    from recast_cli.core.ranking import Interval

    facts = evaluation.facts
    for mode, title in TITLES.items():
        names = [name for name in COLUMNS if name in evaluation.arms["model"][mode]]
        rows = [
            [LABELS[arm], *(values[mode].get(name) for name in names)]
            for arm, values in evaluation.arms.items()
        ]
        cells = [[v.mean if isinstance(v, Interval) else v for v in row] for row in rows]
        print_table(f"{facts['dataset']['name']}, {facts['split']}: {title}", ["", *names], cells)
    model = evaluation.arms["model"]["history_removed"]
    lines = [
        f"{name} {value.mean:.4g}, 95 % interval {value.low:.4g} to {value.high:.4g}"
        for name, value in model.items()
        if isinstance(value, Interval)
        and name in ("hr@10", "ndcg@10", "target_log_prob", "target_probability")
    ]
    lines.append(
        f"{facts['num_users']} users, {facts['num_items']} items, beam {facts['beam_width']}; RL rows: "
        f"{facts['rl_rows']}; baselines learn from {facts['baselines_learn_from']}"
    )
    if facts["num_targets_in_history"]:
        lines.append(
            f"{facts['num_targets_in_history']} targets stand in their user's history: with it removed, they "
            "are out of reach"
        )
    for line in lines:
        console().print(line)
