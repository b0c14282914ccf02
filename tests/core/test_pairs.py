"""Repair, contrast and drop in one call, against hand-worked groups and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recast_cli.core.pairs import choose_pairs
from recast_cli.core.seeding import tie_keys

TARGET, SIBLING, COUSIN, STRANGER = (1, 1, 1), (1, 1, 2), (1, 2, 2), (3, 3, 3)


def everything(num_groups: int, width: int) -> np.ndarray:
    return np.ones((num_groups, width), dtype=bool)


def test_three_groups_by_hand() -> None:
    codes_BGL = np.array(
        [
            [COUSIN, SIBLING, STRANGER],  # u = .01, .1, 0: the stranger becomes the anchor
            [STRANGER, TARGET, COUSIN],  # a natural hit; the cousin is the hardest miss
            [TARGET, TARGET, TARGET],  # no negative
        ]
    )
    before = codes_BGL.copy()
    found = choose_pairs(
        codes_BGL,
        everything(3, 3),
        [[TARGET]] * 3,
        np.array([4, 5, 6]),
        seed=0,
        step=0,
        w_positive=2.0,
        w_negative=0.25,
    )
    assert found.kept_B2[:2].tolist() == [[2, 1], [1, 2]]
    assert found.repaired_B.tolist() == [True, False, False]
    assert found.codes_B2L[:2].tolist() == [[[*TARGET], [*SIBLING]], [[*TARGET], [*COUSIN]]]
    assert found.advantages_B2.tolist() == [[2.0, -0.25], [2.0, -0.25], [0.0, 0.0]]
    assert found.trainable_B.tolist() == [True, True, False]
    assert found.signal["all_zero"] == found.signal["single_hit"] == found.signal["multi_hit"] == 1 / 3
    assert found.signal["all_zero_after_repair"] == 0.0
    assert (codes_BGL == before).all()


def test_a_rollout_without_a_semantic_id_is_replaced_first_and_negative_last() -> None:
    valid_BG = np.tile([True, False, False, True], (20, 1))
    valid_BG[10:] = False
    codes_BGL = np.where(valid_BG[..., None], np.array(STRANGER), -1)
    found = choose_pairs(codes_BGL, valid_BG, [[TARGET]] * 20, np.arange(20), seed=0, step=0)
    assert set(found.kept_B2[:10, 0].tolist()) == {1, 2}
    assert found.codes_B2L[:10].tolist() == [[[*TARGET], [*STRANGER]]] * 10
    assert found.codes_B2L[10:].tolist() == [[[*TARGET], [-1, -1, -1]]] * 10  # nothing better was there
    assert found.trainable_B.all()


def test_every_target_can_be_the_anchor_and_counts_as_a_hit() -> None:
    other = (2, 2, 2)
    codes_BGL = np.array([[STRANGER, STRANGER]] * 50 + [[other, STRANGER]])
    targets = [[TARGET, other]] * 50 + [[TARGET, other, (4, 4, 4)]]
    found = choose_pairs(codes_BGL, everything(51, 2), targets, np.arange(51), seed=0, step=0)
    assert {tuple(codes) for codes in found.codes_B2L[:50, 0].tolist()} == {TARGET, other}
    assert found.codes_B2L[50].tolist() == [[*other], [*STRANGER]]


@pytest.mark.parametrize("targets", [[[TARGET], []], [[TARGET], [(1, 1)]]])
def test_a_prompt_needs_targets_of_as_many_codes(targets: list[list[tuple[int, ...]]]) -> None:
    codes_BGL = np.zeros((2, 2, 3), dtype=np.int64)
    with pytest.raises(ValueError, match="needed at least one, of 3 codes"):
        choose_pairs(codes_BGL, everything(2, 2), targets, np.arange(2), seed=0, step=0)


def reference(
    codes_GL: list[list[int]], present: list[int], targets: list[tuple[int, ...]], keys_G: list[int]
) -> tuple[list[int], bool, bool]:
    """Places of i+ and i-, whether the group was repaired, and whether it trains: the definition in loops."""
    num_levels = len(targets[0])

    def shared(codes: list[int], target: tuple[int, ...]) -> int:
        return next((i for i in range(num_levels) if codes[i] != target[i]), num_levels)

    # u of the nearest target: 10^(m - L) for m leading codes, 0 for none (method.md, section 2)
    near = {i: max(shared(codes_GL[i], target) for target in targets) for i in present}
    hits = [i for i in present if near[i] == num_levels]
    best = max(hits or present, key=lambda i: (1 if hits else -near[i], keys_G[i]))
    misses = [i for i in present if near[i] < num_levels and i != best]
    worst = max(misses, key=lambda i: (near[i], keys_G[i]), default=len(codes_GL) - 1)
    return [best, worst], not hits, bool(misses)


@given(
    seed=st.integers(0, 2**32),
    width=st.integers(2, 9),
    num_levels=st.integers(1, 5),
    num_targets=st.integers(1, 3),
)
def test_plain_loops_choose_alike(seed: int, width: int, num_levels: int, num_targets: int) -> None:
    """Any L, up to three targets a prompt, and groups of which rollouts are missing."""
    rng = np.random.default_rng(seed)
    codes_BGL = rng.integers(0, 2, (7, width, num_levels))
    counts = rng.integers(1, num_targets + 1, 7)
    targets = [[tuple(codes) for codes in rng.integers(0, 2, (n, num_levels)).tolist()] for n in counts]
    present_BG = rng.random((7, width)) < 0.8
    present_BG[:, 0] = True
    index_B = np.arange(20, 27)
    found = choose_pairs(
        codes_BGL, everything(7, width), targets, index_B, seed=3, step=5, present_BG=present_BG
    )
    keys_BG = tie_keys(3, 5, index_B, width)
    for b in range(7):
        present = np.flatnonzero(present_BG[b]).tolist()
        places, repaired, trains = reference(codes_BGL[b].tolist(), present, targets[b], keys_BG[b].tolist())
        assert (bool(found.repaired_B[b]), bool(found.trainable_B[b])) == (repaired, trains)
        assert found.advantages_B2[b].tolist() == ([1.0, -1.0] if trains else [0.0, 0.0])
        if not trains:
            continue
        assert found.kept_B2[b].tolist() == places
        positive, negative = (tuple(codes) for codes in found.codes_B2L[b].tolist())
        assert positive in targets[b] and negative not in targets[b]
        assert negative == tuple(codes_BGL[b, places[1]].tolist())


def test_a_rollout_that_is_not_there_is_no_negative() -> None:
    """Distinct rollouts of a small catalogue: one hit, and nobody else to be kept beside it."""
    codes = np.array([[[0, 1, 2], [-1, -1, -1], [-1, -1, -1]]])
    present = np.array([[True, False, False]])
    found = choose_pairs(codes, present, [[(0, 1, 2)]], np.array([0]), seed=0, step=1, present_BG=present)
    assert not found.trainable_B[0] and not found.advantages_B2.any()
    assert found.signal["invalid"] == 0
