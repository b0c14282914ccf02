"""What must never get through: items outside the catalogue, a checkpoint's settings, impossible arguments."""

from __future__ import annotations

import itertools
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
    tiny,
    uniforms,
)

from recast_cli.core.beam_search import beam_search
from recast_cli.core.sampling import sample
from recast_cli.core.trie import Trie


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

    def everything(
        self: Trie, level: int, nodes_R: torch.Tensor, exclusion=None, request_R=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes_RK = torch.arange(self.codebook_sizes[level]).expand(len(nodes_R), -1)
        return codes_RK, torch.ones_like(codes_RK, dtype=torch.bool)

    monkeypatch.setattr(Trie, "choices", everything)
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
