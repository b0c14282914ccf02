"""Floating-point operations of a decoder-only transformer, counted from its shape.

Counted (a multiply-add is 2 operations): every matrix product with a weight, the output head included, and
the two products of attention. Backward costs twice the forward. Left out: embedding look-up, norms, rotary
embedding, activation functions, softmax, the loss and the optimiser, together below 2 % at the widths of
language models and a few percent at a width of 128. Padding is left out too: this is the work that the real
tokens need, not what a kernel does, so padded or masked-out work shows up as a lower MFU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BACKWARD = 2.0  # gradients of inputs and of weights: two products for each forward one
TRAIN = 1.0 + BACKWARD


@dataclass(frozen=True)
class ModelShape:
    """What decides the cost of a dense model with gated MLPs (Llama, Qwen2, Qwen3, Mistral)."""

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    vocab_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a Hugging Face `config.json`.

        Raises:
            ValueError: a mixture of experts, or a config that lacks one of the sizes.
        """
        experts = [
            name for name in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(name)
        ]
        if experts:
            raise ValueError(f"config has {experts[0]}={config[experts[0]]}; only dense models are counted")
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [name for name in names if name not in config]
        if missing:
            raise ValueError(f"config lacks {missing[0]}")
        num_heads = config["num_attention_heads"]
        return cls(
            num_layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads") or num_heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            mlp_width=config["intermediate_size"],
            vocab_size=config["vocab_size"],
        )

    @property
    def layer_parameters(self) -> int:
        """Weights that every token is multiplied with: projections and MLP of every layer."""
        attention = self.width * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.width * self.mlp_width)

    @property
    def head_parameters(self) -> int:
        """Weights of the output head (also if tied), with which the tokens are multiplied that are read."""
        return self.width * self.vocab_size

    @property
    def matmul_parameters(self) -> int:
        """Both together."""
        return self.layer_parameters + self.head_parameters


@dataclass(frozen=True)
class Work:
    """What a batch asks of a model.

    Attributes:
        tokens: Tokens that pass the layers.
        read_tokens: Tokens whose logits are taken.
        square_tokens: Twice the pairs of tokens of which one sees the other: for a whole sequence of n tokens
            n^2 (a token's half of seeing itself counts as much as the other).
    """

    tokens: int
    read_tokens: int
    square_tokens: int

    @classmethod
    def of_rows(cls, lengths: Sequence[int]) -> Work:
        """Rows read one by one, logits of every token."""
        return cls(sum(lengths), sum(lengths), sum(n * n for n in lengths))

    @classmethod
    def of_group(cls, prompt: int, responses: Sequence[int]) -> Work:
        """Responses behind one copy of their prompt, logits where a response is predicted
        (`core/shared_prompt.py`; it takes one token more of each row, as verl does)."""
        answers = sum(responses)
        squares = prompt * prompt + 2 * prompt * answers + sum(n * n for n in responses)
        return cls(prompt + answers, answers + len(responses), squares)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.read_tokens + other.read_tokens,
            self.square_tokens + other.square_tokens,
        )


def forward_flops(shape: ModelShape, work: Work) -> float:
    """Operations of one forward pass: of the score matrix the part that a causal model needs.

    Kernels that are given an explicit mask (verl on the CPU) compute all of it.
    """
    linear = 2.0 * (shape.layer_parameters * work.tokens + shape.head_parameters * work.read_tokens)
    # Scores and their product with the values: 2 products x 2 operations per pair of tokens.
    return linear + 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * work.square_tokens


def train_flops(shape: ModelShape, work: Work) -> float:
    """Operations of a forward and a backward pass, without activation recomputation."""
    return TRAIN * forward_flops(shape, work)
