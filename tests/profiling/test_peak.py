"""The measured matrix-product peak: its arithmetic, that it is plausible, and that it leaves the thread count
alone."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from recast_cli.profiling import peak


def test_a_product_of_two_square_matrices_is_two_operations_a_cell_and_term(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # start of the warm-up, then start and end of three products of 4, 2 and 3 seconds
    clock = itertools.chain([0], [10, 14], [20, 22], [30, 33])
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(clock))
    monkeypatch.setitem(peak.SIZES, "cpu", 10)
    assert peak.matmul_peak("cpu", 1, repeats=3) == 2 * 10**3 / 2


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
