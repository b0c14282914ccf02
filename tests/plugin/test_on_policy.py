"""Old log-probs out of the update's own forward pass: the gradient that verl computes with a pass for them.

Groups of ragged prompts and answers as pairs, through verl's own worker (test_loss_equality.py).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_loss_equality import KL_AND_ENTROPY, case, gradients, make_step
from transformers import GPT2Config, GPTNeoXConfig, MixtralConfig

from verl_recast.on_policy import require_no_dropout

CASES = {"token-mean": {}, "seq-mean-token-mean": KL_AND_ENTROPY}
Found = dict[tuple[Any, ...], list[torch.Tensor]]


@pytest.fixture(scope="module")
def found(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Gradients by (ranks, whose old log-probs, mode): a pass's `own`, the `update`'s, or a `stranger`'s."""
    step = make_step()
    answers: Found = {}
    model, folder = tokenizer_folder / "model", tmp_path_factory.mktemp("on-policy")
    asked = {
        (ranks, mode): case(
            step, step.kept, 2, ranks, scale="kept", mode=mode, micro_batch_size=None, **terms
        )
        for ranks in (1, 2)
        for mode, terms in CASES.items()
    }
    # Rows lie in another order for two ranks, but are the same: one rank knows the log-probs of both.
    asking = [asked[ranks, "token-mean"] | {"infer": True} for ranks in (1, 2)]
    for each in asking:
        each["extra"] = each["extra"] | {"calculate_entropy": True}
    inferred = dict(zip((1, 2), gradients(asking, 1, model, folder), strict=True))
    for ranks in (1, 2):
        made: dict[tuple[Any, ...], dict[str, Any]] = {}
        for mode in CASES:
            given = asked[ranks, mode]
            sizes = [len(response) for response in given["columns"]["responses"]]
            log_probs = zip(inferred[ranks][0], sizes, strict=True)
            own = [row[len(row) - size - 1 : -1].clone() for row, size in log_probs]
            others = {name: rows for name, rows in given["columns"].items() if name != "old_log_probs"}
            made[ranks, "stranger", mode] = given
            made[ranks, "own", mode] = given | {"columns": others | {"old_log_probs": own}}
            made[ranks, "update", mode] = given | {"columns": others, "on_policy": True}
        made[ranks, "update", "shared"] = made[ranks, "update", "token-mean"] | {"share": True}
        answers |= dict(zip(made, gradients(list(made.values()), ranks, model, folder), strict=True))
    return answers


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", [*CASES, "shared"])
def test_gradients_are_those_of_a_pass_for_old_log_probs(found: Found, ranks: int, mode: str) -> None:
    update = found[ranks, "update", mode]
    mode = "token-mean" if mode == "shared" else mode
    own, stranger = found[ranks, "own", mode], found[ranks, "stranger", mode]
    assert len(own) == len(update) == 3
    for one, other, wrong in zip(own, update, stranger, strict=True):
        assert one.norm() > 1e-4
        assert float((one - other).norm() / one.norm()) <= 5e-6
        assert float((one - wrong).norm() / one.norm()) > 1e-2  # old log-probs do matter here


def test_rates_that_a_language_model_does_not_use_are_no_dropout() -> None:
    """Both are 0.1 by default, of heads that classify."""
    neox = GPTNeoXConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for config in (neox, GPT2Config(n_embd=8, n_head=2, n_layer=1, **rates)):
        model = torch.nn.Linear(2, 2)
        model.config = config
        require_no_dropout(model)
    model.config = MixtralConfig(hidden_size=8, num_attention_heads=2, router_jitter_noise=0.2)
    with pytest.raises(ValueError, match=r"router_jitter_noise of the model is 0\.2"):
        require_no_dropout(model)


def test_a_model_with_dropout_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.0))
    require_no_dropout(model)
    model.config = SimpleNamespace(attention_dropout=0.0, classifier_dropout=None)
    require_no_dropout(model)
    model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout of the model is 0\.1, needs 0"):
        require_no_dropout(model)
    model.config.attention_dropout = 0.0
    model.append(torch.nn.Dropout(0.2))
    with pytest.raises(ValueError, match=r"custom\.on_policy: 2 of the model is 0\.2"):
        require_no_dropout(model)
