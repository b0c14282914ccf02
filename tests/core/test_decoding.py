"""Constrained decoding against plain forwards of prompt and answer, row by row, with tiny real models."""

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
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recast_cli.core.decoding import _distinct, _draw, beam_search, beam_searches, sample
from recast_cli.core.trie import Trie
from recast_cli.core.walk import TreeWalk, decoding_mode, micro_batches

SIZES = [4, 5, 3]
OFFSETS = [5, 9, 14]  # ids 0..4 are ordinary tokens, 17..23 are padding of the vocabulary
VOCABULARY = 24
PAD = 1
PROMPTS = [[2, 3, 6], [4], [0, 2, 9, 15, 3, 2, 7, 12, 14], [3, 3, 8, 11, 16]]
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # peaked answers: a wrong mask shows
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def tiny(family: str = "qwen3", attention: str = "sdpa", **changes):
    config, model = FAMILIES[family]
    torch.manual_seed(7)
    return model._from_config(config(**(CONFIG | changes)), attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def random_catalogue(num_items: int, seed: int = 0, sizes: list[int] = SIZES) -> np.ndarray:
    every = np.array(list(np.ndindex(*sizes)))
    return np.random.default_rng(seed).permutation(every)[:num_items]


CODES = random_catalogue(25)


@pytest.fixture(scope="module")
def trie() -> Trie:
    return Trie.from_codes(CODES, SIZES)


def uniforms(num_prompts: int, num_rollouts: int, num_levels: int = 3, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((num_prompts, num_rollouts, num_levels))


@torch.no_grad()
def plain_log_probs(
    model, prompt: list[int], codes, temperature: float = 1.0, offsets=OFFSETS
) -> torch.Tensor:
    """Full-vocabulary log-softmax (L, V) before each code: one row, no cache, no mask, no padding."""
    tokens = [offset + int(code) for offset, code in zip(offsets, codes, strict=True)]
    logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0].float()
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def plain_score(model, prompt: list[int], codes, offsets=OFFSETS) -> float:
    rows = plain_log_probs(model, prompt, codes, offsets=offsets)
    return sum(float(row[offset + code]) for row, offset, code in zip(rows, offsets, codes, strict=True))


def plain_trie_log_probs(
    model, prompt: list[int], codes, catalogue: np.ndarray, temperature: float = 1.0
) -> list[float]:
    """Log-probability of each code among the codes that some item of the catalogue has there."""
    out = []
    for level, row in enumerate(plain_log_probs(model, prompt, codes, temperature)):
        same_prefix = (catalogue[:, :level] == np.asarray(codes)[:level]).all(axis=1)
        allowed = sorted(set(catalogue[same_prefix, level].tolist()))
        among = row[[OFFSETS[level] + code for code in allowed]].log_softmax(-1)
        out.append(float(among[allowed.index(int(codes[level]))]))
    return out


# --- the walk ---


@pytest.mark.parametrize(("family", "attention"), [("qwen3", "sdpa"), ("qwen3", "eager"), ("llama", "sdpa")])
def test_tree_logits_equal_plain_forwards(family: str, attention: str) -> None:
    model = tiny(family, attention)
    rng = np.random.default_rng(0)
    with decoding_mode(model):
        walk = TreeWalk(model, PROMPTS, PAD)
        answers = [[()] for _ in PROMPTS]
        for num_slots in (3, 6, 4, None):
            for prompt, slots, logits in zip(PROMPTS, answers, walk.logits_BSV, strict=True):
                for answer, row in zip(slots, logits, strict=True):
                    plain = model(input_ids=torch.tensor([prompt + list(answer)])).logits[0, -1]
                    torch.testing.assert_close(row, plain, atol=1e-5, rtol=0)
            if num_slots is not None:
                parents = rng.integers(0, len(answers[0]), (len(PROMPTS), num_slots))
                tokens = rng.integers(0, VOCABULARY, (len(PROMPTS), num_slots))
                answers = [
                    [(*slots[parent], int(token)) for parent, token in zip(*rows, strict=True)]
                    for slots, *rows in zip(answers, parents, tokens, strict=True)
                ]
                walk.grow(torch.from_numpy(tokens), torch.from_numpy(parents))


def test_a_prompt_is_read_once_and_never_copied_per_answer(model, trie: Trie) -> None:
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        sample(model, trie, OFFSETS, [[2] * 30] * 2, uniforms(2, 40), pad_token_id=PAD)
    finally:
        hook.remove()
    assert shapes[0] == (2, 30)
    # 40 rollouts hold at most 4 first codes and 20 pairs: answers with a common prefix share its tokens.
    assert [rows for rows, _ in shapes] == [2, 2, 2]
    assert shapes[1][1] <= 4 and shapes[2][1] <= 20


def test_bfloat16_with_long_padding_is_finite_and_close(trie: Trie) -> None:
    model, prompts = tiny().to(torch.bfloat16), [[2], [3, 4] * 20]
    rollouts = sample(model, trie, OFFSETS, prompts, uniforms(2, 16), pad_token_id=PAD)
    assert rollouts.log_probs_BGL.dtype == torch.float32
    for prompt, rows, log_probs in zip(prompts, rollouts.codes_BGL, rollouts.log_probs_BGL, strict=True):
        for codes, found in zip(rows, log_probs, strict=True):
            plain = plain_log_probs(model, prompt, codes)
            expected = torch.stack([plain[level, OFFSETS[level] + code] for level, code in enumerate(codes)])
            torch.testing.assert_close(found, expected, atol=0.15, rtol=0)


def test_micro_batches_by_hand() -> None:
    prompts = [[0] * 5, [0] * 2, [0] * 9, [0] * 3]
    # 4 answer tokens: lengths 2 and 3 make 2 x 7 = 14; with 5, 3 x 9 = 27 > 20; 5 and 9 would make 26.
    assert [rows.tolist() for rows in micro_batches(prompts, 4, 20)] == [[1, 3], [0], [2]]
    assert [rows.tolist() for rows in micro_batches(prompts, 4, 1)] == [[1], [3], [0], [2]]
    assert [rows.tolist() for rows in micro_batches(prompts, 4, 4 * 13)] == [[1, 3, 0, 2]]
    assert micro_batches([], 4, 20) == []


# --- sampling ---


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


def test_distinct_by_hand() -> None:
    members, slots = _distinct(torch.tensor([[7, 3, 7, 3], [5, 5, 5, 5]]))
    assert slots.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert members[0, 0] in (1, 3) and members[0, 1] in (0, 2) and members.shape == (2, 2)


# --- beam search ---


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


# --- what must never get through ---


def num_invalid(codes: torch.Tensor) -> int:
    """Answers outside the catalogue, counted by plain membership."""
    items = set(map(tuple, CODES.tolist()))
    return sum(tuple(answer) not in items for answer in codes.flatten(0, 1).tolist())


def test_a_broken_mask_is_seen(model, trie: Trie, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = uniforms(4, 100)
    good = sample(model, trie, OFFSETS, PROMPTS, draws, pad_token_id=PAD)
    good_beams = beam_search(model, trie, OFFSETS, PROMPTS, 25, pad_token_id=PAD)
    assert num_invalid(good.codes_BGL) == num_invalid(good_beams.codes_BWL) == 0
    assert (good.items_BG >= 0).all() and (good_beams.items_BW >= 0).all()

    def no_mask(
        self: Trie, level: int, nodes_R: torch.Tensor, exclusion=None, request_R=None
    ) -> torch.Tensor:
        return torch.ones(len(nodes_R), self.codebook_sizes[level], dtype=torch.bool)

    monkeypatch.setattr(Trie, "mask", no_mask)
    broken = sample(model, trie, OFFSETS, PROMPTS, draws, pad_token_id=PAD)
    beams = beam_search(model, trie, OFFSETS, PROMPTS, 25, pad_token_id=PAD)
    # 25 of 4 x 5 x 3 = 60 answers are items, so most of what is free is not.
    assert num_invalid(broken.codes_BGL) == int((broken.items_BG == -1).sum()) > 100
    assert num_invalid(beams.codes_BWL) == int((beams.items_BW == -1).sum()) > 20
    # Answers that are no item must not be taken for one another on the way.
    for row, group in itertools.product(range(4), range(100)):
        codes = broken.codes_BGL[row, group]
        plain = plain_log_probs(model, PROMPTS[row], codes)
        expected = torch.stack([plain[level, OFFSETS[level] + code] for level, code in enumerate(codes)])
        torch.testing.assert_close(broken.log_probs_BGL[row, group], expected, atol=1e-5, rtol=0)


def test_likelier_ids_outside_the_level_stay_out(trie: Trie) -> None:
    model = tiny()
    codes_of_a_level = set(range(OFFSETS[0], OFFSETS[0] + SIZES[0]))
    outside = [token for token in range(VOCABULARY) if token not in codes_of_a_level]
    with torch.no_grad():  # padded ids, ordinary tokens and other levels take nearly all the probability
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
        model.lm_head.bias[outside] = 30.0
        model.lm_head.bias[17:] = 60.0
    rollouts = sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 50), pad_token_id=PAD)
    beams = beam_search(model, trie, OFFSETS, PROMPTS, 25, pad_token_id=PAD)
    assert num_invalid(rollouts.codes_BGL) == num_invalid(beams.codes_BWL) == 0
    assert (rollouts.log_probs_BGL[..., 0] < -40).all()
    assert (rollouts.trie_log_probs_BGL > -30).all()


