"""How good the semantic IDs are: one dictionary of numbers, one picture.

N items, D width, L levels, K codes of a level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recast_cli.tokenizer.collisions import Resolution
from recast_cli.tokenizer.quantize import Quantization, reconstruct

INK, MUTED, ACCENT, PALE = "#1f2933", "#7b8794", "#2563a8", "#c3d3e6"


def perplexity(codes_N: NDArray[np.integer], codebook_size: int) -> float:
    """exp of the entropy of the code histogram: K when codes are used evenly, 1 when one has every item."""
    share_K = np.bincount(codes_N, minlength=codebook_size) / len(codes_N)
    used = share_K[share_K > 0]
    return float(np.exp(-(used * np.log(used)).sum()))


def utilisation(codes_N: NDArray[np.integer], codebook_size: int) -> float:
    """Share of the codebook that at least one item uses."""
    return len(np.unique(codes_N)) / codebook_size


def collisions(codes_NL: NDArray[np.integer]) -> dict[str, Any]:
    """How many items lack a semantic ID of their own.

    Returns:
        `colliding_items`: items minus distinct semantic IDs (0 = every item has its own); `unique_share`:
        items that share theirs with no other, over items; `largest_group`: most items on one semantic ID.
    """
    _, counts = np.unique(codes_NL, axis=0, return_counts=True)
    return {
        "colliding_items": int(len(codes_NL) - len(counts)),
        "unique_share": float((counts == 1).sum() / len(codes_NL)),
        "largest_group": int(counts.max()),
    }


def relative_error(embeddings_ND: NDArray[np.float32], reconstructed_ND: NDArray[np.float32]) -> float:
    """Squared error over the squared distance to the mean embedding: 0 exact, 1 no better than the mean."""
    spread = np.square(embeddings_ND - embeddings_ND.mean(axis=0)).sum(dtype=np.float64)
    return float(np.square(embeddings_ND - reconstructed_ND).sum(dtype=np.float64) / spread)


def mean_cosine(embeddings_ND: NDArray[np.float32], reconstructed_ND: NDArray[np.float32]) -> float:
    """Mean over items of the cosine of embedding and reconstruction; a zero vector counts as cosine 0."""
    norms = np.linalg.norm(embeddings_ND, axis=1) * np.linalg.norm(reconstructed_ND, axis=1)
    dots = (embeddings_ND * reconstructed_ND).sum(axis=1)
    return float(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).mean())


def quality(
    embeddings_ND: NDArray[np.float32], nearest: Quantization, resolved: Resolution
) -> dict[str, Any]:
    """All numbers of quality.json. `before`: nearest codes; `after` and levels: the final ones."""
    before_ND = reconstruct(nearest.codes_NL, nearest.codebooks)
    after_ND = reconstruct(resolved.codes_NL, nearest.codebooks)
    levels = [
        {
            "codebook_size": len(book),
            "utilisation": utilisation(resolved.codes_NL[:, level], len(book)),
            "perplexity": perplexity(resolved.codes_NL[:, level], len(book)),
            "perplexity_before": perplexity(nearest.codes_NL[:, level], len(book)),
            "relative_error": nearest.errors[level],
            "moved_items": resolved.moved_L[level],
        }
        for level, book in enumerate(nearest.codebooks)
    ]
    return {
        "num_items": len(embeddings_ND),
        "num_dimensions": embeddings_ND.shape[1],
        "before": {
            **collisions(nearest.codes_NL),
            "relative_error": relative_error(embeddings_ND, before_ND),
            "mean_cosine": mean_cosine(embeddings_ND, before_ND),
        },
        "after": {
            **collisions(resolved.codes_NL),
            "relative_error": relative_error(embeddings_ND, after_ND),
            "mean_cosine": mean_cosine(embeddings_ND, after_ND),
        },
        "levels": levels,
    }


def draw(path: Path, facts: Mapping[str, Any], codes_NL: NDArray[np.integer]) -> None:
    """Draw quality.png: how full each code is, level by level, and what is left over after each level.

    Args:
        facts: From `quality`.
        codes_NL: The final codes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = facts["levels"]
    num_levels = len(levels)
    figure = Figure(figsize=(9, 1.9 + 1.35 * num_levels), layout="constrained")  # no pyplot: no global state
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(num_levels, 2, width_ratios=(2.4, 1))
    for level, level_facts in enumerate(levels):
        axes = figure.add_subplot(grid[level, 0])
        _draw_usage(axes, level, level_facts, codes_NL[:, level])
    axes.set_xlabel("codes, most used first", color=MUTED, fontsize=9)
    _draw_errors(
        figure.add_subplot(grid[:, 1]), [level_facts["relative_error"] for level_facts in levels], facts
    )
    before, after = facts["before"], facts["after"]
    figure.suptitle(
        f"{facts['num_items']:,} items: {before['colliding_items']} without a semantic ID of their own, "
        f"{after['colliding_items']} once collisions are resolved",
        color=INK,
        fontsize=11,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=MUTED, labelsize=8, length=2)


def _draw_usage(axes: Any, level: int, level_facts: Mapping[str, Any], codes_N: NDArray[np.integer]) -> None:
    size = level_facts["codebook_size"]
    counts_K = np.sort(np.bincount(codes_N, minlength=size))[::-1]
    axes.fill_between(
        np.arange(size + 1) - 0.5, np.append(counts_K, counts_K[-1]), step="post", color=ACCENT, lw=0
    )
    axes.axhline(len(codes_N) / size, color=INK, lw=0.8, ls=(0, (4, 3)))
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(0, None)
    axes.set_ylabel("items", color=MUTED, fontsize=9)
    axes.set_title(
        f"level {level + 1}: {level_facts['utilisation']:.0%} of {size} codes used, "
        f"perplexity {level_facts['perplexity']:.1f}",
        loc="left",
        fontsize=9,
        color=INK,
    )
    if level == 0:
        axes.annotate(
            "even use",
            (size - 0.5, len(codes_N) / size),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK,
        )
    _tidy(axes)


def _draw_errors(axes: Any, errors_L: Sequence[float], facts: Mapping[str, Any]) -> None:
    final = facts["after"]["relative_error"]
    labels = [f"level {level + 1}" for level in range(len(errors_L))] + ["collisions\nresolved"]
    values = [*errors_L, final]
    bars = axes.bar(labels, values, color=[PALE] * len(errors_L) + [ACCENT], width=0.7)
    axes.bar_label(bars, [f"{value:.0%}" for value in values], fontsize=8, color=INK, padding=2)
    axes.set_ylim(0, max(*values, 0.01) * 1.12)  # with a code for each item nothing is left
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title(
        f"variance left after each level\ncosine to the embedding {facts['after']['mean_cosine']:.3f}",
        loc="left",
        fontsize=9,
        color=INK,
    )
    _tidy(axes)
