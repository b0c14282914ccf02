"""`recast demo`: the whole product on MovieLens-100K; `make demo` calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

METRICS = ("hr@1", "hr@10", "ndcg@10", "target_log_prob")
LABELS = {
    "warm_start": "warm start",
    "rl": "+ ReCast",
    "grpo": "+ stock GRPO",
    "sft_continued": "+ continued SFT",
    "popularity": "popularity",
    "item_knn": "item-kNN",
}
# A shortened demo walks the same path with almost no training.
SHORT = ["warm_start.epochs=1", "rl.steps=2", "rl.prompts_per_step=4", "rl.warmup_steps=0"]


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the demo's runs. Default: runs/demo, with --short runs/demo-short."),
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of dataset and tokenizer.")] = Path("data"),
    short: Annotated[bool, typer.Option("--short", help="A few steps only: same path, no result.")] = False,
) -> None:
    """Logs to a ReCast-trained recommender on MovieLens-100K, step by step, and one table at the end."""
    import json
    import os
    import shlex
    import time

    from recast_cli.artifacts import atomic_text
    from recast_cli.console import note
    from recast_cli.demo import Layout, commands, is_current, summarise

    out = out or Path("runs/demo-short" if short else "runs/demo")
    recipes = Path(__file__).resolve().parents[2] / "recipes" / "ml-100k"
    layout = Layout(data=data, run=out, recipes=Path(os.path.relpath(recipes)))
    # One process per arm here; the benchmark repeats them (benchmarks/README.md).
    profile = ["--repeats", "1", *(["--steps", "1", "--prompts", "4"] if short else ["--steps", "4"])]
    started = time.monotonic()
    for batch in commands(layout, SHORT if short else [], profile):
        todo = [arguments for arguments in batch if not is_current(layout, arguments)]
        for arguments in batch:
            if arguments not in todo:
                note(f"reusing {arguments[arguments.index('--out') + 1]}")
        for arguments in todo:
            note(f"\n$ recast {shlex.join(arguments)}   [{time.monotonic() - started:.0f} s]")
        _run_together(todo)
    summary = summarise(layout)
    summary["seconds"] = round(time.monotonic() - started, 1)
    atomic_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    _show(summary, out)


def _run_together(batch: list[list[str]]) -> None:
    """Run the commands of a batch, as many at a time as there are cores, each as a user would start it.

    A process of its own gives its memory back when it ends. A command alone writes to the terminal; several
    keep their output until they are done, so that tables do not mix.
    """
    import subprocess
    import sys

    from recast_cli.environment import cpu_count
    from recast_cli.errors import EnvironmentFault

    width = cpu_count() if len(batch) > 1 else 1
    for start in range(0, len(batch), width):
        part = batch[start : start + width]
        shared = (
            {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if len(part) > 1 else {}
        )
        running = [
            subprocess.Popen([sys.executable, "-m", "recast_cli.main", *arguments], **shared)  # type: ignore[call-overload]
            for arguments in part
        ]
        for arguments, process in zip(part, running, strict=True):
            output, _ = process.communicate()
            print(output or "", end="", flush=True)
            if process.returncode:
                raise EnvironmentFault(
                    f"`recast {arguments[0]}` ended with exit code {process.returncode}",
                    "mend what it says above and run the demo again: finished steps are reused",
                )


def _show(summary: dict[str, Any], out: Path) -> None:
    from recast_cli.console import note, print_table

    rows = []
    for arm, values in {**summary["evaluation"], **summary["baselines"]}.items():
        difference = summary["difference"].get(arm, {}).get("ndcg@10")
        change = (
            "" if difference is None else f"{difference[0]:+.4f} [{difference[1]:+.4f}, {difference[2]:+.4f}]"
        )
        rows.append([LABELS[arm], *(values.get(name) for name in METRICS), change])
    columns = ["", *METRICS, "ndcg@10 against warm start, 95 %"]
    users, items = summary["num_users"], summary["num_items"]
    print_table(
        f"Test, history removed, {users} users, all {items} items ranked, RL rows: {summary['rl_rows']}",
        columns,
        rows,
    )
    signal = summary["signal"]
    print("\nSignal of the full groups, mean over the RL steps of ReCast")  # a title would wrap to the table
    print_table(
        "",
        ["groups with", "share"],
        [
            ["no hit, as sampled", signal["all_zero"]],
            ["one hit", signal["single_hit"]],
            ["several hits", signal["multi_hit"]],
            ["no hit, after repair", signal["all_zero_after_repair"]],
        ],
    )
    ratio = summary["cost"]["ratio"]
    print("\nActor cost, stock GRPO over ReCast on the same rollouts")
    print_table(
        "",
        ["phase", "times"],
        [[name.replace("_", " "), float(value)] for name, value in ratio.items() if value is not None],
    )
    note(f"invalid items: {summary['invalid_items']}   seconds: {summary['seconds']}")
    note(f"summary: {out / 'summary.json'}   run directory: {out}")
