"""The catalogue as a trie over semantic IDs: which codes may follow a partial answer.

One sorted CSR array per level. The children of node n of level l are the nodes of level l+1 from `ptr[l][n]`
up to `ptr[l][n + 1]`, their codes ascending. Level 0 has one node, the root; the nodes of level L are the
leaves, one per item. The trie keeps no state: a node goes in, a mask comes out.

Shapes: N items, L levels, R rows of one call, K codes of the level's codebook, D most children of any node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from recast_cli.core.exclusion import Exclusion, close_items


@dataclass(frozen=True)
class Trie:
    """Children of every node, level by level; see the module's first lines for the layout.

    Attributes:
        codebook_sizes: K of each level.
        ptr: L int32 tensors, `ptr[l]` of length num_nodes[l] + 1.
        codes: L tensors of the narrowest type that holds K, `codes[l]` of length num_nodes[l + 1].
        leaf_item: int32 (N,), item row of each leaf.
    """

    codebook_sizes: tuple[int, ...]
    ptr: tuple[torch.Tensor, ...]
    codes: tuple[torch.Tensor, ...]
    leaf_item: torch.Tensor

    @classmethod
    def from_codes(cls, codes_NL: np.ndarray, codebook_sizes: Sequence[int]) -> Trie:
        """Build the trie of a catalogue; row i of `codes_NL` is the semantic ID of item i.

        Raises:
            ValueError: no items, a code outside its codebook, or two items with one semantic ID.
        """
        codes_NL = np.asarray(codes_NL)
        sizes = tuple(int(size) for size in codebook_sizes)
        _check_codes(codes_NL, sizes)
        # Narrow columns let numpy sort by radix.
        columns = [codes_NL[:, level].astype(_narrow(size)) for level, size in enumerate(sizes)]
        order = np.lexsort(columns[::-1])
        columns = [column[order] for column in columns]
        is_new_N = np.zeros(len(order), dtype=bool)
        is_new_N[0] = True  # leaves are sorted; a node begins where its prefix differs from the row above
        starts, ptr, codes = np.zeros(1, dtype=np.int64), [], []
        for column in columns:
            is_new_N[1:] |= column[1:] != column[:-1]
            child_starts = np.flatnonzero(is_new_N)
            first_child = np.searchsorted(child_starts, starts)
            ptr.append(np.append(first_child, len(child_starts)).astype(np.int32))
            codes.append(column[child_starts])
            starts = child_starts
        if not is_new_N.all():
            second = int(np.flatnonzero(~is_new_N)[0])
            raise ValueError(
                f"items {order[second - 1]} and {order[second]} share the semantic ID "
                f"{tuple(codes_NL[order[second]].tolist())}; every item needs its own"
            )
        return cls._from_arrays(sizes, ptr, codes, order.astype(np.int32))

    @classmethod
    def _from_arrays(
        cls, sizes: tuple[int, ...], ptr: list[np.ndarray], codes: list[np.ndarray], leaf_item: np.ndarray
    ) -> Trie:
        ptr_tensors, code_tensors = (tuple(map(torch.from_numpy, arrays)) for arrays in (ptr, codes))
        return cls(sizes, ptr_tensors, code_tensors, torch.from_numpy(leaf_item))

    @property
    def num_levels(self) -> int:
        return len(self.codebook_sizes)

    @property
    def num_items(self) -> int:
        return len(self.leaf_item)

    @cached_property
    def num_nodes(self) -> tuple[int, ...]:
        """Nodes of levels 0..L (the last are the leaves)."""
        return (1, *(len(codes) for codes in self.codes))

    @cached_property
    def max_children(self) -> tuple[int, ...]:
        """Most children of any node, levels 0..L-1."""
        return tuple(int(ptr.diff().max()) for ptr in self.ptr)

    @cached_property
    def _host_ptr(self) -> tuple[np.ndarray, ...]:
        return tuple(ptr.cpu().numpy() for ptr in self.ptr)

    @cached_property
    def _item_leaf(self) -> np.ndarray:
        leaf_item = self.leaf_item.cpu().numpy()
        item_leaf = np.empty(len(leaf_item), dtype=np.int64)
        item_leaf[leaf_item] = np.arange(len(leaf_item))
        return item_leaf

    @property
    def device(self) -> torch.device:
        return self.leaf_item.device

    def to(self, device: torch.device | str) -> Trie:
        """The same trie on another device (itself, if it is there already)."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = [tuple(array.to(device) for array in arrays) for arrays in (self.ptr, self.codes)]
        return Trie(self.codebook_sizes, moved[0], moved[1], self.leaf_item.to(device))

    def save(self, path: Path | str) -> None:
        """Write the trie as one `.npz`; equal tries give equal bytes."""
        arrays = {"codebook_sizes": np.asarray(self.codebook_sizes, dtype=np.int64)}
        arrays["leaf_item"] = self.leaf_item.cpu().numpy()
        for level in range(self.num_levels):
            arrays[f"ptr_{level}"] = self.ptr[level].cpu().numpy()
            arrays[f"codes_{level}"] = self.codes[level].cpu().numpy()
        with Path(path).open("wb") as handle:  # a handle: given a name, numpy may append a suffix
            np.savez(handle, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> Trie:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                sizes = tuple(file["codebook_sizes"].tolist())
                ptr = [file[f"ptr_{level}"] for level in range(len(sizes))]
                codes = [file[f"codes_{level}"] for level in range(len(sizes))]
                leaf_item = file["leaf_item"]
        except (KeyError, BadZipFile, EOFError, TypeError, ValueError) as exc:
            raise ValueError(f"{path} is not a trie: {exc}") from exc
        num_nodes = [1, *(len(array) for array in codes)]
        whole = num_nodes[-1] == len(leaf_item) > 0 and all(
            len(ptr[level]) == num_nodes[level] + 1 and ptr[level][-1] == num_nodes[level + 1]
            for level in range(len(sizes))
        )
        if not whole:
            raise ValueError(f"{path} is not a trie: its levels do not fit together")
        return cls._from_arrays(sizes, ptr, codes, leaf_item)

    def mask(
        self,
        level: int,
        nodes_R: torch.Tensor,
        exclusion: Exclusion | None = None,
        request_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Codes that may follow each node: bool (R, K), True = allowed.

        Args:
            level: Level of `nodes_R`, 0..L-1.
            nodes_R: Nodes of that level (0 at level 0).
            exclusion: Nodes closed to single requests.
            request_R: Request of each row; needed with `exclusion`.

        Raises:
            ValueError: a row with no allowed code: its node is none of this level, or all below is excluded.
        """
        codes_RD, allowed_RD, _ = self._lanes(level, nodes_R, exclusion, request_R)
        shape = len(codes_RD), self.codebook_sizes[level]
        mask_RK = torch.zeros(shape, dtype=torch.bool, device=self.device)
        mask_RK.scatter_(1, codes_RD, allowed_RD)
        return mask_RK.expand(len(nodes_R), -1)

    def choices(
        self,
        level: int,
        nodes_R: torch.Tensor,
        exclusion: Exclusion | None = None,
        request_R: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`mask` as a list, short where a codebook is large: codes, and which of them may follow.

        Args:
            level, nodes_R, exclusion, request_R: As of `mask`, whose errors are these too.

        Returns:
            int64 (R, D), ascending, the last one repeated; bool (R, D), False for repetitions.
        """
        codes_RD, allowed_RD, is_child_RD = self._lanes(level, nodes_R, exclusion, request_R)
        shape = len(nodes_R), -1
        return codes_RD.expand(shape), (allowed_RD & is_child_RD).expand(shape)

    def _lanes(
        self,
        level: int,
        nodes_R: torch.Tensor,
        exclusion: Exclusion | None,
        request_R: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of each node's children, whether they may follow, and False past the last, which is repeated.

        All (R, D); (1, D) where all rows are the root and nothing is excluded.
        """
        is_node_R = (nodes_R >= 0) & (nodes_R < self.num_nodes[level])
        if self.num_nodes[level] == 1 and exclusion is None and bool(is_node_R.all()):
            nodes_R, is_node_R = nodes_R[:1], is_node_R[:1]  # the root: one row serves all
        begin_R, end_R = self._children(level, nodes_R)
        lanes_RD = begin_R[:, None] + torch.arange(self.max_children[level], device=self.device)
        # Lanes past the last child repeat it: all that write one code write the same, so their order is free.
        children_RD = torch.minimum(lanes_RD, end_R[:, None] - 1)
        allowed_RD = is_node_R[:, None].expand_as(children_RD)
        if exclusion is not None or request_R is not None:
            if exclusion is None or request_R is None or exclusion.num_nodes != self.num_nodes:
                raise ValueError("an exclusion needs request_R and the trie that it was built for")
            allowed_RD = allowed_RD & ~exclusion.is_closed(level, children_RD, request_R)
        if not bool((is_node_R if exclusion is None else allowed_RD.any(dim=1)).all()):
            row = int((~allowed_RD.any(dim=1)).nonzero()[0])
            node = f"row {row}: node {int(nodes_R[row])} of level {level}"
            raise ValueError(
                f"{node} has no item left for its request" if is_node_R[row] else f"{node} does not exist"
            )
        return self.codes[level][children_RD].long(), allowed_RD, lanes_RD < end_R[:, None]

    def find(self, level: int, nodes_R: torch.Tensor, codes_R: torch.Tensor) -> torch.Tensor:
        """Node of the next level that each code leads to; -1 where there is none, or no such node."""
        known_R = (nodes_R >= 0) & (nodes_R < self.num_nodes[level])
        low_R, end_R = self._children(level, nodes_R)
        high_R = end_R
        for _ in range(self.max_children[level].bit_length()):  # binary search, every row at once
            middle_R = (low_R + high_R) // 2
            inside_R = low_R < high_R
            below_R = inside_R & (self._code(level, middle_R) < codes_R)
            low_R = torch.where(below_R, middle_R + 1, low_R)
            high_R = torch.where(inside_R & ~below_R, middle_R, high_R)
        hit_R = known_R & (low_R < end_R) & (self._code(level, low_R) == codes_R)
        return torch.where(hit_R, low_R, -1)

    def child(self, level: int, nodes_R: torch.Tensor, codes_R: torch.Tensor) -> torch.Tensor:
        """Like `find`, but a code the trie does not have there is an error.

        Raises:
            ValueError: naming the first illegal row.
        """
        children_R = self.find(level, nodes_R, codes_R)
        if bool((children_R < 0).any()):
            row = int((children_R < 0).nonzero()[0])
            node, code = int(nodes_R[row]), int(codes_R[row])
            raise ValueError(f"row {row}: node {node} of level {level} has no code {code}")
        return children_R

    def lookup(self, codes_RL: torch.Tensor) -> torch.Tensor:
        """Item row of each semantic ID, -1 where it is none of the catalogue."""
        nodes_R = torch.zeros(len(codes_RL), dtype=torch.int64, device=self.device)
        for level in range(self.num_levels):
            nodes_R = self.find(level, nodes_R, codes_RL[:, level].to(self.device))
        return self.items(nodes_R)

    def items(self, leaves_R: torch.Tensor) -> torch.Tensor:
        """Item row (int64) of each leaf; -1 stays -1."""
        return torch.where(leaves_R >= 0, self.leaf_item[leaves_R.clamp(min=0)].long(), -1)

    def exclusion(self, item_rows_per_request: Sequence[Sequence[int] | np.ndarray]) -> Exclusion:
        """Close, per request, the given items and every node all of whose items are closed.

        Args:
            item_rows_per_request: Item rows to keep out, one list per request; repeats are harmless.

        Raises:
            ValueError: a row that is no item, or a request that excludes the whole catalogue.
        """
        exclusion = close_items(item_rows_per_request, self._item_leaf, self._host_ptr)
        return exclusion.to(self.device)

    def _children(self, level: int, nodes_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First child and one past the last; of any node where `nodes_R` are none."""
        nodes_R, ptr = nodes_R.long().clamp(0, self.num_nodes[level] - 1), self.ptr[level]
        return ptr[nodes_R].long(), ptr[nodes_R + 1].long()

    def _code(self, level: int, children_R: torch.Tensor) -> torch.Tensor:
        return self.codes[level][children_R.clamp(max=self.num_nodes[level + 1] - 1)].long()


def _narrow(size: int) -> type[np.integer]:
    """Narrowest type for codes 0..size-1 that both numpy and torch can index with ease."""
    return np.uint8 if size <= 1 << 8 else np.int16 if size <= 1 << 15 else np.int32


def _check_codes(codes_NL: np.ndarray, sizes: tuple[int, ...]) -> None:
    if codes_NL.ndim != 2 or codes_NL.shape[1] != len(sizes) or not len(codes_NL) or not sizes:
        raise ValueError(
            f"need codes of shape (at least 1 item, {len(sizes)} levels), found {codes_NL.shape}"
        )
    if codes_NL.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers, found {codes_NL.dtype}")
    for level, size in enumerate(sizes):
        low, high = int(codes_NL[:, level].min()), int(codes_NL[:, level].max())
        if low < 0 or high >= size:
            raise ValueError(f"level {level}: codes must lie in 0..{size - 1}, found {low}..{high}")
