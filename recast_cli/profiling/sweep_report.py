"""A sweep as a picture and as a page: measured ratios beside what the count of operations predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recast_cli.profiling.page import page as html_page
from recast_cli.profiling.plot import MIB
from recast_cli.profiling.report import words
from recast_cli.profiling.sweep import ARMS, PHASES

AXES = ("prompt_length", "group_size", "batch", "hidden_size", "layers")
COLOURS = {"stock": "#6b7682", "stock_shared": "#2a7fb8", "recast": "#e8a33d", "recast_shared": "#d1495b"}
LABELS = {
    "stock": "stock GRPO",
    "stock_shared": "stock GRPO, shared prompts",
    "recast": "ReCast",
    "recast_shared": "ReCast, shared prompts",
}
SECONDS = {"cpu_s": "processor s", "s": "s"}
SHOWN = ("cpu", "cores", "device", "threads", "compared", "timed_steps")  # of the setting, on the page


def phases_of(row: dict[str, Any]) -> list[str]:
    """Those that were measured."""
    return [phase for phase in PHASES if row[f"{phase}_s"] is not None]


def total(row: dict[str, Any], kind: str) -> float:
    """Seconds of all phases."""
    return float(sum(row[f"{phase}_{kind}"] for phase in phases_of(row)))


def with_ratios(rows: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The rows, each with what stock takes at its point divided by what it takes itself.

    Args:
        kind: Seconds that are compared: `cpu_s`, of the processor, or `s`, of the clock.
    """
    stock = {_point(row): row for row in rows if row["arm"] == "stock"}
    found = []
    for row in rows:
        base = stock[_point(row)]
        ratio = {phase: base[f"{phase}_{kind}"] / row[f"{phase}_{kind}"] for phase in phases_of(row)}
        ratio |= {
            "all": total(base, kind) / total(row, kind),
            "flops": base["flops"] / row["flops"],
            "tokens": base["tokens"] / row["tokens"],
            "peak_memory": base["peak_memory_bytes"] / row["peak_memory_bytes"],
        }
        found.append({**row, "compared": kind, "ratio": ratio})
    return found


def _point(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[axis] for axis in AXES)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: a line of panels for every combination of the other axes, the longest axis across.

    Args:
        rows: Of `with_ratios`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = max(AXES, key=lambda axis: len({row[axis] for row in rows}))
    others = [axis for axis in AXES if axis != across]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[axis] for axis in others), []).append(row)
    figure, panels = plt.subplots(
        len(groups), 3, figsize=(13, 3.9 * len(groups)), squeeze=False, layout="constrained", dpi=120
    )
    for line, (values, found) in zip(panels, groups.items(), strict=True):
        named = [f"{axis} {value}" for axis, value in zip(others, values, strict=True) if value is not None]
        line[0].set_title(", ".join(named).replace("_", " "), loc="left", fontsize=9)
        _ratios(line[0], found, across)
        _seconds(line[1], found, across)
        _memory(line[2], found, across)
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path)
    plt.close(figure)


def _lines(rows: Sequence[dict[str, Any]], across: str) -> list[tuple[str, list[int], list[dict[str, Any]]]]:
    """Arm, places on the axis, rows in their order."""
    lines = []
    for arm in ARMS:
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row[across] or 0)
        lines.append((arm, [row[across] or 0 for row in mine], mine))
    return lines


def _axes(axes: Any, across: str, places: Sequence[int], label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted(set(places)), [f"{place:,}" for place in sorted(set(places))])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(across.replace("_", " "))
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#e5e8eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _ratios(axes: Any, rows: Sequence[dict[str, Any]], across: str) -> None:
    """Times cheaper than stock: measured, and dotted what the operations say."""
    from matplotlib.ticker import FixedLocator

    highest = 1.0
    for arm, places, mine in _lines(rows, across):
        if arm == "stock":
            continue
        measured = [row["ratio"]["all"] for row in mine]
        axes.plot(places, measured, "o-", color=COLOURS[arm])
        axes.plot(places, [row["ratio"]["flops"] for row in mine], ":", color=COLOURS[arm])
        for place, value in zip(places, measured, strict=True):
            axes.annotate(f"{value:.1f}x", (place, value), (0, 6), textcoords="offset points", fontsize=8)
        highest = max(highest, *measured, *(row["ratio"]["flops"] for row in mine))
    _axes(axes, across, places, "stock / arm (dotted: operations)")
    axes.set_ylim(0.8, highest * 1.6)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick < highest * 1.6]
    axes.yaxis.set_major_locator(FixedLocator(ticks))


def _seconds(axes: Any, rows: Sequence[dict[str, Any]], across: str) -> None:
    for arm, places, mine in _lines(rows, across):
        values = [total(row, row["compared"]) for row in mine]
        axes.plot(places, values, "o-", color=COLOURS[arm], label=LABELS[arm])
    _axes(axes, across, places, f"{SECONDS[rows[0]['compared']]} of a step, all phases")


def _memory(axes: Any, rows: Sequence[dict[str, Any]], across: str) -> None:
    for arm, places, mine in _lines(rows, across):
        axes.plot(places, [row["peak_memory_bytes"] / MIB for row in mine], "o-", color=COLOURS[arm])
    _axes(axes, across, places, "peak MiB of one group above weights")


def table(rows: Sequence[dict[str, Any]], *, by_phase: bool = False) -> tuple[list[str], list[list[Any]]]:
    """Headers and cells, for a terminal or (`by_phase`: MFU and memory of each) a page."""
    axes = [axis for axis in AXES if any(row[axis] is not None for row in rows)]
    kind, phases = rows[0]["compared"], phases_of(rows[0])
    inside = phases if by_phase else ()
    headers = [
        *(axis.replace("_", " ") for axis in axes),
        "arm",
        *(f"{words(phase)}, {SECONDS[kind]}" for phase in phases),
        "stock/arm",
        "operations",
        "tokens",
        "peak MiB",
        *(f"{words(phase)}, MFU" for phase in inside),
        *(f"{words(phase)}, peak MiB" for phase in inside),
    ]
    cells = [
        [
            *(row[axis] for axis in axes),
            LABELS[row["arm"]],
            *(f"{row[f'{phase}_{kind}']:.3f}" for phase in phases),
            f"{row['ratio']['all']:.1f}x",
            f"{row['ratio']['flops']:.1f}x",
            f"{row['tokens']:,}",
            f"{row['peak_memory_bytes'] / MIB:,.0f}",
            *(f"{row[f'{phase}_mfu']:.0%}" for phase in inside),
            *(f"{row[f'{phase}_peak_bytes'] / MIB:,.1f}" for phase in inside),
        ]
        for row in rows
    ]
    return headers, cells


def page(result: dict[str, Any], picture: Path) -> str:
    """One HTML file: the setting, the picture, the table."""
    setting = ", ".join(f"{name} {value}" for name, value in result["setting"].items() if name in SHOWN)
    text = (
        f"{setting}. One worker alone: no queue, no trainer. Seconds are medians of timed steps; stock/arm "
        "is over all phases; operations is the ratio that the count predicts."
    )
    described, title = "ratios, seconds and memory over the sweep", "What the actor costs, point by point"
    return html_page(title, [text], picture, described, table(result["rows"], by_phase=True))
