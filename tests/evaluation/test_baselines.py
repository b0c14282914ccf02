"""Popularity and item-kNN: by hand, against plain loops, and against an independent library."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from recast_cli.core import ranking
from recast_cli.core.ranking import Targets
from recast_cli.evaluation import baselines
from recast_cli.evaluation.baselines import ItemKNN, Popularity, rank, ranked_lists
from recast_cli.evaluation.split import Split, load_split

# `implicit` complains about a matrix that it makes itself.
pytestmark = pytest.mark.filterwarnings("ignore:Method expects CSR input")


def arrays(histories: list[list[int]]) -> list[np.ndarray]:
    return [np.array(history, dtype=np.int64) for history in histories]


def both_modes(model: Popularity | ItemKNN, histories: list[np.ndarray], width: int) -> list[np.ndarray]:
    """Lists with the history removed, and kept."""
    return [np.concatenate(lists) for lists in zip(*ranked_lists(model, histories, width), strict=True)]


# --- by hand ---


def test_popularity_counts_events_and_ties_go_to_the_lower_row() -> None:
    model = Popularity.fit(np.array([0, 0, 1, 2, 2]), np.array([3, 3, 1, 2, 1]), num_items=5)
    assert model.counts_N.tolist() == [0, 2, 1, 2, 0]
    removed, kept = both_modes(model, arrays([[1], []]), 5)
    assert kept.tolist() == [[1, 3, 2, 0, 4]] * 2
    assert removed.tolist() == [[3, 2, 0, 4, -1], [1, 3, 2, 0, 4]]


def test_item_knn_by_hand() -> None:
    # Users 0: {0, 1}, 1: {0, 1, 2}, 2: {1}. Item 3 is never seen.
    model = ItemKNN.fit(np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 0, 1, 2, 1]), num_items=4)
    cos_01, cos_02, cos_12 = 2 / sqrt(2 * 3), 1 / sqrt(2 * 1), 1 / sqrt(3 * 1)
    scores = model.scores(arrays([[0], [0, 2], [3], [0, 0]]))
    expected = [
        [0, cos_01, cos_02, 0],  # an item is not its own neighbour
        [cos_02, cos_01 + cos_12, cos_02, 0],
        [0, 0, 0, 0],
        [0, cos_01, cos_02, 0],  # a repeat counts once
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-9)


def test_rank_breaks_ties_at_the_cut_by_row() -> None:
    scores = np.array([[1.0, 5.0, 1.0, 1.0, 0.0]])
    assert rank(scores, 3).tolist() == [[1, 0, 2]]
    assert rank(scores, 2, arrays([[0]])).tolist() == [[1, 2]]
    assert rank(scores, 3, arrays([[0, 1, 2, 3, 4]])).tolist() == [[-1, -1, -1]]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    model = ItemKNN.fit(rng.integers(0, 20, 200), rng.integers(0, 30, 200), num_items=30)
    histories = [rng.choice(30, size=5, replace=False) for _ in range(17)]
    whole = both_modes(model, histories, 10)
    monkeypatch.setattr(baselines, "BLOCK_CELLS", 4 * 30)
    assert len(list(ranked_lists(model, histories, 10))) == 5
    for first, second in zip(whole, both_modes(model, histories, 10), strict=True):
        np.testing.assert_array_equal(first, second)


# --- against plain loops ---

EVENTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=30)


@given(EVENTS, st.lists(st.integers(0, 7), max_size=6))
def test_item_knn_matches_loops(events: list[tuple[int, int]], history: list[int]) -> None:
    user_E = np.array([user for user, _ in events], dtype=np.int64)
    item_E = np.array([item for _, item in events], dtype=np.int64)
    scores = ItemKNN.fit(user_E, item_E, num_items=8).scores(arrays([history]))[0]
    users = [{user for user, item in events if item == wanted} for wanted in range(8)]
    for j in range(8):
        expected = sum(
            len(users[i] & users[j]) / sqrt(len(users[i]) * len(users[j]))
            for i in set(history)
            if i != j and users[i] and users[j]
        )
        assert scores[j] == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sets(st.integers(0, 11)), st.integers(1, 14))
def test_rank_matches_sorting(scores: list[int], closed: set[int], width: int) -> None:
    closed = {row for row in closed if row < len(scores)}
    rows = sorted(
        (row for row in range(len(scores)) if row not in closed), key=lambda row: (-scores[row], row)
    )
    expected = (rows + [-1] * width)[:width]
    assert rank(np.array([scores], dtype=float), width, arrays([sorted(closed)]))[0].tolist() == expected


# --- against `implicit` ---


def history_matrix(histories: list[np.ndarray], num_items: int) -> csr_matrix:
    rows = np.repeat(np.arange(len(histories)), [len(np.unique(history)) for history in histories])
    columns = np.concatenate([np.unique(history) for history in histories])
    return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(histories), num_items))


def train_matrix(split: Split) -> csr_matrix:
    """Events of each user with each item."""
    shape = (int(split.train_user_E.max()) + 1, split.num_items)
    return csr_matrix(
        (np.ones(len(split.train_item_E)), (split.train_user_E, split.train_item_E)), shape=shape
    )


def implicit_knn(split: Split) -> Any:
    from implicit.nearest_neighbours import CosineRecommender

    log = train_matrix(split)
    log.data[:] = 1  # whether, not how often
    model = CosineRecommender(K=split.num_items, num_threads=1)
    model.fit(log, show_progress=False)
    return model


def implicit_popularity(split: Split) -> Any:
    """Their matrix factorisation with one factor: 1 for every user, the column sum for every item."""
    from implicit.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(factors=1, use_gpu=False, num_threads=1)
    model.item_factors = np.asarray(train_matrix(split).sum(axis=0)).reshape(-1, 1).astype(np.float32)
    model.user_factors = np.ones((len(split.histories), 1), dtype=np.float32)
    return model


def assert_same_lists(model: Any, split: Split, ours: Popularity | ItemKNN, width: int) -> None:
    """Same score at every rank in both modes, and the same items wherever scores differ."""
    users, seen = np.arange(len(split.histories)), history_matrix(split.histories, split.num_items)
    scores_UN = ours.scores(split.histories)
    for ranked_UK, removes in zip(both_modes(ours, split.histories, width), (True, False), strict=True):
        ids_UK, theirs_UK = model.recommend(users, seen, N=width, filter_already_liked_items=removes)
        for u in users:
            mine_K = scores_UN[u][ranked_UK[u]]
            positive = mine_K > 1e-6  # their kNN lists nothing below
            np.testing.assert_allclose(theirs_UK[u][positive], mine_K[positive], rtol=1e-5)
            for k in np.flatnonzero(positive[:-1]):
                apart = mine_K[k] - mine_K[k + 1] > 1e-5 and (k == 0 or mine_K[k - 1] - mine_K[k] > 1e-5)
                assert not apart or ids_UK[u][k] == ranked_UK[u][k]


def without_self_similarity(model: Any) -> Any:
    """Theirs counts an item as its own neighbour."""
    from implicit._nearest_neighbours import NearestNeighboursScorer

    model.similarity.setdiag(0)
    model.similarity.eliminate_zeros()
    model.scorer = NearestNeighboursScorer(model.similarity)
    return model


def assert_matches_implicit(split: Split, width: int) -> None:
    knn = ItemKNN.fit(split.train_user_E, split.train_item_E, split.num_items)
    popularity = Popularity.fit(split.train_user_E, split.train_item_E, split.num_items)
    assert_same_lists(without_self_similarity(implicit_knn(split)), split, knn, width)
    assert_same_lists(implicit_popularity(split), split, popularity, width)


def assert_metrics_match_implicit(split: Split, k: int) -> None:
    """HR and NDCG of one target: their precision (over min(k, 1) targets) and ndcg, history removed."""
    from implicit.evaluation import ranking_metrics_at_k

    seen = history_matrix(split.histories, split.num_items)
    users = np.arange(len(split.histories))
    truth = csr_matrix((np.ones(len(users)), (users, split.target_U)), shape=seen.shape)
    theirs = ranking_metrics_at_k(implicit_knn(split), seen, truth, K=k, show_progress=False, num_threads=1)
    knn = ItemKNN.fit(split.train_user_E, split.train_item_E, split.num_items)
    values = ranking.per_user(both_modes(knn, split.histories, k)[0], Targets.single(split.target_U), [k])
    assert values[f"hr@{k}"].mean() == pytest.approx(theirs["precision"], abs=1.01 / len(users))  # one tie
    assert values[f"ndcg@{k}"].mean() == pytest.approx(theirs["ndcg"], abs=1 / len(users))


def synthetic_split(seed: int) -> Split:
    """Users of two tastes, no repeats; the last event is the target."""
    rng = np.random.default_rng(seed)
    num_users, num_items, length = 150, 80, 12
    weight_2N = rng.dirichlet(np.full(num_items, 0.3), size=2) + 1e-3
    events = [
        rng.choice(num_items, size=length, replace=False, p=weight_2N[u % 2] / weight_2N[u % 2].sum())
        for u in range(num_users)
    ]
    return Split(
        name="test",
        index_U=np.arange(num_users),
        user_ids=[str(u) for u in range(num_users)],
        target_U=np.array([row[-1] for row in events]),
        histories=[row[:-1] for row in events],
        train_user_E=np.repeat(np.arange(num_users), length - 1),
        train_item_E=np.concatenate([row[:-1] for row in events]),
        item_ids=[str(i) for i in range(num_items)],
        manifest={},
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_baselines_match_implicit_on_a_synthetic_log(seed: int) -> None:
    split = synthetic_split(seed)
    assert_matches_implicit(split, 20)
    assert_metrics_match_implicit(split, 10)


@pytest.mark.slow
def test_baselines_match_implicit_on_ml_100k(tmp_path: Path) -> None:
    from recast_cli.data import movielens
    from recast_cli.data.prepare import Params, prepare

    prepare(movielens.source(), Params(k_core=5), tmp_path / "data")
    split = load_split(tmp_path / "data", "test")
    assert (len(split.histories), split.num_items) == (943, 1349)
    assert_matches_implicit(split, 50)
    assert_metrics_match_implicit(split, 10)
    # A reference run outside this project: popularity HR@10 .087, NDCG@10 .045, history removed.
    popularity = Popularity.fit(split.train_user_E, split.train_item_E, split.num_items)
    lists = both_modes(popularity, split.histories, 10)[0]
    values = ranking.per_user(lists, Targets.single(split.target_U), [10])
    assert values["hr@10"].mean() == pytest.approx(0.087, abs=0.0005)
    assert values["ndcg@10"].mean() == pytest.approx(0.045, abs=0.0005)
