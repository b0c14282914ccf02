"""Does RL raise the target's probability where the truth is known?

On the synthetic generator, with RL rows that SFT has not seen: an early warm start, then each arm for the
same number of updates on the same prompts. Reported per arm: change of the target's mean log-prob and of
NDCG@10 on validation against the warm start, over all users and seeds, with a paired bootstrap interval.

The log-prob is split in two, since rollouts are drawn from the policy renormalised over the trie while the
actor trains the full-vocabulary policy: `catalogue_mass`, the log of the probability that an answer names any
item at all, and `log_prob_in_catalogue`, the target's log-prob among the items.

    python benchmarks/learning.py --out runs/learning --seeds 0 1 2

A finished part is reused, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recast_cli.artifacts import atomic_text
from recast_cli.core.ranking import paired_bootstrap
from recast_cli.data import synthetic
from recast_cli.data.prepare import Params, prepare
from recast_cli.data.prompts import CHAT_TEMPLATE
from recast_cli.data.render import render
from recast_cli.evaluation.evaluate import evaluate_model
from recast_cli.evaluation.recommender import Recommender
from recast_cli.provenance import versions
from recast_cli.recipe import Recipe
from recast_cli.tokenizer.build import TokenizerParams, build
from recast_cli.training import run, warm_start
from recast_cli.training.inputs import Inputs

METRICS = ("target_log_prob", "ndcg@10", "catalogue_mass", "log_prob_in_catalogue")
# Arm -> the recipe's method section.
ARMS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo"},
    "recast": {"name": "recast", "w_positive": 1.0, "w_negative": 1.0},
    "recast w-=0.25": {"name": "recast", "w_positive": 1.0, "w_negative": 0.25},
    "recast w-=0": {"name": "recast", "w_positive": 1.0, "w_negative": 0.0},
    "sft-continued": {"name": "sft-continued"},
}


def prepare_inputs(out: Path, seed: int, users: int, items: int) -> tuple[Path, Path]:
    """Synthetic dataset with held-out RL rows, and its tokenizer."""
    data, tokenizer = out / "data", out / "tokenizer"
    config = synthetic.SyntheticConfig(num_users=users, num_items=items, seed=seed)
    prepare(synthetic.source(config), Params(rl_rows="held-out", held_out_share=0.2), data, seed=seed)
    params = TokenizerParams(
        codebook_sizes=(16, 16, 16), embeddings="cooccurrence", hidden_size=64, num_layers=2, seed=seed
    )
    build(
        data,
        tokenizer,
        params,
        chat_template=CHAT_TEMPLATE,
        finish=lambda scratch: render(data, scratch / "semantic_ids.parquet", scratch / "verl") and None,
    )
    return data, tokenizer


def recipe_for(
    out: Path, data: Path, tokenizer: Path, seed: int, arm: str, options: dict[str, Any]
) -> Recipe:
    return Recipe.model_validate(
        {
            "data": str(data),
            "tokenizer": str(tokenizer),
            "out": str(out / arm.replace(" ", "-").replace("=", "")),
            "seed": seed,
            "device": "cpu",
            "threads": 1,
            "warm_start": {"out": str(out / "warm_start"), **options["warm_start"]},
            "rl": options["rl"],
            "method": ARMS[arm],
        }
    )


def users_of(model: Path, data: Path, tokenizer: Path, cache: Path) -> pl.DataFrame:
    """`METRICS` of every validation user; NDCG@10 with the history removed."""
    if not cache.exists():
        users = evaluate_model(model, tokenizer, data, "validation", modes=("history_removed",)).users
        masses = catalogue_masses(model, data, tokenizer)
        users.join(masses, on="index", how="left", validate="1:1").write_parquet(cache)
    users = pl.read_parquet(cache).sort("index")
    rank = pl.col("rank_removed").cast(pl.Float64)
    return users.select(
        "index",
        "target_log_prob",
        "catalogue_mass",
        log_prob_in_catalogue=pl.col("target_log_prob") - pl.col("catalogue_mass"),
        **{"ndcg@10": pl.when(rank <= 10).then(1 / (rank + 1).log(2)).otherwise(0.0).fill_null(0.0)},
    )


def catalogue_masses(model: Path, data: Path, tokenizer: Path) -> pl.DataFrame:
    """Log of the summed probability of all items, per validation user: beams as wide as the catalogue."""
    recommender = Recommender.load(model, tokenizer, data)
    rows = pl.read_parquet(tokenizer / "verl" / "validation.parquet", columns=["prompt", "extra_info"])
    index = rows["extra_info"].struct.field("index")
    prompts, width = recommender.encode(rows["prompt"].to_list()), len(recommender.row_of_sid)
    scores = np.concatenate(
        [
            recommender.rank(prompts[start : start + 256], width).scores_BW
            for start in range(0, len(rows), 256)
        ]
    )
    return pl.DataFrame({"index": index, "catalogue_mass": np.logaddexp.reduce(scores, axis=1)})


def run_seed(out: Path, seed: int, arms: list[str], options: dict[str, Any]) -> dict[str, pl.DataFrame]:
    """Per-user values of the warm start and of every arm."""
    folder = out / f"seed-{seed}"
    data, tokenizer = prepare_inputs(folder, seed, options["users"], options["items"])
    tables: dict[str, pl.DataFrame] = {}
    for arm in arms:
        recipe = recipe_for(folder, data, tokenizer, seed, arm, options)
        inputs = Inputs.load(recipe)
        warm = warm_start.folder_of(recipe) / "model"
        if warm_start.find(recipe, inputs) is None:
            warm_start.train(
                recipe,
                inputs,
                score=lambda model: evaluate_model(model, tokenizer, data, "validation").means(),
            )
        if run.find(recipe, inputs) is None:
            run.train(recipe, inputs, warm)
        if "warm start" not in tables:
            tables["warm start"] = users_of(warm, data, tokenizer, folder / "warm-start-users.parquet")
        cache = folder / f"{Path(recipe.out).name}-users.parquet"
        tables[arm] = users_of(Path(recipe.out) / "model", data, tokenizer, cache)
        print(f"seed {seed} {arm}: log-prob {tables[arm]['target_log_prob'].mean():.4f}", flush=True)
    return tables


def differences(found: list[dict[str, pl.DataFrame]]) -> dict[str, dict[str, list[float]]]:
    """Arm -> metric -> [mean, low, high] of arm minus warm start, users of all seeds together."""
    result: dict[str, dict[str, list[float]]] = {}
    for arm in found[0]:
        if arm == "warm start":
            continue
        result[arm] = {}
        for metric in METRICS:
            before = np.concatenate([tables["warm start"][metric].to_numpy() for tables in found])
            after = np.concatenate([tables[arm][metric].to_numpy() for tables in found])
            interval = paired_bootstrap(before, after, seed=0)
            result[arm][metric] = [interval.mean, interval.low, interval.high]
    return result


def study(out: Path, seeds: list[int], arms: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Run (or go on with) the study and return its table."""
    found = [run_seed(out, seed, arms, options) for seed in seeds]
    start = [tables["warm start"] for tables in found]
    return {
        "seeds": seeds,
        "options": options,
        "warm_start": {
            metric: [float(table[metric].mean()) for table in start]  # type: ignore[arg-type]
            for metric in METRICS
        },
        "difference": differences(found),
        "per_seed": {
            arm: {
                metric: [float((t[arm][metric] - t["warm start"][metric]).mean()) for t in found]  # type: ignore[arg-type]
                for metric in METRICS
            }
            for arm in arms
        },
        "versions": versions(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
        },
    }


