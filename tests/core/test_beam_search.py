"""Beam search against brute force and plain loops."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch
from tiny_models import (
    CODES,
    OFFSETS,
    PAD,
    PROMPTS,
    SIZES,
    VOCABULARY,
    plain_log_probs,
    plain_score,
    random_catalogue,
    tiny,
    uniforms,
)

from recast_cli.core.beam_search import beam_search, beam_searches
from recast_cli.core.sampling import sample
from recast_cli.core.trie import Trie


def brute_force(
    model, prompt: list[int], catalogue: np.ndarray, closed: list[int]
) -> list[tuple[int, float]]:
    """Every open item with its score, best first, equal scores by item row."""
    scores = {
        row: plain_score(model, prompt, codes) for row, codes in enumerate(catalogue) if row not in closed
    }
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


@pytest.mark.parametrize("closed", [[[], [], [], []], [[1], [0, 2, 4, 6, 8], list(range(1, 25)), []]])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_beam_as_wide_as_the_catalogue_is_brute_force(
    family: str, closed: list[list[int]], trie: Trie
) -> None:
    model = tiny(family)
    exclusion = trie.exclusion(closed) if any(closed) else None
    beams = beam_search(
        model, trie, OFFSETS, PROMPTS, len(CODES), pad_token_id=PAD, exclusion=exclusion, token_budget=200
    )
    for row, prompt in enumerate(PROMPTS):
        expected = brute_force(model, prompt, CODES, closed[row])
        missing = len(CODES) - len(expected)
        assert beams.items_BW[row].tolist() == [item for item, _ in expected] + [-1] * missing
        scores = torch.tensor([score for _, score in expected] + [-inf] * missing)
        torch.testing.assert_close(beams.scores_BW[row], scores, atol=1e-4, rtol=0)
        codes = CODES[[item for item, _ in expected]].tolist() + [[-1] * 3] * missing
        assert beams.codes_BWL[row].tolist() == codes


def plain_beam(model, prompt: list[int], catalogue: np.ndarray, width: int) -> list[tuple[int, ...]]:
    """Beam search with loops and plain forwards."""
    items, beams = {tuple(codes) for codes in catalogue.tolist()}, [((), 0.0)]
    for level in range(catalogue.shape[1]):
        grown = []
        for prefix, score in beams:
            row = plain_log_probs(model, prompt, (*prefix, 0), offsets=OFFSETS[: level + 1])[-1]
            allowed = {item[level] for item in items if item[:level] == prefix}
            grown += [
                ((*prefix, code), score + float(row[OFFSETS[level] + code])) for code in sorted(allowed)
            ]
        beams = sorted(grown, key=lambda pair: -pair[1])[:width]
    return [codes for codes, _ in beams]


@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_narrow_beams_equal_plain_loops(width: int, model, trie: Trie) -> None:
    beams = beam_search(model, trie, OFFSETS, PROMPTS, width, pad_token_id=PAD)
    for row, prompt in enumerate(PROMPTS):
        assert list(map(tuple, beams.codes_BWL[row].tolist())) == plain_beam(model, prompt, CODES, width)


def test_equal_scores_go_by_item_row(trie: Trie) -> None:
    model = tiny()
    torch.nn.init.zeros_(model.lm_head.weight)  # every item scores -3 log V
    beams = beam_search(model, trie, OFFSETS, PROMPTS, len(CODES), pad_token_id=PAD)
    assert beams.items_BW.tolist() == [list(range(len(CODES)))] * len(PROMPTS)
    assert beams.scores_BW.unique().tolist() == pytest.approx([-3 * np.log(VOCABULARY)])
    # One level: the cut itself is a tie, settled by item row too.
    codes = np.array([[3], [0], [2], [1]])
    narrow = beam_search(model, Trie.from_codes(codes, [4]), [5], PROMPTS, 2, pad_token_id=PAD)
    assert narrow.items_BW.tolist() == [[0, 1]] * len(PROMPTS)
    # Two levels: first codes survive the cut in their own order (0 and 1), whatever the item rows.
    codes = np.array([[2, 0], [1, 0], [0, 1], [0, 0]])
    narrow = beam_search(model, Trie.from_codes(codes, [3, 2]), [5, 9], PROMPTS, 2, pad_token_id=PAD)
    assert narrow.items_BW.tolist() == [[1, 2]] * len(PROMPTS)


def test_scores_above_a_tied_cut_stay(trie: Trie) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
        model.lm_head.bias[7] = 1.0  # code 2
    codes = np.array([[3], [0], [2], [1]])
    beams = beam_search(model, Trie.from_codes(codes, [4]), [5], PROMPTS, 3, pad_token_id=PAD)
    assert beams.items_BW.tolist() == [[2, 0, 1]] * len(PROMPTS)


def test_fewer_items_than_beams(model) -> None:
    codes = np.array([[1, 4, 2], [3, 0, 0]])
    trie = Trie.from_codes(codes, SIZES)
    beams = beam_search(model, trie, OFFSETS, PROMPTS, 6, pad_token_id=PAD)
    assert (beams.items_BW[:, 2:] == -1).all() and (beams.scores_BW[:, 2:] == -inf).all()
    assert (beams.codes_BWL[:, 2:] == -1).all()
    assert beams.items_BW[:, :2].sort().values.tolist() == [[0, 1]] * 4
    assert beams.scores_BW[:, :2].isfinite().all()
    one_left = beam_search(
        model, trie, OFFSETS, PROMPTS, 2, pad_token_id=PAD, exclusion=trie.exclusion([[0], [1], [0], [1]])
    )
    assert one_left.items_BW.tolist() == [[1, -1], [0, -1], [1, -1], [0, -1]]


def test_one_reading_serves_several_searches_and_given_answers(model, trie: Trie) -> None:
    closed = trie.exclusion([[0, 3], [], [5], list(range(1, 9))])
    given = CODES[[4, 0, 7, 2]]
    prompts_read = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: prompts_read.append(kwargs.get("past_key_values") is None), with_kwargs=True
    )
    try:
        found, log_probs_BL = beam_searches(
            model, trie, OFFSETS, PROMPTS, 8, pad_token_id=PAD, exclusions=[closed, None], given_BL=given
        )
    finally:
        hook.remove()
    assert sum(prompts_read) == 1
    for beams, exclusion in zip(found, [closed, None], strict=True):
        alone = beam_search(model, trie, OFFSETS, PROMPTS, 8, pad_token_id=PAD, exclusion=exclusion)
        assert torch.equal(beams.items_BW, alone.items_BW)
        torch.testing.assert_close(beams.scores_BW, alone.scores_BW, atol=1e-6, rtol=0)
    for prompt, codes, log_probs in zip(PROMPTS, given, log_probs_BL, strict=True):
        plain = plain_log_probs(model, prompt, codes)
        expected = torch.stack([plain[level, OFFSETS[level] + code] for level, code in enumerate(codes)])
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("code", [-1, 9])
def test_given_answers_of_codes_that_no_level_has_are_refused(model, trie: Trie, code: int) -> None:
    """-1 would be read as the last code."""
    given = np.array(CODES[[4, 0, 7, 2]])
    given[2, 1] = code
    with pytest.raises(ValueError, match=r"codes of a given answer lie outside 0\.\.K-1 of their levels"):
        beam_searches(model, trie, OFFSETS, PROMPTS, 8, pad_token_id=PAD, exclusions=[None], given_BL=given)


def test_searches_feed_the_beams_they_share_once(model, trie: Trie) -> None:
    def tokens_fed(exclusions) -> int:
        fed: list[int] = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        try:
            beam_searches(model, trie, OFFSETS, PROMPTS, 4, pad_token_id=PAD, exclusions=exclusions)
        finally:
            hook.remove()
        return sum(fed)

    best_B = beam_search(model, trie, OFFSETS, PROMPTS, 4, pad_token_id=PAD).items_BW[:, 0].tolist()
    # All items that begin like the best one: the second search has to go other ways, for a part.
    closed = trie.exclusion([np.flatnonzero(CODES[:, 0] == CODES[best, 0]) for best in best_B])
    alone = tokens_fed([None])
    assert tokens_fed([None, None]) == alone
    assert alone < tokens_fed([None, closed]) < alone + tokens_fed([closed]) - sum(map(len, PROMPTS))


def test_beams_do_not_depend_on_the_batch(model, trie: Trie) -> None:
    together = beam_search(model, trie, OFFSETS, PROMPTS, 8, pad_token_id=PAD)
    apart = beam_search(model, trie, OFFSETS, PROMPTS, 8, pad_token_id=0, token_budget=1)
    assert torch.equal(together.items_BW, apart.items_BW)
    torch.testing.assert_close(together.scores_BW, apart.scores_BW, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [[6], [3, 2], [2, 3, 2, 3]])
def test_any_number_of_levels(model, sizes: list[int]) -> None:
    codes, offsets = random_catalogue(5, sizes=sizes), np.cumsum([5, *sizes])[:-1].tolist()
    trie = Trie.from_codes(codes, sizes)
    rollouts = sample(model, trie, offsets, PROMPTS, uniforms(4, 20, len(sizes)), pad_token_id=PAD)
    assert torch.equal(rollouts.codes_BGL, torch.from_numpy(codes)[rollouts.items_BG])
    beams = beam_search(model, trie, offsets, PROMPTS, 5, pad_token_id=PAD)
    for row, prompt in enumerate(PROMPTS):
        expected = sorted(range(5), key=lambda item: -plain_score(model, prompt, codes[item], offsets))
        assert beams.items_BW[row].tolist() == expected
