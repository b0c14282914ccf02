"""An engine of verl's that reads the prompt of a group once (shared_prompts.py says who asks for it).

verl's FSDP engine reads every row whole. A shared engine packs the rows of a micro-batch behind their
distinct prompts (`recast_cli.core.shared_prompt`), keeps the rows of a prompt in one micro-batch, and takes
logits only where a response is predicted; from there on it is verl's own code again. Log-probs and gradients
are those of the rows read alone. What verl derives of prompt tokens is 0 here: nothing in a loss reads it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch.nested import nested_tensor_from_jagged
from transformers import AttentionInterface
from verl.utils import tensordict_utils as tu
from verl.workers.engine import utils
from verl.workers.engine.fsdp import transformer_impl

from recast_cli.core.shared_prompt import SharedPrompts, attend, rows_by_prompt, share_prompts
from recast_cli.core.walkable import FULL_ATTENTION, require_layers
from verl_recast.platform.micro_batches import by_length, take
from verl_recast.shared_prompts import SHARED

ATTENTION = "recast_shared_prompt"
# What a model's attention may ask for without changing which token sees which, or how scores become weights.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "cache_position", "num_items_in_batch"}


class Reading:
    """One forward call: where its prompts are, and how many layers have asked.

    No dataclass: FSDP2 copies those on their way into each layer, and would count in the copies.
    """

    def __init__(self, layout: SharedPrompts) -> None:
        self.layout, self.layers = layout, 0


def shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    shared_prompts: Reading | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface for packed rows.

    Raises:
        ValueError: a model whose attention is more than causal: windows, sinks, soft caps, dropout.
    """
    strange = sorted(name for name, found in asked.items() if found is not None and name not in _HARMLESS)
    if dropout:
        strange.append("dropout")
    if strange:
        raise ValueError(f"share_prompt: attention with {strange[0]}, needs plain causal attention")
    if shared_prompts is None:
        raise ValueError(f"{type(module).__name__} was not told where the prompts are")
    shared_prompts.layers += 1
    return attend(query, key, value, shared_prompts.layout, scaling), None


