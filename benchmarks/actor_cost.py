"""Actor cost of stock GRPO and of ReCast on the same rollouts: the recorded result of `recast profile`.

    python benchmarks/actor_cost.py recipes/ml-100k/recast.yaml

Writes benchmarks/results/actor_cost.json. Run it on an otherwise idle machine: the load is recorded too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from commands import recast

from recast_cli.outputs import atomic_text
from recast_cli.provenance import git_state

PATHS = ("data=", "tokenizer=", "out=", "warm_start.out=", "model=")  # of this machine: not recorded
RESULT = Path(__file__).parent / "results" / "actor_cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="an ML-100K recipe; further key=value overrides may follow")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--prompts", default="16")
    parser.add_argument("--group-size", default="32")
    parser.add_argument("--steps", default="5")
    parser.add_argument("--repeats", default="3")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()

    options = [
        word
        for name in ("prompts", "group_size", "steps", "repeats")
        for word in (f"--{name.replace('_', '-')}", getattr(args, name))
    ]
    before = {"git": git_state(), "load_average_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        command = ["profile", args.recipe, *args.overrides, *options, "--out", folder]
        print(recast(Path(), *command), end="")
        result = json.loads((Path(folder) / "profile.json").read_text(encoding="utf-8"))
    for name in ("data", "tokenizer", "out", "model"):
        result["setting"]["recipe"].pop(name)
    result["setting"]["recipe"]["warm_start"].pop("out")
    overrides = [text for text in args.overrides if not text.startswith(PATHS)]
    command_line = " ".join(["recast profile", Path(args.recipe).name, *overrides, *options])
    atomic_text(args.result, json.dumps({"command": command_line, **before, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
