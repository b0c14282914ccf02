"""What RL does to a recommender on MovieLens-100K, from a full warm start and over seeds.

    python benchmarks/ml100k.py

Each seed has a tokenizer, a model and a warm start of its own. On the first seed every method is trained at
each learning rate; the rate with the best mean log-prob of the validation targets (the quietest measure) is
then used on every seed, and only those models see the test split. Reported per method: change against the
warm start over all users and seeds, paired bootstrap, and per seed.

A finished part is reused, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import record
from learning import difference

from recast_cli.artifacts import weights_sha256
from recast_cli.core.ranking import hit_of_rank, ndcg_of_rank
from recast_cli.outputs import atomic_text

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "ml100k.json"
ARMS = ("recast", "recast-w025", "grpo", "sft-continued")  # recipes of recipes/ml-100k
METRICS = ("target_log_prob", "hr@1", "hr@10", "ndcg@10")


@dataclass(frozen=True)
class Study:
    """Where a study lies, and its sizes.

    Attributes:
        jobs: Training runs side by side, one thread each.
        epochs: Of the warm start; its best on validation is kept.
        steps: Updates of every method.
    """

    out: Path
    jobs: int
    epochs: int
    steps: int

    @property
    def data(self) -> Path:
        return self.out / "data"

    def tokenizer(self, seed: int) -> Path:
        return self.out / f"tokenizer-{seed}"

    def run(self, seed: int, name: str) -> Path:
        return self.out / f"seed-{seed}" / name

    def each(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda task: function(*task), tasks))

    def recast(self, *arguments: str) -> None:
        """Run a command, silent but for what went wrong."""
        command = [sys.executable, "-m", "recast_cli.main", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"recast {' '.join(arguments)}\n{done.stderr}")
        print("done: recast", *arguments, flush=True)

    def prepare(self, seeds: list[int]) -> None:
        """Data, and each seed's tokenizer and warm start."""
        self.recast("prepare-data", "ml-100k", "--out", str(self.data))
        self.each(self._build_tokenizer, [(seed,) for seed in seeds])
        self.each(self.train, [(seed, "warm-start", None) for seed in seeds])

    def _build_tokenizer(self, seed: int) -> None:
        options = ["--data", str(self.data), "--out", str(self.tokenizer(seed)), "--seed", str(seed)]
        self.recast("build-tokenizer", *options)

    def train(self, seed: int, arm: str, rate: float | None) -> None:
        """One recipe at one learning rate; a finished run is found by `recast train` itself."""
        overrides = [
            f"data={self.data}",
            f"tokenizer={self.tokenizer(seed)}",
            f"out={self.run(seed, 'nothing' if arm == 'warm-start' else name_of(arm, rate))}",
            f"warm_start.out={self.run(seed, 'warm-start')}",
            f"warm_start.epochs={self.epochs}",
            f"seed={seed}",
            "threads=1",
            f"rl.steps={self.steps}",
            *([] if rate is None else [f"rl.learning_rate={rate}"]),
        ]
        self.recast("train", str(ROOT / "recipes" / "ml-100k" / f"{arm}.yaml"), *overrides)

    def evaluate(self, seed: int, name: str, split: str) -> None:
        model, cache = self.run(seed, name) / "model", self.run(seed, f"{name}-{split}.json")
        stamp = cache.with_suffix(".weights")
        weights = json.dumps(weights_sha256(model))
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != weights:
            where = ["--data", str(self.data), "--tokenizer", str(self.tokenizer(seed)), "--threads", "1"]
            options = ["--model", str(model), "--split", split, "--out", str(cache), "--no-baselines"]
            self.recast("evaluate", *where, *options)
            atomic_text(stamp, weights)

    def users(self, seed: int, name: str, split: str) -> pl.DataFrame:
        """`METRICS` of every user, history removed."""
        users = pl.read_parquet(self.run(seed, f"{name}-{split}.users.parquet")).sort("index")
        rank_U = users["rank_removed"].fill_null(0).to_numpy()
        return users.with_columns(
            pl.Series("ndcg@10", ndcg_of_rank(rank_U, 10)),
            *(pl.Series(f"hr@{k}", hit_of_rank(rank_U, k)) for k in (1, 10)),
        ).select("index", *METRICS)


