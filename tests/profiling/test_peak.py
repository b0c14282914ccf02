"""The measured matrix-product peak: plausible, and it leaves the thread count alone."""

from __future__ import annotations

import time

import torch

from recast_cli.profiling import peak


def test_a_peak_is_at_least_what_a_plain_product_reaches() -> None:
    before = torch.get_num_threads()
    found = peak.matmul_peak("cpu", 1, repeats=2)
    assert torch.get_num_threads() == before
    left, right = torch.randn(512, 512), torch.randn(512, 512)
    left @ right
    start = time.process_time()
    for _ in range(4):
        left @ right
    slow = 4 * 2 * 512**3 / (time.process_time() - start)
    assert 0.2 * slow < found < 1e14  # a factor of 5: other processes share the cores
