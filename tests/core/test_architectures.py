"""Tiny random models of many architectures: a sampled answer has the log-probs of a plain forward, or the
model is refused.

Each has its own positions (rotary, partly rotary, learned), norms, biases, heads (grouped, single) and head.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import CODES, CONFIG, OFFSETS, PAD, PROMPTS, SIZES, plain_log_probs, plain_score, uniforms
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from recast_cli.core.beam_search import beam_search
from recast_cli.core.sampling import sample
from recast_cli.core.trie import Trie

BASE = {name: value for name, value in CONFIG.items() if name != "head_dim"}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WALKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gemma": {"head_dim": 8},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neox": {},
    "gpt_bigcode": GPT,
    "phi": {},
    "phi3": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "olmo2": {},
    "granite": {},
    "glm": {"head_dim": 8},
    "stablelm": {},
    "cohere": {},
    "falcon": {},
    "smollm3": {},
}
LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gemma2": ({"head_dim": 8}, "sliding-window attention"),
    "cohere2": ({"head_dim": 8}, "sliding-window attention"),
    "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 3},
        "layers of kind 'local'",
    ),
    "qwen3_5_text": (LINEAR, "layers of kind 'linear_attention'"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of kind 'conv'"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "MptForCausalLM counts positions itself"),
    "falcon": ({"alibi": True}, "FalconForCausalLM counts positions itself"),
    "bloom": ({"n_layer": 2, "n_head": 4}, "BloomForCausalLM counts positions itself"),
    "mamba": ({"state_size": 4}, "MambaForCausalLM counts positions itself"),
}


def build(family: str, changes: dict[str, Any]) -> Any:
    """A model of a random start that is peaked enough for a wrong mask to show; eager where sdpa is not."""
    torch.manual_seed(7)
    config = CONFIG_MAPPING[family](**(BASE | changes))
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    except ValueError:
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", WALKED)
def test_walk_equals_plain_forwards(family: str) -> None:
    model, trie = build(family, WALKED[family]), Trie.from_codes(CODES, SIZES)
    rollouts = sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 6), pad_token_id=PAD)
    for prompt, group, found_GL in zip(PROMPTS, rollouts.codes_BGL, rollouts.log_probs_BGL, strict=True):
        for codes, found in zip(group, found_GL, strict=True):
            plain = plain_log_probs(model, prompt, codes)
            expected = torch.stack([plain[level, OFFSETS[level] + code] for level, code in enumerate(codes)])
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert len(set(rollouts.items_BG.flatten().tolist())) > 3
    # Logits of the codes alone are the same logits, whatever the model does to them behind its head.
    codes_only = sample(
        model, trie, OFFSETS, PROMPTS, uniforms(4, 6), pad_token_id=PAD, full_vocabulary=False
    )
    assert torch.equal(codes_only.codes_BGL, rollouts.codes_BGL)
    for name in ("trie_log_probs_BGL", "drawn_log_probs_BGL"):
        torch.testing.assert_close(getattr(codes_only, name), getattr(rollouts, name), atol=2e-5, rtol=0)
    assert codes_only.log_probs_BGL.isnan().all()
    beams = beam_search(model, trie, OFFSETS, PROMPTS[2:3], 3, pad_token_id=PAD)
    scores = [plain_score(model, PROMPTS[2], codes) for codes in beams.codes_BWL[0]]
    assert beams.scores_BW[0].tolist() == pytest.approx(scores, abs=5e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_would_be_walked_wrongly_is_refused(family: str) -> None:
    changes, message = REFUSED[family]
    model, trie = build(family, changes), Trie.from_codes(CODES, SIZES)
    with pytest.raises(ValueError, match=message):
        sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 6), pad_token_id=PAD)


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_bfloat16_stays_close_to_float32(family: str) -> None:
    """As on a GPU: 8 bits of mantissa, so logits of about 3 are off by about 0.01."""
    trie = Trie.from_codes(CODES, SIZES)
    exact, rounded = (build(family, WALKED[family]) for _ in range(2))
    rounded = rounded.to(torch.bfloat16)
    rollouts = sample(rounded, trie, OFFSETS, PROMPTS, uniforms(4, 16), pad_token_id=PAD)
    assert rollouts.log_probs_BGL.dtype == rollouts.trie_log_probs_BGL.dtype == torch.float32
    worst = 0.0
    for prompt, group, found_GL in zip(PROMPTS, rollouts.codes_BGL, rollouts.log_probs_BGL, strict=True):
        for codes, found in zip(group, found_GL, strict=True):
            plain = plain_log_probs(exact, prompt, codes)
            expected = torch.stack([plain[level, OFFSETS[level] + code] for level, code in enumerate(codes)])
            worst = max(worst, float((found - expected).abs().max()))
    assert 1e-4 < worst < 0.25  # it was bfloat16, and no more than that
