"""Residual k-means, beside bare faiss on the same data.

    python benchmarks/kmeans.py

100,000 random embeddings of width 384 in 500 clusters, 3 levels of 256 codes, 25 rounds, two threads.
`residual_kmeans` checks its input and measures what each level leaves over; the rest is faiss. Wall-clock
seconds; arms take turns. The codes must be the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import record
import torch
from timing import compared, in_turns, show, wall

from recast_cli.tokenizer.quantize import residual_kmeans

RESULT = Path(__file__).parent / "results" / "kmeans.json"
NUM_ITEMS, WIDTH, CLUSTERS = 100_000, 384, 500
SIZES, ROUNDS, SEED = (256, 256, 256), 25, 0


def make_embeddings(num_items: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS, WIDTH), dtype=np.float32)
    noise = rng.standard_normal((num_items, WIDTH), dtype=np.float32)
    return centres[rng.integers(0, CLUSTERS, num_items)] + noise


def bare_faiss(embeddings_ND: np.ndarray) -> np.ndarray:
    """Codes (N, L) of three k-means, each on what the ones before leave over."""
    residual_ND, codes = embeddings_ND.copy(), []
    for level, size in enumerate(SIZES):
        kmeans: Any = faiss.Kmeans(WIDTH, size, niter=ROUNDS, seed=SEED + level)
        kmeans.train(residual_ND)
        nearest_N = kmeans.index.search(residual_ND, 1)[1][:, 0]
        residual_ND -= kmeans.centroids[nearest_N]
        codes.append(nearest_N)
    return np.stack(codes, axis=1)


def measure(repeats: int, num_items: int = NUM_ITEMS) -> dict[str, list[float]]:
    """Seconds of both arms."""
    embeddings_ND = make_embeddings(num_items)
    faiss.omp_set_num_threads(torch.get_num_threads())
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found["recast"] = residual_kmeans(embeddings_ND, SIZES, seed=SEED, num_iterations=ROUNDS).codes_NL

    def bare() -> None:
        found["faiss"] = bare_faiss(embeddings_ND)

    seconds = in_turns({"recast": ours, "faiss": bare}, repeats, wall)
    assert np.array_equal(found["recast"], found["faiss"])
    return seconds


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    start = record.before()
    rows: dict[str, Any] = compared(measure(args.repeats))
    show(rows)
    record.write(args.result, start, {"items": NUM_ITEMS, "width": WIDTH, "arms": rows})


if __name__ == "__main__":
    main()
