"""Masked logits against the plain log-softmax over the allowed codes: values, gradients, entropy."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch
from tiny_models import CODES, OFFSETS, PROMPTS, SIZES, VOCABULARY, plain_trie_log_probs, tiny

from recast_cli.core.masked_policy import OUT_OF_REACH, mask_answers
from recast_cli.core.trie import Trie


def test_by_hand() -> None:
    # items (0, 1), (0, 2), (1, 0): after code 0 come 1 and 2, after code 1 only 0
    trie = Trie.from_codes(np.array([[0, 1], [0, 2], [1, 0]]), [2, 3])
    logits = torch.arange(24.0).reshape(4, 6) / 8  # a prompt token, code 0, code 1, an end nobody asks about
    before = logits.clone()
    mask_answers(logits, trie, [0, 3], torch.tensor([1]), torch.tensor([[0, 2]]))
    assert torch.equal(logits[[0, 3]], before[[0, 3]])
    allowed = {1: [0, 1], 2: [4, 5]}
    for position, tokens in allowed.items():
        closed = [token for token in range(6) if token not in tokens]
        assert torch.equal(logits[position, tokens], before[position, tokens])
        assert (logits[position, closed] == OUT_OF_REACH).all()
    # neighbouring logits are 1/8 apart: the second of two has 1 / (1 + exp(-1/8))
    assert float(logits[2].log_softmax(-1)[5]) == pytest.approx(-log(1 + np.exp(-1 / 8)), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.01, 3.0])
def test_log_probs_are_those_over_the_trie_and_the_entropy_is_finite(trie: Trie, temperature: float) -> None:
    model, codes = tiny(), torch.tensor(CODES[[3, 11]])
    for prompt in PROMPTS:
        tokens = codes + torch.tensor(OFFSETS)
        rows = torch.cat([torch.tensor(prompt).expand(2, -1), tokens], dim=1)
        with torch.no_grad():
            logits = model(input_ids=rows).logits
        width, first = rows.shape[1], len(prompt) - 1
        mask_answers(logits.view(-1, VOCABULARY), trie, OFFSETS, torch.tensor([first, width + first]), codes)
        log_probs = (logits / temperature).log_softmax(-1)
        for row in range(2):
            found = log_probs[row, first : first + 3].gather(1, tokens[row][:, None])[:, 0]
            expected = plain_trie_log_probs(model, prompt, codes[row], CODES, temperature)
            torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)
        scaled = logits / temperature
        entropy = scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)  # as verl computes it
        assert bool(entropy.isfinite().all()) and bool((entropy > -1e-4).all())


def test_gradient_is_that_of_the_renormalised_policy(trie: Trie) -> None:
    """Through a whole model, against autograd of the log-softmax over the allowed codes alone."""
    model, prompt, codes = tiny(), PROMPTS[2], torch.tensor(CODES[7:8])
    tokens = torch.tensor(OFFSETS) + codes[0]
    rows = torch.cat([torch.tensor(prompt), tokens])[None]
    first, weights = len(prompt) - 1, torch.tensor([1.0, -2.0, 0.5])

    def gradient(log_probs_L: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad((weights * log_probs_L).sum(), list(model.parameters()))
        return torch.cat([grad.flatten() for grad in grads])

    logits = model(input_ids=rows).logits[0]
    mask_answers(logits, trie, OFFSETS, torch.tensor([first]), codes)
    masked = gradient(logits[first : first + 3].log_softmax(-1).gather(1, tokens[:, None])[:, 0])

    logits = model(input_ids=rows).logits[0]
    among = []
    for level in range(3):
        same_prefix = (CODES[:, :level] == CODES[7, :level]).all(axis=1)
        allowed = sorted(set(CODES[same_prefix, level].tolist()))
        row = logits[first + level, [OFFSETS[level] + code for code in allowed]].log_softmax(-1)
        among.append(row[allowed.index(int(CODES[7, level]))])
    plain = gradient(torch.stack(among))
    assert plain.norm() > 1e-3
    assert (masked - plain).norm() < 1e-5 * plain.norm()
    logits = model(input_ids=rows).logits[0]
    full = gradient(logits[first : first + 3].log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    assert (full - plain).norm() > 0.1 * plain.norm()  # or the test would not tell them apart


def test_what_is_no_item_and_what_cannot_be_masked_is_refused(trie: Trie) -> None:
    logits, first = torch.zeros(4, VOCABULARY), torch.tensor([0])
    outside = next(codes for codes in np.ndindex(*SIZES) if list(codes) not in CODES.tolist())
    for codes in (outside, (-1, 0, 0), (99, 0, 0)):
        with pytest.raises(ValueError, match="is no item of the catalogue"):
            mask_answers(logits, trie, OFFSETS, first, torch.tensor([codes]))
    with pytest.raises(ValueError, match=r"logits are torch\.float16, needed float32 or bfloat16"):
        mask_answers(logits.half(), trie, OFFSETS, first, torch.tensor(CODES[:1]))
    assert (logits == 0).all()


def test_bfloat16_is_masked_in_the_same_places(trie: Trie) -> None:
    whole, half = torch.zeros(4, VOCABULARY), torch.zeros(4, VOCABULARY, dtype=torch.bfloat16)
    for logits in (whole, half):
        mask_answers(logits, trie, OFFSETS, torch.tensor([0]), torch.tensor(CODES[:1]))
    assert torch.equal(whole == 0, half == 0) and 0 < int((half == 0).sum()) < half.numel()
