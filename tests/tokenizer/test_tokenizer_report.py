"""The quality numbers as arithmetic."""

from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pytest

from recast_cli.tokenizer import report
from recast_cli.tokenizer.collisions import resolve_collisions
from recast_cli.tokenizer.quantize import Quantization


def test_perplexity_of_a_histogram() -> None:
    codes = np.array([0] * 4 + [1] * 2 + [3] * 2)  # shares 1/2, 1/4, 0, 1/4
    entropy = -(1 / 2 * log(1 / 2) + 1 / 4 * log(1 / 4) + 1 / 4 * log(1 / 4))
    assert report.perplexity(codes, 4) == pytest.approx(exp(entropy))
    assert report.perplexity(codes, 400) == pytest.approx(2 * sqrt(2))  # unused codes do not count
    assert report.perplexity(np.arange(16), 16) == pytest.approx(16)
    assert report.perplexity(np.zeros(5, dtype=int), 16) == pytest.approx(1)
    assert report.utilisation(codes, 4) == 3 / 4


def test_collisions_by_hand() -> None:
    codes = np.array([[0, 1], [0, 1], [0, 1], [2, 2], [2, 2], [3, 0]])
    assert report.collisions(codes) == {
        "colliding_items": 6 - 3,
        "unique_share": 1 / 6,
        "largest_group": 3,
    }


def test_relative_error_and_cosine_by_hand() -> None:
    x_ND = np.array([[0, 0], [2, 0], [0, 4], [2, 4]], dtype=np.float32)  # mean (1, 2): each 1 + 4 away
    r_ND = np.array([[0, 0], [2, 0], [0, 3], [1, 4]], dtype=np.float32)
    assert report.relative_error(x_ND, r_ND) == pytest.approx((1 + 1) / (4 * 5))
    cosines = [0, 1, 1, (2 * 1 + 4 * 4) / (sqrt(20) * sqrt(17))]  # a zero vector counts as 0
    assert report.mean_cosine(x_ND, r_ND) == pytest.approx(sum(cosines) / 4)


def test_quality_tells_before_from_after(tmp_path: Path) -> None:
    books = (np.array([[0], [1], [5], [9]], dtype=np.float32),)
    x_ND = np.array([[0.4], [0.1], [1.2]], dtype=np.float32)
    codes = np.array([[0], [0], [1]])
    spread = sum((value - 1.7 / 3) ** 2 for value in (0.4, 0.1, 1.2))
    left = 0.4**2 + 0.1**2 + 0.2**2
    nearest = Quantization(codes, books, (left / spread,))
    resolved = resolve_collisions(x_ND, codes, books)
    facts = report.quality(x_ND, nearest, resolved)
    assert (facts["before"]["colliding_items"], facts["after"]["colliding_items"]) == (1, 0)
    assert facts["before"]["relative_error"] == pytest.approx(left / spread)
    assert facts["after"]["relative_error"] == pytest.approx((4.6**2 + 0.1**2 + 0.2**2) / spread)
    (level,) = facts["levels"]
    assert level["perplexity"] == pytest.approx(3)
    assert level["perplexity_before"] == pytest.approx(3 / 2 ** (2 / 3))  # shares 2/3, 1/3
    assert (level["utilisation"], level["moved_items"]) == (3 / 4, 1)

    report.draw(tmp_path / "a.png", facts, resolved.codes_NL)
    report.draw(tmp_path / "b.png", facts, resolved.codes_NL)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
def test_a_code_for_each_item_leaves_nothing_to_draw(tmp_path: Path) -> None:
    x_ND = np.array([[0.0], [1.0], [5.0]], dtype=np.float32)
    codes = np.array([[0], [1], [2]])
    resolved = resolve_collisions(x_ND, codes, (x_ND,))
    facts = report.quality(x_ND, Quantization(codes, (x_ND,), (0.0,)), resolved)
    assert facts["after"]["relative_error"] == 0
    report.draw(tmp_path / "quality.png", facts, resolved.codes_NL)
