"""Log-probs in blocks of tokens against verl's own loop over rows: values and gradients."""

from __future__ import annotations

import pytest
import torch
from fresh import run_fresh
from verl.utils.torch_functional import logprobs_from_logits_v2

from verl_recast.platform.log_probs import BLOCK_TOKENS, log_probs_from_logits


@pytest.mark.parametrize("shape", [(3,), (BLOCK_TOKENS + 7,), (2, 5), (3, BLOCK_TOKENS // 2 + 1)])
def test_values_and_gradients_are_verls(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn((*shape, 11), generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, shape, generator=generator)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = []
    for function in (log_probs_from_logits, logprobs_from_logits_v2):
        leaf = logits.clone().requires_grad_()
        values = function(leaf, labels)
        (values * weight).sum().backward()
        found.append((values.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1])


def test_half_precision_is_widened() -> None:
    logits = (5 * torch.randn(64, 300, generator=torch.Generator().manual_seed(0))).bfloat16()
    labels = torch.arange(64)
    exact = torch.log_softmax(logits.double(), dim=-1)[torch.arange(64), labels]
    torch.testing.assert_close(log_probs_from_logits(logits, labels).double(), exact, rtol=1e-6, atol=1e-5)


def test_the_cpu_engine_uses_it_and_another_platform_does_not() -> None:
    program = """
import json, sys
import verl.workers.engine
from verl.utils import torch_functional
json.dump(torch_functional.logprobs_from_logits_v2.__module__, open(sys.argv[1], "w"))
"""
    assert run_fresh(program, VERL_PLATFORM="cpu")[0] == "verl_recast.platform.log_probs"
    assert run_fresh(program)[0] == "verl.utils.torch_functional"
