"""Successive expansions against the SID engine's beam search, with a model in place of the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from recast_cli.core.beam_group import beam_group
from verl_recast.catalogue import Catalogue
from verl_recast.rollout import vllm_beams
from verl_recast.rollout.vllm_beams import Request, expand_beams

PROMPTS = [[3, 12, 13, 24, 4, 3], [3], [3, 6, 13, 27, 4, 3, 12, 16, 27, 4, 3]]


@pytest.mark.parametrize("most_tokens", [128, 3])
@pytest.mark.parametrize("width", [1, 4, 16, 60])
@pytest.mark.parametrize("tied", [False, True])
def test_expansions_find_the_beams_of_the_sid_engine(
    tokenizer_folder: Path, width: int, tied: bool, most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all logits equal, order and cut are decided by the tie rules alone."""
    monkeypatch.setattr(vllm_beams, "MAX_LOGPROB_TOKENS", most_tokens)
    catalogue = Catalogue.load(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(tokenizer_folder / "model", dtype=torch.float32).eval()
    if tied:
        torch.nn.init.zeros_(model.get_input_embeddings().weight)  # tied to the head

    async def ask(requests: list[Request]) -> list[list[float]]:
        answers = []
        for prompt, given, ids in requests:
            assert prompt[: len(prompt) - given] in PROMPTS
            assert len(ids) <= most_tokens
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            answers.append(log_probs[ids].tolist())
        return answers

    found = asyncio.run(expand_beams(ask, catalogue.trie, catalogue.level_offsets, PROMPTS, width))
    expected = beam_group(
        model,
        catalogue.trie,
        catalogue.level_offsets,
        PROMPTS,
        width,
        pad_token_id=catalogue.pad_token_id,
    )
    assert torch.equal(found.codes_BGL, expected.codes_BGL)
    assert torch.equal(found.items_BG, expected.items_BG)
    for name in ("log_probs_BGL", "trie_log_probs_BGL"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5, equal_nan=True), name
