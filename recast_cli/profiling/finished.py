"""Phases of finished runs, from what verl's trainer logged of each step: `recast profile --from-run`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recast_cli.artifacts import load_manifest, read_json_lines
from recast_cli.errors import ArtifactError

# Timers of verl's trainer -> what they are called in a table; all others are part of `other`.
PHASES = {
    "gen": "rollouts",
    "recast_hook": "selection (hook)",
    "old_log_prob": "old log-probs",
    "ref": "reference log-probs",
    "adv": "advantages",
    "update_actor": "actor update",
    "update_weights": "new weights",
    "save_checkpoint": "checkpoint",
}
TOKENS = "perf/total_num_tokens"  # that the actor reads
COLOURS = ("#9aa5b1", "#d1495b", "#2a7fb8", "#5b8fb0", "#e5e8eb", "#e8a33d", "#6b7682", "#b7c7b0", "#f4f5f6")


def read_run(folder: Path) -> dict[str, Any]:
    """Seconds of each phase of a step: medians over the steps but the first, which compiles and connects.

    Raises:
        ArtifactError: no finished run, or one with fewer than two steps of RL.
    """
    manifest = load_manifest(folder, "run")
    log = folder / "metrics.jsonl"
    steps = [line["data"] for line in read_json_lines(log)] if log.exists() else []
    timed = [step for step in steps if "timing_s/step" in step and "timing_s/update_actor" in step][1:]
    if not timed:
        raise ArtifactError(
            f"{folder} holds {len(steps)} records of steps, needed two steps of RL at least: the first is "
            "left out",
            "profile a longer run",
        )
    each = {name: [step.get(f"timing_s/{name}", 0.0) for step in timed] for name in PHASES}
    total = [step["timing_s/step"] for step in timed]
    other = [whole - sum(found[n] for found in each.values()) for n, whole in enumerate(total)]
    rl = manifest["recipe"]["rl"]
    return {
        "run": str(folder),
        "method": manifest["recipe"]["method"]["name"],
        "share_prompt": rl.get("share_prompt", False),
        "prompts_per_step": rl["prompts_per_step"],
        "group_size": rl["group_size"],
        "timed_steps": len(timed),
        "seconds": {name: statistics.median(found) for name, found in (each | {"other": other}).items()},
        "step_s": statistics.median(total),
        "step_s_range": [min(total), max(total)],
        "actor_tokens": statistics.median(step.get(TOKENS, 0) for step in timed),
    }


def table(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: a row for each phase, and the first run's step over each."""
    headers = ["median of a step, s", *(Path(run["run"]).name for run in runs)]
    cells = [
        [text, *(f"{run['seconds'][name]:.3f} ({run['seconds'][name] / run['step_s']:.0%})" for run in runs)]
        for name, text in (PHASES | {"other": "other"}).items()
    ]
    low_high = (run["step_s_range"] for run in runs)
    ranges = [f"{run['step_s']:.3f} ({a:.3f}-{b:.3f})" for run, (a, b) in zip(runs, low_high, strict=True)]
    cells.append(["step (range)", *ranges])
    cells.append(["tokens of the actor", *(f"{run['actor_tokens']:,.0f}" for run in runs)])
    cells.append(["method", *(run["method"] + ", shared" * run["share_prompt"] for run in runs)])
    sizes = [f"{run['prompts_per_step']} x {run['group_size']}" for run in runs]
    cells.append(["prompts x rollouts", *sizes])
    cells.append(["first / this", *(f"{runs[0]['step_s'] / run['step_s']:.2f}x" for run in runs)])
    return headers, cells


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: a bar for each run, its phases one after another."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.6 * len(runs)), layout="constrained", dpi=120)
    names = PHASES | {"other": "other"}
    for place, run in enumerate(runs):
        begin = 0.0
        for colour, (name, text) in zip(COLOURS, names.items(), strict=True):
            width = max(run["seconds"][name], 0.0)
            axes.barh(place, width, left=begin, color=colour, label=text if place == 0 else None)
            begin += width
        axes.text(begin, place, f"  {run['step_s']:.2f} s", va="center", fontsize=9)
    axes.set_yticks(range(len(runs)), [f"{Path(run['run']).name}\n{run['method']}" for run in runs])
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step (medians)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)
