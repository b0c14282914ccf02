"""Items closed to single requests, such as a user's history: which nodes of the trie close with them.

Shapes: N items, L levels, R rows of one call, D lanes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Exclusion:
    """Nodes closed to single requests, because every item below them is excluded. Made by `Trie.exclusion`.

    Attributes:
        num_requests: Requests it was built for; request_R of `Trie.mask` counts into them.
        num_nodes: Nodes of each level of the trie it was built for.
        keys: For l = 0..L-1, ascending `request * num_nodes[l + 1] + node` of the closed nodes of level l+1.
    """

    num_requests: int
    num_nodes: tuple[int, ...]
    keys: tuple[torch.Tensor, ...]

    def to(self, device: torch.device | str) -> Exclusion:
        """The same exclusion on another device."""
        return Exclusion(self.num_requests, self.num_nodes, tuple(key.to(device) for key in self.keys))

    def is_closed(self, level: int, children_RD: torch.Tensor, request_R: torch.Tensor) -> torch.Tensor:
        """Whether nodes of level `level` + 1 are closed to the request of their row, bool (R, D).

        A request it was not built for has everything closed: a wrong number must not open the history again.
        """
        keys, known_R = self.keys[level], (request_R >= 0) & (request_R < self.num_requests)
        wanted_RD = request_R[:, None] * self.num_nodes[level + 1] + children_RD
        if not len(keys):
            return ~known_R[:, None].expand_as(wanted_RD)
        found_RD = keys[torch.searchsorted(keys, wanted_RD).clamp(max=len(keys) - 1)]
        return (found_RD == wanted_RD) | ~known_R[:, None]


def close_items(
    item_rows_per_request: Sequence[Sequence[int] | np.ndarray], leaf_N: np.ndarray, ptr: Sequence[np.ndarray]
) -> Exclusion:
    """Close leaves, then level by level every node all of whose children are closed; see `Trie.exclusion`.

    Args:
        item_rows_per_request: Item rows, one list per request.
        leaf_N: Leaf of each item.
        ptr: `Trie.ptr` on the host.
    """
    num_requests, num_items = len(item_rows_per_request), len(leaf_N)
    num_nodes = (*(len(level_ptr) - 1 for level_ptr in ptr), num_items)
    rows = [np.asarray(rows, dtype=np.int64).reshape(-1) for rows in item_rows_per_request]
    requests = np.repeat(np.arange(num_requests), np.array([len(row) for row in rows], dtype=np.int64))
    flat = np.concatenate([*rows, np.empty(0, dtype=np.int64)])
    outside = flat[(flat < 0) | (flat >= num_items)]
    if len(outside):
        raise ValueError(f"excluded items must be rows 0..{num_items - 1}, found {outside[0]}")
    closed = np.unique(requests * num_items + leaf_N[flat])
    keys = [closed]
    for level in range(len(ptr) - 1, -1, -1):
        request, child = np.divmod(closed, num_nodes[level + 1])
        parent = np.searchsorted(ptr[level], child, side="right") - 1
        packed, num_closed = np.unique(request * num_nodes[level] + parent, return_counts=True)
        closed = packed[num_closed == np.diff(ptr[level])[packed % num_nodes[level]]]
        keys.append(closed)
    if len(keys.pop()):  # the root, whose key is the request itself
        raise ValueError(f"request {closed[0]} excludes the whole catalogue of {num_items} items")
    return Exclusion(num_requests, num_nodes, tuple(torch.from_numpy(key) for key in reversed(keys)))
