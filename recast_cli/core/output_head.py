"""Logits of some tokens alone: the output head multiplies with their rows of its weight and no others.

What a model does with its logits afterwards (a scale, a soft cap) it does to those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import Linear
from torch.nn.functional import linear


@contextmanager
def only_columns(model: Any, columns: slice | None) -> Iterator[None]:
    """Inside the block the head of `model` gives these columns; all of them where the head is no plain
    `Linear`, or somebody else has taken its place in front of it already."""
    head = model.get_output_embeddings()
    if columns is None or type(head) is not Linear or "forward" in vars(head):
        yield
        return

    def some(hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, head.weight[columns], None if head.bias is None else head.bias[columns])

    vars(head)["forward"] = some  # the instance's own, which hides its class's
    try:
        yield
    finally:
        del vars(head)["forward"]


def chosen(logits: torch.Tensor, columns: slice | None) -> torch.Tensor:
    """The columns of logits (..., V) that came out of a block of `only_columns`, cut out if all came."""
    if columns is None or logits.shape[-1] == columns.stop - columns.start:
        return logits
    return logits[..., columns]
