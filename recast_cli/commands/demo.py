"""`recast demo`: the whole product on MovieLens-100K; `make demo` calls it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast_cli.errors import ArtifactError

if TYPE_CHECKING:
    from recast_cli.demo import Command, Lane

COLUMNS = {
    "warm_start": "start",
    "rl": "ReCast",
    "grpo": "GRPO",
    "sft_continued": "more SFT",
    "popularity": "popular",
    "item_knn": "kNN",
}  # short, as the labels below: the table has to fit 80 columns
KEPT = ("hr@10", "ndcg@10")  # of the lists that may name items of the history again
METRICS = {"hr@1": "hr@1", "hr@10": "hr@10", "ndcg@10": "ndcg@10", "target log-prob": "target_log_prob"}
SIGNAL = {
    "no hit, as sampled": "all_zero",
    "one hit": "single_hit",
    "several hits": "multi_hit",
    "no hit, after repair": "all_zero_after_repair",
}
PHASES = {
    "old log-prob": "old_log_prob",
    "reference": "ref_log_prob",
    "update": "actor_update",
    "together": "actor_total",
}
# The demo cuts the recipes for time. At these sizes another learning rate was the best on validation
# (benchmarks/results/ml100k_demo.json).
CUT = ["warm_start.epochs=3", "rl.steps=8", "rl.learning_rate=3e-5"]
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

    from recast_cli.console import note
    from recast_cli.demo import Layout, commands, is_current, peak_memory, summarise, why_stale
    from recast_cli.outputs import atomic_text

    out = out or Path("runs/demo-short" if short else "runs/demo")
    for option, folder in (("--out", out), ("--data", data)):
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{option} {folder} is a file, needed a folder", "choose another name")
    recipes = Path(__file__).resolve().parents[2] / "recipes" / "ml-100k"
    layout = Layout(data=data, run=out, recipes=Path(os.path.relpath(recipes)))
    # One process per arm here; the benchmark repeats them (benchmarks/README.md).
    profile = ["--repeats", "1", *(["--steps", "1", "--prompts", "4"] if short else ["--steps", "2"])]
    started, measured = time.monotonic(), False

    def prepare(arguments: Command) -> Command | None:
        nonlocal measured
        if is_current(layout, arguments):
            note(f"reusing {arguments[arguments.index('--out') + 1]}")
            return None
        if arguments[0] == "train" and (reason := why_stale(arguments)):
            note(f"{reason}: made again")
            arguments = [*arguments, "--overwrite"]
        note(f"\n$ recast {shlex.join(arguments)}   [after {time.monotonic() - started:.0f} s]")
        if arguments[0] in ("evaluate", "profile"):
            measured = True  # not |=, which two lanes may interleave
        return arguments

    with peak_memory() as peak:
        for batch in commands(layout, SHORT if short else CUT, profile):
            run_lanes(batch, prepare)
    path = out / "summary.json"
    took = {"seconds": round(time.monotonic() - started, 1), "peak_memory_bytes": peak[0]}
    if not measured and path.exists():  # all of it was there: what making it took stays as it is
        before = json.loads(path.read_text(encoding="utf-8"))
        took = {name: before.get(name, value) for name, value in took.items()}
    summary = summarise(layout) | took
    atomic_text(path, json.dumps(summary, indent=2) + "\n")
    _show(summary, out)


def run_lanes(lanes: list[Lane], prepare: Callable[[Command], Command | None]) -> None:
    """Run the lanes of a batch side by side, each command as a user would start it.

    A process of its own gives its memory back when it ends. A lane alone has the terminal to itself; of
    several, progress comes through line by line and tables are kept until their command is done.

    Args:
        prepare: Called when a command's turn has come: what to run, None for nothing.

    Raises:
        EnvironmentFault: a command failed; the other lanes are ended.
    """
    import subprocess
    import sys
    import threading
    from concurrent.futures import ThreadPoolExecutor, as_completed
    from typing import IO

    from recast_cli.errors import EnvironmentFault
    from recast_cli.host import cpu_count

    pipe = subprocess.PIPE if len(lanes) > 1 else None
    running: list[subprocess.Popen[str]] = []
    over = threading.Event()

    def relay(lines: IO[str]) -> None:
        for line in lines:
            print(line, end="", file=sys.stderr, flush=True)

    def run(arguments: Command) -> None:
        command = [sys.executable, "-m", "recast_cli.main", *arguments]
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        running.append(process)
        if over.is_set():
            process.terminate()
        tables = ""
        if process.stdout and process.stderr:
            with ThreadPoolExecutor(1) as reader:
                reader.submit(relay, process.stderr)
                tables = process.stdout.read()
        if process.wait():
            raise EnvironmentFault(
                f"`recast {arguments[0]}` ended with exit code {process.returncode}",
                "mend what it says above and run the demo again: finished steps are reused",
            )
        print(tables, end="", flush=True)

    def follow(lane: Lane) -> None:
        for arguments in lane:
            if not over.is_set() and (todo := prepare(arguments)) is not None:
                run(todo)

    pool = ThreadPoolExecutor(min(len(lanes), cpu_count()))
    try:
        for job in as_completed([pool.submit(follow, lane) for lane in lanes]):
            job.result()
    finally:
        over.set()
        for process in running:
            if process.poll() is None:
                process.terminate()  # it ends its own children
        pool.shutdown()


def _show(summary: dict[str, Any], out: Path) -> None:
    from recast_cli.console import note, print_table

    users, items = summary["num_users"], summary["num_items"]
    seed = summary["recipes"]["rl"]["seed"]
    title = (
        f"MovieLens-100K: {users} users, all {items} items ranked, RL rows: {summary['rl_rows']}, seed {seed}"
    )
    print_table(title, ["", *COLUMNS.values()], table_rows(summary))
    total = sum(summary["rollouts"].values())
    note(f"invalid items: {summary['invalid_items']} (evaluations and {total:,} rollouts)")
    memory = summary["peak_memory_bytes"] / 2**30
    note(f"{summary['seconds']:.0f} s, at most {memory:.1f} GiB of memory (all processes together)")
    note(f"summary: {out / 'summary.json'}   run directory: {out}")


def table_rows(summary: dict[str, Any]) -> list[list[Any]]:
    """The demo's one table: a row for each quantity, a column for each of `COLUMNS`."""

    def row(label: str, **cells: Any) -> list[Any]:
        return [label, *(cells.get(column, "") for column in COLUMNS)]

    arms = summary["evaluation"] | summary["baselines"]
    gained = {arm: found["ndcg@10"] for arm, found in summary["difference"].items()}
    rows = [row("test, history removed")]
    for label, name in METRICS.items():
        rows.append(row(f"  {label}", **{arm: values.get(name) for arm, values in arms.items()}))
    for place, label in enumerate(("ndcg@10 gained", "95 % from", "95 % to")):
        cells = {arm: f"{interval[place]:+.4f}" for arm, interval in gained.items()}
        rows.append(row(f"  {label}", **cells))
    kept = summary["evaluation_history_kept"] | summary["baselines_history_kept"]
    rows += [row(""), row("test, history kept")]
    for name in KEPT:
        rows.append(row(f"  {name}", **{arm: values.get(name) for arm, values in kept.items()}))
    recast, stock = summary["signal"], summary["signal_grpo"]
    rows += [row(""), row("share of groups with")]
    for label, name in SIGNAL.items():
        rows.append(row(f"  {label}", rl=recast[name], grpo=stock.get(name)))
    cost = summary["cost"]
    rows += [row(""), row("actor, seconds a step")]
    for label, name in PHASES.items():
        if name in cost["seconds"]["stock"]:
            seconds = {arm: cost["seconds"][arm][name] for arm in ("recast", "stock")}
            factor = f"{label}: {cost['ratio'][name]:.1f}x less"
            rows.append(row(f"  {factor}", rl=seconds["recast"], grpo=seconds["stock"]))
    rows.append(row(f"  peak memory: {cost['ratio']['peak_memory']:.1f}x less"))
    rows.append(row(f"  tokens: {cost['ratio']['tokens']:.1f}x less"))
    return rows
