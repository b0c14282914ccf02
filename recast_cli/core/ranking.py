"""Ranking metrics over item rows: one value per user, then a mean with a bootstrap interval.

Shapes: U users (evaluated rows), K list length, N items, M metrics, R resamples.

A ranked list is a row of `ranked_UK`: item rows in descending preference. Any negative entry (-1) is a place
without an item: a list that ran out, or an answer that names no item. It keeps its rank and never hits.
An item that is listed twice counts at its first place only.

Edges, the same for every per-user metric: an empty list (all negative) scores 0, a user without a target
scores NaN (undefined) and is left out of means and intervals, a cutoff longer than the list is a ValueError
(cutting the list first would silently report a smaller number).

Definitions: Järvelin & Kekäläinen 2002 (DCG); Chen et al., arXiv 2107.03374, eq. 1 (Pass@k from n samples);
OpenOneRec, arXiv 2512.24762 (RecIF's Pass@k over beams); Efron & Tibshirani 1993, ch. 13 (percentiles).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RESAMPLE_BLOCK = 1 << 22  # resampled users held at once: 32 MiB of int64


@dataclass(frozen=True)
class Targets:
    """The true items of every user in CSR form, distinct inside a user.

    Attributes:
        indptr: (U + 1,) user u owns `items[indptr[u]:indptr[u + 1]]`.
        items: item rows, sorted inside a user.
    """

    indptr: Ints
    items: Ints

    @classmethod
    def from_lists(cls, targets: Sequence[Sequence[int] | NDArray[np.integer]]) -> Targets:
        """Build from one sequence of item rows per user; repeats collapse.

        Raises:
            ValueError: a negative item row.
        """
        parts = [np.unique(np.asarray(row, dtype=np.int64)) for row in targets]
        indptr = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([part.size for part in parts], out=indptr[1:])
        items = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        if items.size and items.min() < 0:
            raise ValueError(f"targets hold the item row {items.min()}, rows start at 0")
        return cls(indptr, items)

    @classmethod
    def single(cls, target_U: NDArray[np.integer]) -> Targets:
        """One target per user."""
        return cls.from_lists(list(np.asarray(target_U, dtype=np.int64)[:, None]))

    @property
    def sizes_U(self) -> Ints:
        """|T| of every user."""
        return np.diff(self.indptr)


def first_occurrence(ranked_UK: NDArray[np.integer]) -> Bools:
    """True where an item stands in its list for the first time; False at negative places. (U, K)"""
    ranked_UK = np.asarray(ranked_UK, dtype=np.int64)
    order_UK = np.argsort(ranked_UK, axis=1, kind="stable")
    sorted_UK = np.take_along_axis(ranked_UK, order_UK, axis=1)
    new_UK = np.ones_like(sorted_UK, dtype=bool)
    new_UK[:, 1:] = sorted_UK[:, 1:] != sorted_UK[:, :-1]  # stable sort: the best-ranked copy is first
    first_UK = np.empty_like(new_UK)
    np.put_along_axis(first_UK, order_UK, new_UK, axis=1)
    return first_UK & (ranked_UK >= 0)


def hits(ranked_UK: NDArray[np.integer], targets: Targets) -> Bools:
    """True where the item at that rank is a target of the user, for the first time in the list. (U, K)

    Raises:
        ValueError: other number of users, or not a matrix.
    """
    ranked_UK = np.asarray(ranked_UK, dtype=np.int64)
    if ranked_UK.ndim != 2 or len(ranked_UK) != len(targets.sizes_U):
        raise ValueError(f"ranked has shape {ranked_UK.shape}, needed ({len(targets.sizes_U)}, K)")
    # One integer per (user, item) makes the lookup a single sorted search, free of loops over users.
    num_items = 1 + max(int(ranked_UK.max(initial=-1)), int(targets.items.max(initial=-1)))
    users_U = np.arange(len(ranked_UK), dtype=np.int64)
    truth = np.repeat(users_U, targets.sizes_U) * num_items + targets.items
    keys_UK = users_U[:, None] * num_items + ranked_UK
    return np.isin(keys_UK, truth) & first_occurrence(ranked_UK)


def _top(values_UK: Any, k: int) -> NDArray[Any]:
    values_UK = np.asarray(values_UK)
    if not 1 <= k <= values_UK.shape[1]:
        raise ValueError(f"cutoff {k} outside 1..{values_UK.shape[1]}, the length of the lists")
    return values_UK[:, :k]


def _defined(values_U: Any, sizes_U: Ints) -> Floats:
    return np.where(sizes_U > 0, values_U, np.nan).astype(np.float64)


def hit_rate(hits_UK: Bools, sizes_U: Ints, k: int) -> Floats:
    """HR@k = 1 if any target is among the first k items, else 0. (U,)"""
    return _defined(_top(hits_UK, k).any(axis=1), sizes_U)


def recall(hits_UK: Bools, sizes_U: Ints, k: int) -> Floats:
    """Recall@k = |first k items and T| / |T|. The denominator is |T|, not min(|T|, k). (U,)"""
    return _defined(_top(hits_UK, k).sum(axis=1) / np.maximum(sizes_U, 1), sizes_U)


def ndcg(hits_UK: Bools, sizes_U: Ints, k: int) -> Floats:
    """NDCG@k = sum over hits at 1-based rank j of 1 / log2(j + 1), over the ideal DCG of min(|T|, k). (U,)"""
    discount_K = 1.0 / np.log2(np.arange(2, k + 2))
    ideal_U = np.concatenate([[1.0], np.cumsum(discount_K)])[np.minimum(sizes_U, k)]
    return _defined(_top(hits_UK, k) @ discount_K / ideal_U, sizes_U)


def mrr(hits_UK: Bools, sizes_U: Ints, k: int) -> Floats:
    """MRR@k = 1 / rank of the first hit among the first k items, else 0. (U,)"""
    return _defined((_top(hits_UK, k) / np.arange(1, k + 1)).max(axis=1), sizes_U)


def hit_of_rank(rank_U: Any, k: int) -> Floats:
    """HR@k of a single target from its 1-based rank; 0 stands for a target that is not listed. (U,)"""
    rank_U = np.asarray(rank_U)
    return ((rank_U >= 1) & (rank_U <= k)).astype(np.float64)


def ndcg_of_rank(rank_U: Any, k: int) -> Floats:
    """NDCG@k of a single target from its rank (see `hit_of_rank`): 1 / log2(rank + 1) if it is a hit. (U,)"""
    return hit_of_rank(rank_U, k) / np.log2(np.maximum(rank_U, 1) + 1.0)


def pass_at_k(beam_hits_UK: Bools, sizes_U: Ints, k: int) -> Floats:
    """RecIF's Pass@k = 1 if any of the first k beams (not distinct items) hits, else 0. (U,)

    Equals HR@k where every beam is another item. verl's `best@k` is a bootstrap with replacement: not this.
    """
    return _defined(_top(beam_hits_UK, k).any(axis=1), sizes_U)


def pass_at_k_unbiased(num_samples: int, num_hits_U: NDArray[np.integer], k: int) -> Floats:
    """Pass@k of i.i.d. samples from n >= k of them with c hits, without bias: 1 - C(n-c, k) / C(n, k). (U,)

    Raises:
        ValueError: k outside 1..n, or c outside 0..n.
    """
    hits_U = np.asarray(num_hits_U, dtype=np.int64)
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}, needed 1..{num_samples} (the number of samples)")
    if hits_U.size and (hits_U.min() < 0 or hits_U.max() > num_samples):
        raise ValueError(f"hits range over {hits_U.min()}..{hits_U.max()}, needed 0..{num_samples}")
    # C(n-c, k) / C(n, k) = prod over j < k of (n-c-j) / (n-j); a factor reaches 0 where n-c < k.
    drawn_k = np.arange(k)
    factors_Uk = np.maximum(num_samples - hits_U[..., None] - drawn_k, 0) / (num_samples - drawn_k)
    return 1.0 - factors_Uk.prod(axis=-1)


def _exposure(ranked_UK: NDArray[np.integer], num_items: int, k: int) -> Ints:
    items = _top(ranked_UK, k)
    items = items[items >= 0]
    if items.size and items.max() >= num_items:
        raise ValueError(f"item row {items.max()} in a list, the catalogue has {num_items} items")
    return np.bincount(items, minlength=num_items).astype(np.int64)


def coverage(ranked_UK: NDArray[np.integer], num_items: int, k: int) -> float:
    """Coverage@k = distinct items in anybody's first k / all N items; 0 if nothing is listed."""
    return float(np.count_nonzero(_exposure(ranked_UK, num_items, k)) / num_items)


