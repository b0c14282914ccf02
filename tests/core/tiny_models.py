"""Tiny real models, a small catalogue, and what they give by plain forwards: no cache, no mask."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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


def random_catalogue(num_items: int, seed: int = 0, sizes: list[int] = SIZES) -> np.ndarray:
    every = np.array(list(np.ndindex(*sizes)))
    return np.random.default_rng(seed).permutation(every)[:num_items]


CODES = random_catalogue(25)


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
