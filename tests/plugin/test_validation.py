"""Exact validation metrics from answers in verl's shape, each worked out by hand."""

from __future__ import annotations

from math import log2
from typing import Any

import pytest

from verl_recast.validation import beam_info, validation_metrics

A, B, C, D = (0, 0, 0), (0, 0, 1), (1, 2, 0), (2, 2, 2)


def metrics_of(
    answers: list[tuple[str, str, dict[str, Any]]], expected: dict[tuple[str, str], int]
) -> dict[str, float]:
    """Answers as (source, uid, info), in any order; verl keeps a column for each name."""
    names = sorted({name for _, _, info in answers for name in info})
    infos = {name: [info.get(name) for _, _, info in answers] for name in names}
    return validation_metrics([s for s, _, _ in answers], [u for _, u, _ in answers], infos, expected)


def beams(uid: str, listed: list[tuple[int, ...]], targets: list[tuple[int, ...]]) -> list[Any]:
    return [
        ("s", uid, {"hit": 1.0, **beam_info(codes, rank, targets, valid=codes != D)})
        for rank, codes in enumerate(listed)
    ]


def test_ranked_lists_give_pass_recall_and_ndcg() -> None:
    # u1: its target at rank 2 of 5 | u2: two of its three targets, at ranks 1 and 3 | u3: no answer at all
    answers = beams("u1", [A, B, C, (1, 1, 1), (1, 1, 2)], [B])
    answers += beams("u2", [C, A, B, (1, 1, 1), (1, 1, 2)], [C, B, (2, 2, 1)])
    answers = answers[::-1]  # they arrive in any order
    found = metrics_of(answers, {("s", "u1"): 5, ("s", "u2"): 5, ("s", "u3"): 5})
    ideal = 1 + 1 / log2(3) + 1 / log2(4)
    assert found["val-core/s/pass@1"] == pytest.approx((0 + 1 + 0) / 3)
    assert found["val-core/s/pass@5"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["val-core/s/recall@1"] == pytest.approx((0 + 1 / 3 + 0) / 3)
    assert found["val-core/s/recall@5"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["val-core/s/ndcg@1"] == pytest.approx((0 + 1 + 0) / 3)
    assert found["val-core/s/ndcg@5"] == pytest.approx((1 / log2(3) + (1 + 1 / log2(4)) / ideal + 0) / 3)
    assert found["val-aux/s/answers"] == 10 and found["val-aux/s/invalid"] == 0
    assert not [name for name in found if "@10" in name], "nobody has ten answers"


def test_an_answer_that_is_no_item_holds_its_rank_and_is_counted() -> None:
    found = metrics_of(beams("u", [D, A, A], [A, D]), {("s", "u"): 3})
    # D is a target by its codes and no item of the catalogue; A counts at its first place
    assert found["val-core/s/pass@1"] == 0
    assert found["val-aux/s/invalid"] == pytest.approx(1 / 3)
    assert beam_info(A, 2, [B, A, A], valid=True) == {"rank": 2, "target": 0, "num_targets": 2, "valid": 1}
    assert beam_info(D, 0, [B, D], valid=False)["target"] == -1


def test_samples_give_the_unbiased_pass_at_k_and_not_a_bootstrap() -> None:
    # ten samples: u1 hits with 2, u2 with none, u3 lost two of its ten and hits with 1
    def samples(uid: str, hits: int, count: int) -> list[Any]:
        return [("s", uid, {"hit": float(g < hits), "structural_score": 0.1}) for g in range(count)]

    answers = samples("u1", 2, 10) + samples("u2", 0, 10) + samples("u3", 1, 8)
    found = metrics_of(answers, {("s", uid): 10 for uid in ("u1", "u2", "u3")})
    assert found["val-core/s/pass@1"] == pytest.approx((2 / 10 + 0 + 1 / 10) / 3)
    # 1 - C(8, 5) / C(10, 5) = 1 - 56 / 252; 1 - C(9, 5) / C(10, 5) = 1 - 126 / 252
    assert found["val-core/s/pass@5"] == pytest.approx(((1 - 56 / 252) + 0 + (1 - 126 / 252)) / 3)
    assert found["val-core/s/pass@10"] == pytest.approx((1 + 0 + 1) / 3)
    assert found["val-aux/s/answers"] == 28


def test_sources_are_kept_apart() -> None:
    other = [("t", uid, info) for _, uid, info in beams("u2", [B], [A])]
    found = metrics_of([*beams("u1", [A], [A]), *other], {("s", "u1"): 1, ("t", "u2"): 1})
    assert found["val-core/s/pass@1"] == 1 and found["val-core/t/pass@1"] == 0
