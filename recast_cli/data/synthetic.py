"""A seeded generator of logs whose next-item distribution is known.

Every item belongs to a latent cluster. A user's next item is drawn in two steps: a cluster, given the cluster
of the item `horizon` events ago (of the first item, while there are fewer), from a sparse Markov chain; then
an item of it, by a Zipf popularity. With probability `noise` it is drawn from the whole catalogue instead.
Items the user already had are excluded and the rest renormalised, so no history holds its target.

Shape suffixes: N items, C clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from recast_cli.data.source import RawTables, Source, hash_json
from recast_cli.errors import RecipeError

MIN_LENGTH = 5  # events of the shortest user
NUM_SUCCESSORS = 2  # clusters that can follow a cluster, without noise
_SUCCESSOR_WEIGHTS = (0.8, 0.2)
_START = 1_600_000_000  # seconds; any date does

# fmt: off
_THEMES = (
    "jazz piano", "space opera", "garden tools", "mountain biking", "baroque violin", "detective novel",
    "sourdough baking", "chess strategy", "watercolour painting", "deep sea diving", "medieval history",
    "robot kits", "wildlife photography", "marathon running", "herbal tea", "model railways", "street dance",
    "antique maps", "vegan cooking", "ice climbing",
)
_KINDS = (
    "guide", "classic", "collection", "workshop", "companion", "edition", "story", "handbook", "anthology",
    "primer",
)
# fmt: on


@dataclass(frozen=True)
class SyntheticConfig:
    """Settings of the generator.

    Attributes:
        num_users, num_items, num_clusters: Sizes.
        sparsity: Share of empty cells of the user-item matrix: a user has (1 - sparsity) * num_items events
            on average, uniformly between half and one and a half of it, and never fewer than 5.
        horizon: How many events back the cluster lies that decides the next one.
        noise: Probability of an item from anywhere.
        seed: Decides everything else.
    """

    num_users: int = 400
    num_items: int = 200
    num_clusters: int = 10
    sparsity: float = 0.9
    horizon: int = 1
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, found, ok, needed in [
            ("num-users", self.num_users, self.num_users >= 1, "1 or more"),
            (
                "num-clusters",
                self.num_clusters,
                self.num_clusters > NUM_SUCCESSORS,
                f"above {NUM_SUCCESSORS}",
            ),
            ("num-items", self.num_items, self.num_items >= 2 * self.num_clusters, "2 or more a cluster"),
            ("sparsity", self.sparsity, 0.5 <= self.sparsity < 1, "at least 0.5 and below 1"),
            ("num-items", self.num_items, self.num_items > MIN_LENGTH, f"above {MIN_LENGTH}"),
            ("horizon", self.horizon, self.horizon >= 1, "1 or more"),
            ("noise", self.noise, 0 <= self.noise <= 1, "between 0 and 1"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
        ]:
            if not ok:
                raise RecipeError(f"{name} is {found}, needed {needed}", "see recast prepare-data --help")


@dataclass(frozen=True)
class SyntheticData:
    """Generated tables and the law behind them.

    Attributes:
        tables: Interactions and items; item id "7" is row 7 of the arrays below.
        cluster_N: Cluster of each item.
        transitions_CC: P(next cluster | cluster `horizon` events ago).
        popularity_N: P(item | its cluster); sums to 1 in every cluster.
    """

    config: SyntheticConfig
    tables: RawTables
    cluster_N: np.ndarray
    transitions_CC: np.ndarray
    popularity_N: np.ndarray

    def next_item_distribution(self, history: Sequence[int]) -> np.ndarray:
        """The true P(next item | history), over all items (N).

        Args:
            history: Item rows of ALL the user's events so far, oldest first; empty: the first event.
        """
        law = _Law(self.config, self.cluster_N, self.transitions_CC, self.popularity_N)
        return law.next_item(list(history))


@dataclass(frozen=True)
class _Law:
    config: SyntheticConfig
    cluster_N: np.ndarray
    transitions_CC: np.ndarray
    popularity_N: np.ndarray

    def next_item(self, history: list[int]) -> np.ndarray:
        num_clusters, num_items = len(self.transitions_CC), len(self.cluster_N)
        if history:
            past = history[max(0, len(history) - self.config.horizon)]
            cluster_C = self.transitions_CC[self.cluster_N[past]]
        else:
            cluster_C = np.full(num_clusters, 1 / num_clusters)
        structured_N = cluster_C[self.cluster_N] * self.popularity_N
        item_N = (1 - self.config.noise) * structured_N + self.config.noise / num_items
        item_N[history] = 0.0
        total = item_N.sum()
        if total > 0:
            return item_N / total
        # Without noise a user may have used up every reachable item: then any unseen one, all alike.
        unseen_N = np.ones(num_items)
        unseen_N[history] = 0.0
        return unseen_N / unseen_N.sum()


def generate(config: SyntheticConfig) -> SyntheticData:
    """Draw clusters, chain, popularity and every user's events from `config.seed`."""
    rng = np.random.default_rng(config.seed)
    cluster_N = rng.permutation(np.arange(config.num_items) % config.num_clusters)
    law = _Law(config, cluster_N, _transitions(config.num_clusters, rng), _popularity(cluster_N, rng))
    users: list[int] = []
    items: list[int] = []
    times: list[float] = []
    mean_length = (1 - config.sparsity) * config.num_items
    for user in range(config.num_users):
        length = int(rng.integers(round(mean_length / 2), round(1.5 * mean_length), endpoint=True))
        history: list[int] = []
        for _ in range(min(max(length, MIN_LENGTH), config.num_items)):
            history.append(int(_draw(law.next_item(history), rng)))
        users += [user] * len(history)
        items += history
        times += (_START + np.cumsum(rng.integers(60, 86_400, size=len(history)))).tolist()
    interactions = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times}).select(
        pl.row_index("row") + 1,
        pl.col("user_id", "item_id").cast(pl.String),
        pl.col("timestamp").cast(pl.Float64),
        pl.col("timestamp").cast(pl.String).alias("timestamp_text"),
    )
    tables = RawTables(interactions, _items(cluster_N))
    return SyntheticData(config, tables, law.cluster_N, law.transitions_CC, law.popularity_N)


