"""The walk over a tree of answers against plain forwards, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    OFFSETS,
    PAD,
    PROMPTS,
    VOCABULARY,
    plain_log_probs,
    tiny,
    uniforms,
)

from recast_cli.core.guide import distinct
from recast_cli.core.sampling import sample
from recast_cli.core.trie import Trie
from recast_cli.core.walk import TreeWalk, decoding_mode, micro_batches


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


def test_a_long_prompt_beside_a_short_one() -> None:
    """1,500 tokens of left padding: nothing of them, and no position, reaches the short prompt's answers."""
    model = tiny(max_position_embeddings=2048)
    prompts = [(PROMPTS[2] * 167)[:1500], PROMPTS[0]]
    with decoding_mode(model):
        walk = TreeWalk(model, prompts, PAD)
        walk.grow(torch.tensor([[7, 12], [14, 3]]), torch.zeros(2, 2, dtype=torch.int64))
        for prompt, tokens, logits in zip(prompts, ([7, 12], [14, 3]), walk.logits_BSV, strict=True):
            for token, row in zip(tokens, logits, strict=True):
                plain = model(input_ids=torch.tensor([[*prompt, token]])).logits[0, -1]
                torch.testing.assert_close(row, plain, atol=1e-5, rtol=0)


def shapes_read(model) -> tuple[list[tuple[int, ...]], Any]:
    """Shapes of `input_ids` of every call from now on, and what ends the recording."""
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes, hook


@pytest.mark.parametrize(("family", "attention"), [("qwen3", "sdpa"), ("qwen3", "eager"), ("llama", "sdpa")])
def test_what_prompts_have_in_common_is_read_once(family: str, attention: str) -> None:
    """Tails of 1 to 12 tokens behind 20 common ones, 45 prompts: 44 x 20 tokens less."""
    model = tiny(family, attention)
    rng = np.random.default_rng(5)
    common = rng.integers(0, VOCABULARY, 20).tolist()
    prompts = [common + rng.integers(0, VOCABULARY, 1 + b % 12).tolist() for b in range(45)]
    prompts[12] = [*common, prompts[0][20]]  # the whole of another: its last token is its own all the same
    shapes, hook = shapes_read(model)
    with decoding_mode(model):
        walk = TreeWalk(model, prompts, PAD)
        hook.remove()
        assert shapes == [(1, 20), (45, 12)]
        first = walk.logits_BSV
        tokens = torch.from_numpy(rng.integers(0, VOCABULARY, (45, 3)))
        walk.grow(tokens, torch.zeros(45, 3, dtype=torch.int64))
        for b, prompt in enumerate(prompts):
            plain = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            torch.testing.assert_close(first[b, 0], plain, atol=1e-5, rtol=0)
            for token, found in zip(tokens[b].tolist(), walk.logits_BSV[b], strict=True):
                plain = model(input_ids=torch.tensor([[*prompt, token]])).logits[0, -1]
                torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "read"),
    [
        # 10 common tokens of 52 and of 53 prompts: 510 and 520 saved, and a call must save 512
        ([[3] * 10 + [4 + b] for b in range(2)] * 26, [(52, 11)]),
        ([[3] * 10 + [4]] + [[3] * 10 + [5]] * 52, [(1, 10), (53, 1)]),
        ([[3] * 40] * 20, [(1, 39), (20, 1)]),
        ([[3] * 40] * 20 + [[4]], [(21, 40)]),
    ],
)
def test_when_it_is_read_apart(model, prompts: list[list[int]], read: list[tuple[int, int]]) -> None:
    shapes, hook = shapes_read(model)
    with decoding_mode(model):
        TreeWalk(model, prompts, PAD)
    hook.remove()
    assert shapes == read


def test_a_prompt_is_read_once_and_never_copied_per_answer(model, trie: Trie) -> None:
    shapes, hook = shapes_read(model)
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


def test_distinct_by_hand() -> None:
    members, slots = distinct(torch.tensor([[7, 3, 7, 3], [5, 5, 5, 5]]))
    assert slots.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert members[0, 0] in (1, 3) and members[0, 1] in (0, 2) and members.shape == (2, 2)
