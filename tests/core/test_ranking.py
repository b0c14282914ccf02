"""Ranking metrics against arithmetic done by hand and against plain loops."""

from itertools import combinations
from math import comb, log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recast_cli.core import ranking
from recast_cli.core.ranking import Targets

NAN = float("nan")


def one(ranked: list[int], target: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hits and target count of one user."""
    targets = Targets.from_lists([target])
    return ranking.hits(np.array([ranked]), targets), targets.sizes_U


# --- points, by hand ---


def test_one_target_at_rank_two() -> None:
    hits, sizes = one([7, 3, 5], [3])
    assert hits.tolist() == [[False, True, False]]
    assert ranking.ndcg(hits, sizes, 3)[0] == pytest.approx(1 / log2(3))
    assert ranking.mrr(hits, sizes, 3)[0] == 1 / 2
    assert ranking.hit_rate(hits, sizes, 1)[0] == 0
    assert ranking.hit_rate(hits, sizes, 2)[0] == 1


def test_several_targets() -> None:
    # Targets 3, 5, 9; the list has 5 at rank 1 and 3 at rank 4.
    hits, sizes = one([5, 1, 2, 3], [9, 3, 5])
    dcg = 1 + 1 / log2(5)
    assert ranking.ndcg(hits, sizes, 4)[0] == pytest.approx(dcg / (1 + 1 / log2(3) + 1 / log2(4)))
    assert ranking.ndcg(hits, sizes, 2)[0] == pytest.approx(
        1 / (1 + 1 / log2(3))
    )  # ideal of min(3, 2) targets
    assert ranking.recall(hits, sizes, 4)[0] == 2 / 3
    assert ranking.recall(hits, sizes, 1)[0] == 1 / 3  # denominator |T|, not min(|T|, k)
    assert ranking.mrr(hits, sizes, 4)[0] == 1


def test_repeated_item_hits_once() -> None:
    hits, sizes = one([4, 8, 8, 8], [8])
    assert hits.tolist() == [[False, True, False, False]]
    assert ranking.recall(hits, sizes, 4)[0] == 1
    assert ranking.ndcg(hits, sizes, 4)[0] == pytest.approx(1 / log2(3))


def test_repeated_target_counts_once() -> None:
    hits, sizes = one([8, 1], [8, 8])
    assert sizes.tolist() == [1]
    assert ranking.recall(hits, sizes, 1)[0] == 1


def test_places_without_an_item_keep_their_rank_and_never_hit() -> None:
    hits, sizes = one([-1, -1, 2], [2])
    assert ranking.mrr(hits, sizes, 3)[0] == pytest.approx(1 / 3)
    # -1 of user 1 must not be read as the last item of user 0, whatever the encoding of (user, item).
    hits = ranking.hits(np.array([[2], [-1]]), Targets.from_lists([[2], [1]]))
    assert hits.tolist() == [[True], [False]]


def test_empty_list_scores_zero_and_empty_truth_is_undefined() -> None:
    targets = Targets.from_lists([[3], []])
    values = ranking.per_user(np.array([[-1, -1], [3, 4]]), targets, [1, 2])
    assert sorted(values) == ["hr@1", "hr@2", "mrr@1", "mrr@2", "ndcg@1", "ndcg@2", "recall@1", "recall@2"]
    for value_U in values.values():
        np.testing.assert_array_equal(value_U, [0.0, NAN])
    assert ranking.bootstrap_ci(values["hr@2"], seed=0) == ranking.Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize("k", [0, 4])
def test_cutoff_outside_the_list_is_an_error(k: int) -> None:
    hits, sizes = one([7, 3, 5], [3])
    for metric in (ranking.hit_rate, ranking.recall, ranking.ndcg, ranking.mrr, ranking.pass_at_k):
        with pytest.raises(ValueError, match=rf"cutoff {k} outside 1\.\.3"):
            metric(hits, sizes, k)
    with pytest.raises(ValueError, match="cutoff"):
        ranking.coverage(np.array([[7, 3, 5]]), 9, k)


def test_wrong_shapes_and_rows_are_errors() -> None:
    with pytest.raises(ValueError, match=r"needed \(2, K\)"):
        ranking.hits(np.array([[1, 2]]), Targets.from_lists([[1], [2]]))
    with pytest.raises(ValueError, match="item row -1"):
        Targets.from_lists([[-1]])
    with pytest.raises(ValueError, match="item row 5"):
        ranking.coverage(np.array([[5]]), 5, 1)


def test_pass_over_beams_counts_beams_not_distinct_items() -> None:
    # Beams name items 4, 4, 8. Distinct items: 4, 8. The hit is the third beam and the second item.
    sizes = np.array([1])
    beam_hits = np.array([[False, False, True]])
    item_hits = ranking.hits(np.array([[4, 8, -1]]), Targets.from_lists([[8]]))
    assert ranking.pass_at_k(beam_hits, sizes, 2)[0] == 0
    assert ranking.pass_at_k(beam_hits, sizes, 3)[0] == 1
    assert ranking.hit_rate(item_hits, sizes, 2)[0] == 1


def test_unbiased_pass_at_k() -> None:
    # 5 samples, 2 hits, k = 2: the misses leave C(3, 2) = 3 of C(5, 2) = 10 pairs without a hit.
    assert ranking.pass_at_k_unbiased(5, np.array([2]), 2)[0] == pytest.approx(1 - 3 / 10)
    assert ranking.pass_at_k_unbiased(5, np.array([0, 4, 5]), 2).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="k is 6"):
        ranking.pass_at_k_unbiased(5, np.array([1]), 6)
    with pytest.raises(ValueError, match=r"needed 0\.\.5"):
        ranking.pass_at_k_unbiased(5, np.array([6]), 2)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_unbiased_pass_at_k_counts_subsets(case: tuple[int, int, int]) -> None:
    n, c, k = case
    subsets = [any(sample < c for sample in subset) for subset in combinations(range(n), k)]
    assert ranking.pass_at_k_unbiased(n, np.array([c]), k)[0] == pytest.approx(np.mean(subsets))
    assert len(subsets) == comb(n, k)


def test_coverage_gini_novelty_by_hand() -> None:
    ranked = np.array([[0, 1], [0, -1]])  # item 0 twice, item 1 once, items 2 and 3 never
    assert ranking.coverage(ranked, 4, 2) == 2 / 4
    assert ranking.coverage(ranked, 4, 1) == 1 / 4
    # Ascending exposure 0, 0, 1, 2 with weights -3, -1, 1, 3: (1 + 6) / (4 * 3).
    assert ranking.gini(ranked, 4, 2) == pytest.approx(7 / 12)
    assert ranking.gini(np.array([[2]]), 4, 1) == pytest.approx(3 / 4)
    assert ranking.gini(np.array([[0], [1], [2], [3]]), 4, 1) == 0
    # Events 3, 1, 0, 0 -> p = (4, 2, 1, 1) / 8: item 0 has 1 bit, item 1 has 2 bits.
    assert ranking.novelty(ranked, np.array([3, 1, 0, 0]), 2) == pytest.approx((1 + 1 + 2) / 3)
    assert ranking.novelty(ranked, np.array([5, 5, 5, 5]), 2) == pytest.approx(log2(4))


def test_nothing_listed() -> None:
    nothing = np.array([[-1, -1]])
    assert ranking.coverage(nothing, 4, 2) == 0
    assert np.isnan(ranking.gini(nothing, 4, 2))
    assert np.isnan(ranking.novelty(nothing, np.ones(4, dtype=int), 2))
    assert ranking.duplicate_share(nothing, 2) == 0
    assert ranking.invalid_share(np.zeros((1, 2), dtype=bool), np.zeros((1, 2), dtype=bool)) == 0


def test_invalid_and_duplicate_shares() -> None:
    valid = np.array([[True, False, False], [True, True, False]])
    given_answers = np.array([[True, True, True], [True, True, False]])
    assert ranking.invalid_share(valid, given_answers) == 2 / 5
    assert ranking.invalid_share(valid) == 3 / 6
    assert ranking.duplicate_share(np.array([[1, 1, 2], [3, -1, -1]]), 3) == 1 / 4
    assert ranking.duplicate_share(np.array([[1, 2, 1], [3, -1, -1]]), 2) == 0


# --- against plain loops ---


def slow_metrics(ranked: list[int], target: set[int], k: int) -> dict[str, float]:
    """The definitions, one user at a time."""
    if not target:
        return dict.fromkeys(("hr", "recall", "ndcg", "mrr"), NAN)
    found, dcg, first = set(), 0.0, 0.0
    for rank, item in enumerate(ranked[:k], start=1):
        if item in target and item not in found:
            found.add(item)
            dcg += 1 / log2(rank + 1)
            first = first or 1 / rank
    ideal = sum(1 / log2(rank + 1) for rank in range(1, min(len(target), k) + 1))
    return {"hr": float(bool(found)), "recall": len(found) / len(target), "ndcg": dcg / ideal, "mrr": first}


@st.composite
def lists_and_targets(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    width = draw(st.integers(1, 8))
    users = draw(st.integers(1, 5))
    row = st.lists(st.integers(-1, 9), min_size=width, max_size=width)
    truth = st.lists(st.integers(0, 9), max_size=6)
    return draw(st.lists(row, min_size=users, max_size=users)), draw(
        st.lists(truth, min_size=users, max_size=users)
    )


@given(lists_and_targets())
@settings(max_examples=200)
def test_per_user_metrics_match_loops(case: tuple[list[list[int]], list[list[int]]]) -> None:
    ranked, targets = case
    cutoffs = range(1, len(ranked[0]) + 1)
    values = ranking.per_user(np.array(ranked), Targets.from_lists(targets), list(cutoffs))
    for user, (row, target) in enumerate(zip(ranked, targets, strict=True)):
        for k in cutoffs:
            for name, expected in slow_metrics(row, set(target), k).items():
                np.testing.assert_allclose(
                    values[f"{name}@{k}"][user], expected, rtol=1e-12, err_msg=f"{name}@{k}"
                )


@given(lists_and_targets())
def test_properties(case: tuple[list[list[int]], list[list[int]]]) -> None:
    ranked, _ = case
    targets = Targets.single(np.arange(len(ranked)))
    values = ranking.per_user(np.array(ranked), targets, list(range(1, len(ranked[0]) + 1)))
    for k in range(1, len(ranked[0]) + 1):
        np.testing.assert_array_equal(values[f"hr@{k}"], values[f"recall@{k}"])  # one target: the same thing
        assert (values[f"mrr@{k}"] <= values[f"ndcg@{k}"]).all()  # 1/j <= 1/log2(j+1)
        assert (values[f"ndcg@{k}"] <= values[f"hr@{k}"]).all()
        if k > 1:
            for name in ("hr", "recall", "mrr", "ndcg"):
                assert (values[f"{name}@{k}"] >= values[f"{name}@{k - 1}"]).all()


@given(st.lists(st.lists(st.integers(-1, 5), min_size=3, max_size=3), min_size=1, max_size=6))
def test_gini_matches_pairwise_definition(ranked: list[list[int]]) -> None:
    shown = np.bincount([item for row in ranked for item in row if item >= 0], minlength=6)
    value = ranking.gini(np.array(ranked), 6, 3)
    if shown.sum() == 0:
        assert np.isnan(value)
    else:  # mean absolute difference over twice the mean
        assert value == pytest.approx(np.abs(shown[:, None] - shown).mean() / (2 * shown.mean()))


# --- intervals ---


def test_bootstrap_interval_of_a_rate_is_the_binomial_one() -> None:
    values = np.repeat([0.0, 1.0], [700, 300])
    interval = ranking.bootstrap_ci(values, seed=1, num_resamples=4000)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert interval.mean == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.003)
    assert interval.high == pytest.approx(0.3 + half, abs=0.003)


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = ranking.bootstrap_ci(rng.normal(size=100), seed=trial, num_resamples=400)
        covered += interval.low <= 0 <= interval.high
    assert 177 <= covered <= 199  # 95 % of 200, +- 4 standard errors of 3.1


def test_bootstrap_is_seeded_and_shares_users_between_metrics() -> None:
    values = np.random.default_rng(0).normal(size=50)
    first = ranking.bootstrap_table({"a": values, "b": 2 * values}, seed=3)
    again = ranking.bootstrap_table({"b": 2 * values}, seed=3)
    assert (again["b"].low, again["b"].high) == pytest.approx((first["b"].low, first["b"].high), rel=1e-12)
    assert first["b"].low == pytest.approx(2 * first["a"].low)
    assert ranking.bootstrap_ci(values, seed=4) != first["a"]


def test_bootstrap_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = ranking.bootstrap_ci(values, seed=3, num_resamples=101)
    monkeypatch.setattr(ranking, "RESAMPLE_BLOCK", 7 * 50)
    blocks = ranking.bootstrap_ci(values, seed=3, num_resamples=101)
    assert (blocks.mean, blocks.low, blocks.high) == pytest.approx((whole.mean, whole.low, whole.high))


def test_bootstrap_without_users() -> None:
    interval = ranking.bootstrap_ci(np.array([NAN]), seed=0)
    assert np.isnan([interval.mean, interval.low, interval.high]).all()
    assert ranking.bootstrap_table({}, seed=0) == {}


def test_paired_bootstrap_is_narrower_than_two_separate_ones() -> None:
    rng = np.random.default_rng(0)
    user_U = rng.normal(size=500)
    first, second = user_U, user_U + 0.1 + 0.01 * rng.normal(size=500)
    paired = ranking.paired_bootstrap(first, second, seed=0)
    assert paired.mean == pytest.approx(np.mean(second) - np.mean(first))
    assert 0.098 < paired.low < 0.1 < paired.high < 0.102
    separate = ranking.bootstrap_ci(second, seed=0)
    assert separate.high - separate.low > 50 * (paired.high - paired.low)
    with pytest.raises(ValueError, match="shapes"):
        ranking.paired_bootstrap(first, second[1:], seed=0)


def test_one_target_by_its_rank() -> None:
    rank_U = np.array([1, 2, 10, 11, 0])  # 0: not listed
    assert ranking.hit_of_rank(rank_U, 10).tolist() == [1, 1, 1, 0, 0]
    expected = [1, 1 / log2(3), 1 / log2(11), 0, 0]
    np.testing.assert_allclose(ranking.ndcg_of_rank(rank_U, 10), expected, rtol=1e-12)
    # and as the general definition has it
    hits_UK = rank_U[:, None] == np.arange(1, 13)
    ones = np.ones(5, dtype=np.int64)
    np.testing.assert_allclose(ranking.ndcg_of_rank(rank_U, 10), ranking.ndcg(hits_UK, ones, 10), rtol=1e-12)
    np.testing.assert_allclose(ranking.hit_of_rank(rank_U, 10), ranking.hit_rate(hits_UK, ones, 10))