def source(config: SyntheticConfig) -> Source:
    """Generated data as a source.

    `generate(SyntheticConfig(**manifest["source"]["config"]))` gives the truth of a dataset back.
    """
    settings = asdict(config)
    return Source("synthetic", hash_json(settings), lambda: generate(config).tables, {"config": settings})


def _transitions(num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    # One random cycle through all clusters carries most of the weight, so that none is a dead end.
    cycle = rng.permutation(num_clusters)
    transitions_CC = np.zeros((num_clusters, num_clusters))
    for step, weight in enumerate(_SUCCESSOR_WEIGHTS, start=1):
        transitions_CC[cycle, np.roll(cycle, -step)] += weight
    return transitions_CC


def _popularity(cluster_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    popularity_N = np.empty(len(cluster_N))
    for cluster in np.unique(cluster_N):
        members = rng.permutation(np.flatnonzero(cluster_N == cluster))
        weights = 1 / np.arange(1, len(members) + 1)  # Zipf, exponent 1
        popularity_N[members] = weights / weights.sum()
    return popularity_N


def _draw(probability_N: np.ndarray, rng: np.random.Generator) -> np.intp:
    # side="right" skips items of probability 0; the clip guards against a cumulative sum just below 1
    cumulative_N = np.cumsum(probability_N)
    place = np.searchsorted(cumulative_N, rng.random() * cumulative_N[-1], side="right")
    return min(place, np.flatnonzero(probability_N)[-1])


def _items(cluster_N: np.ndarray) -> pl.DataFrame:
    titles, texts = [], []
    for item, cluster in enumerate(cluster_N.tolist()):
        theme = _THEMES[cluster % len(_THEMES)]
        if cluster >= len(_THEMES):  # a second theme tells further clusters apart
            theme += f" and {_THEMES[(cluster // len(_THEMES) + cluster) % len(_THEMES)]}"
        kind = _KINDS[item % len(_KINDS)]
        titles.append(f"{theme.capitalize()} {kind} {item}")
        texts.append(f"{titles[-1]} | {theme}")
    return pl.DataFrame(
        {"item_id": [str(item) for item in range(len(cluster_N))], "title": titles, "text": texts}
    ).select(pl.row_index("row") + 1, "item_id", "title", "text")