def test_generation_config_is_never_read(trie: Trie) -> None:
    model, strange = tiny(), tiny()
    strange.generation_config.update(
        top_k=1,
        top_p=0.1,
        temperature=0.01,
        repetition_penalty=5.0,
        do_sample=True,
        max_new_tokens=1,
        num_beams=2,
    )
    draws = uniforms(4, 20)
    plain = sample(model, trie, OFFSETS, PROMPTS, draws, pad_token_id=PAD)
    assert torch.equal(
        plain.codes_BGL, sample(strange, trie, OFFSETS, PROMPTS, draws, pad_token_id=PAD).codes_BGL
    )
    beams = beam_search(model, trie, OFFSETS, PROMPTS, 9, pad_token_id=PAD)
    assert torch.equal(
        beams.items_BW, beam_search(strange, trie, OFFSETS, PROMPTS, 9, pad_token_id=PAD).items_BW
    )


def test_modes_are_restored_and_results_are_ordinary_tensors(trie: Trie) -> None:
    model = tiny(attention_dropout=0.5)
    expected = sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 20), pad_token_id=PAD)
    model.train()
    model.model.layers[0].eval()
    rollouts = sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 20), pad_token_id=PAD)
    assert torch.equal(rollouts.codes_BGL, expected.codes_BGL)  # no dropout while decoding
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
    weight = torch.ones((), requires_grad=True)
    (rollouts.log_probs_BGL * weight).sum().backward()  # inference tensors would refuse
    assert float(weight.grad) == pytest.approx(float(rollouts.log_probs_BGL.sum()), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), inf, -inf])
