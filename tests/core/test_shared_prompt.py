"""Packed rows behind shared prompts: places by hand, and logits and gradients of each row read alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny
from transformers import AttentionInterface

from recast_cli.core.shared_prompt import attend, share_prompts

Rows = list[tuple[list[int], list[int]]]


def lay_out(rows: Rows):
    flat = np.concatenate([np.array(prompt + response) for prompt, response in rows])
    lengths = np.array([len(prompt) + len(response) for prompt, response in rows])
    return flat, lengths, share_prompts(flat, lengths, np.array([len(response) for _, response in rows]))


def test_places_by_hand() -> None:
    rows: Rows = [([7, 8], [1, 2]), ([9], [3]), ([7, 8], [4])]
    # row tokens       0  1  2  3    4  5    6  7  8
    #                  7  8  1  2    9  3    7  8  4
    # packed           7  8  9  1  2  4  3   (prompts, then the responses of the first, of the second)
    _, _, shared = lay_out(rows)
    assert shared.source_T.tolist() == [0, 1, 4, 2, 3, 8, 5]
    assert shared.read_K.tolist() == [1, 3, 4, 2, 6, 1, 5]
    assert shared.target_K.tolist() == [1, 2, 3, 4, 5, 7, 8]
    assert shared.prompts_UP.tolist() == [[0, 1], [2, 0]]
    assert shared.responses_US.tolist() == [[3, 4, 5], [6, 0, 0]]
    # the first prompt's responses are 1 2 and 4: two of the prompt, then 1, 2, 4
    assert shared.visible_U1SA[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    # what is padding sees some token: a softmax over nothing is no number
    assert shared.visible_U1SA[1, 0].int().tolist()[0] == [1, 0, 1, 0, 0]
    assert shared.visible_U1SA[1, 0].any(dim=1).all()
    assert shared.back_T.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert not shared.is_even
    assert lay_out([([7], [1]), ([9], [3])])[2].is_even


def test_a_row_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 2 tokens, 2 of them its response"):
        lay_out([([7], [1]), ([], [3, 4])])


def packed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **given: Any
) -> tuple[torch.Tensor, None]:
    assert mask is None
    return attend(query, key, value, given["shared_prompts"], given["scaling"]), None


AttentionInterface.register("packed", packed_attention)
tokens = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)
response = st.lists(st.integers(0, VOCABULARY - 1), min_size=0, max_size=4)


@st.composite
def many_rows(draw: st.DrawFn) -> Rows:
    prompts = draw(st.lists(tokens, min_size=1, max_size=4))
    rows = [(prompt, draw(response)) for prompt in prompts for _ in range(draw(st.integers(1, 4)))]
    return draw(st.permutations(rows))


EVEN: Rows = [([p, 3, 5], [r, 4]) for p in range(3) for r in range(4)]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@settings(max_examples=25, deadline=None)
@given(rows=many_rows())
def test_logits_and_gradients_are_those_of_rows_read_alone(family: str, rows: Rows) -> None:
    compare(family, rows)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_without_any_padding_too(family: str) -> None:
    assert lay_out(EVEN)[2].is_even
    compare(family, EVEN)


def compare(family: str, rows: Rows) -> None:
    """In float64, but for the norms, which are float32 in any dtype: these peaked models magnify rounding."""
    flat, lengths, shared = lay_out(rows)
    weights = torch.rand(int(sum(len(r) + 1 for _, r in rows)), VOCABULARY, generator=torch.manual_seed(1))

    alone = tiny(family).double()
    read = []
    for prompt, answer in rows:
        logits = alone(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        read.append(logits[len(prompt) - 1 :])
    expected = torch.cat(read)
    (expected * weights).sum().backward()

    together = tiny(family, attention="packed").double()
    positions = np.concatenate([np.arange(length) for length in lengths])
    found = together(
        input_ids=torch.from_numpy(flat)[shared.source_T][None],
        position_ids=torch.from_numpy(positions)[shared.source_T][None],
        logits_to_keep=shared.read_K,
        shared_prompts=shared,
        use_cache=False,
    ).logits[0]
    (found * weights).sum().backward()

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for (name, parameter), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        assert float((parameter.grad - other.grad).abs().max()) <= 2e-6 * max(scale, 1), name
