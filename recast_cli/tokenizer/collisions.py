"""One semantic ID per item: resolve collisions by capacity, level by level.

N items, D width, L levels, K codes of a level, M items that must move.

A prefix of l codes has room for as many items as there are ways to continue it. Going down from the root, the
items of an over-full prefix that fit it worst move to the nearest sibling code with room. At the last level
the room of a code is one item, so this is "the nearest free code"; at earlier levels it happens only where a
prefix is full.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Resolution:
    """Codes after the collisions are gone.

    Attributes:
        codes_NL: int64, rows distinct.
        moved_L: per level, how many items left their nearest code there.
    """

    codes_NL: NDArray[np.int64]
    moved_L: tuple[int, ...]


def resolve_collisions(
    embeddings_ND: NDArray[np.float32], codes_NL: NDArray[np.int64], codebooks: Sequence[NDArray[np.float32]]
) -> Resolution:
    """Give every item its own semantic ID.

    Of the items that share a code, the one nearest to it keeps it (ties: the lower row). Deterministic.
    The number of items moved at the last level is the smallest possible given the prefixes: one item stays on
    every used code.

    Args:
        embeddings_ND: what was quantised.
        codes_NL: nearest codes, from `residual_kmeans`.
        codebooks: per level (K, D); at least as many semantic IDs as items.
    """
    sizes = [len(book) for book in codebooks]
    assert math.prod(sizes) >= len(codes_NL), "check_capacity comes first"
    codes_NL = codes_NL.copy()
    residual_ND = np.array(embeddings_ND, dtype=np.float32)
    node_N = np.zeros(len(codes_NL), dtype=np.int64)  # which prefix an item is under, numbered without gaps
    displaced_N = np.zeros(len(codes_NL), dtype=bool)  # moved above: its nearest code here is no longer known
    moved = []
    for level, book in enumerate(codebooks):
        if displaced_N.any():
            codes_NL[displaced_N, level] = _squared_distances(residual_ND[displaced_N], book).argmin(axis=1)
        room = min(math.prod(sizes[level + 1 :]), len(codes_NL))
        rows_M = _move_overflow(codes_NL[:, level], residual_ND, node_N, book, room)
        displaced_N[rows_M] = True
        moved.append(len(rows_M))
        residual_ND -= book[codes_NL[:, level]]
        node_N = np.unique(node_N * sizes[level] + codes_NL[:, level], return_inverse=True)[1].reshape(-1)
    assert node_N.max() == len(node_N) - 1, "every item has its own semantic ID"
    return Resolution(codes_NL, tuple(moved))


def _move_overflow(
    code_N: NDArray[np.int64],
    residual_ND: NDArray[np.float32],
    node_N: NDArray[np.int64],
    book_KD: NDArray[np.float32],
    room: int,
) -> NDArray[np.int64]:
    """Move, in place, the items beyond `room` per (node, code) to the nearest code of the node with room.

    All nodes at once, in rounds: every item still to be placed asks for its nearest code with room, a code
    takes the nearest askers, the others ask again. At most K rounds.

    Returns:
        Rows of the moved items, ascending.
    """
    own_N = np.square(residual_ND - book_KD[code_N]).sum(axis=1)
    rows_M = np.sort(_beyond_room(node_N * len(book_KD) + code_N, own_N, room))
    if not len(rows_M):
        return rows_M
    # Rooms of the nodes with an overflow only: there may be far more nodes than that.
    nodes, local_M = np.unique(node_N[rows_M], return_inverse=True)
    local_M = local_M.reshape(-1)
    inside_N = np.isin(node_N, nodes)
    room_SK = np.full((len(nodes), len(book_KD)), room)
    np.subtract.at(room_SK, (np.searchsorted(nodes, node_N[inside_N]), code_N[inside_N]), 1)
    room_SK = np.maximum(room_SK, 0)

    distance_MK = _squared_distances(residual_ND[rows_M], book_KD)
    left = np.arange(len(rows_M))
    while len(left):
        allowed = np.where(room_SK[local_M[left]] > 0, distance_MK[left], np.inf)
        wanted = allowed.argmin(axis=1)
        cell = local_M[left] * len(book_KD) + wanted
        refused = _beyond_room(cell, allowed[np.arange(len(left)), wanted], room_SK.reshape(-1)[cell])
        placed = np.setdiff1d(np.arange(len(left)), refused, assume_unique=True)
        assert len(placed), "the codes of a node have room for all its items"
        code_N[rows_M[left[placed]]] = wanted[placed]
        np.subtract.at(room_SK, (local_M[left[placed]], wanted[placed]), 1)
        left = left[np.sort(refused)]
    return rows_M


def _beyond_room(
    cell_M: NDArray[np.int64], distance_M: NDArray[np.floating], room: int | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Positions of entries not among the `room` nearest of their cell (ties: the lower position stays)."""
    order = np.lexsort((distance_M, cell_M))  # stable, so equal distances keep their order
    sorted_cell = cell_M[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_cell, sorted_cell)
    return order[rank >= (room if isinstance(room, int) else room[order])]


def _squared_distances(rows_MD: NDArray[np.float32], book_KD: NDArray[np.float32]) -> NDArray[np.float64]:
    """Squared Euclidean distances (M, K), in float64 so that near ties do not depend on the BLAS."""
    rows, book = rows_MD.astype(np.float64), book_KD.astype(np.float64)
    return np.maximum(
        np.square(rows).sum(1)[:, None] - 2 * rows @ book.T + np.square(book).sum(1)[None, :], 0.0
    )