def test_logits_that_are_not_finite_are_an_error(trie: Trie, value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(torch.full((VOCABULARY,), value))
    with pytest.raises(ValueError, match="logits that are not finite"):
        sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 5), pad_token_id=PAD)
    with pytest.raises(ValueError, match="logits that are not finite"):
        beam_search(model, trie, OFFSETS, PROMPTS, 5, pad_token_id=PAD)


def test_models_that_cannot_be_masked_are_refused(trie: Trie) -> None:
    windowed = tiny("mistral", sliding_window=4)
    with pytest.raises(ValueError, match="sliding-window attention"):
        beam_search(windowed, trie, OFFSETS, PROMPTS, 5, pad_token_id=PAD)
    flash = tiny()
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask per token"):
        beam_search(flash, trie, OFFSETS, PROMPTS, 5, pad_token_id=PAD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uniforms_BGL": uniforms(3, 5)}, r"shape \(4, rollouts, 3\), found \(3, 5, 3\)"),
        ({"uniforms_BGL": uniforms(4, 5, 2)}, r"found \(4, 5, 2\)"),
        ({"uniforms_BGL": uniforms(4, 5)[0]}, r"found \(5, 3\)"),
        ({"uniforms_BGL": np.ones((4, 5, 3))}, r"uniforms must lie in \[0, 1\)"),
        ({"uniforms_BGL": np.full((4, 5, 3), np.nan)}, r"uniforms must lie in \[0, 1\)"),
        ({"temperature": 0.0}, "temperature must be positive and finite, found 0.0"),
        ({"temperature": float("nan")}, "temperature must be positive and finite"),
        ({"prompts": [[2], [], [3], [4]]}, "prompt 1 is empty"),
        ({"level_offsets": [5, 9]}, "2 level offsets, but the trie has 3 levels"),
        ({"level_offsets": [5, 9, 22]}, r"codes use token ids 5\.\.24 of 24"),
        ({"level_offsets": [-1, 9, 14]}, r"codes use token ids -1\.\.16 of 24"),
    ],
)
def test_arguments_that_cannot_be(model, trie: Trie, changes: dict, message: str) -> None:
    arguments = {"level_offsets": OFFSETS, "prompts": PROMPTS, "uniforms_BGL": uniforms(4, 5)} | changes
    with pytest.raises(ValueError, match=message):
        sample(model, trie, **arguments, pad_token_id=PAD)


def test_beam_arguments_that_cannot_be(model, trie: Trie) -> None:
    with pytest.raises(ValueError, match="beam_width must be at least 1, found 0"):
        beam_search(model, trie, OFFSETS, PROMPTS, 0, pad_token_id=PAD)
    with pytest.raises(ValueError, match="4 prompts, but an exclusion for 1 requests"):
        beam_search(model, trie, OFFSETS, PROMPTS, 5, pad_token_id=PAD, exclusion=trie.exclusion([[0]]))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        beam_search(model, trie, OFFSETS, [[]], 5, pad_token_id=PAD)