def options_of(
    *, users: int = 2000, items: int = 200, epochs: int = 3, steps: int = 60, learning_rate: float = 1e-4
) -> dict[str, Any]:
    """Sizes of a study; `epochs` are the warm start's, few on purpose."""
    return {
        "users": users,
        "items": items,
        "warm_start": {"epochs": epochs, "batch_size": 32, "learning_rate": 2e-3},
        "rl": {
            "steps": steps,
            "prompts_per_step": 32,
            "group_size": 32,
            "learning_rate": learning_rate,
            "warmup_steps": 5,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    for name, default in (("users", 2000), ("items", 200), ("epochs", 3), ("steps", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    arguments = parser.parse_args()
    names = ("users", "items", "epochs", "steps", "learning_rate")
    options = options_of(**{name: getattr(arguments, name) for name in names})
    result = study(arguments.out, arguments.seeds, arguments.arms, options)
    atomic_text(arguments.out / "learning.json", json.dumps(result, indent=2) + "\n")
    for arm, metrics in result["difference"].items():
        cells = [
            f"{name} {mean:+.4f} [{low:+.4f}, {high:+.4f}]" for name, (mean, low, high) in metrics.items()
        ]
        print(f"{arm:16} " + "   ".join(cells))


if __name__ == "__main__":
    main()
