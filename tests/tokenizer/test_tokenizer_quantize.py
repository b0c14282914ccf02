"""Residual k-means against a slow numpy assignment, and its refusals."""

import numpy as np
import pytest

from recast_cli.errors import DataError, RecipeError
from recast_cli.tokenizer.quantize import check_capacity, parse_codebook_sizes, reconstruct, residual_kmeans


def gaussian(num_items: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_items, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("num_items", "width", "sizes"), [(110, 16, (8, 5, 3)), (64, 3, (64, 2)), (40, 1, (6, 7))]
)
def test_codes_are_the_nearest_of_each_residual(num_items: int, width: int, sizes: tuple[int, ...]) -> None:
    x_ND = gaussian(num_items, width)
    found = residual_kmeans(x_ND, sizes, seed=3)
    total = np.sum((x_ND - x_ND.mean(0)) ** 2)
    for item in range(num_items):
        residual = x_ND[item].astype(np.float64)
        for level, book in enumerate(found.codebooks):
            distances = [np.sum((residual - vector) ** 2) for vector in book.astype(np.float64)]
            assert distances[found.codes_NL[item, level]] <= min(distances) + 1e-5
            residual = residual - book[found.codes_NL[item, level]]
    assert [len(book) for book in found.codebooks] == list(sizes)
    error = np.sum((x_ND - reconstruct(found.codes_NL, found.codebooks)) ** 2) / total
    assert found.errors[-1] == pytest.approx(error, rel=1e-4, abs=1e-6)
    assert list(found.errors) == sorted(found.errors, reverse=True)


def test_errors_by_hand() -> None:
    # Two tight pairs around 0 and 10, then the four offsets -1, +1 in each: exact after the second level.
    x_ND = np.array([[-1.0], [1.0], [9.0], [11.0]], dtype=np.float32)
    found = residual_kmeans(x_ND, (2, 2), seed=0)
    spread = 36 + 16 + 16 + 36  # around the mean 5
    assert found.errors == pytest.approx((4 / spread, 0.0), abs=1e-6)
    np.testing.assert_allclose(reconstruct(found.codes_NL, found.codebooks), x_ND, atol=1e-5)


def test_same_seed_same_codes_whatever_the_global_generators() -> None:
    x_ND = gaussian(60, 8)
    first = residual_kmeans(x_ND, (8, 8), seed=1)
    np.random.seed(99)
    again, other = residual_kmeans(x_ND, (8, 8), seed=1), residual_kmeans(x_ND, (8, 8), seed=2)
    np.testing.assert_array_equal(first.codes_NL, again.codes_NL)
    assert (first.codes_NL != other.codes_NL).any()


def test_input_is_left_alone() -> None:
    x_ND = gaussian(50, 4)
    before = x_ND.copy()
    residual_kmeans(x_ND, (4, 4, 4), seed=0)
    np.testing.assert_array_equal(x_ND, before)


@pytest.mark.parametrize(
    ("x_ND", "needle"),
    [
        (np.full((20, 4), np.nan, dtype=np.float32), "20 items hold NaN"),
        (np.vstack([gaussian(19, 4), [[1, np.inf, 0, 0]]]).astype(np.float32), "first item row 19"),
        (np.ones((20, 4), dtype=np.float32), "all 20 items are equal"),
        (np.empty((0, 4), dtype=np.float32), "(0, 4)"),
        (np.empty((4, 0), dtype=np.float32), "(4, 0)"),
    ],
)
def test_unusable_embeddings_are_named(x_ND: np.ndarray, needle: str) -> None:
    with pytest.raises(DataError) as caught:
        residual_kmeans(x_ND, (4, 4, 4), seed=0)
    assert needle in caught.value.message and caught.value.hint


def test_too_few_codes_or_items() -> None:
    check_capacity(27, (3, 3, 3))
    with pytest.raises(RecipeError, match="3 x 3 x 3 make 27 semantic IDs for 28 items"):
        check_capacity(28, (3, 3, 3))
    with pytest.raises(RecipeError, match="has 64 codes, but there are 63 items"):
        check_capacity(63, (64, 64))


@pytest.mark.parametrize(
    ("text", "levels", "sizes"), [("64", 3, (64, 64, 64)), (64, 1, (64,)), ("64, 32", 2, (64, 32))]
)
def test_codebook_sizes(text: str | int, levels: int, sizes: tuple[int, ...]) -> None:
    assert parse_codebook_sizes(text, levels) == sizes


@pytest.mark.parametrize(
    ("text", "levels", "needle"),
    [
        ("abc", 3, "'abc'"),
        ("64,32", 3, "2 codebook sizes for 3 levels"),
        ("1", 3, "is 1, needed at least 2"),
        ("64", 0, "levels is 0"),
        ("64", 27, "levels is 27"),
        ("64,", 2, "'64,'"),
    ],
)
def test_bad_codebook_sizes(text: str, levels: int, needle: str) -> None:
    with pytest.raises(RecipeError, match=needle):
        parse_codebook_sizes(text, levels)