def name_of(arm: str, rate: float | None) -> str:
    return arm if rate is None else f"{arm}-{rate:g}"


def choose_rates(study: Study, seed: int, arms: list[str], rates: list[float]) -> dict[str, Any]:
    """Every arm at every rate on one seed; per arm the validation figures and the rate to take."""
    runs = [(seed, arm, rate) for rate in rates for arm in arms]
    study.each(study.train, runs)
    names = ["warm-start", *(name_of(arm, rate) for _, arm, rate in runs)]
    study.each(study.evaluate, [(seed, name, "validation") for name in names])
    start = study.users(seed, "warm-start", "validation")
    found: dict[str, Any] = {}
    for arm in arms:
        tables = {f"{rate:g}": study.users(seed, name_of(arm, rate), "validation") for rate in rates}
        change = {
            rate: {
                metric: difference({"warm start": start, "arm": table}, "arm", metric) for metric in METRICS
            }
            for rate, table in tables.items()
        }
        best = max(change, key=lambda rate: change[rate]["target_log_prob"][0])
        found[arm] = {"rate": float(best), "validation": change}
    return found


def compare(study: Study, seeds: list[int], rates: dict[str, float]) -> dict[str, Any]:
    """Every arm at its rate on the test users of every seed."""
    study.each(study.train, [(seed, arm, rate) for seed in seeds for arm, rate in rates.items()])
    names = {"warm start": "warm-start"} | {arm: name_of(arm, rate) for arm, rate in rates.items()}
    study.each(study.evaluate, [(seed, name, "test") for seed in seeds for name in names.values()])
    each = [{arm: study.users(seed, name, "test") for arm, name in names.items()} for seed in seeds]
    pooled = {arm: pl.concat([tables[arm] for tables in each]) for arm in names}
    return {
        "warm_start": {
            metric: [float(np.mean(tables["warm start"][metric].to_numpy())) for tables in each]
            for metric in METRICS
        },
        "difference": {arm: {metric: difference(pooled, arm, metric) for metric in METRICS} for arm in rates},
        "per_seed": {
            arm: {metric: [difference(tables, arm, metric) for tables in each] for metric in METRICS}
            for arm in rates
        },
    }


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--out", type=Path, default=Path("runs/ml100k-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-6, 1e-5, 3e-5, 1e-4])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, 6 GiB each")
    arguments = parser.parse_args()
    start = record.before()
    study = Study(arguments.out, arguments.jobs, arguments.epochs, arguments.steps)
    study.prepare(arguments.seeds)
    rates = choose_rates(study, arguments.seeds[0], arguments.arms, arguments.rates)
    result = compare(study, arguments.seeds, {arm: found["rate"] for arm, found in rates.items()})
    sizes = {"seeds": arguments.seeds, "epochs": arguments.epochs, "steps": arguments.steps}
    record.write(arguments.result, start, sizes | {"rates": rates} | result)
    show(rates, result)


def show(rates: dict[str, Any], result: dict[str, Any]) -> None:
    """Both tables as Markdown."""

    def cell(interval: list[float]) -> str:
        mean, low, high = interval
        return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"

    print("| validation | rate | " + " | ".join(METRICS) + " |")
    for arm, found in rates.items():
        for rate, change in found["validation"].items():
            print(f"| {arm} | {rate} | " + " | ".join(cell(change[metric]) for metric in METRICS) + " |")
    print("\n| test | " + " | ".join(METRICS) + " |")
    for arm, change in result["difference"].items():
        print(f"| {arm} | " + " | ".join(cell(change[metric]) for metric in METRICS) + " |")
    for arm, seeds in result["per_seed"].items():
        cells = [" ".join(f"{mean:+.4f}" for mean, _, _ in seeds[metric]) for metric in METRICS]
        print(f"| {arm}, by seed | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
