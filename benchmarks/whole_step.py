"""A whole step of a real job, from prompts to new weights: stock GRPO and ReCast, prompts shared or not.

    python benchmarks/whole_step.py

64 prompts of 256 tokens, 32 rollouts each, Qwen3 of width 128 with 4 layers (untrained), one thread a worker,
the settings of `recast train`, rows read alone four at a time as in `shared_prompts.py`. A learning rate of
1e-12 leaves the weights as they are, so that every arm draws the same rollouts; their hashes must agree. Of
each step: verl's own timers, and the share of it in which a model computes (rollouts, log-probs, update).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import record
from commands import recast

from recast_cli.artifacts import read_json_lines
from recast_cli.profiling.finished import PHASES

RESULT = Path(__file__).parent / "results" / "whole_step.json"
PROMPTS, GROUP, HISTORY = 64, 32, 51  # 51 items of 5 tokens and the next one's begin: 256
ROW_TOKENS = 5 * HISTORY + 1 + 3
COMPUTING = ("rollout", "old_log_prob", "ref_log_prob", "actor_update")  # phases of the workers
NUM_USERS, NUM_ITEMS = 640, 2000
ARMS: dict[str, list[str]] = {
    "stock": ["method.name=grpo", f"rl.max_tokens_per_micro_batch={4 * ROW_TOKENS}"],
    "stock_shared": ["method.name=grpo", "rl.share_prompt=true"],
    "recast": ["method.name=recast", f"rl.max_tokens_per_micro_batch={4 * ROW_TOKENS}"],
    "recast_shared": ["method.name=recast", "rl.share_prompt=true"],
    # and without the pass for old log-probs: one update a step
    "recast_shared_on_policy": [
        "method.name=recast",
        "rl.share_prompt=true",
        "rl.on_policy=true",
        "rl.sampled_log_probs=false",
    ],
}
RECIPE = f"""
data: data
tokenizer: tokenizer
model: tokenizer/model
out: run
device: cpu
threads: 1
ray_cpus: 8
rl: {{prompts_per_step: {PROMPTS}, group_size: {GROUP}, learning_rate: 1.0e-12, warmup_steps: 0}}
"""


def prepare(folder: Path) -> None:
    """Artifacts from a random log of 54 events a user: of the 52 for training, RL has the last one."""
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(NUM_ITEMS)[: HISTORY + 3] for _ in range(NUM_USERS)])
    users = np.repeat(np.arange(NUM_USERS), HISTORY + 3)
    log = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": np.arange(len(users))})
    log.write_csv(folder / "log.csv")
    catalogue = {"item_id": np.arange(NUM_ITEMS), "title": [f"item {i}" for i in range(NUM_ITEMS)]}
    pl.DataFrame(catalogue).write_csv(folder / "items.csv")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    files = ["--interactions", "log.csv", "--items", "items.csv", "--history", str(HISTORY)]
    held_out = ["--rl-rows", "held-out", "--held-out-share", "0.02"]
    recast(folder, "prepare-data", *files, *held_out, "--out", "data")
    sizes = ["--codebook-size", "256", "--hidden-size", "128", "--layers", "4"]
    recast(
        folder,
        "build-tokenizer",
        "--data",
        "data",
        "--out",
        "tokenizer",
        "--embeddings",
        "cooccurrence",
        *sizes,
    )


def run(folder: Path, arm: str, steps: int) -> dict[str, Any]:
    """One job: timers of the timed steps, what the models computed in them, and its rollouts."""
    measured = folder / f"{arm}.jsonl"
    options = [f"out={arm}", f"rl.steps={1 + steps}", "rl.save_every=-1", *ARMS[arm]]
    recast(folder, "train", "recipe.yaml", *options, RECAST_MEASURE=str(measured))
    lines = [line["data"] for line in read_json_lines(folder / arm / "metrics.jsonl")]
    assert {line["prompt_length/mean"] for line in lines} == {5 * HISTORY + 1}
    calls, rollouts = read_json_lines(measured), read_json_lines(folder / arm / "rollouts.jsonl")
    timers = [
        {phase: line.get(f"timing_s/{phase}", 0.0) for phase in (*PHASES, "step")} for line in lines[1:]
    ]
    computed = []
    for step in range(1, 1 + steps):
        inside = {}
        for phase in (*COMPUTING, "optimizer"):
            each = [call["wall_s"] for call in calls if call["phase"] == phase]
            count = len(each) // (1 + steps)  # rollouts are drawn in several calls
            inside[phase] = sum(each[step * count : (step + 1) * count])
        computed.append(inside)
    return {
        "steps": timers,
        "computed": computed,
        "share_computed": [
            sum(inside.values()) / step["step"] for inside, step in zip(computed, timers, strict=True)
        ],
        "sha256": [line["sha256"] for line in rollouts],
    }


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args()

    start = record.before()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        for arm in args.arms:
            found[arm] = run(Path(temporary), arm, args.steps)
    hashes = {tuple(result["sha256"]) for result in found.values()}
    assert len(hashes) == 1, "the arms had different rollouts"
    medians = {
        arm: statistics.median(step["step"] for step in result["steps"]) for arm, result in found.items()
    }
    for arm, result in found.items():
        shares = {
            phase: statistics.median(step[phase] / step["step"] for step in result["steps"])
            for phase in PHASES
        }
        result |= {"median_s": medians[arm], "share_of_step": shares}
        if "stock" in medians:
            result["ratio"] = medians["stock"] / medians[arm]
        computed = statistics.median(result["share_computed"])
        print(
            f"{arm:24} {medians[arm]:8.2f} s {result.get('ratio', 0):6.1f}x  models compute {computed:.0%}  ",
            end="",
        )
        print("  ".join(f"{phase} {share:.0%}" for phase, share in shares.items()))
    record.write(args.result, start, {"prompts": PROMPTS, "group": GROUP, "arms": found})


if __name__ == "__main__":
    main()
