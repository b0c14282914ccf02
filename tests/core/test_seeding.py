"""Counter-based draws: reproducible, independent of the batch, uniform."""

import numpy as np

from recast_cli.core.seeding import hash64, tie_keys, uniforms

MASK = (1 << 64) - 1


def _mix(state):  # SplitMix64's finaliser in Python integers
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def _hash(*counters):
    state = 0
    for counter in counters:
        state = _mix((state + 0x9E3779B97F4A7C15 + _mix((counter + 0x9E3779B97F4A7C15) & MASK)) & MASK)
    return state


def test_hash_matches_integer_arithmetic():
    assert int(hash64(0)) == _hash(0)
    assert int(hash64(3, 17, 2**40, 1)) == _hash(3, 17, 2**40, 1)
    assert int(hash64(3, 17)) != int(hash64(17, 3))


def test_splitmix_finaliser_matches_the_published_stream():
    # first output of SplitMix64 seeded with 0 (Vigna's reference implementation)
    assert _mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_uniforms_depend_on_the_row_index_alone_not_on_the_batch():
    alone = uniforms(7, 3, np.array([42]), 5, 3)
    batch = uniforms(7, 3, np.array([9, 42, 1]), 5, 3)
    assert np.array_equal(alone[0], batch[1])
    assert not np.array_equal(alone, uniforms(7, 4, np.array([42]), 5, 3))
    assert not np.array_equal(alone, uniforms(8, 3, np.array([42]), 5, 3))


def test_more_rollouts_or_levels_keep_the_earlier_draws():
    assert np.array_equal(uniforms(1, 2, np.array([3]), 8, 4)[:, :4, :2], uniforms(1, 2, np.array([3]), 4, 2))


def test_uniforms_are_uniform():
    draws = uniforms(0, 0, np.arange(1000), 32, 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    expected = draws.size / 20
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001


def test_tie_keys_depend_on_seed_step_and_row():
    keys = tie_keys(7, 3, np.array([9, 42]), 5)
    assert np.array_equal(tie_keys(7, 3, np.array([42]), 5)[0], keys[1]), "and not on the batch"
    assert int(keys[1, 4]) == _hash(7, 3, 42, 4)
    for other in (tie_keys(8, 3, np.array([42]), 5), tie_keys(7, 4, np.array([42]), 5), keys[:1]):
        assert not np.isin(other, keys[1]).any()


def test_tie_keys_differ_inside_a_group_and_favour_no_position():
    keys = tie_keys(0, 5, np.arange(4000), 8)
    assert all(len(set(row)) == 8 for row in keys.tolist())
    winners = np.bincount(keys.argmax(axis=1), minlength=8)
    chi_square = ((winners - 500) ** 2 / 500).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001
