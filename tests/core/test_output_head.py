"""The output head gives the columns that are asked for, and is itself again afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import OFFSETS, PAD, PROMPTS, SIZES, VOCABULARY, tiny, uniforms
from torch import nn

from recast_cli.core.output_head import chosen, only_columns
from recast_cli.core.sampling import sample
from recast_cli.core.trie import Trie
from recast_cli.core.without_replacement import sample_distinct


class WithHead(nn.Module):
    """A model that is nothing but its head, and scales what comes out of it."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden) * 3


class OddHead(nn.Linear):
    """Some head of another make: what it does to the whole vocabulary nobody knows."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden).softmax(dim=-1)


@pytest.mark.parametrize("head", [nn.Linear(4, 9), nn.Linear(4, 9, bias=False), OddHead(4, 9)])
@torch.no_grad()
def test_columns_of_any_head(head: nn.Module) -> None:
    model, hidden, columns = WithHead(head), torch.randn(2, 3, 4), slice(2, 7)
    whole = model(hidden)
    with only_columns(model, columns):
        raw = model(hidden)
    assert raw.shape[-1] == (9 if isinstance(head, OddHead) else 5)
    torch.testing.assert_close(chosen(raw, columns), whole[..., 2:7])
    assert torch.equal(model(hidden), whole)
    assert chosen(whole, None) is whole


def test_a_head_that_somebody_else_has_wrapped_stays_wrapped() -> None:
    """As accelerate's hooks do: in `vars` of the instance."""
    head, hidden = nn.Linear(4, 9), torch.randn(1, 4)
    calls: list[int] = []
    vars(head)["forward"] = lambda given: calls.append(1) or nn.Linear.forward(head, given)
    model = WithHead(head)
    with only_columns(model, slice(0, 2)):
        assert model(hidden).shape == (1, 9)
    assert model(hidden).shape == (1, 9) and len(calls) == 2


def test_the_head_is_itself_again_after_an_error() -> None:
    model, hidden = WithHead(nn.Linear(4, 9)), torch.randn(1, 4)
    with pytest.raises(RuntimeError, match="stop"), only_columns(model, slice(0, 2)):
        raise RuntimeError("stop")
    assert model(hidden).shape == (1, 9)


@pytest.mark.parametrize("distinct", [False, True])
def test_draws_multiply_with_the_codes_of_a_level(model, trie: Trie, distinct: bool) -> None:
    """A level of 4, of 5 and of 3 codes of a vocabulary of 24: that many logits of each slot, and no more."""
    widths = []
    hook = model.register_forward_hook(lambda _, args, output: widths.append(output.logits.shape[-1]))
    options = {"pad_token_id": PAD, "full_vocabulary": False}
    try:
        if distinct:
            keys = np.arange(4, dtype=np.uint64)
            found = sample_distinct(model, trie, OFFSETS, PROMPTS, keys, 5, **options)
        else:
            found = sample(model, trie, OFFSETS, PROMPTS, uniforms(4, 6), **options)
    finally:
        hook.remove()
    assert widths == SIZES
    assert (found.items_BG >= 0).all() and found.log_probs_BGL.isnan().all()
    assert found.trie_log_probs_BGL.isfinite().all()


def test_codes_beyond_the_vocabulary_are_refused(trie: Trie) -> None:
    offsets = [*OFFSETS[:2], VOCABULARY - 2]  # the last level's three codes end one past it
    with pytest.raises(ValueError, match=r"token ids 5\.\.24 of 24"):
        sample(tiny(), trie, offsets, PROMPTS, uniforms(4, 6), pad_token_id=PAD, full_vocabulary=False)
