"""What surrounds vLLM under verl, without vLLM: the requests of a group, the guard, the CPU shim."""

from __future__ import annotations

import asyncio
import importlib.metadata
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from verl.workers.config import RolloutConfig, SamplingConfig
from verl.workers.rollout.replica import TokenOutput

from verl_recast.platform import vllm_cpu
from verl_recast.rollout.vllm_loop import PROCESSOR, VLLMLoopWorker, require_trie

TOKENIZER = "a/tokenizer"
OFFSETS = (5, 13, 21)


def config(**changes: Any) -> RolloutConfig:
    options = {"logits_processors": [PROCESSOR], "additional_config": {"recast_tokenizer": TOKENIZER}}
    fields: dict[str, Any] = {
        "name": "vllm",
        "custom": {"tokenizer": TOKENIZER},
        "engine_kwargs": {"vllm": options},
        "logprobs_mode": "raw_logprobs",
        "calculate_log_probs": True,
        "n": 3,
    }
    return RolloutConfig(**(fields | changes))


class Client:
    """Answers with codes that are a function of the request's seed, last request first."""

    def __init__(self, **fields: Any) -> None:
        self.requests: list[dict[str, Any]] = []
        self.fields = {"log_probs": [-0.5, -0.25, -0.125], "stop_reason": "completed", **fields}

    async def generate(self, **request: Any) -> TokenOutput:
        self.requests.append(request)
        await asyncio.sleep(0.02 / len(self.requests))
        seed = request["sampling_params"]["seed"]
        tokens = [offset + (seed >> 8 * level) % 8 for level, offset in enumerate(OFFSETS)]
        return TokenOutput(**{"token_ids": tokens, "extra_fields": {"global_steps": 4}, **self.fields})


def answers(client: Client, rows: list[dict[str, Any]], *, validate: bool = False, **changes: Any) -> Any:
    worker: Any = VLLMLoopWorker.__new__(VLLMLoopWorker)  # its __init__ needs a running TransferQueue
    worker.rollout_config, worker.seed, worker.llm_client = config(**changes), 7, client
    worker.catalogue = SimpleNamespace(num_levels=3, level_offsets=OFFSETS)
    return asyncio.run(worker._answers(rows, [[9, row["index"], 3] for row in rows], validate=validate))


def rows(*index: int, step: int = 2) -> list[dict[str, Any]]:
    return [{"index": i, "uid": f"u{i}", "global_steps": step} for i in index]


def test_every_rollout_is_a_request_of_l_tokens_with_a_seed_of_its_own() -> None:
    client = Client()
    out = answers(client, rows(4, 8))
    assert out["codes_BGL"].shape == out["log_probs_BGL"].shape == (2, 3, 3)
    assert out["global_steps"] == 4
    params = [request["sampling_params"] for request in client.requests]
    assert {(p["max_tokens"], p["temperature"], p["top_p"], p["top_k"]) for p in params} == {
        (3, 1.0, 1.0, -1)
    }
    assert len({p["seed"] for p in params}) == 6
    assert [request["prompt_ids"] for request in client.requests] == [[9, 4, 3]] * 3 + [[9, 8, 3]] * 3
    assert [request["request_id"] for request in client.requests] == ["u4"] * 3 + ["u8"] * 3
    for place, request in enumerate(client.requests):  # though they were answered in another order
        seed = request["sampling_params"]["seed"]
        expected = [seed % 8, (seed >> 8) % 8, (seed >> 16) % 8]
        assert out["codes_BGL"].reshape(6, 3)[place].tolist() == expected


def test_draws_depend_on_run_step_row_and_rollout_and_on_nothing_else() -> None:
    both, swapped = answers(Client(), rows(4, 8)), answers(Client(), rows(8, 4))
    assert np.array_equal(both["codes_BGL"], swapped["codes_BGL"][::-1])
    assert not np.array_equal(both["codes_BGL"], answers(Client(), rows(4, 8, step=3))["codes_BGL"])


def test_validation_has_its_own_temperature_and_number_of_answers() -> None:
    client = Client(log_probs=None)
    val = SamplingConfig(n=1, temperature=0.0)
    out = answers(client, rows(4), validate=True, val_kwargs=val)
    assert out["codes_BGL"].shape == (1, 1, 3) and np.isnan(out["log_probs_BGL"]).all()
    assert client.requests[0]["sampling_params"]["temperature"] == 0


def test_group_of_equal_greedy_answers_is_refused() -> None:
    val = SamplingConfig(n=2, temperature=0.0)
    with pytest.raises(ValueError, match="temperature=0 asks for 2 beams of a prompt, vLLM gives samples"):
        answers(Client(), rows(4), validate=True, val_kwargs=val)


def test_answer_cut_short_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"vLLM answered with 0 tokens \(aborted\), needed 3"):
        answers(Client(token_ids=[], stop_reason="aborted"), rows(4))


# -- guard -----------------------------------------------------------------------------------------------


def test_config_with_the_trie_passes_whoever_wants_log_probs() -> None:
    require_trie(config())
    require_trie(config(logprobs_mode="processed_logprobs", calculate_log_probs=False))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"engine_kwargs": {}},
            r"vllm.logits_processors=\['verl_recast.*'\], found \[\]: without it nothing",
        ),
        ({"engine_kwargs": {"vllm": {"logits_processors": ["a:B"]}}}, r"found \['a:B'\]"),
        ({"engine_kwargs": {"vllm": {"logits_processors": [PROCESSOR]}}}, "is None, needs a/tokenizer"),
        (
            {"custom": {"catalogue": "b.csv"}},
            r"custom.catalogue is b.csv: the trie of vLLM needs .*.tokenizer",
        ),
        ({"custom": {"tokenizer": "b"}}, r"recast_tokenizer is a/tokenizer, needs b \(.*custom.tokenizer\)"),
        (
            {"logprobs_mode": "processed_logprobs"},
            "logprobs_mode=processed_logprobs and temperature=1.0: vLLM",
        ),
        ({"temperature": 0.7}, "logprobs_mode=raw_logprobs and temperature=0.7: vLLM"),
    ],
)
def test_config_under_which_vllm_would_do_something_else_is_refused(
    changes: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        require_trie(config(**changes))


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
