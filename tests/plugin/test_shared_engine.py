"""Shared prompts in verl's own worker: gradients and log-probs of rows read alone, from fewer tokens.

Groups of ragged prompts and answers, whole and as pairs (test_loss_equality.py).
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from test_loss_equality import GROUP, KL_AND_ENTROPY, PROMPTS, Step, case, gradients, make_step
from transformers import Lfm2Config, Lfm2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp import transformer_impl

from verl_recast.actor_options import extend_workers
from verl_recast.shared_engine import share_engine
from verl_recast.shared_prompts import OPTION

WHOLE, PAIRS = "whole", "pairs"
Key = tuple[Any, ...]
Found = dict[Key, list[Any]]


@pytest.fixture(scope="module")
def step() -> Step:
    return make_step()


@pytest.fixture(scope="module")
def found(step: Step, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the child recorded by (ranks, shared, rows, size of micro-batches); `log_probs` in its place."""
    folder, answers = tmp_path_factory.mktemp("shared"), {}
    groups = {
        WHOLE: ({b: rows_G[rows_G >= 0].tolist() for b, rows_G in enumerate(step.rows_BG)}, GROUP),
        PAIRS: (step.kept, 2),
    }
    for ranks in (1, 2):
        made: dict[Key, dict[str, Any]] = {}
        for shared, kind, size in itertools.product((False, True), groups, (2, None)):
            options = {"scale": "kept", "mode": "token-mean", "micro_batch_size": size, **KL_AND_ENTROPY}
            made[ranks, shared, kind, size] = case(step, *groups[kind], ranks, **options)
            if not made[ranks, shared, kind, size]["extra"]["use_dynamic_bsz"]:
                continue
            made[ranks, shared, kind, "log_probs"] = case(step, *groups[kind], ranks, **options) | {
                "infer": True
            }
        for (_, shared, _, size), each in made.items():
            each["share"] = shared and not any(earlier.get("share") for earlier in made.values())
            each["extra"]["calculate_entropy"] = True
            if size in (None, "log_probs"):
                each["extra"]["max_token_len_per_gpu"] = 60
        out = gradients(list(made.values()), ranks, tokenizer_folder / "model", folder)
        answers |= dict(zip(made, out, strict=True))
        for kind in groups:
            answers[ranks, True, kind, "answers"] = made[ranks, True, kind, "log_probs"]["columns"][
                "responses"
            ]
    return answers


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", [WHOLE, PAIRS])
@pytest.mark.parametrize("size", [2, None])
def test_gradients_are_those_of_rows_read_alone(
    found: Found, kind: str, size: int | None, ranks: int
) -> None:
    alone, shared = found[ranks, False, kind, size], found[ranks, True, kind, size]
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared, strict=True):
        assert one.norm() > 1e-4
        assert float((one - other).norm() / one.norm()) <= 5e-6


@pytest.mark.parametrize("kind", [WHOLE, PAIRS])
def test_log_probs_and_entropies_are_those_of_rows_read_alone(found: Found, step: Step, kind: str) -> None:
    *alone, read_alone = found[1, False, kind, "log_probs"]
    *shared, read_shared = found[1, True, kind, "log_probs"]
    sizes = [len(row) for row in found[1, True, kind, "answers"]]
    for one, other in zip(alone, shared, strict=True):
        for size, row_alone, row_shared in zip(sizes, one, other, strict=True):
            assert len(row_alone) == len(row_shared)
            # From the last of the prompt on; what follows the answer's last token is nobody's.
            answer = slice(len(row_alone) - size - 1, -1)
            torch.testing.assert_close(row_shared[answer], row_alone[answer], rtol=0, atol=1e-5)
            assert (row_alone[answer] != 0).all() and not row_shared[: answer.start].any()
    assert int(read_shared.sum()) < int(read_alone.sum())


def test_every_prompt_is_read_once_where_micro_batches_allow_it(found: Found, step: Step) -> None:
    lengths = np.array([len(each["input_ids"]) for each in step.columns]).reshape(PROMPTS, GROUP)
    answers = np.array([len(each["responses"]) for each in step.columns]).reshape(PROMPTS, GROUP)
    there = step.rows_BG >= 0
    prompts = (lengths - answers)[:, 0].sum()
    filled = 9 + 1  # the rows that fill the batch up are one prompt of 9 with an answer of 1
    read = found[1, True, WHOLE, "log_probs"][-1]
    num_filled = PROMPTS * GROUP - int(there.sum())
    assert int(read.sum()) == prompts + (answers * there).sum() + (filled - 1 + num_filled)


@pytest.mark.parametrize("custom", [None, {}, {"share_prompt": False}, {"masked_actor": True}])
def test_a_worker_that_does_not_ask_is_left_alone(custom: dict[str, Any] | None) -> None:
    class Worker:
        role, config = "actor_ref", OmegaConf.create({"rollout": {"custom": custom}})

        def init_model(self) -> str:
            self.actor = self.ref = "stock"
            return "built"

    extend_workers(Worker, OPTION, lambda *_: pytest.fail("checked"), lambda *_: pytest.fail("changed"))
    worker = Worker()
    assert worker.init_model() == "built" and (worker.actor, worker.ref) == ("stock", "stock")


def test_a_worker_that_asks_is_checked_and_both_its_engines_change() -> None:
    class Worker:
        role, config = "actor_ref", OmegaConf.create({"rollout": {"custom": {"share_prompt": True}}})

        def init_model(self) -> None:
            self.actor, self.ref = "actor", "ref"

    seen: list[Any] = []
    extend_workers(Worker, OPTION, seen.append, lambda config, part: seen.append((config, part)))
    worker = Worker()
    worker.init_model()
    assert seen == [worker.config, (worker.config, "actor"), (worker.config, "ref")]


def test_layers_that_are_no_full_attention_are_refused() -> None:
    """A convolution, a recurrence or a window reads the packed rows as one text, without an error."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Lfm2ForCausalLM(
        Lfm2Config(**sizes, vocab_size=20, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    )
    with pytest.raises(ValueError, match="layers of kind 'conv'; share_prompt needs full attention in all"):
        share_engine(SimpleNamespace(module=model))


def test_a_layer_that_asks_for_no_attention_is_told(step: Step) -> None:
    """Of a kind that no config names: one of two layers passes its input on."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=40, num_hidden_layers=2, head_dim=8))
    engine = SimpleNamespace(
        module=model,
        forward_backward_batch=None,
        prepare_model_inputs=lambda _: ({}, {}),
        prepare_model_outputs=lambda *_: {},
    )
    stock = transformer_impl.prepare_micro_batches
    try:
        share_engine(engine)
    finally:
        transformer_impl.prepare_micro_batches = stock
    rows = [torch.tensor([3, 4, 5, 6, 7]), torch.tensor([3, 4, 5, 8, 9])]
    columns = {
        "input_ids": rows,
        "position_ids": [torch.arange(5)] * 2,
        "responses": [row[3:] for row in rows],
    }
    nested = {
        name: torch.nested.as_nested_tensor(column, layout=torch.jagged) for name, column in columns.items()
    }
    batch = tu.get_tensordict(nested, {})
    for broken in (False, True):
        if broken:
            model.model.layers[1].forward = lambda hidden_states, *_, **__: hidden_states
        inputs, output_args = engine.prepare_model_inputs(batch)
        output = model(**inputs, use_cache=False)
        if not broken:
            engine.prepare_model_outputs(output, output_args, batch, None)
            continue
        with pytest.raises(ValueError, match="1 of the model's 2 layers asked for attention, needs all"):
            engine.prepare_model_outputs(output, output_args, batch, None)
