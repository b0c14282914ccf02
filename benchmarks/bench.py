"""The regression benchmarks: ratios over a peer or a baseline in the same run, beside the stored ones.

    make bench                         (under 30 minutes on two cores)
    make bench BENCH_ARGS="--only search trie"
    make bench BENCH_ARGS=--store      the new ratios become the stored ones

A ratio says how many times longer the other one took, so a higher one is better, and a busy machine weighs on
both. Suites of which a ratio is more than 10 % below the stored one run once more, and the better figure
counts; what is still below is named, and the exit code is 1.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kmeans
import plugin_import
import prepare_data
import record
import search
import shared_prompts
import start_up
import torch
import trie_masks
from timing import compared

from recast_cli.console import print_table

RESULT = Path(__file__).parent / "results" / "bench.json"
TOLERANCE = 0.10
Figures = dict[str, dict[str, Any]]  # what is compared -> its `ratio` and the `ratio_range` of the turns


def _start_up() -> Figures:
    seconds = start_up.measure(10)
    return {"an idle interpreter / recast --help": compared(seconds, "recast --help")["python"]}


def _plugin() -> Figures:
    turns = [verl / plugin for verl, plugin in plugin_import.measure(9)]
    name = "import verl / the plugin"
    return {name: {"ratio": statistics.median(turns), "ratio_range": [min(turns), max(turns)]}}


def _data() -> Figures:
    return {"pandas / recast prepare-data": compared(prepare_data.measure(3))["pandas"]}


def _tokenizer() -> Figures:
    return {"bare faiss / residual k-means": compared(kmeans.measure(2))["faiss"]}


def _trie() -> Figures:
    found: Figures = {}
    for size in trie_masks.SIZES:
        for work, seconds in trie_masks.measure(size, 5)[0].items():
            found[f"dictionary / trie, {work}, {size} codes"] = compared(seconds)["dictionary"]
    return found


def _search() -> Figures:
    beams, samples = search.beams(2, chunks=(16,)), search.samples(60, 3, budgets=(4096,))
    found = {f"beams: {name}": row for name, row in beams["arms"].items()}
    found |= {f"samples: {name}": row for name, row in samples["arms"].items()}
    found |= {name: rows["without"] for name, rows in search.savings(5).items()}
    for name, rows in search.sizes(5).items():
        many = rows["1,000,000 items"]  # whose ratio says how much longer they take: here the other way round
        low, high = many["ratio_range"]
        found[f"1,000 / 1,000,000 items, {name}"] = {
            "ratio": 1 / many["ratio"],
            "ratio_range": [1 / high, 1 / low],
        }
    return {name: row for name, row in found.items() if not name.endswith(": recast")}


def _actor() -> Figures:
    rows = shared_prompts.measure(2, {256: 8})
    return {
        f"actor: stock / {row['arm']}": {
            "ratio": row["ratio"]["all"],
            "ratio_range": shared_prompts.spread(rows, row),
        }
        for row in rows
        if row["arm"] != "stock"
    }


SUITES: dict[str, Callable[[], Figures]] = {
    "start-up": _start_up,
    "plugin": _plugin,
    "data": _data,
    "tokenizer": _tokenizer,
    "trie": _trie,
    "search": _search,
    "actor": _actor,
}
THREADS = {"trie": 1, "search": 1}  # one core, processor seconds


def run(name: str) -> Figures:
    """One suite, with the threads that it is meant for."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS.get(name, before))
    start = time.perf_counter()
    try:
        return SUITES[name]()
    finally:
        torch.set_num_threads(before)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def fallen(found: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """What is more than a tenth below its stored ratio."""
    return [
        name
        for name, figure in found.items()
        if name in stored and figure["ratio"] < (1 - TOLERANCE) * stored[name]["ratio"]
    ]


def better(first: Figures, second: Figures) -> Figures:
    """Of two runs of a suite the higher ratio of each."""
    return {name: max(first[name], second[name], key=lambda figure: figure["ratio"]) for name in first}


def table(found: Mapping[str, Any], stored: Mapping[str, Any]) -> list[list[str]]:
    """A row for each ratio: now, extremes of the turns, stored, and the change."""
    rows = []
    for name, figure in found.items():
        (low, high), old = figure["ratio_range"], stored.get(name)
        rows.append(
            [
                name,
                f"{figure['ratio']:.2f}x",
                f"{low:.2f}-{high:.2f}",
                f"{old['ratio']:.2f}x" if old else "new",
                f"{figure['ratio'] / old['ratio'] - 1:+.0%}" if old else "",
            ]
        )
    return rows


def measure(names: Sequence[str], stored: Mapping[str, Any]) -> Figures:
    """The figures of some suites; one with a fall runs once more."""
    found: Figures = {}
    for name in names:
        figures = run(name)
        if fallen(figures, stored):
            figures = better(figures, run(name))
        found |= figures
    return found


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--store", action="store_true")
    args = parser.parse_args()

    start = record.before()
    stored = json.loads(args.result.read_text(encoding="utf-8"))["ratios"] if args.result.exists() else {}
    found = measure(args.only, stored)
    print_table(
        "How many times longer the other takes", ["", "now", "turns", "stored", ""], table(found, stored)
    )
    if args.store:
        record.write(args.result, start, {"ratios": {**stored, **found}})
        return
    down = fallen(found, stored)
    for name in down:
        print(f"fell by more than {TOLERANCE:.0%}: {name}", file=sys.stderr)
    raise SystemExit(bool(down))


if __name__ == "__main__":
    main()
