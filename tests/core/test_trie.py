"""The trie against plain sets of tuples, over random catalogues of odd shapes."""

from __future__ import annotations

import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from recast_cli.core.trie import Trie

Catalogue = tuple[list[tuple[int, ...]], list[int]]


@st.composite
def catalogues(draw: st.DrawFn) -> Catalogue:
    """Unique semantic IDs in any order, and codebook sizes (codes 0 and K-1 are often unused)."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    one = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    return draw(st.lists(one, min_size=1, max_size=30, unique=True)), sizes


def build(catalogue: Catalogue) -> Trie:
    items, sizes = catalogue
    return Trie.from_codes(np.array(items), sizes)


def walk(trie: Trie, prefix: tuple[int, ...]) -> int:
    """Node of a prefix, code by code."""
    node = torch.zeros(1, dtype=torch.int64)
    for level, code in enumerate(prefix):
        node = trie.child(level, node, torch.tensor([code]))
    return int(node)


def prefixes(items: list[tuple[int, ...]], level: int) -> list[tuple[int, ...]]:
    return sorted({item[:level] for item in items})


def expected_mask(items: list[tuple[int, ...]], prefix: tuple[int, ...], size: int) -> list[bool]:
    level = len(prefix)
    following = {item[level] for item in items if item[:level] == prefix}
    return [code in following for code in range(size)]


def listed(choices: tuple[torch.Tensor, torch.Tensor]) -> list[list[int]]:
    """The open codes of each row."""
    return [codes[is_open].tolist() for codes, is_open in zip(*choices, strict=True)]


def expected_codes(items: list[tuple[int, ...]], prefix: tuple[int, ...]) -> list[int]:
    return sorted({item[len(prefix)] for item in items if item[: len(prefix)] == prefix})


@given(catalogues())
def test_masks_equal_set_membership(catalogue: Catalogue) -> None:
    items, sizes = catalogue
    trie = build(catalogue)
    assert trie.num_nodes == tuple(len(prefixes(items, level)) for level in range(len(sizes) + 1))
    for level, size in enumerate(sizes):
        rows = prefixes(items, level)
        nodes = torch.tensor([walk(trie, prefix) for prefix in rows])
        assert trie.mask(level, nodes).tolist() == [expected_mask(items, prefix, size) for prefix in rows]
        assert listed(trie.choices(level, nodes)) == [expected_codes(items, prefix) for prefix in rows]


@given(catalogues())
def test_every_path_is_an_item_and_every_item_is_reached(catalogue: Catalogue) -> None:
    items, sizes = catalogue
    trie = build(catalogue)
    found, frontier = {}, [((), 0)]
    while frontier:
        prefix, node = frontier.pop()
        if len(prefix) == len(sizes):
            found[prefix] = int(trie.items(torch.tensor([node])))
            continue
        level = len(prefix)
        for code in trie.mask(level, torch.tensor([node]))[0].nonzero()[:, 0].tolist():
            child = int(trie.child(level, torch.tensor([node]), torch.tensor([code])))
            frontier.append(((*prefix, code), child))
    assert found == {item: row for row, item in enumerate(items)}


@given(catalogues())
def test_child_and_mask_agree_on_every_code(catalogue: Catalogue) -> None:
    trie = build(catalogue)
    for level, size in enumerate(trie.codebook_sizes):
        nodes, codes = torch.meshgrid(
            torch.arange(trie.num_nodes[level]), torch.arange(-2, size + 2), indexing="ij"
        )
        nodes, codes = nodes.reshape(-1), codes.reshape(-1)
        found = trie.find(level, nodes, codes)
        inside = (codes >= 0) & (codes < size)
        legal = inside & trie.mask(level, nodes)[torch.arange(len(nodes)), codes.clamp(0, size - 1)]
        assert torch.equal(found >= 0, legal)
        assert sorted(found[legal].tolist()) == list(range(trie.num_nodes[level + 1]))
        for row in (~legal).nonzero()[:, 0].tolist():
            with pytest.raises(
                ValueError, match=f"node {nodes[row]} of level {level} has no code {codes[row]}"
            ):
                trie.child(level, nodes[row : row + 1], codes[row : row + 1])


@given(catalogues(), st.data())
def test_exclusion_equals_a_trie_without_those_items(catalogue: Catalogue, data: st.DataObject) -> None:
    items, sizes = catalogue
    trie = build(catalogue)
    some_rows = st.lists(st.integers(0, len(items) - 1), max_size=len(items) + 3)
    keeps_one = some_rows.filter(lambda rows: len(set(rows)) < len(items))
    requests = data.draw(st.lists(keeps_one, min_size=1, max_size=4))
    exclusion = trie.exclusion(requests)
    remaining = [[item for row, item in enumerate(items) if row not in rows] for rows in requests]
    for level, size in enumerate(sizes):
        rows = [
            (request, prefix) for request, kept in enumerate(remaining) for prefix in prefixes(kept, level)
        ]
        rows = data.draw(st.permutations(rows))  # requests may come in any order
        nodes = torch.tensor([walk(trie, prefix) for _, prefix in rows])
        asked = level, nodes, exclusion, torch.tensor([request for request, _ in rows])
        expected = [expected_mask(remaining[request], prefix, size) for request, prefix in rows]
        assert trie.mask(*asked).tolist() == expected
        codes = [expected_codes(remaining[request], prefix) for request, prefix in rows]
        assert listed(trie.choices(*asked)) == codes


@given(catalogues())
def test_lookup_finds_items_and_nothing_else(catalogue: Catalogue) -> None:
    items, sizes = catalogue
    every = list(np.ndindex(*sizes))
    found = build(catalogue).lookup(torch.tensor(every))
    assert found.tolist() == [items.index(codes) if codes in items else -1 for codes in every]


#   codes   row
#   0 0      2
#   0 2      0
#   2 1      1
SMALL = np.array([[0, 2], [2, 1], [0, 0]])


ROWS = torch.arange(2)


@pytest.fixture
def small() -> Trie:
    return Trie.from_codes(SMALL, [3, 4])


def test_layout_by_hand(small: Trie) -> None:
    assert [ptr.tolist() for ptr in small.ptr] == [[0, 2], [0, 2, 3]]
    assert [codes.tolist() for codes in small.codes] == [[0, 2], [0, 2, 1]]
    assert small.leaf_item.tolist() == [2, 0, 1]
    assert (small.num_nodes, small.num_items, small.num_levels, small.max_children) == (
        (1, 2, 3),
        3,
        2,
        (2, 2),
    )


def test_exclusion_by_hand(small: Trie) -> None:
    exclusion = small.exclusion([[1], [], [0, 0], [0, 2]])
    mask = small.mask(0, torch.zeros(4, dtype=torch.int64), exclusion, torch.arange(4))
    assert mask.int().tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 1], [0, 0, 1]]
    below = small.mask(1, torch.tensor([0, 0]), exclusion, torch.tensor([2, 1]))
    assert below.int().tolist() == [[1, 0, 0, 0], [1, 0, 1, 0]]
    for ask in (small.mask, small.choices):
        with pytest.raises(ValueError, match="row 1: node 0 of level 1 has no item left for its request"):
            ask(1, torch.tensor([0, 0]), exclusion, torch.tensor([0, 3]))


def test_choices_by_hand(small: Trie) -> None:
    codes, is_open = small.choices(1, torch.tensor([1, 0, 1]))
    assert codes.tolist() == [[1, 1], [0, 2], [1, 1]]  # the only child of node 1 fills its second lane
    assert is_open.tolist() == [[True, False], [True, True], [True, False]]
    codes, is_open = small.choices(0, torch.zeros(2, dtype=torch.int64), small.exclusion([[1], []]), ROWS)
    assert codes.tolist() == [[0, 2], [0, 2]]
    assert is_open.tolist() == [[True, False], [True, True]]


def test_no_requests_at_all(small: Trie) -> None:
    exclusion = small.exclusion([])
    none = torch.zeros(0, dtype=torch.int64)
    assert small.mask(0, none, exclusion, none).shape == (0, 3)
    assert small.mask(1, none).shape == (0, 4)
    assert small.choices(0, none, exclusion, none)[0].shape == (0, 2)


def test_exclusion_errors(small: Trie) -> None:
    with pytest.raises(ValueError, match="request 1 excludes the whole catalogue of 3 items"):
        small.exclusion([[0], [2, 1, 0]])
    with pytest.raises(ValueError, match=r"rows 0\.\.2, found 3"):
        small.exclusion([[0, 3]])
    with pytest.raises(ValueError, match=r"rows 0\.\.2, found -1"):
        small.exclusion([[-1]])
    root = torch.zeros(1, dtype=torch.int64)
    for history in ([1], []):  # with and without closed nodes at the root
        exclusion = small.exclusion([history])
        with pytest.raises(ValueError, match="no item left for its request"):
            small.mask(0, root, exclusion, torch.tensor([1]))
        with pytest.raises(ValueError, match="an exclusion needs request_R and the trie"):
            small.mask(0, root, exclusion)
        with pytest.raises(ValueError, match="an exclusion needs request_R and the trie"):
            Trie.from_codes(SMALL[:2], [3, 4]).mask(0, root, exclusion, root)
    with pytest.raises(ValueError, match="an exclusion needs request_R and the trie"):
        small.mask(0, root, None, root)


@pytest.mark.parametrize(("level", "node"), [(0, 1), (0, -1), (1, -1), (1, 2)])
def test_a_node_that_is_none_is_an_error(small: Trie, level: int, node: int) -> None:
    nodes = torch.tensor([0, node])
    with pytest.raises(ValueError, match=f"row 1: node {node} of level {level} does not exist"):
        small.mask(level, nodes)
    with pytest.raises(ValueError, match=f"row 1: node {node} of level {level}"):
        small.child(level, nodes, torch.zeros(2, dtype=torch.int64))
    assert small.find(level, nodes, torch.zeros(2, dtype=torch.int64)).tolist() == [0, -1]


def test_unknown_leaf_is_no_item(small: Trie) -> None:
    assert small.items(torch.tensor([0, -1, 2])).tolist() == [2, -1, 1]


def test_narrow_integers_are_accepted(small: Trie) -> None:
    nodes, codes = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2, 1], dtype=torch.uint8)
    assert small.child(1, nodes, codes).tolist() == [1, 2]
    assert torch.equal(small.mask(1, nodes), small.mask(1, nodes.long()))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 1], [2, 0], [0, 1]], r"items 0 and 2 share the semantic ID \(0, 1\)"),
        ([[0, 4]], r"level 1: codes must lie in 0\.\.3, found 4\.\.4"),
        ([[-1, 0]], r"level 0: codes must lie in 0\.\.2, found -1\.\.-1"),
        ([[0.0, 1.0]], "codes must be integers, found float64"),
        ([[0, 1, 2]], r"found \(1, 3\)"),
        (np.zeros((0, 2), dtype=int), r"found \(0, 2\)"),
    ],
)
def test_catalogues_that_cannot_be(codes: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trie.from_codes(np.array(codes), [3, 4])


@pytest.mark.parametrize("size", [256, 257, 32768, 32769])
def test_codes_survive_the_narrowest_type(size: int) -> None:
    trie = Trie.from_codes(np.array([[size - 1], [0]]), [size])
    assert trie.mask(0, torch.tensor([0]))[0].nonzero()[:, 0].tolist() == [0, size - 1]
    assert trie.lookup(torch.tensor([[0], [size - 1]])).tolist() == [1, 0]


@given(catalogues())
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, catalogue: Catalogue) -> None:
    trie, path = build(catalogue), tmp_path_factory.mktemp("trie") / "trie"
    trie.save(path)
    loaded = Trie.load(path)
    assert loaded.codebook_sizes == trie.codebook_sizes
    for mine, theirs in zip((*trie.ptr, *trie.codes), (*loaded.ptr, *loaded.codes), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert torch.equal(trie.leaf_item, loaded.leaf_item)
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_a_damaged_file_is_an_error(small: Trie, tmp_path) -> None:
    path = tmp_path / "trie.npz"
    small.save(path)
    whole = path.read_bytes()
    for content in (b"", b"not an archive", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"trie\.npz is not a trie"):
            Trie.load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ValueError, match="is not a trie"):
        Trie.load(path)
    small.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    shorter = {name: arrays[name][:-1] for name in ("leaf_item", "ptr_0", "codes_0")}
    for damage in (*({name: array} for name, array in shorter.items()), {"ptr_0": arrays["ptr_0"] + [0, 1]}):
        np.savez(path, **(arrays | damage))
        with pytest.raises(ValueError, match="its levels do not fit together"):
            Trie.load(path)
    with pytest.raises(FileNotFoundError):
        Trie.load(tmp_path / "none.npz")


def test_pickle_and_device(small: Trie) -> None:
    assert small.max_children == (2, 2)  # a cached value must not hinder the copy
    copy = pickle.loads(pickle.dumps(small))
    assert copy.lookup(torch.from_numpy(SMALL)).tolist() == [0, 1, 2]
    assert small.to("cpu") is small
    assert small.to("meta").device.type == "meta"


@pytest.mark.parametrize(("size", "most"), [(256, 3), (8192, 10)])
def test_bytes_per_item(size: int, most: int) -> None:
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, size, (200_000, 3)), axis=0)
    trie = Trie.from_codes(rng.permutation(codes), [size] * 3)
    assert sum(array.nbytes for array in (*trie.ptr, *trie.codes)) <= most * len(codes)


class CountOperators(TorchDispatchMode):
    """Tensor operators run inside the block, and Python lines of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.lines = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return func(*args, **(kwargs or {}))

    def trace(self, frame, event: str, argument):
        self.lines += event == "line" and "recast_cli" in frame.f_code.co_filename
        return self.trace


def test_the_mask_has_no_loop_over_rows() -> None:
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 16, (1000, 3)), axis=0)
    trie = Trie.from_codes(codes, [16] * 3)
    closed = trie.exclusion([[0], [1, 2]])
    counts = set()
    for num_rows in (2, 2000):
        nodes, request = torch.arange(num_rows) % 16, torch.arange(num_rows) % 2
        trie.mask(1, nodes, closed, request)  # what is cached is cached
        before = sys.gettrace()
        with CountOperators() as counted:
            sys.settrace(counted.trace)
            try:
                trie.mask(1, nodes, closed, request)
                trie.find(1, nodes, nodes)
            finally:
                sys.settrace(before)
        counts.add((counted.operators, counted.lines))
    ((operators, lines),) = counts
    assert operators > 10 and lines > 10