def gini(ranked_UK: NDArray[np.integer], num_items: int, k: int) -> float:
    """Gini coefficient of exposure in the first k over all N items, the never-shown ones included.

    sum_i (2 i - N - 1) x_i / (N sum x), x ascending, i = 1..N: 0 if all are shown equally often, (N-1)/N if
    only one item is ever shown, NaN if nothing is listed.
    """
    shown_N = np.sort(_exposure(ranked_UK, num_items, k))
    total = shown_N.sum()
    if total == 0:
        return float("nan")
    weights_N = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float(weights_N @ shown_N / (num_items * total))


def novelty(ranked_UK: NDArray[np.integer], popularity_N: NDArray[np.integer], k: int) -> float:
    """Mean self-information in bits, -log2 p(item), over the listed items of the first k; NaN if none is.

    p(i) = (n_i + 1) / (sum_j n_j + N), n_i events of item i in training: add-one, so that a cold item has a
    finite value. A uniform log gives log2 N whatever is listed.
    """
    counts_N = np.asarray(popularity_N, dtype=np.float64)
    shown_N = _exposure(ranked_UK, len(counts_N), k)
    if shown_N.sum() == 0:
        return float("nan")
    bits_N = -np.log2((counts_N + 1) / (counts_N.sum() + len(counts_N)))
    return float(shown_N @ bits_N / shown_N.sum())


