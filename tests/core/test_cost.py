"""The cost model against numbers worked out by hand and against torch's own operation counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recast_cli.core.cost import ModelShape, Work, forward_flops, train_flops

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 3,
    "intermediate_size": 8,
    "vocab_size": 10,
}


def test_matmul_parameters_by_hand() -> None:
    queries, keys, values, output = 4 * 6, 4 * 3, 4 * 3, 6 * 4
    mlp, head = 3 * 4 * 8, 4 * 10
    expected = 2 * (queries + keys + values + output + mlp) + head
    assert ModelShape.from_config(TINY).matmul_parameters == expected == 376


def test_flops_by_hand() -> None:
    shape = ModelShape.from_config(TINY)
    lengths = [3, 2]
    work = Work.of_rows(lengths)
    assert work == Work(tokens=3 + 2, read_tokens=3 + 2, square_tokens=9 + 4)
    linear = 2 * 376 * 5
    # per layer and head: scores (3x3 and 2x2 of dot products over 3), then the weighted sum of values
    attention = 2 * 2 * sum(2 * n * n * 3 + 2 * n * n * 3 for n in lengths)
    assert linear + attention == 4384
    assert forward_flops(shape, work) == linear + attention / 2
    assert train_flops(shape, work) == 3 * (linear + attention / 2)


def test_a_shared_prompt_is_counted_once() -> None:
    """A prompt of 5, responses of 2 and 1: every token but the prompt's first four is read, the last of the
    prompt for each response."""
    work = Work.of_group(5, [2, 1])
    assert work == Work(tokens=5 + 3, read_tokens=1 + 2 + 1 + 1, square_tokens=25 + 2 * 5 * 3 + 4 + 1)
    # Rows read alone have the pairs inside the prompt twice.
    alone = Work.of_rows([7, 6])
    assert alone.square_tokens - work.square_tokens == 5 * 5
    shape = ModelShape.from_config(TINY)
    layers, head = 2 * 336 * 8, 2 * 40 * 5
    assert forward_flops(shape, work) == layers + head + 2 * 2 * 2 * 3 * 60


def test_defaults_of_older_configs() -> None:
    config = {key: value for key, value in TINY.items() if key not in ("num_key_value_heads", "head_dim")}
    shape = ModelShape.from_config(config)
    assert (shape.num_kv_heads, shape.head_dim) == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_experts": 8}, "num_experts=8"), ({"hidden_size": None}, "config lacks hidden_size")],
)
def test_what_cannot_be_counted_is_refused(change: dict, message: str) -> None:
    config = {key: value for key, value in {**TINY, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        ModelShape.from_config(config)


@pytest.mark.parametrize(("rows", "length"), [(1, 7), (3, 16)])
def test_torchs_counter_agrees_on_a_real_qwen3(rows: int, length: int) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {**TINY, "hidden_size": 32, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": 50, "num_hidden_layers": 3}
    # eager: plain products that the counter sees, all of the score matrix
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, attn_implementation="eager", tie_word_embeddings=True))
    shape = ModelShape.from_config(model.config.to_dict())
    ids = torch.randint(50, (rows, length))
    work = Work.of_rows([length] * rows)
    # No tolerance. The one product left out is that of positions and rotary frequencies.
    rotary = 2 * length * 16 // 2
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, use_cache=False).logits.sum()
    forward = counter.get_total_flops()
    above_the_diagonal = 2 * 3 * 4 * 16 * work.square_tokens  # which eager attention computes too
    assert forward == forward_flops(shape, work) + above_the_diagonal + rotary
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * (forward - rotary)
