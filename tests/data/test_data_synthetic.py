"""The generator: its law by hand, and that the drawn logs follow it."""

from __future__ import annotations

import numpy as np
import pytest

from recast_cli.data.source import RawTables
from recast_cli.data.synthetic import SyntheticConfig, SyntheticData, generate, source
from recast_cli.errors import RecipeError


def three_items(noise: float = 0.1) -> SyntheticData:
    """Items 0 and 1 (popularity 3 to 1) in cluster 0; cluster 1 = {item 2} follows it, and back."""
    config = SyntheticConfig(noise=noise)
    tables: RawTables = generate(SyntheticConfig(num_users=1)).tables
    clusters, transitions = np.array([0, 0, 1]), np.array([[0.0, 1.0], [1.0, 0.0]])
    return SyntheticData(config, tables, clusters, transitions, np.array([0.75, 0.25, 1.0]))


def test_law_by_hand() -> None:
    # the first event: either cluster with 1/2
    expected = 0.9 * np.array([0.375, 0.125, 0.5]) + 0.1 / 3
    np.testing.assert_allclose(three_items().next_item_distribution([]), expected, rtol=1e-12)
    # after item 0: cluster 1; item 0 itself is excluded and its noise share is given to the others
    rest = np.array([0.0, 0.1 / 3, 0.9 + 0.1 / 3])
    np.testing.assert_allclose(three_items().next_item_distribution([0]), rest / rest.sum(), rtol=1e-12)
    # after item 2: cluster 0, by popularity
    rest = np.array([0.9 * 0.75 + 0.1 / 3, 0.9 * 0.25 + 0.1 / 3, 0.0])
    np.testing.assert_allclose(three_items().next_item_distribution([2]), rest / rest.sum(), rtol=1e-12)


def test_horizon_looks_further_back() -> None:
    # items 0, 1 in cluster 0 and 2, 3 in cluster 1; each cluster leads to the other
    clusters, transitions = np.array([0, 0, 1, 1]), np.array([[0.0, 1.0], [1.0, 0.0]])
    for horizon, expected in ((2, [0.0, 1.0, 0.0, 0.0]), (1, [0.0, 0.0, 0.0, 1.0])):
        config = SyntheticConfig(horizon=horizon, noise=0.0)
        data = SyntheticData(config, three_items().tables, clusters, transitions, np.full(4, 0.5))
        # horizon 2 looks at item 2 and leads to cluster 0, horizon 1 looks at item 0 and leads to cluster 1
        assert data.next_item_distribution([2, 0]).tolist() == expected
        # a history shorter than the horizon counts from its first item
        assert data.next_item_distribution([0]).tolist() == [0.0, 0.0, 0.5, 0.5]


def test_used_up_cluster_leaves_any_unseen_item() -> None:
    # item 0 leads to cluster 1, but its only item was had; without noise nothing else is reachable
    assert three_items(noise=0.0).next_item_distribution([2, 0]).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("horizon", [1, 3])
def test_logs_follow_the_law(horizon: int) -> None:
    data = generate(
        SyntheticConfig(num_users=150, num_items=60, num_clusters=6, sparsity=0.8, horizon=horizon)
    )
    by_user = data.tables.interactions.group_by("user_id", maintain_order=True).all()["item_id"].to_list()
    histories = [[int(item) for item in items] for items in by_user]
    excess, cluster_excess = [], []
    for items in histories:
        for place, item in enumerate(items):
            p_N = data.next_item_distribution(items[:place])
            assert p_N.sum() == pytest.approx(1, abs=1e-12) and p_N[item] > 0
            assert not p_N[items[:place]].any()
            # under the law, the probability of what was drawn has the mean sum p^2
            excess.append(p_N[item] - (p_N**2).sum())
            same = data.cluster_N == data.cluster_N[item]
            by_cluster = np.bincount(data.cluster_N, weights=p_N)
            cluster_excess.append(p_N[same].sum() - (by_cluster**2).sum())
    for values in (np.array(excess), np.array(cluster_excess)):
        standard_error = values.std() / np.sqrt(len(values))
        assert abs(values.mean()) < 4 * standard_error
        assert standard_error < 0.01  # else the line above would prove nothing


def test_seed_decides_everything() -> None:
    first, again = (generate(SyntheticConfig(num_users=5, seed=3)).tables for _ in range(2))
    other = generate(SyntheticConfig(num_users=5, seed=4)).tables
    assert first.interactions.equals(again.interactions) and first.items.equals(again.items)
    assert not first.interactions.equals(other.interactions)
    assert source(SyntheticConfig(seed=3)).sha256 != source(SyntheticConfig(seed=4)).sha256


@pytest.mark.parametrize("sparsity", [0.7, 0.9])
def test_sizes_and_sparsity(sparsity: float) -> None:
    config = SyntheticConfig(num_users=300, num_items=100, num_clusters=5, sparsity=sparsity)
    data = generate(config)
    events = data.tables.interactions
    assert events["user_id"].n_unique() == 300
    assert data.tables.items.height == 100
    assert np.bincount(data.cluster_N).tolist() == [20] * 5
    assert events.select("user_id", "item_id").is_unique().all()  # nobody has an item twice
    # lengths are uniform between half and one and a half of the mean: standard error of the share below 0.006
    assert 1 - events.height / (300 * 100) == pytest.approx(sparsity, abs=0.02)


def test_text_tells_clusters_apart() -> None:
    data = generate(SyntheticConfig(num_users=1, num_items=100, num_clusters=50))
    theme = [text.split(" | ")[1] for text in data.tables.items["text"].to_list()]
    assert len(set(zip(theme, data.cluster_N.tolist(), strict=True))) == 50 == len(set(theme))
    assert data.tables.items["title"].n_unique() == 100


def test_timestamps_rise_within_a_user() -> None:
    events = generate(SyntheticConfig(num_users=20)).tables.interactions
    assert (
        events.select((events["timestamp"].diff() > 0) | (events["user_id"] != events["user_id"].shift(1)))
        .to_series()[1:]
        .all()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 1.5}, "noise is 1.5, needed between 0 and 1"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"num_clusters": 2}, "num-clusters is 2, needed above 2"),
        ({"horizon": 0}, "horizon is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_bounds(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SyntheticConfig(**options)
