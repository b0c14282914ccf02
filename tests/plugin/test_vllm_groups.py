"""What surrounds vLLM under verl, without vLLM: the requests of a group, its options, the CPU shim."""

from __future__ import annotations

import asyncio
import importlib.metadata
from typing import Any

import numpy as np
import pytest
from verl.workers.config import RolloutConfig
from verl.workers.rollout.replica import TokenOutput

from verl_recast.platform import vllm_cpu
from verl_recast.rollout.vllm_groups import PROCESSOR, add_trie, require_fitting, sample_groups

# -- requests --------------------------------------------------------------------------------------------


class Engine:
    """Answers with tokens that are a function of the request's seed, the last request first."""

    def __init__(self, **fields: Any) -> None:
        self.requests: list[tuple[list[int], dict[str, Any], str]] = []
        self.fields = {"log_probs": [-0.5, -0.25, -0.125], "stop_reason": "completed", **fields}

    async def generate(self, prompt: list[int], params: dict[str, Any], request_id: str) -> TokenOutput:
        self.requests.append((prompt, dict(params), request_id))
        await asyncio.sleep(0.02 / len(self.requests))
        return TokenOutput(**{"token_ids": drawn(params["seed"]), **self.fields})


def drawn(seed: int) -> list[int]:
    return [seed >> 8 * level & 255 for level in range(3)]


def sample(engine: Engine, *index: int, step: int = 2, temperature: float = 1.0) -> Any:
    prompts = [[9, row, 3] for row in index]
    options = {"num_levels": 3, "step": step, "seed": 7, "temperature": temperature, "top_p": 0.9}
    return asyncio.run(sample_groups(engine.generate, prompts, index, 3, **options))


def test_every_rollout_is_a_request_of_l_tokens_with_a_seed_of_its_own() -> None:
    engine = Engine()
    tokens_BGL, log_probs_BGL = sample(engine, 4, 8, temperature=0.5)
    assert tokens_BGL.shape == log_probs_BGL.shape == (2, 3, 3)
    assert log_probs_BGL[1, 2].tolist() == [-0.5, -0.25, -0.125]
    params = [params for _, params, _ in engine.requests]
    asked = {(p["max_tokens"], p["temperature"], p["top_p"], p["top_k"], p["logprobs"]) for p in params}
    assert asked == {(3, 0.5, 0.9, -1, True)}
    assert all(p["extra_args"] == {"recast_given": 0} for p in params)
    assert [prompt for prompt, _, _ in engine.requests] == [[9, 4, 3]] * 3 + [[9, 8, 3]] * 3
    assert len({p["seed"] for p in params}) == len({name for _, _, name in engine.requests}) == 6
    # though they were answered in another order
    assert tokens_BGL.reshape(6, 3).tolist() == [drawn(p["seed"]) for p in params]


def test_draws_depend_on_run_step_row_and_rollout_and_on_nothing_else() -> None:
    both, swapped = sample(Engine(), 4, 8)[0], sample(Engine(), 8, 4)[0]
    assert np.array_equal(both, swapped[::-1])
    assert not np.array_equal(both, sample(Engine(), 4, 8, step=3)[0])


def test_answer_cut_short_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"vLLM answered with 0 tokens \(aborted\), needed 3"):
        sample(Engine(token_ids=[], stop_reason="aborted"), 4)


# -- options ---------------------------------------------------------------------------------------------


def test_the_trie_stands_beside_what_the_user_gave_to_the_engine() -> None:
    options = {"logits_processors": ["a:B"], "additional_config": {"c": 1}, "max_logprobs": 500, "seed": 3}
    for _ in range(2):
        add_trie(options, {"tokenizer": "a/tokenizer", "log": "x"})
        assert options == {
            "logits_processors": ["a:B", PROCESSOR],
            "additional_config": {"c": 1, "recast_tokenizer": "a/tokenizer"},
            "max_logprobs": 500,
            "seed": 3,
        }
    bare: dict[str, Any] = {"additional_config": None}
    add_trie(bare, {"catalogue": "b.csv"})
    assert bare == {
        "logits_processors": [PROCESSOR],
        "additional_config": {"recast_catalogue": "b.csv"},
        "max_logprobs": 128,
    }


def config(**changes: Any) -> RolloutConfig:
    fields: dict[str, Any] = {
        "name": "recast_vllm",
        "custom": {"tokenizer": "a/tokenizer"},
        "logprobs_mode": "raw_logprobs",
        "calculate_log_probs": True,
    }
    return RolloutConfig(**(fields | changes))


def test_config_that_fits_passes_also_at_another_temperature_without_log_probs() -> None:
    require_fitting(config())
    require_fitting(config(custom={"catalogue": "b.csv", "sampling": "beam"}))
    require_fitting(config(temperature=0.7, calculate_log_probs=False))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"custom": None}, r"names no catalogue: set .*custom=\{tokenizer: DIR\}"),
        (
            {"custom": {"tokenizer": "t", "sampling": "without-replacement"}},
            "sampling is without-replacement with exclude_history=False, vLLM needs iid or beam and False",
        ),
        ({"custom": {"tokenizer": "t", "exclude_history": True}}, "exclude_history=True, vLLM needs"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size is 2, needs 1"),
        ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode is processed_logprobs, needs raw_logprobs"),
        ({"temperature": 0.7}, "temperature is 0.7, needs 1 with calculate_log_probs"),
    ],
)
def test_config_under_which_vllm_would_do_something_else_is_refused(
    changes: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        require_fitting(config(**changes))


# -- vLLM's CPU build ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm-cpu": "0.28.0"}, "0.28.0+cpu"),
        ({"vllm-cpu": "0.28.0+cpu"}, "0.28.0+cpu"),
        ({"vllm": "0.24.0", "vllm-cpu": "0.28.0"}, "0.24.0"),
        ({}, None),
    ],
)
def test_cpu_build_answers_for_vllm(
    installed: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    vllm_cpu.answer_for_vllm()
    vllm_cpu.answer_for_vllm()  # once is enough
    for name, found in {"vllm": expected, "another": None}.items():
        if found is None:
            with pytest.raises(importlib.metadata.PackageNotFoundError):
                importlib.metadata.version(name)
        else:
            assert importlib.metadata.version(name) == found
