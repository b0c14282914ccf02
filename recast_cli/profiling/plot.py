"""The profile as a picture: seconds and memory of each phase, stock beside ReCast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"stock": "#9aa5b1", "recast": "#d9642c"}
LABELS = {"stock": "stock GRPO", "recast": "ReCast"}
TITLES = {
    "hook": "selection\n(ReCast's hook)",
    "old_log_prob": "old\nlog-probs",
    "ref_log_prob": "reference\nlog-probs",
    "actor_update": "actor\nupdate",
    "actor_total": "all of it",
}
MIB = 1 << 20


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: seconds (log scale, median, whiskers from minimum to maximum) and peak memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained", dpi=130
    )
    _seconds(left, result)
    _memory(right, result)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#e5e8eb")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle(_headline(result["setting"]), x=0.01, ha="left", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def _headline(setting: dict[str, Any]) -> str:
    return (
        f"{setting['prompts']} prompts x {setting['group_size']} rollouts, "
        f"{setting['prompt_tokens_mean']:.0f} prompt tokens, {setting['parameters'] / 1e6:.2f} M parameters, "
        f"{setting['device']}, "
        f"{setting['threads']} thread{'s' if setting['threads'] > 1 else ''}"
    )


def _seconds(axes: Any, result: dict[str, Any]) -> None:
    """Grouped bars on a log scale; the hook exists on one side only."""
    arms = result["arms"]
    phases = [phase for phase in TITLES if any(phase in cost["seconds"] for cost in arms.values())]
    lowest = min(v["min"] for cost in arms.values() for v in cost["seconds"].values())
    highest = max(v["max"] for cost in arms.values() for v in cost["seconds"].values())
    for side, (arm, cost) in enumerate(arms.items()):
        found = [(x, cost["seconds"][p]) for x, p in enumerate(phases) if p in cost["seconds"]]
        middle = [value["median"] for _, value in found]
        whiskers = [
            [value["median"] - value["min"] for _, value in found],
            [value["max"] - value["median"] for _, value in found],
        ]
        axes.bar(
            [x + (side - 0.5) * 0.38 for x, _ in found],
            middle,
            width=0.36,
            color=COLOURS[arm],
            label=LABELS[arm],
            yerr=whiskers,
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
        )
        for x, value in found:
            place = (x + (side - 0.5) * 0.38, value["max"])
            axes.annotate(
                f"{value['median']:.3g} s",
                place,
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(lowest / 2, highest * 6)
    for x, phase in enumerate(phases):
        if phase in result["cost"]["ratio"]:
            axes.text(x, highest * 2.6, f"{result['cost']['ratio'][phase]:.1f}x", ha="center", weight="bold")
    axes.set_xticks(range(len(phases)), [TITLES[phase] for phase in phases])
    axes.set_ylabel("seconds per step (log)")


def _memory(axes: Any, result: dict[str, Any]) -> None:
    """Resident bytes (hatched) below what the phase allocates at its peak."""
    arms = result["arms"]
    phases = [phase for phase in TITLES if phase in arms["stock"]["peak_bytes"]]
    highest = 0.0
    for side, (arm, cost) in enumerate(arms.items()):
        places = [x + (side - 0.5) * 0.38 for x in range(len(phases))]
        resident = [cost["resident_bytes"][phase] / MIB for phase in phases]
        peak = [cost["peak_bytes"][phase] / MIB for phase in phases]
        axes.bar(places, peak, width=0.36, bottom=resident, color=COLOURS[arm])
        axes.bar(places, resident, width=0.36, color=COLOURS[arm], hatch="////", edgecolor="white")
        for place, below, above in zip(places, resident, peak, strict=True):
            axes.annotate(
                f"{below + above:.0f}",
                (place, below + above),
                (0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
            highest = max(highest, below + above)
    axes.set_ylim(0, highest * 1.15)
    axes.set_xticks(range(len(phases)), [TITLES[phase] for phase in phases])
    axes.set_ylabel("peak MiB (hatched: weights, optimiser)")
    axes.set_title(
        f"worst phase: stock / ReCast = {result['cost']['ratio']['peak_memory']:.1f}x", fontsize=9, loc="left"
    )
