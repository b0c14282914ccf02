"""Reference rows: popularity and item-kNN, scored over the whole catalogue.

Both learn from the same events: everything before a user's validation target for `validation`; for `test` the
validation events too (they lie in the past of the test target). Equal scores are ordered by item row.

Shapes: U users asked, V users in training, N items, E events, K list length, B users of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Histories = Sequence[NDArray[np.int64]]

BLOCK_CELLS = 1 << 24  # scores held at once: 128 MiB of float64
TIE_DECIMALS = 10  # scores closer than this differ by the order of summation, not by preference


@dataclass(frozen=True)
class Popularity:
    """Score of an item = its number of training events, the same for every user."""

    counts_N: NDArray[np.int64]

    @classmethod
    def fit(cls, user_E: NDArray[np.int64], item_E: NDArray[np.int64], num_items: int) -> Popularity:
        """Count events (a user's repeats count again)."""
        del user_E
        return cls(np.bincount(item_E, minlength=num_items).astype(np.int64))

    def scores(self, histories: Histories) -> NDArray[np.float64]:
        """(B, N)."""
        return np.broadcast_to(self.counts_N.astype(np.float64), (len(histories), len(self.counts_N)))


@dataclass(frozen=True)
class ItemKNN:
    """Score of item j = sum over distinct history items i != j of cos(i, j), every item a neighbour.

    cos(i, j) = |V_i and V_j| / sqrt(|V_i| |V_j|), V_i the users of item i in training (Sarwar et al. 2001,
    binary). An item is not its own neighbour: else a kept history would fill the top of every list. An
    item without events in training scores 0. No N x N matrix is built: with R the users x items
    matrix of 1 / sqrt(|V_i|), the similarity is R^T R, applied from the right.

    Attributes:
        rated_VN: Sparse R.
        counts_N: |V_i|.
    """

    rated_VN: torch.Tensor
    counts_N: NDArray[np.int64]

    @classmethod
    def fit(cls, user_E: NDArray[np.int64], item_E: NDArray[np.int64], num_items: int) -> ItemKNN:
        """Build R from events; repeats collapse."""
        pairs = np.unique(user_E.astype(np.int64) * num_items + item_E)
        user, item = np.divmod(pairs, num_items)
        counts_N = np.bincount(item, minlength=num_items).astype(np.int64)
        num_users = int(user.max(initial=-1)) + 1
        rated_VN = torch.sparse_coo_tensor(
            torch.from_numpy(np.stack([user, item])),
            torch.from_numpy(1.0 / np.sqrt(counts_N[item])),
            size=(num_users, num_items),
            is_coalesced=True,  # np.unique sorted them
            check_invariants=False,
        )
        return cls(rated_VN, counts_N)

    def scores(self, histories: Histories) -> NDArray[np.float64]:
        """(B, N)."""
        num_items = len(self.counts_N)
        seen_BN = torch.zeros(len(histories), num_items, dtype=torch.float64)
        for row, history in enumerate(histories):
            seen_BN[row, torch.from_numpy(np.unique(history))] = 1
        reached_VB = torch.sparse.mm(self.rated_VN, seen_BN.T.contiguous())
        scores_BN = torch.sparse.mm(self.rated_VN.t(), reached_VB).T
        itself_BN = seen_BN * torch.from_numpy((self.counts_N > 0).astype(np.float64))
        return (scores_BN - itself_BN).numpy().round(TIE_DECIMALS)


BASELINES: dict[str, Callable[[NDArray[np.int64], NDArray[np.int64], int], Popularity | ItemKNN]] = {
    "popularity": Popularity.fit,
    "item_knn": ItemKNN.fit,
}


def rank(scores_BN: NDArray[np.float64], width: int, closed: Histories | None = None) -> NDArray[np.int64]:
    """Best `width` item rows of every user, descending, equal scores by row; -1 where items run out. (B, K)

    Args:
        scores_BN: One score per item.
        width: K.
        closed: Item rows that may not be listed, per user.
    """
    ranked_BK = np.full((len(scores_BN), width), -1, dtype=np.int64)
    num_items = scores_BN.shape[1]
    for row, scores_N in enumerate(scores_BN):
        open_N = np.ones(num_items, dtype=bool)
        if closed is not None:
            open_N[closed[row]] = False
        items = np.flatnonzero(open_N)
        scores = scores_N[items]
        if width < len(items):  # keep all that tie with the last place, so that the row decides among them
            reaches = scores >= np.partition(scores, -width)[-width]
            items, scores = items[reaches], scores[reaches]
        best = items[np.argsort(-scores, kind="stable")][:width]
        ranked_BK[row, : len(best)] = best
    return ranked_BK


def ranked_lists(
    model: Popularity | ItemKNN, histories: Histories, width: int
) -> Iterator[tuple[NDArray, NDArray]]:
    """Lists of both modes, block by block: (history removed, history kept), each (B, width)."""
    block = max(1, BLOCK_CELLS // len(model.counts_N))
    for start in range(0, len(histories), block):
        part = histories[start : start + block]
        scores_BN = model.scores(part)
        yield rank(scores_BN, width, part), rank(scores_BN, width)
