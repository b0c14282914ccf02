"""Residual k-means: item embeddings to L codes.

N items, D width, L levels, K codes of a level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recast_cli.errors import DataError, RecipeError

MAX_LEVELS = 26  # levels are spelled a..z


@dataclass(frozen=True)
class Quantization:
    """Codes of every item and the codebooks they index.

    Attributes:
        codes_NL: int64, the nearest code of each level's residual.
        codebooks: per level float32 (K, D).
        errors: per level the squared reconstruction error left after it, as a share of the embeddings'
            variance (1 = no better than one mean vector, 0 = exact).
    """

    codes_NL: NDArray[np.int64]
    codebooks: tuple[NDArray[np.float32], ...]
    errors: tuple[float, ...]


def parse_codebook_sizes(text: str | int, num_levels: int) -> tuple[int, ...]:
    """Codebook size per level from `64` (all levels) or `64,64,32`.

    Raises:
        RecipeError: not integers >= 2, or not one size per level.
    """
    if not 1 <= num_levels <= MAX_LEVELS:
        raise RecipeError(f"levels is {num_levels}, needed 1 to {MAX_LEVELS}", "3 is a good start")
    try:
        sizes = [int(part) for part in str(text).split(",")]
    except ValueError as exc:
        raise RecipeError(
            f"codebook size is {text!r}, needed an integer or a comma list", "for example 64 or 64,64,32"
        ) from exc
    if len(sizes) == 1:
        sizes = sizes * num_levels
    if len(sizes) != num_levels:
        raise RecipeError(
            f"{len(sizes)} codebook sizes for {num_levels} levels", "give one size, or one per level"
        )
    if min(sizes) < 2:
        raise RecipeError(f"codebook size is {min(sizes)}, needed at least 2", "for example 64")
    return tuple(sizes)


def check_capacity(num_items: int, codebook_sizes: Sequence[int]) -> None:
    """Refuse codebooks that cannot give every item its own semantic ID, or that k-means cannot fill.

    Raises:
        RecipeError: the product of the sizes is below `num_items`, or a size is above it.
    """
    spelled = " x ".join(map(str, codebook_sizes))
    if math.prod(codebook_sizes) < num_items:
        raise RecipeError(
            f"codebooks of {spelled} make {math.prod(codebook_sizes)} semantic IDs for {num_items} items",
            "raise --codebook-size or --levels",
        )
    if max(codebook_sizes) > num_items:
        raise RecipeError(
            f"a codebook has {max(codebook_sizes)} codes, but there are {num_items} items",
            "lower --codebook-size: k-means needs an item for each code",
        )


def check_embeddings(embeddings_ND: NDArray[np.floating]) -> None:
    """Refuse embeddings that k-means would turn into silent nonsense.

    Raises:
        DataError: empty, not finite (names the first item row), or all rows equal.
    """
    if embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
        raise DataError(
            f"embeddings have shape {embeddings_ND.shape}, needed (items, width)", "check items.parquet"
        )
    bad = np.flatnonzero(~np.isfinite(embeddings_ND).all(axis=1))
    if len(bad):
        raise DataError(
            f"embeddings of {len(bad)} items hold NaN or infinity, first item row {bad[0]}",
            "check the text of these items",
        )
    if len(embeddings_ND) > 1 and bool((embeddings_ND == embeddings_ND[0]).all()):
        raise DataError(
            f"the embeddings of all {len(embeddings_ND)} items are equal", "give the items texts that differ"
        )


@contextmanager
def _faiss_threads() -> Iterator[None]:
    """Give faiss as many threads as torch has.

    Both wheels bring their own OpenMP runtime, so faiss would otherwise take every core whatever torch was
    told.
    """
    import faiss
    import torch

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def residual_kmeans(
    embeddings_ND: NDArray[np.float32], codebook_sizes: Sequence[int], *, seed: int, num_iterations: int = 25
) -> Quantization:
    """Quantise level by level: k-means on what the levels before have left over.

    Residual quantisation as in TIGER (arXiv 2305.05065, section 3.1) with k-means codebooks in place of a
    learned autoencoder. faiss trains on at most 256 items per code, drawn by the seed, which bounds time on
    large catalogues.

    Args:
        embeddings_ND: finite, not constant.
        codebook_sizes: K of each level, each at most N.
        seed: level l uses seed + l.
        num_iterations: k-means rounds per level.

    Raises:
        DataError: unusable embeddings (see `check_embeddings`).
        RecipeError: too few codes for the items, or more codes than items.
    """
    import faiss

    check_embeddings(embeddings_ND)
    check_capacity(len(embeddings_ND), codebook_sizes)
    residual_ND = np.array(embeddings_ND, dtype=np.float32, order="C")
    total = float(np.square(residual_ND - residual_ND.mean(axis=0)).sum(dtype=np.float64))
    codes, codebooks, errors = [], [], []
    with _faiss_threads():
        for level, size in enumerate(codebook_sizes):
            kmeans: Any = faiss.Kmeans(
                residual_ND.shape[1], size, niter=num_iterations, seed=seed + level, min_points_per_centroid=1
            )
            kmeans.train(residual_ND)
            nearest_N = kmeans.index.search(residual_ND, 1)[1][:, 0]
            residual_ND -= kmeans.centroids[nearest_N]
            codes.append(nearest_N)
            codebooks.append(kmeans.centroids.copy())
            errors.append(float(np.square(residual_ND).sum(dtype=np.float64)) / total)
    return Quantization(np.stack(codes, axis=1).astype(np.int64), tuple(codebooks), tuple(errors))


def reconstruct(
    codes_NL: NDArray[np.integer], codebooks: Sequence[NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Sum of the chosen codebook vectors, (N, D)."""
    return np.sum(
        [book[codes_NL[:, level]] for level, book in enumerate(codebooks)], axis=0, dtype=np.float32
    )
