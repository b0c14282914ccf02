"""Does RL raise the target's probability where the truth is known?

On the synthetic generator, with RL rows that SFT has not seen: an early warm start (four epochs at a constant
learning rate, so that it is neither converged nor annealed), then each arm for the same number of updates on
the same prompts. Reported per arm: change against the warm start on validation, over all users and seeds,
with a paired bootstrap interval, and per seed.

    python benchmarks/learning.py

The log-prob is split in two ways. Rollouts are drawn from the policy renormalised over the trie while the
actor trains the full-vocabulary policy: `catalogue_mass` is the log of the probability that an answer names
any item at all, `log_prob_in_catalogue` the target's log-prob among the items. And `level_1` ... are the
log-probs of the target's codes, each given the codes before it.

`best_temperature` says how well a warm start is calibrated: the softmax temperature over the items at which
its targets are likeliest. Above 1 it is too sure of itself, and sharpening can only cost log-prob.

A finished part is reused, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
import record

import recast_cli.main  # noqa: F401  its OpenMP policy, which torch reads when it is imported
from recast_cli.core.ranking import ndcg_of_rank, paired_bootstrap
from recast_cli.data import synthetic
from recast_cli.data.prepare import Params, prepare
from recast_cli.data.prompts import CHAT_TEMPLATE
from recast_cli.data.render import render
from recast_cli.evaluation.evaluate import evaluate_model
from recast_cli.evaluation.recommender import Recommender
from recast_cli.recipe import Recipe
from recast_cli.tokenizer.build import TokenizerParams, build
from recast_cli.training import run, run_directory, warm_start
from recast_cli.training.inputs import Inputs

RESULT = Path(__file__).parent / "results" / "learning.json"
LEVELS, CODES = 3, 8
TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.0)
METRICS = (
    "target_log_prob",
    "ndcg@10",
    "catalogue_mass",
    "log_prob_in_catalogue",
    *(f"level_{level}" for level in range(1, LEVELS + 1)),
)
# Arm -> (method section, changes of the rl section).
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"name": "grpo"}, {}),
    "grpo kl=1": ({"name": "grpo"}, {"kl_coef": 1.0}),
    "recast": ({"name": "recast", "w_positive": 1.0, "w_negative": 1.0}, {}),
    "recast w-=0.25": ({"name": "recast", "w_positive": 1.0, "w_negative": 0.25}, {}),
    "recast w-=0": ({"name": "recast", "w_positive": 1.0, "w_negative": 0.0}, {}),
    "sft-continued": ({"name": "sft-continued"}, {}),
    # Beside the study, by --arms: the actor renormalised over the trie, as rollouts are drawn.
    "recast masked": ({"name": "recast", "w_positive": 1.0, "w_negative": 1.0}, {"masked_actor": True}),
    "recast w-=0.25 masked": (
        {"name": "recast", "w_positive": 1.0, "w_negative": 0.25},
        {"masked_actor": True},
    ),
}
STUDY = ("grpo", "grpo kl=1", "recast", "recast w-=0.25", "recast w-=0", "sft-continued")


def options_of(
    *,
    users: int = 3000,
    items: int = 100,
    sparsity: float = 0.9,
    steps: int = 30,
    prompts: int = 64,
    learning_rate: float = 1e-4,
    epochs: int = 4,
) -> dict[str, Any]:
    """Sizes of a study."""
    return {
        "users": users,
        "items": items,
        "sparsity": sparsity,
        "warm_start": {"epochs": epochs, "batch_size": 32, "learning_rate": 1e-3},
        "rl": {
            "steps": steps,
            "prompts_per_step": prompts,
            "group_size": 32,
            "learning_rate": learning_rate,
            "warmup_steps": 5,
        },
    }


def prepare_inputs(out: Path, seed: int, users: int, items: int, sparsity: float) -> tuple[Path, Path]:
    """Synthetic dataset with held-out RL rows, and its tokenizer; what is there already must be of these
    sizes."""
    data, tokenizer = out / "data", out / "tokenizer"
    config = synthetic.SyntheticConfig(num_users=users, num_items=items, sparsity=sparsity, seed=seed)
    params = Params(rl_rows="held-out", held_out_share=0.4, history=8)
    prepare(synthetic.source(config), params, data, seed=seed)
    sizes = TokenizerParams(
        codebook_sizes=(CODES,) * LEVELS,
        embeddings="cooccurrence",
        hidden_size=64,
        num_layers=2,
        seed=seed,
    )

    def finish(scratch: Path) -> None:
        render(data, scratch / "semantic_ids.parquet", scratch / "verl")

    build(data, tokenizer, sizes, chat_template=CHAT_TEMPLATE, finish=finish)
    return data, tokenizer


def recipe_for(
    out: Path, data: Path, tokenizer: Path, seed: int, arm: str, options: dict[str, Any]
) -> Recipe:
    """The recipe of one arm; everything but its method and its changes is shared."""
    method, changes = ARMS[arm]
    return Recipe.model_validate(
        {
            "data": str(data),
            "tokenizer": str(tokenizer),
            "out": str(out / arm.replace(" ", "-").replace("=", "")),
            "seed": seed,
            "device": "cpu",
            "threads": 1,
            "warm_start": {"out": str(out / "warm_start"), **options["warm_start"]},
            "verl_sft": {"optim.lr_scheduler_type": "constant"},
            "rl": options["rl"] | changes,
            "method": method,
        }
    )


def users_of(model: Path, data: Path, tokenizer: Path, cache: Path) -> pl.DataFrame:
    """`METRICS` of every validation user, NDCG@10 with the history removed, and `log_prob_at_T`."""
    weights = model / "model.safetensors"
    if not cache.exists() or cache.stat().st_mtime < weights.stat().st_mtime:
        users = evaluate_model(model, tokenizer, data, "validation", modes=("history_removed",)).users
        parts = probabilities(model, data, tokenizer)
        scratch = cache.with_suffix(".part")
        users.join(parts, on="index", how="left", validate="1:1").write_parquet(scratch)
        scratch.rename(cache)
    users = pl.read_parquet(cache).sort("index")
    rank_U = users["rank_removed"].fill_null(0).to_numpy()
    return users.with_columns(
        pl.Series("ndcg@10", ndcg_of_rank(rank_U, 10)),
        log_prob_in_catalogue=pl.col("target_log_prob") - pl.col("catalogue_mass"),
    ).select("index", *METRICS, cs.starts_with("log_prob_at_"))


def probabilities(model: Path, data: Path, tokenizer: Path) -> pl.DataFrame:
    """Per validation user: log of all items' summed probability, the target's log-prob level by level, and
    its log-prob among the items at each temperature."""
    recommender = Recommender.load(model, tokenizer, data)
    rows = pl.read_parquet(tokenizer / "verl" / "validation.parquet")
    prompts = recommender.encode(rows["prompt"].to_list())
    answers = recommender.tokenizer(
        rows["reward_model"].struct.field("ground_truth").to_list(), add_special_tokens=False
    )["input_ids"]
    codes_UL = np.array(answers) - np.array(recommender.level_offsets)
    width = len(recommender.row_of_sid)  # beams as wide as the catalogue are all of it
    chunks = [slice(start, start + 256) for start in range(0, len(prompts), 256)]
    found = [recommender.answer(prompts[chunk], width, [None], codes_UL[chunk]) for chunk in chunks]
    scores_UN = np.concatenate([ranked.scores_BW for (ranked,), _ in found])
    log_probs_UL = np.concatenate([log_probs_BL for _, log_probs_BL in found])
    target_U = log_probs_UL.sum(1)
    return pl.DataFrame(
        {
            "index": rows["extra_info"].struct.field("index"),
            "catalogue_mass": np.logaddexp.reduce(scores_UN, axis=1),
            **{f"level_{level + 1}": log_probs_UL[:, level] for level in range(LEVELS)},
            **{
                f"log_prob_at_{t}": target_U / t - np.logaddexp.reduce(scores_UN / t, axis=1)
                for t in TEMPERATURES
            },
        }
    )


def train_warm_start(recipe: Recipe, inputs: Inputs) -> None:
    """To its last epoch: choosing the best would be one more use of the validation users."""
    numbers = itertools.count()
    warm_start.train(recipe, inputs, score=lambda _: {"ndcg@10": float(next(numbers))})


def run_seed(out: Path, seed: int, arms: list[str], options: dict[str, Any]) -> dict[str, pl.DataFrame]:
    """Per-user values of the warm start and of every arm."""
    folder = out / f"seed-{seed}"
    sizes = (options[name] for name in ("users", "items", "sparsity"))
    data, tokenizer = prepare_inputs(folder, seed, *sizes)
    tables: dict[str, pl.DataFrame] = {}
    for arm in arms:
        recipe = recipe_for(folder, data, tokenizer, seed, arm, options)
        inputs = Inputs.load(recipe)
        start = warm_start.folder_of(recipe) / "model"
        if warm_start.find(recipe, inputs) is None:
            train_warm_start(recipe, inputs)
        if (Path(recipe.out) / "command.txt").exists() and not (Path(recipe.out) / "manifest.json").exists():
            run_directory.remove(Path(recipe.out))  # interrupted
        if run_directory.find(recipe, inputs, start) is None:
            run.train(recipe, inputs, start)
        if "warm start" not in tables:
            tables["warm start"] = users_of(start, data, tokenizer, folder / "warm-start-users.parquet")
        cache = folder / f"{Path(recipe.out).name}-users.parquet"
        tables[arm] = users_of(Path(recipe.out) / "model", data, tokenizer, cache)
        print(f"seed {seed} {arm}: {difference(tables, arm, 'target_log_prob')}", flush=True)
    return tables


def best_temperature(users: pl.DataFrame) -> float:
    """Of `TEMPERATURES`, the one at which the targets are likeliest on average."""
    return max(TEMPERATURES, key=lambda t: float(np.mean(users[f"log_prob_at_{t}"].to_numpy())))


def difference(tables: dict[str, pl.DataFrame], arm: str, metric: str) -> list[float]:
    """[mean, low, high] of arm minus warm start over the users of one seed."""
    before, after = (tables[name][metric].to_numpy() for name in ("warm start", arm))
    interval = paired_bootstrap(before, after, seed=0)
    return [interval.mean, interval.low, interval.high]


def study(out: Path, seeds: list[int], arms: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Run (or go on with) the study and return its table."""
    found = [run_seed(out, seed, arms, options) for seed in seeds]
    names = ["warm start", *arms]
    pooled = {name: pl.concat([tables[name] for tables in found]) for name in names}
    return {
        "seeds": seeds,
        "options": options,
        "arms": {arm: {"method": ARMS[arm][0], "rl": ARMS[arm][1]} for arm in arms},
        "warm_start": {
            metric: [float(np.mean(tables["warm start"][metric].to_numpy())) for tables in found]
            for metric in METRICS
        }
        | {"best_temperature": [best_temperature(tables["warm start"]) for tables in found]},
        "difference": {arm: {metric: difference(pooled, arm, metric) for metric in METRICS} for arm in arms},
        "per_seed": {
            arm: {metric: [difference(tables, arm, metric) for tables in found] for metric in METRICS}
            for arm in arms
        },
    }


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(STUDY))
    for name, default in (("users", 3000), ("items", 100), ("steps", 30), ("prompts", 64), ("epochs", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    arguments = parser.parse_args()
    names = ("users", "items", "sparsity", "steps", "prompts", "learning_rate", "epochs")
    start = record.before()
    options = options_of(**{name: getattr(arguments, name) for name in names})
    result = study(arguments.out, arguments.seeds, arguments.arms, options)
    record.write(arguments.result, start, result)
    for arm, metrics in result["difference"].items():
        cells = [
            f"{name} {mean:+.4f} [{low:+.4f}, {high:+.4f}]" for name, (mean, low, high) in metrics.items()
        ]
        print(f"{arm:16} " + "  ".join(cells))


if __name__ == "__main__":
    main()
