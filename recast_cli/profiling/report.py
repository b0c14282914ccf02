"""The profile as a table, for a terminal or a page."""

from __future__ import annotations

from typing import Any

from recast_cli.profiling.plot import MIB, TITLES


def table(result: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headers and cells: seconds, utilisation, tokens, operations and memory of each phase."""
    ratio, inside = result["cost"]["ratio"], result["cost"]["worker_ratio"]
    stock, recast = result["arms"]["stock"], result["arms"]["recast"]
    both = (stock, recast)
    rows: list[list[Any]] = []
    for phase in TITLES:
        if phase in recast["seconds"]:
            cells = [_seconds(cost["seconds"].get(phase)) for cost in both]
            rows.append([f"{words(phase)}, s", *cells, _times(ratio.get(phase))])
    for phase in inside:
        cells = [_seconds(cost["worker_seconds"][phase]) for cost in both]
        rows.append([f"{words(phase)}, s in the worker", *cells, _times(inside[phase])])
    for phase in stock["mfu"]:
        rows.append([f"{words(phase)}, MFU", *(f"{cost['mfu'][phase]:.1%}" for cost in both), None])
    for name, unit, scale in (("tokens", "tokens", 1.0), ("flops", "GFLOP", 1e9)):
        cells = [f"{sum(cost[name].values()) / scale:,.0f}" for cost in both]
        rows.append([f"all phases, {unit}", *cells, _times(ratio[name])])
    for phase in stock["peak_bytes"]:
        peaks = [(cost["peak_bytes"][phase] + cost["resident_bytes"][phase]) / MIB for cost in both]
        rows.append([f"{words(phase)}, peak MiB", *(f"{peak:,.0f}" for peak in peaks), None])
    rows.append(["worst phase, peak MiB", None, None, _times(ratio["peak_memory"])])
    return ["", "stock GRPO", "ReCast", "stock/ReCast"], rows


def lines(result: dict[str, Any]) -> list[str]:
    """What was measured, and on what."""
    setting, stock, kept = result["setting"], result["arms"]["stock"], result["cost"]["kept"]
    total = stock["seconds"]["actor_total"]["count"]
    return [
        f"{setting['prompts']} prompts of {setting['prompt_tokens_mean']:.0f} tokens (at most "
        f"{setting['prompt_tokens_max']}) x {setting['group_size']} rollouts, {setting['parameters']:,} "
        f"parameters, {setting['device']} ({setting['cpu']}), {setting['threads']} threads",
        f"kept {kept['samples']}/{kept['rollouts']} rollouts, {kept['trainable_groups']} groups trainable; "
        f"{len(stock['repeats'])} processes and {total} timed steps an arm; "
        f"matrix-product peak {setting['peak_flops'] / 1e9:,.0f} GFLOP/s; RL rows: {setting['rl_rows']}",
    ]


def words(phase: str) -> str:
    """A phase's name in a table."""
    return phase.replace("_", " ")


def _seconds(value: dict[str, float] | None) -> str | None:
    return f"{value['median']:.3f} ({value['min']:.3f}-{value['max']:.3f})" if value else None


def _times(value: float | None) -> str | None:
    return f"{value:.2f}x" if value is not None else None
