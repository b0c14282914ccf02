"""What ReCast's pair does inside verl's own policy loss, on a real tiny model on the CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from verl_recast.estimator import recast_advantage

PROMPT = [3, 6, 14, 22, 4, 3]  # begin, an item, end, begin
PAIR = [[5, 13, 21], [5, 13, 25]]  # i+ and i-: they share two of three codes


def actor_config(mode: str = "token-sum") -> FSDPActorConfig:
    return FSDPActorConfig(
        strategy="fsdp",
        rollout_n=2,
        ppo_mini_batch_size=2,
        ppo_micro_batch_size_per_gpu=2,
        loss_agg_mode=mode,
        loss_scale_factor=7 if mode == "seq-mean-token-sum-norm" else None,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
    )


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def token_log_probs(model: torch.nn.Module, pair: list[list[int]]) -> torch.Tensor:
    """Log-prob of the next token at every place of prompt + response, as verl's engine gives its loss."""
    rows = []
    for response in pair:
        ids = torch.tensor([PROMPT + response])
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        following = torch.roll(ids[0], -1)
        rows.append(log_probs.gather(1, following[:, None])[:, 0])
    return nested(rows)


def loss_of(
    log_probs: torch.Tensor,
    mask: list[list[int]],
    config: FSDPActorConfig,
    *,
    old: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict]:
    """verl's loss of the pair; advantages from the estimator, as verl would compute them."""
    rewards = torch.tensor([[0, 0, 1.0], [0, 0, 0]])
    advantages, _ = recast_advantage(rewards, torch.tensor(mask))
    return loss_of_rows(log_probs, PAIR, mask, advantages, config, old=old, global_batch_size=2)


def loss_of_rows(
    log_probs: torch.Tensor,
    responses: list[list[int]],
    mask: list[list[int]],
    advantages: torch.Tensor,
    config: FSDPActorConfig,
    *,
    global_batch_size: int,
    old: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict]:
    """verl's ppo_loss of some responses to the prompt, at ratio 1 unless `old` log-probs are given."""
    mask_NT = torch.tensor(mask)
    if old is None:
        begin = len(PROMPT) - 1
        old = torch.stack([row.detach()[begin : begin + 3] for row in log_probs.unbind()])
    data = tu.get_tensordict(
        {
            "prompts": nested([torch.tensor(PROMPT)] * len(responses)),
            "responses": nested([torch.tensor(response) for response in responses]),
            "response_mask": nested(list(mask_NT)),
            "old_log_probs": nested(list(old)),
            "advantages": nested(list(advantages)),
        },
        {"dp_size": 1, "batch_num_tokens": int(mask_NT.sum()), "global_batch_size": global_batch_size},
    )
    assert isinstance(data, TensorDict)
    return ppo_loss(config, {"log_probs": log_probs}, data)


@pytest.fixture(scope="module")
def model(tokenizer_folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tokenizer_folder / "model", dtype=torch.float64)


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@pytest.mark.parametrize("mode", MODES)
def test_tokens_of_the_shared_prefix_get_no_net_gradient_at_ratio_one(
    model: torch.nn.Module, mode: str
) -> None:
    config = actor_config(mode)
    prefix = gradient(model, loss_of(token_log_probs(model, PAIR), [[1, 1, 0], [1, 1, 0]], config)[0])
    alone = gradient(model, loss_of(token_log_probs(model, PAIR), [[1, 1, 0], [0, 0, 0]], config)[0])
    assert alone.norm() > 1e-3  # one row of the pair does pull at the shared tokens
    assert prefix.norm() < 1e-12 * alone.norm() + 1e-15  # and the other one pulls back


def test_only_the_code_where_the_pair_parts_is_learned(model: torch.nn.Module) -> None:
    config = actor_config("token-sum")
    whole = gradient(model, loss_of(token_log_probs(model, PAIR), [[1, 1, 1]] * 2, config)[0])
    last = gradient(model, loss_of(token_log_probs(model, PAIR), [[0, 0, 1]] * 2, config)[0])
    assert last.norm() > 1e-3
    assert torch.allclose(whole, last, rtol=0, atol=1e-6)  # the norms work in float32


def test_the_step_raises_the_positive_and_lowers_the_negative(model: torch.nn.Module) -> None:
    before = token_log_probs(model, PAIR)
    loss, _ = loss_of(before, [[1, 1, 1]] * 2, actor_config("token-sum"))
    model.zero_grad()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
        after = token_log_probs(model, PAIR)
        for parameter in model.parameters():
            parameter += 1e-3 * parameter.grad
    place = len(PROMPT) + 1  # predicts the third code
    change = [
        float(row_after[place] - row_before[place])
        for row_after, row_before in zip(after.unbind(), before.unbind(), strict=True)
    ]
    assert change[0] > 0 > change[1]


def test_loss_of_a_pair_by_hand(model: torch.nn.Module) -> None:
    # ratios e^.1 (inside the clip) for i+ and e^.1 for i-: -A * ratio, summed over three tokens each
    log_probs = token_log_probs(model, PAIR)
    begin = len(PROMPT) - 1
    actor = torch.stack([row.detach()[begin : begin + 3] for row in log_probs.unbind()])
    loss, metrics = loss_of(log_probs, [[1, 1, 1]] * 2, actor_config("token-sum"), old=actor - 0.1)
    assert float(loss) == pytest.approx(3 * -math.exp(0.1) + 3 * math.exp(0.1), abs=1e-12)
    # ratio e^.4 is above 1.28: i+ is clipped to 1.28, i- pays its full ratio; 4 of 6 tokens count
    loss, metrics = loss_of(log_probs, [[1, 1, 1], [1, 0, 0]], actor_config("token-mean"), old=actor - 0.4)
    assert float(loss) == pytest.approx((3 * -1.28 + math.exp(0.4)) / 4, abs=1e-12)
    assert metrics["actor/pg_clipfrac"].aggregate() == pytest.approx(3 / 4)
    # ratio e^-.4 is below 0.8: i- is clipped to 0.8, i+ pays its full ratio; mean over the two rows
    loss, _ = loss_of(log_probs, [[1, 1, 1]] * 2, actor_config("seq-mean-token-sum"), old=actor + 0.4)
    assert float(loss) == pytest.approx((3 * -math.exp(-0.4) + 3 * 0.8) / 2, abs=1e-12)
