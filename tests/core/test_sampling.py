"""Sampling inside the catalogue against exact probabilities of plain forwards."""

from __future__ import annotations

import itertools
from collections import Counter
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2
from tiny_models import (
    CODES,
    OFFSETS,
    PAD,
    PROMPTS,
    SIZES,
    plain_log_probs,
    plain_trie_log_probs,
    tiny,
    uniforms,
)

from recast_cli.core.beam_search import beam_search
from recast_cli.core.sampling import _draw, nucleus, sample
from recast_cli.core.trie import Trie


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_log_probs_of_samples_equal_a_plain_forward(family: str, temperature: float, trie: Trie) -> None:
    model = tiny(family)
    rollouts = sample(
        model, trie, OFFSETS, PROMPTS, uniforms(4, 12), temperature=temperature, pad_token_id=PAD
    )
    for row, group in itertools.product(range(4), range(12)):
        codes = rollouts.codes_BGL[row, group]
        plain = plain_log_probs(model, PROMPTS[row], codes, temperature)
        full = torch.stack([plain[level, OFFSETS[level] + code] for level, code in enumerate(codes)])
        among = torch.tensor(plain_trie_log_probs(model, PROMPTS[row], codes, CODES, temperature))
        torch.testing.assert_close(rollouts.log_probs_BGL[row, group], full, atol=1e-5, rtol=0)
        torch.testing.assert_close(rollouts.trie_log_probs_BGL[row, group], among, atol=1e-5, rtol=0)
        assert CODES[rollouts.items_BG[row, group]].tolist() == codes.tolist()


@pytest.mark.parametrize("closed", [[], [0, 3, 4, 11]])
def test_sampled_frequencies_match_exact_item_probabilities(model, trie: Trie, closed: list[int]) -> None:
    num_draws, prompt, heat = 40_000, PROMPTS[2], 2.0  # flat enough for every item to be drawn
    rollouts = sample(
        model,
        trie,
        OFFSETS,
        [prompt],
        uniforms(1, num_draws),
        temperature=heat,
        pad_token_id=PAD,
        exclusion=trie.exclusion([closed]),
    )
    open_rows = [row for row in range(len(CODES)) if row not in closed]
    expected = {
        row: num_draws * np.exp(sum(plain_trie_log_probs(model, prompt, CODES[row], CODES[open_rows], heat)))
        for row in open_rows
    }
    assert sum(expected.values()) == pytest.approx(num_draws, rel=1e-5)
    found = Counter(rollouts.items_BG[0].tolist())
    assert set(found) <= set(open_rows)
    statistic = sum((found[row] - count) ** 2 / count for row, count in expected.items())
    assert min(expected.values()) > 5 and len(expected) > 20  # the bound below is chi-square's
    assert statistic < chi2.ppf(0.999, df=len(expected) - 1)


def test_nucleus_by_hand() -> None:
    probs = torch.tensor([[[0.25, 0.0, 0.5, 0.25]], [[0.1, 0.7, 0.2, 0.0]]])
    # .5 reaches .4; .5 and the first .25 reach .6 (of equal codes the lower); all three are needed for .8
    kept = {
        0.4: [0, 0, 1, 0],
        0.6: [1 / 3, 0, 2 / 3, 0],
        0.8: [0.25, 0, 0.5, 0.25],
        1.0: [0.25, 0, 0.5, 0.25],
    }
    for top_p, expected in kept.items():
        assert nucleus(probs.log(), top_p)[0, 0].exp().tolist() == pytest.approx(expected, abs=1e-6)
    assert nucleus(probs.log(), 0.8)[1, 0].exp().tolist() == pytest.approx([0, 7 / 9, 2 / 9, 0], abs=1e-6)
    assert nucleus(probs.log(), 1e-9)[1, 0].exp().tolist() == [0, 1, 0, 0]


def plain_nucleus(model, prompt: list[int], top_p: float, heat: float) -> dict[int, float]:
    """Probability of each item where every level is cut to its nucleus, by a loop over the catalogue."""

    def below(prefix: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        level = len(prefix)
        if level == len(SIZES):
            return {prefix: 1.0}
        inside = sorted({int(codes[level]) for codes in CODES if tuple(codes[:level].tolist()) == prefix})
        padded = [*prefix, *[0] * (len(SIZES) - level)]
        row = plain_log_probs(model, prompt, padded, heat)[level]
        probs = row[[OFFSETS[level] + code for code in inside]].softmax(-1).tolist()
        kept, mass = [], 0.0
        for prob, code in sorted(zip(probs, inside, strict=True), key=lambda pair: -pair[0]):
            if mass < top_p:
                kept.append((code, prob))
            mass += prob
        total = sum(prob for _, prob in kept)
        return {
            codes: prob / total * rest
            for code, prob in kept
            for codes, rest in below((*prefix, code)).items()
        }

    rows = {tuple(codes): row for row, codes in enumerate(CODES.tolist())}
    return {rows[codes]: prob for codes, prob in below(()).items()}


def test_nucleus_frequencies_and_log_probs(model, trie: Trie) -> None:
    num_draws, prompt, heat, top_p = 40_000, PROMPTS[2], 2.0, 0.7
    rollouts = sample(
        model,
        trie,
        OFFSETS,
        [prompt],
        uniforms(1, num_draws),
        temperature=heat,
        top_p=top_p,
        pad_token_id=PAD,
    )
    expected = plain_nucleus(model, prompt, top_p, heat)
    assert 5 < len(expected) < len(CODES) and sum(expected.values()) == pytest.approx(1, abs=1e-6)
    found = Counter(rollouts.items_BG[0].tolist())
    assert set(found) == set(expected)
    statistic = sum((found[row] - num_draws * p) ** 2 / (num_draws * p) for row, p in expected.items())
    assert statistic < chi2.ppf(0.999, df=len(expected) - 1)
    for place in range(0, 400, 20):
        row = int(rollouts.items_BG[0, place])
        drawn = float(rollouts.drawn_log_probs_BGL[0, place].sum())
        assert drawn == pytest.approx(np.log(expected[row]), abs=1e-5)
        among = plain_trie_log_probs(model, prompt, CODES[row], CODES, heat)
        assert rollouts.trie_log_probs_BGL[0, place].tolist() == pytest.approx(among, abs=1e-5)


def test_without_a_nucleus_the_trie_is_drawn_from(model, trie: Trie) -> None:
    rollouts = sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 12), pad_token_id=PAD)
    assert torch.equal(rollouts.drawn_log_probs_BGL, rollouts.trie_log_probs_BGL)
    for top_p in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="top_p must lie in"):
            sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 12), top_p=top_p, pad_token_id=PAD)


