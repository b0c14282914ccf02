"""Collisions: worked by hand, against a slow reference, and at saturation."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recast_cli.tokenizer.collisions import resolve_collisions
from recast_cli.tokenizer.quantize import reconstruct


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def nearest_codes(x_ND: np.ndarray, books: list[np.ndarray]) -> np.ndarray:
    residual, codes = x_ND.astype(np.float64), []
    for book in books:
        codes.append(((residual[:, None] - book[None]) ** 2).sum(-1).argmin(1))
        residual = residual - book[codes[-1]]
    return np.stack(codes, axis=1)


def test_the_farther_of_two_gets_the_nearest_free_code() -> None:
    # Codes at 0, 1, 5, 9. Items 0.1 and 0.4 share code 0, and 1.2 has code 1: 0.4 gets the next, 5.
    books = [column(0, 1, 5, 9)]
    x_ND = column(0.4, 0.1, 1.2)
    codes = nearest_codes(x_ND, books)
    assert codes[:, 0].tolist() == [0, 0, 1]
    found = resolve_collisions(x_ND, codes, books)
    assert found.codes_NL[:, 0].tolist() == [2, 0, 1]
    assert found.moved_L == (1,)
    assert codes[:, 0].tolist() == [0, 0, 1], "the input is left alone"


def test_two_movers_want_one_free_code() -> None:
    # Codes 0, 2, 10. Items 0.0 stays; 0.5 and 0.9 both want code 1: 0.9 is nearer to it, 0.5 goes to 10.
    books = [column(0, 2, 10)]
    x_ND = column(0.0, 0.5, 0.9)
    found = resolve_collisions(x_ND, nearest_codes(x_ND, books), books)
    assert found.codes_NL[:, 0].tolist() == [0, 2, 1]
    assert found.moved_L == (2,)


def test_equal_items_keep_row_order() -> None:
    books = [column(0, 10), column(-1, 0, 1)]
    x_ND = column(0, 0, 0)
    found = resolve_collisions(x_ND, nearest_codes(x_ND, books), books)
    # Row 0 keeps the nearest second code; -1 and 1 are equally far, so row 1 takes the lower code.
    assert found.codes_NL.tolist() == [[0, 1], [0, 0], [0, 2]]


def test_a_full_prefix_overflows_one_level_up() -> None:
    # Prefix 0 (at 0) has room for two items, three want it: 0.9 fits worst and moves to prefix 1 (at 10),
    # where its residual is -9.1, so its second code is that of -1.
    books = [column(0, 10), column(-1, 1)]
    x_ND = column(0.1, 0.2, 0.9)
    found = resolve_collisions(x_ND, nearest_codes(x_ND, books), books)
    assert found.moved_L == (1, 1)
    assert found.codes_NL[2].tolist() == [1, 0]
    assert sorted(found.codes_NL[:2].tolist()) == [[0, 0], [0, 1]]
    # 0.2 is nearer to the code of 1 (both want it), 0.1 gets the other.
    assert found.codes_NL[1].tolist() == [0, 1]


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(2, 4), min_size=1, max_size=3),
    fill=st.floats(0.5, 1.0),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_every_item_has_its_own_near_saturation(
    sizes: list[int], fill: float, seed: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    num_items = max(1, round(fill * math.prod(sizes)))
    books = [rng.standard_normal((size, 2)).astype(np.float32) for size in sizes]
    x_ND = (spread * rng.standard_normal((num_items, 2))).astype(np.float32)
    codes = nearest_codes(x_ND, books)
    found = resolve_collisions(x_ND, codes, books)
    assert len(np.unique(found.codes_NL, axis=0)) == num_items
    assert (found.codes_NL >= 0).all() and (found.codes_NL < np.array(sizes)).all()
    np.testing.assert_array_equal(found.codes_NL, resolve_collisions(x_ND, codes, books).codes_NL)


def slow_last_level(x_ND: np.ndarray, codes_NL: np.ndarray, books: list[np.ndarray]) -> np.ndarray:
    """Plain loops over prefixes and rounds, for catalogues where no prefix is full."""
    codes = codes_NL.copy()
    residual = x_ND - reconstruct(codes[:, :-1], books[:-1]) if len(books) > 1 else x_ND
    cost = ((residual[:, None].astype(np.float64) - books[-1][None]) ** 2).sum(-1)
    for prefix in {tuple(row) for row in codes[:, :-1].tolist()}:
        members = [item for item in range(len(codes)) if tuple(codes[item, :-1].tolist()) == prefix]
        owner: dict[int, int] = {}
        for item in sorted(members, key=lambda item: (cost[item, codes[item, -1]], item)):
            owner.setdefault(int(codes[item, -1]), item)
        waiting = [item for item in members if item not in owner.values()]
        while waiting:
            free = [code for code in range(len(books[-1])) if code not in owner]
            wants = {item: min(free, key=lambda code: (cost[item, code], code)) for item in waiting}
            for item in sorted(waiting, key=lambda item: (cost[item, wants[item]], item)):
                owner.setdefault(wants[item], item)
            waiting = [item for item in waiting if item not in owner.values()]
        for code, item in owner.items():
            codes[item, -1] = code
    return codes


def test_matches_plain_loops() -> None:
    rng = np.random.default_rng(5)
    for num_items, sizes in [(40, (64,)), (60, (4, 40)), (150, (5, 6, 64))]:
        books = [
            rng.standard_normal((size, 3)).astype(np.float32) / (level + 1)
            for level, size in enumerate(sizes)
        ]
        x_ND = rng.standard_normal((num_items, 3)).astype(np.float32) * 0.7
        codes = nearest_codes(x_ND, books)
        found = resolve_collisions(x_ND, codes, books)
        assert not any(found.moved_L[:-1]), "no prefix is full here"
        assert found.moved_L[-1] == num_items - len(np.unique(codes, axis=0)) > 0
        np.testing.assert_array_equal(found.codes_NL, slow_last_level(x_ND, codes, books))


def test_ten_thousand_items_are_quick() -> None:
    import time

    rng = np.random.default_rng(0)
    books = [rng.standard_normal((24, 8)).astype(np.float32) / (level + 1) for level in range(3)]
    x_ND = rng.standard_normal((10_000, 8)).astype(np.float32)
    codes = nearest_codes(x_ND, books)
    started = time.process_time()
    found = resolve_collisions(x_ND, codes, books)
    assert time.process_time() - started < 20
    assert len(np.unique(found.codes_NL, axis=0)) == 10_000
