"""Actor cost with the prompt of a group read once, beside rows read alone: four arms, three prompt lengths.

    python benchmarks/shared_prompts.py

Qwen3 of width 128 with 4 layers, a vocabulary of about 1,000 and answers of 3 tokens, G = 32, prompts of 64,
256 and 1,024 tokens in batches of 16, 8 and 4, one thread. Seconds are processor seconds of verl's worker,
the same rollouts in every arm, two processes an arm in turns; `recast profile --sweep` measures them. Ratios
are over stock GRPO with rows read alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
from commands import recast

from recast_cli.profiling.sweep import PHASES

RESULT = Path(__file__).parent / "results" / "shared_prompts.json"
LENGTHS = {64: 16, 256: 8, 1024: 4}  # prompt tokens -> prompts of a batch
GROUP = 32
RECIPE = """
data: data
tokenizer: tokenizer
out: run
device: {device}
threads: 1
rl: {{kl_coef: 0.001, learning_rate: 1.0e-5}}
"""


def prepare(folder: Path, device: str = "cpu") -> None:
    """Data, tokenizer and recipe."""
    log = ["--num-users", "3000", "--num-items", "2000", "--num-clusters", "50"]
    recast(folder, "prepare-data", "synthetic", "--out", "data", *log)
    sizes = ["--embeddings", "cooccurrence", "--codebook-size", "330"]
    recast(folder, "build-tokenizer", "--data", "data", "--out", "tokenizer", *sizes)
    (folder / "recipe.yaml").write_text(RECIPE.format(device=device), encoding="utf-8")


def sweep(
    folder: Path, length: int, batch: int, steps: int, *options: str, repeats: int = 1
) -> list[dict[str, Any]]:
    """The rows of one prompt length."""
    sizes = ["--prompts", str(batch), "--group-size", str(GROUP)]
    sizes += ["--steps", str(steps), "--repeats", str(repeats)]
    where = ["--out", f"out-{length}", "--json"]
    printed = recast(
        folder, "profile", "recipe.yaml", "--sweep", f"prompt_length={length}", *sizes, *options, *where
    )
    return list(json.loads(printed))


def measure(steps: int, batches: Mapping[int, int] = LENGTHS, *, repeats: int = 1) -> list[dict[str, Any]]:
    """The rows of a sweep at each prompt length, whose batch is given with it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        return [
            row
            for length, batch in batches.items()
            for row in sweep(folder, length, batch, steps, repeats=repeats)
        ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the ratios over stock."""
    names = ("old_log_prob", "ref_log_prob", "actor_update", "all", "tokens", "flops", "peak_memory")
    print(f"{'prompt':>6} {'arm':14}" + "".join(f"{name:>14}" for name in names))
    for row in rows:
        cells = "".join(f"{row['ratio'][name]:13.1f}x" for name in names)
        print(f"{row['prompt_length']:6} {row['arm']:14}{cells}")


def spread(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[float]:
    """Lowest and highest ratio over stock, all phases, that the extremes of the timed steps allow."""

    def extremes(of: dict[str, Any]) -> list[float]:
        ranges = [of[f"{phase}_cpu_s_range"] for phase in PHASES if of[f"{phase}_s"] is not None]
        return [sum(each) for each in zip(*ranges, strict=True)]

    (stock,) = (
        each for each in rows if (each["arm"], each["prompt_length"]) == ("stock", row["prompt_length"])
    )
    (low, high), (least, most) = extremes(stock), extremes(row)
    return [low / most, high / least]


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()

    start = record.before()
    rows = measure(args.steps, repeats=args.repeats)
    show(rows)
    record.write(args.result, start, {"rows": rows})


if __name__ == "__main__":
    main()