def test_draws_do_not_depend_on_the_batch(model, trie: Trie) -> None:
    draws = uniforms(4, 50)
    together = sample(model, trie, OFFSETS, PROMPTS, draws, pad_token_id=PAD)
    apart = sample(model, trie, OFFSETS, PROMPTS, draws, pad_token_id=0, token_budget=1)
    assert torch.equal(together.codes_BGL, apart.codes_BGL)
    torch.testing.assert_close(together.log_probs_BGL, apart.log_probs_BGL, atol=1e-5, rtol=0)
    for row, prompt in enumerate(PROMPTS):
        alone = sample(model, trie, OFFSETS, [prompt], draws[row : row + 1], pad_token_id=PAD)
        assert torch.equal(alone.codes_BGL[0], together.codes_BGL[row])
    order = [2, 0, 3, 1]
    turned = sample(model, trie, OFFSETS, [PROMPTS[row] for row in order], draws[order], pad_token_id=PAD)
    assert torch.equal(turned.codes_BGL, together.codes_BGL[order])
    assert torch.equal(turned.items_BG, together.items_BG[order])


def test_sampling_without_items_equals_a_trie_without_them(model, trie: Trie) -> None:
    closed = [[0, 5, 6], [], list(range(20)), [24]]
    exclusion, draws = trie.exclusion(closed), uniforms(4, 30)
    together = sample(
        model, trie, OFFSETS, PROMPTS, draws, pad_token_id=PAD, exclusion=exclusion, token_budget=30
    )
    for row, prompt in enumerate(PROMPTS):
        rest = Trie.from_codes(np.delete(CODES, closed[row], axis=0), SIZES)
        alone = sample(model, rest, OFFSETS, [prompt], draws[row : row + 1], pad_token_id=PAD)
        assert torch.equal(together.codes_BGL[row], alone.codes_BGL[0])
        assert not set(together.items_BG[row].tolist()) & set(closed[row])


def test_more_rollouts_than_items(model) -> None:
    codes = np.array([[1, 4, 2], [3, 0, 0]])
    rollouts = sample(
        model, Trie.from_codes(codes, SIZES), OFFSETS, PROMPTS, uniforms(4, 64), pad_token_id=PAD
    )
    assert set(rollouts.items_BG.unique().tolist()) <= {0, 1}
    assert torch.equal(rollouts.codes_BGL, torch.from_numpy(codes)[rollouts.items_BG])


def test_no_rollouts_and_no_prompts(model, trie: Trie) -> None:
    assert sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 0), pad_token_id=PAD).codes_BGL.shape == (
        4,
        0,
        3,
    )
    assert sample(model, trie, OFFSETS, [], uniforms(0, 5), pad_token_id=PAD).items_BG.shape == (0, 5)
    assert beam_search(model, trie, OFFSETS, [], 5, pad_token_id=PAD).items_BW.shape == (0, 5)


def test_draw_by_hand() -> None:
    log_probs = torch.tensor([[[-inf, 0.25, -inf, 0.75, -inf]]]).log().nan_to_num(nan=-inf)
    largest = float(np.nextafter(1.0, 0.0))
    points = torch.tensor([[0.0, 0.2499, 0.2501, 0.9999, largest]], dtype=torch.float64)
    codes = _draw(log_probs, torch.zeros(1, 5, dtype=torch.int64), points)
    assert codes.tolist() == [[1, 1, 3, 3, 3]]


@given(
    st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 2**53)
)
def test_draw_is_always_possible(logits: list[float], hole: int, steps: int) -> None:
    """Also for the uniforms next to 1, whatever the probabilities add up to."""
    log_probs = torch.tensor([[[-inf, *logits, -inf]]])
    if hole < len(logits) > 1:
        log_probs[0, 0, 1 + hole] = -inf
    log_probs = log_probs.log_softmax(-1)
    points = torch.tensor([[1 - steps * 2.0**-53, 1 - 2.0**-53]], dtype=torch.float64)
    for code in _draw(log_probs, torch.zeros(1, 2, dtype=torch.int64), points)[0].tolist():
        assert log_probs[0, 0, code] > -inf


def test_draw_takes_the_distribution_of_its_slot() -> None:
    log_probs = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]]).log()
    slots = torch.tensor([[1, 0, 1], [0, 1, 1]])
    assert _draw(log_probs, slots, torch.full((2, 3), 0.5, dtype=torch.float64)).tolist() == [
        [2, 0, 2],
        [1, 0, 0],
    ]
