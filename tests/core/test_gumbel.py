"""Counter-based Gumbel noise and the top-down conditional against their definitions."""

from __future__ import annotations

from math import e, exp, inf, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gumbel_r, kstest

from recast_cli.core.gumbel import as_signed, extend_hash, gumbel, with_maximum
from recast_cli.core.seeding import hash64

COUNTER = st.integers(-(2**63), 2**63 - 1)


@given(COUNTER, COUNTER, st.lists(COUNTER, min_size=1, max_size=4))
def test_hash_has_the_bits_of_the_numpy_one(seed: int, level: int, codes: list[int]) -> None:
    keys = as_signed(np.atleast_1d(hash64(seed)))
    found = extend_hash(keys[:, None], level, torch.tensor(codes))
    assert np.array_equal(found.numpy().view(np.uint64)[0], hash64(seed, level, np.array(codes)))


def test_noise_is_gumbel_and_finite_at_both_ends() -> None:
    draws = gumbel(extend_hash(as_signed(hash64(5)), torch.arange(20_000)))
    assert kstest(draws.numpy(), gumbel_r.cdf).pvalue > 0.001
    ends = gumbel(torch.tensor([0, -1]))  # every bit 0, every bit 1
    # the uniforms next to 0 and 1: 2^-53, and 1 - 2^-53 whose -log is 2^-53
    assert ends.tolist() == pytest.approx([-log(53 * log(2)), 53 * log(2)], rel=1e-12)


def test_with_maximum_by_hand() -> None:
    # Z = max = 0, T = 2: the largest becomes 2, the next -log(exp(-2) - exp(0) + exp(1)), none stays none
    found = with_maximum(torch.tensor([[-1.0, 0.0, -inf]]).double(), torch.tensor([2.0]).double())
    assert found[0].tolist() == pytest.approx([-log(exp(-2) - 1 + e), 2, -inf], rel=1e-12)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=5), st.floats(-20, 20))
def test_with_maximum_keeps_the_order_and_sets_the_maximum(values: list[float], maximum: float) -> None:
    rows = torch.tensor([values], dtype=torch.float64)
    found = with_maximum(rows, torch.tensor([maximum], dtype=torch.float64))[0]
    assert float(found.max()) == pytest.approx(maximum, abs=1e-9)
    assert bool((found[rows[0].argsort()].diff() >= 0).all())


def test_with_maximum_of_values_far_apart_is_finite() -> None:
    rows = torch.tensor([[-5000.0, 3.0, -800.0], [700.0, 699.0, -9000.0]]).double()
    found = with_maximum(rows, torch.tensor([-4.0, 900.0]).double())
    assert bool(found.isfinite().all())
    # far below Z, exp(-G) outweighs the rest: the value is left alone
    assert found[0, 0].item() == pytest.approx(-5000, abs=1e-9)
    # 900 against a Z of 700: the largest becomes 900, the next -log(exp(-900) - exp(-700) + exp(-699))
    assert found[1, 1].item() == pytest.approx(699 - log(1 - exp(-1)), abs=1e-9)
