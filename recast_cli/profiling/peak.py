"""The fastest this machine multiplies matrices: what a utilisation is measured against."""

from __future__ import annotations

import time

import torch

SIZES = {"cpu": 2048, "cuda": 8192}


def matmul_peak(device: str, threads: int, *, repeats: int = 8) -> float:
    """Operations per second of a large square matrix product: the best of `repeats`, after one warm-up.

    float32 on the CPU, bfloat16 on a GPU, as the actor computes there.
    """
    size = SIZES[device]
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        best = float("inf")
        for repeat in range(repeats + 1):
            start = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 2.0 * size**3 / best