def invalid_share(valid_UK: Bools, given_UK: Bools | None = None) -> float:
    """Answers that name no item of the catalogue / answers given; 0 if none was given.

    Args:
        valid_UK: True where the answer is in the catalogue, decided by its text and never by the trie.
        given_UK: True where there is an answer at all (a short list is no invalid answer); default all.
    """
    valid_UK = np.asarray(valid_UK, dtype=bool)
    given_UK = np.ones_like(valid_UK) if given_UK is None else np.asarray(given_UK, dtype=bool)
    return float((given_UK & ~valid_UK).sum() / max(int(given_UK.sum()), 1))


def duplicate_share(ranked_UK: NDArray[np.integer], k: int) -> float:
    """Items in the first k that stand higher in the same list already / items in the first k; 0 if none."""
    top_Uk = _top(ranked_UK, k)
    listed = int((top_Uk >= 0).sum())
    return float((listed - first_occurrence(top_Uk).sum()) / max(listed, 1))


def per_user(ranked_UK: NDArray[np.integer], targets: Targets, cutoffs: Sequence[int]) -> dict[str, Floats]:
    """HR, Recall, NDCG and MRR of every user at every cutoff: `{"hr@10": (U,), ...}`."""
    hits_UK, sizes_U = hits(ranked_UK, targets), targets.sizes_U
    metrics = {"hr": hit_rate, "recall": recall, "ndcg": ndcg, "mrr": mrr}
    return {f"{name}@{k}": metric(hits_UK, sizes_U, k) for name, metric in metrics.items() for k in cutoffs}


@dataclass(frozen=True)
class Interval:
    """A mean over users with its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


def bootstrap_table(
    values: Mapping[str, NDArray], *, seed: int, num_resamples: int = 2000, level: float = 0.95
) -> dict[str, Interval]:
    """Means over users with percentile intervals; all metrics share the same resampled users.

    Args:
        values: name -> (U,) one value per user. A user with a NaN in any of them is left out of all.
        seed: Of the resampling; the same seed and users give the same interval.
        num_resamples: R draws of U users with replacement.
        level: 0.95 cuts 2.5 % on either side.

    Returns:
        name -> Interval; all NaN if no user is left, a point if one is.
    """
    if not values:
        return {}
    values_UM = np.stack([np.asarray(column, dtype=np.float64) for column in values.values()], axis=1)
    values_UM = values_UM[~np.isnan(values_UM).any(axis=1)]
    num_users = len(values_UM)
    if num_users == 0:
        return {name: Interval(*[float("nan")] * 3) for name in values}
    rng = np.random.default_rng(seed)
    means_RM = np.empty((num_resamples, values_UM.shape[1]))
    block = max(1, RESAMPLE_BLOCK // num_users)
    for start in range(0, num_resamples, block):
        rows = min(block, num_resamples - start)
        drawn = rng.integers(0, num_users, size=(rows, num_users)) + np.arange(rows)[:, None] * num_users
        times_RU = np.bincount(drawn.ravel(), minlength=rows * num_users).reshape(rows, num_users)
        means_RM[start : start + rows] = times_RU @ values_UM / num_users
    tail = (1 - level) / 2
    low_M, high_M = np.quantile(means_RM, [tail, 1 - tail], axis=0)
    mean_M = values_UM.mean(axis=0)
    rows_M3 = np.stack([mean_M, low_M, high_M], axis=1)
    return {name: Interval(*map(float, row_3)) for name, row_3 in zip(values, rows_M3, strict=True)}


def bootstrap_ci(values_U: NDArray, *, seed: int, num_resamples: int = 2000, level: float = 0.95) -> Interval:
    """`bootstrap_table` of one metric."""
    return bootstrap_table({"": values_U}, seed=seed, num_resamples=num_resamples, level=level)[""]


def paired_bootstrap(
    first_U: NDArray, second_U: NDArray, *, seed: int, num_resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Mean of second - first over the same users, with its interval: users are resampled, pairs kept.

    Raises:
        ValueError: the two do not hold the same number of users.
    """
    first_U, second_U = np.asarray(first_U, dtype=np.float64), np.asarray(second_U, dtype=np.float64)
    if first_U.shape != second_U.shape:
        raise ValueError(f"paired values have shapes {first_U.shape} and {second_U.shape}, needed equal ones")
    return bootstrap_ci(second_U - first_U, seed=seed, num_resamples=num_resamples, level=level)
