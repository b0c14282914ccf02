"""The whole product on MovieLens-100K: the commands of the demo, and one summary of what they left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil

from recast_cli.artifacts import read_json_lines
from recast_cli.core.ranking import Interval, hit_of_rank, ndcg_of_rank, paired_bootstrap
from recast_cli.errors import ArtifactError
from recast_cli.recipe import load_recipe
from recast_cli.training import run_directory, warm_start
from recast_cli.training.inputs import Inputs
from recast_cli.training.process import read_metrics

# Arm of the summary -> folder of its model below the run directory.
ARMS = {
    "warm_start": "warm_start/model",
    "rl": "recast/model",
    "grpo": "grpo/model",
    "sft_continued": "sft-continued/model",
}
RECIPES = {"rl": "recast", "grpo": "grpo", "sft_continued": "sft-continued"}
SPLITS = ("validation", "test")
ROLLED_OUT = ("rl", "grpo")  # the arms with rollouts
SIGNAL = ("all_zero", "single_hit", "multi_hit", "hit_rate", "mean_score", "invalid", "duplicate")


@dataclass(frozen=True)
class Layout:
    """Where the demo keeps things.

    Attributes:
        data: Datasets and tokenizer, shared between demos.
        run: This demo's runs.
        recipes: Folder of the ML-100K recipes.
    """

    data: Path
    run: Path
    recipes: Path

    @property
    def dataset(self) -> Path:
        return self.data / "ml-100k"

    @property
    def tokenizer(self) -> Path:
        return self.data / "ml-100k-tokenizer"

    def evaluation(self, arm: str, split: str) -> Path:
        return self.run / "evaluation" / f"{arm}-{split}.json"


Command = list[str]  # arguments of `recast`
Lane = list[Command]  # one after the other


def commands(layout: Layout, overrides: list[str], profile_options: list[str]) -> list[list[Lane]]:
    """Command lines of the demo, batch after batch; the lanes of a batch may run side by side.

    Args:
        overrides: Recipe overrides of every training run (`key=value`).
        profile_options: Further options of `recast profile`.
    """
    shared = [
        f"data={layout.dataset}",
        f"tokenizer={layout.tokenizer}",
        f"warm_start.out={layout.run / 'warm_start'}",
        *overrides,
    ]
    where = ["--data", str(layout.dataset), "--tokenizer", str(layout.tokenizer)]
    batches = [
        [[["prepare-data", "ml-100k", "--out", str(layout.dataset)]]],
        [[["build-tokenizer", "--data", str(layout.dataset), "--out", str(layout.tokenizer)]]],
    ]

    def train(recipe: str, folder: str) -> Command:
        return ["train", str(layout.recipes / f"{recipe}.yaml"), f"out={layout.run / folder}", *shared]

    def evaluate(arm: str) -> Lane:
        model = ["--model", str(layout.run / ARMS[arm]), "--threads", "1"]
        return [
            [
                *("evaluate", *where, *model, "--split", split, "--out", str(layout.evaluation(arm, split))),
                "--baselines" if (arm, split) == ("warm_start", "test") else "--no-baselines",
            ]
            for split in SPLITS
        ]

    # A verl job starts its processes one after the other, and leaves a core to the next thing meanwhile. Two
    # RL jobs at a time would be over the budget, each holds up to 6 GiB (docs/log.md).
    recast, grpo, continued = (train(name, name) for name in RECIPES.values())
    profile = ["profile", recast[1], f"out={layout.run / 'profile-runs'}", *shared]
    batches += [
        [[train("warm-start", "sft")]],
        [[recast], [continued, *evaluate("warm_start")]],
        [[grpo], [*evaluate("sft_continued"), *evaluate("rl")]],
        [[command] for command in evaluate("grpo")],
        [[[*profile, "--out", str(layout.run / "profile"), *profile_options]]],  # alone: it takes the time
    ]
    return batches


def why_stale(arguments: list[str]) -> str:
    """What keeps a `train` command from reusing what lies in its folder, in words; empty if nothing does."""
    recipe = load_recipe(Path(arguments[1]), arguments[2:])
    inputs = Inputs.load(recipe)
    try:
        if recipe.method.name == "sft":
            warm_start.find(recipe, inputs)
        else:
            run_directory.find(recipe, inputs, warm_start.folder_of(recipe) / "model")
    except ArtifactError as exc:
        return exc.message
    return ""


def is_current(layout: Layout, arguments: list[str]) -> bool:
    """True if an `evaluate` or `profile` has its result already; the other commands look for themselves."""
    if arguments[0] == "profile":
        result = layout.run / "profile" / "profile.json"
        overrides = list(itertools.takewhile(lambda word: not word.startswith("--"), arguments[2:]))
        return (
            _is_newer(result, layout.run / ARMS["warm_start"])
            and _read(result)["setting"]["recipe"] == load_recipe(Path(arguments[1]), overrides).model_dump()
        )
    if arguments[0] == "evaluate":
        out, model = (Path(arguments[arguments.index(name) + 1]) for name in ("--out", "--model"))
        return _is_newer(out, model)
    return False


def _is_newer(result: Path, model: Path) -> bool:
    """True if a result is there and was made from the model that is there now."""
    weights = model / "model.safetensors"
    # A model is written once, at the end of its run: a newer result is of that model.
    return result.exists() and weights.exists() and result.stat().st_mtime > weights.stat().st_mtime


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def peak_memory(seconds_between: float = 2.0) -> Iterator[list[int]]:
    """Watch the memory of this process and of all that it starts; yields a list whose only entry is the peak.

    In bytes: the sum of the processes' proportional set sizes (a page that n share counts 1/n in each), where
    the system tells them (Linux), else of their resident sizes. Sampled: shorter peaks are missed.
    """
    peak, done = [0], threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], _tree_bytes())
            if done.wait(seconds_between):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _tree_bytes() -> int:
    total, own = 0, psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    return total


def summarise(layout: Layout) -> dict[str, Any]:
    """Everything the demo measured, from the files of its commands.

    `evaluation` is the test split with items of the history removed; `evaluation_history_kept`, `validation`
    and `validation_history_kept` stand beside it; `difference` is each arm minus the warm start over the same
    test users, with a paired bootstrap interval; `signal` are the full groups as the ReCast run sampled them.
    `invalid_items` counts every rollout of both RL runs and every list of every evaluation.
    """
    found = {(arm, split): _read(layout.evaluation(arm, split)) for arm in ARMS for split in SPLITS}
    headline = found["warm_start", "test"]

    def table(split: str, mode: str) -> dict[str, Any]:
        return {arm: found[arm, split]["metrics"][mode]["model"] for arm in ARMS}

    def baselines(mode: str) -> dict[str, Any]:
        return {name: headline["metrics"][mode][name] for name in ("popularity", "item_knn")}

    profile = _read(layout.run / "profile" / "profile.json")
    seconds = {
        arm: {phase: values["median"] for phase, values in found["seconds"].items()}
        for arm, found in profile["arms"].items()
    }
    rollouts = {
        arm: [
            line
            for line in read_json_lines(layout.run / RECIPES[arm] / "rollouts.jsonl")
            if line["partition"] == "train"
        ]
        for arm in ROLLED_OUT
    }
    repaired = read_metrics(layout.run / "recast" / "metrics.jsonl")
    after_repair = float(np.mean([record["signal/all_zero_after_repair"] for record in repaired]))
    dataset = _read(layout.dataset / "manifest.json")
    return {
        "rl_rows": dataset["params"]["rl_rows"],
        "num_users": headline["num_users"],
        "num_items": headline["num_items"],
        "evaluation": table("test", "history_removed"),
        "evaluation_history_kept": table("test", "history_kept"),
        "validation": table("validation", "history_removed"),
        "validation_history_kept": table("validation", "history_kept"),
        "baselines": baselines("history_removed"),
        "baselines_history_kept": baselines("history_kept"),
        "difference": {arm: _differences(layout, arm) for arm in RECIPES},
        "signal": _signal(rollouts["rl"]) | {"all_zero_after_repair": after_repair},
        "signal_grpo": _signal(rollouts["grpo"]),
        "rollouts": {arm: sum(line["rollouts"] for line in lines) for arm, lines in rollouts.items()},
        "warm_start": {
            key: _read(layout.run / "warm_start" / "manifest.json")[key] for key in ("best_epoch", "epochs")
        },
        "recipes": {
            arm: _read(layout.run / name / "manifest.json")["recipe"] for arm, name in RECIPES.items()
        },
        "cost": profile["cost"] | {"seconds": seconds},
        "invalid_items": sum(
            values["metrics"][mode]["model"]["invalid_items"]
            for values in found.values()
            for mode in ("history_removed", "history_kept")
        )
        + sum(round(line["invalid"] * line["rollouts"]) for lines in rollouts.values() for line in lines),
    }


def _signal(rollouts: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the RL steps of what the agent loop logged about its full groups."""
    return {name: float(np.mean([line[name] for line in rollouts])) for name in SIGNAL}


def _differences(layout: Layout, arm: str) -> dict[str, list[float]]:
    """[mean, low, high] of arm minus warm start on the test users: target log-prob and metrics at 10."""
    first, second = (
        pl.read_parquet(layout.evaluation(name, "test").with_suffix(".users.parquet")).sort("index")
        for name in ("warm_start", arm)
    )
    assert first["index"].equals(second["index"]), "both arms are evaluated on the same users"

    def values(users: pl.DataFrame) -> dict[str, np.ndarray]:
        rank_U = users["rank_removed"].fill_null(0).to_numpy()
        return {
            "target_log_prob": users["target_log_prob"].to_numpy(),
            "target_prob": np.exp(users["target_log_prob"].to_numpy()),
            "hr@1": hit_of_rank(rank_U, 1),
            "hr@10": hit_of_rank(rank_U, 10),
            "ndcg@10": ndcg_of_rank(rank_U, 10),
        }

    before, after = values(first), values(second)

    def row(interval: Interval) -> list[float]:
        return [interval.mean, interval.low, interval.high]

    return {name: row(paired_bootstrap(before[name], after[name], seed=0)) for name in before}
