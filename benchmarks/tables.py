"""Tables of README.md and of docs/concepts/cost.md, made from `results/`.

    python benchmarks/tables.py            (a test compares the pages with them)

Ratios over a peer or a baseline in the same run, with the extremes of the repeats where a run has several.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_prompts import spread

ROOT = Path(__file__).parents[1]


def load(name: str) -> dict[str, Any]:
    """A stored result."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def times(ratio: float, turns: Sequence[float] | None = None) -> str:
    """`12.3x (11.9-12.6)`."""
    digits = 2 if ratio < 1 else 1 if ratio < 100 else 0
    spread = f" ({turns[0]:.{digits}f}-{turns[1]:.{digits}f})" if turns else ""
    return f"{ratio:.{digits}f}x{spread}"


ARMS = {
    "stock_shared": "stock GRPO, prompts read once",
    "recast": "ReCast",
    "recast_shared": "ReCast, prompts read once",
}


def actor() -> Iterator[list[str]]:
    """Times less than stock GRPO, an arm a column."""
    found = load("whole_step")
    arms = {name: [step["step"] for step in arm["steps"]] for name, arm in found["arms"].items()}
    stock = arms["stock"]
    cells = [
        times(found["arms"][arm]["ratio"], [min(stock) / max(arms[arm]), max(stock) / min(arms[arm])])
        for arm in ARMS
    ]
    what = f"a step of a real job, {found['prompts']} prompts of 256 tokens"
    yield [what, *cells, "whole_step.py"]
    rows = load("shared_prompts")["rows"]
    by_length: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_length.setdefault(row["prompt_length"], {})[row["arm"]] = row
    for length, of in by_length.items():
        cells = [times(of[arm]["ratio"]["all"], spread(rows, of[arm])) for arm in ARMS]
        what = f"three passes of the actor alone, {of['stock']['batch']} prompts of {length:,} tokens"
        yield [what, *cells, "shared_prompts.py"]
        cells = [times(of[arm]["ratio"]["peak_memory"]) for arm in ARMS]
        yield ["their memory", *cells, "shared_prompts.py"]


def search() -> Iterator[list[str]]:
    found = load("search")
    beams, what = found["beams"]["arms"], "32 beams for 64 prompts of 64 tokens"
    peer = "Hugging Face `generate`"
    at_once = beams["hugging face, 64 prompts a call"]
    yield [what, f"{peer}, all in one call", _cell(at_once), "search.py"]
    yield [what, f"{peer}, as many a call as is fastest", _cell(fastest(beams)), "search.py"]
    for samples in found["samples"]:
        row = fastest(samples["arms"])
        cell = f"{_cell(row)}, {samples['share_of_bound']:.0%} of the token bound"
        yield [_rollouts(samples["prompt_length"]), "every rollout read alone", cell, "search.py"]
    rows = load("search_vllm")["rows"]
    for length in sorted({row["prompt_length"] for row in rows}):
        row = fastest({row["arm"]: row for row in rows if row["prompt_length"] == length})
        yield [_rollouts(length), "vLLM's CPU build", _cell(row), "search_vllm.py"]


def fastest(arms: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Of the arms beside ours the one that took least."""
    return min((row for name, row in arms.items() if name != "recast"), key=lambda row: row["ratio"])


def _rollouts(length: int) -> str:
    return f"32 rollouts for 64 prompts of {length} tokens"


def _cell(row: Mapping[str, Any]) -> str:
    return times(row["ratio"], row["ratio_range"])


def regressions() -> Iterator[list[str]]:
    """Those of `make bench` that no other result holds."""
    for name, row in load("bench")["ratios"].items():
        theirs, _, ours = name.partition(" / ")
        if theirs in ("pandas", "bare faiss", "dictionary"):
            yield [ours, theirs, _cell(row), "bench.py"]


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose last column names scripts."""
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    return lines + [f"| {' | '.join([*row[:-1], f'`{row[-1]}`'])} |" for row in rows]


def performance() -> str:
    """The tables, in Markdown."""
    lines = [
        *_table(["times less than stock GRPO, G = 32", *ARMS.values(), "`benchmarks/`"], actor()),
        "",
        *_table(["", "beside", "times less", "`benchmarks/`"], [*search(), *regressions()]),
    ]
    bench = load("bench")
    machine, versions = bench["machine"], bench["versions"]
    lines.append("")
    lines.append(
        f"{machine['cores']} cores of an {machine['cpu']}, torch {versions['torch']}, "
        f"verl {versions['verl']}, transformers {versions['transformers']}; medians, in brackets the "
        "extremes of the turns. Sizes, loads and commits stand in `benchmarks/results/`."
    )
    return "\n".join(lines)


# Of the paper (Qwen3-8B, G = 32, 64 NPUs, table 4): without ReCast, and with it.
PAPER = {"step": (371.54, 77.00), "update": (211.04, 12.71), "tokens": (6.93e6, 0.47e6)}


def table_four() -> str:
    """The paper's cost of a step beside ours, in Markdown."""
    found = load("whole_step")

    def medians(timer: str) -> dict[str, float]:
        return {name: statistics.median(step[timer] for step in arm["steps"]) for name, arm in arms.items()}

    arms = found["arms"]
    steps, updates = medians("step"), medians("update_actor")
    rows = load("shared_prompts")["rows"]
    at_256 = {row["arm"]: row for row in rows if row["prompt_length"] == 256}

    def line(what: str, paper: str, ours: str, shared: str) -> str:
        return f"| {what} | {paper} | {ours} | {shared} |"

    def seconds(before: float, after: float) -> str:
        return f"{before:.1f} -> {after:.1f} s ({times(before / after)})"

    def tokens(arm: str) -> str:
        return times(at_256[arm]["ratio"]["tokens"])

    def memory(arm: str) -> str:
        """Weights and optimiser state included, as in the paper."""
        whole = {name: row["peak_memory_bytes"] + row["resident_bytes"] for name, row in at_256.items()}
        return f"{whole[arm] / whole['stock'] - 1:.0%}"

    def utilisation(arm: str) -> str:
        return f"{at_256[arm]['actor_update_mfu'] / at_256['stock']['actor_update_mfu'] - 1:+.0%}"

    ours = ("recast", "recast_shared")
    paper = {name: seconds(*PAPER[name]) for name in ("step", "update")}
    return "\n".join(
        [
            "| | paper | ReCast here | and the prompt read once |",
            "|---|---|---|---|",
            line("step", paper["step"], *(seconds(steps["stock"], steps[arm]) for arm in ours)),
            line("actor update", paper["update"], *(seconds(updates["stock"], updates[arm]) for arm in ours)),
            line("tokens into the actor", times(PAPER["tokens"][0] / PAPER["tokens"][1]), *map(tokens, ours)),
            line("peak memory", "-16.5%", *map(memory, ours)),
            line("MFU of the update, relative", "+14.2%", *map(utilisation, ours)),
        ]
    )


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "README.md": ("performance", performance),
    "docs/concepts/cost.md": ("table-4", table_four),
}


def replaced(page: str, text: str) -> str:
    """A page with the table of today.

    Raises:
        ValueError: the marks are not there.
    """
    name, table = PAGES[page]
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} lacks {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{table()}\n{end}", text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(replaced(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