def share_engine(engine: Any) -> None:
    """Make one of verl's FSDP engines read shared prompts once, from now on.

    Raises:
        ValueError: a model in which more than attention carries one token's state to another.
    """
    require_layers(engine.module, FULL_ATTENTION, "share_prompt")
    AttentionInterface.register(ATTENTION, shared_attention)
    engine.module.set_attn_implementation(ATTENTION)
    stock_batch = engine.forward_backward_batch
    stock_inputs, stock_outputs = engine.prepare_model_inputs, engine.prepare_model_outputs

    @functools.wraps(stock_inputs)
    def prepare_model_inputs(micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        tokens, positions = micro_batch["input_ids"], micro_batch["position_ids"]
        shared = share_prompts(*_of_rows(micro_batch)).to(tokens.device)
        answers, reading = answers_only(micro_batch, shared), Reading(shared)
        _, output_args = stock_inputs(answers)
        output_args["answers"], output_args["reading"] = answers, reading
        return {
            "input_ids": tokens.values()[shared.source_T][None],
            "attention_mask": None,
            "position_ids": positions.values()[shared.source_T][None],
            "logits_to_keep": shared.read_K,
            "shared_prompts": reading,
        }, output_args

    @functools.wraps(stock_outputs)
    def prepare_model_outputs(
        output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        reading, layers = output_args["reading"], engine.module.config.num_hidden_layers
        if reading.layers != layers:
            raise ValueError(
                f"share_prompt: {reading.layers} of the model's {layers} layers asked for attention, "
                "needs all of them: another layer reads the packed rows as one text"
            )
        found = stock_outputs(output, output_args, output_args["answers"], logits_processor_func)
        offsets = micro_batch["input_ids"].offsets()
        return {name: _on_whole_rows(column, reading.layout, offsets) for name, column in found.items()}

    @functools.wraps(stock_batch)
    def forward_backward_batch(data: TensorDict, *args: Any, **options: Any) -> Any:
        tu.assign_non_tensor(data, **{SHARED: True})
        return stock_batch(data, *args, **options)

    engine.forward_backward_batch = forward_backward_batch
    engine.prepare_model_inputs = prepare_model_inputs
    engine.prepare_model_outputs = prepare_model_outputs
    _keep_together()


def _keep_together() -> None:
    """Have verl's engines of this process ask here for micro-batches; others get the old ones."""
    stock: Any = transformer_impl.prepare_micro_batches
    if getattr(stock, "_recast_shares", False):
        return

    @functools.wraps(stock)
    def prepare(data: TensorDict, **options: Any) -> tuple[list[Any], Any]:
        shared = tu.get_non_tensor_data(data=data, key=SHARED, default=False)
        return (prepare_micro_batches if shared else stock)(data, **options)

    prepare._recast_shares = True  # type: ignore[attr-defined]
    transformer_impl.prepare_micro_batches = prepare  # type: ignore[assignment]


def prepare_micro_batches(data: TensorDict, dp_group: Any = None, **options: Any) -> tuple[list[Any], Any]:
    """verl's function of this name for an engine that shares prompts: their rows stay together.

    Fixed micro-batches are verl's own: they take rows as they come.
    """
    if not tu.get_non_tensor_data(data=data, key="use_dynamic_bsz", default=True):
        return utils.prepare_micro_batches(data, dp_group=dp_group, **options)
    tokens_N, lengths_B, responses_B = _of_rows(data)
    max_tokens = int(data["max_token_len_per_gpu"])
    units = [
        unit
        for rows in rows_by_prompt(tokens_N, lengths_B, responses_B)
        for unit in _fitting(np.array(rows), lengths_B, responses_B, max_tokens)
    ]
    sizes_U = np.array([packed_tokens(unit, lengths_B, responses_B) for unit in units])
    parts = [np.concatenate([units[u] for u in part]) for part in by_length(sizes_U, max_tokens)]
    return take(data, parts, dp_group)


def packed_tokens(rows: np.ndarray, lengths_B: np.ndarray, responses_B: np.ndarray) -> int:
    """Tokens of some rows of one prompt behind one copy of it."""
    return int(lengths_B[rows[0]] - responses_B[rows[0]] + responses_B[rows].sum())


def _fitting(
    rows: np.ndarray, lengths_B: np.ndarray, responses_B: np.ndarray, max_tokens: int
) -> list[np.ndarray]:
    """The rows of a prompt in one piece, or in as many of like size as keep within `max_tokens`."""
    for count in range(1, len(rows) + 1):
        pieces = np.array_split(rows, count)
        if all(packed_tokens(piece, lengths_B, responses_B) <= max_tokens for piece in pieces):
            break
    return pieces


def _of_rows(data: TensorDict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of all rows, tokens of each row, tokens of each response."""
    tokens, responses = data["input_ids"], data["responses"]
    found = tokens.values(), tokens.offsets().diff(), responses.offsets().diff()
    values_N, lengths_B, responses_B = (tensor.cpu().numpy() for tensor in found)
    return values_N, lengths_B, responses_B


def answers_only(micro_batch: TensorDict, shared: SharedPrompts) -> TensorDict:
    """The rows without their prompts, but for the last token, whose logits give the first of the response."""
    offsets = micro_batch["responses"].offsets()
    offsets = offsets + torch.arange(len(offsets), device=offsets.device)
    answers = micro_batch.copy()  # shallow
    for name in ("input_ids", "position_ids"):
        answers[name] = nested_tensor_from_jagged(micro_batch[name].values()[shared.target_K], offsets)
    tu.assign_non_tensor(answers, use_remove_padding=True)
    return answers


def _on_whole_rows(column: torch.Tensor, shared: SharedPrompts, offsets: torch.Tensor) -> torch.Tensor:
    """A column of the answers as one of whole rows, 0 at the prompts."""
    values_N = column.values().new_zeros(int(offsets[-1])).index_copy(0, shared.target_K, column.values())
    return nested_tensor_from_jagged(values_N, offsets)
