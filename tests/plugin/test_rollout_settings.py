"""What `rollout.custom` may say, and how a chunk of prompts reaches the rollout servers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from verl.workers.config import RolloutConfig, SamplingConfig

from verl_recast.rollout import agent_loop
from verl_recast.rollout.agent_loop import GroupLoopWorker
from verl_recast.rollout.columns import Columns
from verl_recast.rollout.rollout_log import Part
from verl_recast.settings import RolloutSettings


def test_defaults_and_a_verl_section() -> None:
    assert RolloutSettings.from_custom(None) == RolloutSettings()
    section = OmegaConf.create({"tokenizer": "t", "sampling": "beam", "masked_actor": True})
    assert RolloutSettings.from_custom(section) == RolloutSettings(
        tokenizer="t", sampling="beam", masked_actor=True
    )


@pytest.mark.parametrize(
    ("custom", "found"),
    [
        ({"tokenizer": "t", "samplng": "beam"}, "rollout.custom has unknown key 'samplng', known: "),
        ({"sampling": "best"}, "sampling is 'best', needed one of iid, without-replacement, beam"),
        ({"masked_actor": "yes"}, "masked_actor is 'yes', needs true or false"),
        ({"exclude_history": 1}, "exclude_history is 1, needs true or false"),
        ({"token_budget": "many"}, "token_budget is 'many', needs a whole number"),
        ({"token_budget": True}, "token_budget is True, needs a whole number"),
        ({"catalogue": 3}, "catalogue is 3, needs a text"),
        ({"catalogue": ["x"]}, "catalogue is .*, needs a text"),
        ({"catalogue": "c.csv", "exclude_history": True}, "needs tokenizer, found catalogue=c.csv"),
    ],
)
def test_what_would_be_ignored_is_refused(custom: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        RolloutSettings.from_custom(custom)


class Balancer:
    """verl's client with servers that answer each prompt with its own number, the later ones first."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.open: list[int] = []

    async def _acquire_server(self, request_id: str) -> tuple[int, Any]:
        number = len(self.asked) + len(self.open)
        self.open.append(number)

        async def answer(prompts: list[list[int]], index_B: list[int], *_: Any, **__: Any) -> dict[str, Any]:
            self.asked.append(index_B)
            await asyncio.sleep(0.02 / (number + 1))
            codes = np.array(index_B)[:, None, None] * np.ones((1, 2, 3), dtype=np.int64)
            return {"codes_BGL": codes, "log_probs_BGL": codes.astype(np.float32), "global_steps": 4}

        return number, SimpleNamespace(generate_groups=SimpleNamespace(remote=answer))

    def _release_server(self, server_id: int, request_id: str) -> None:
        self.open.remove(server_id)


def make_worker(gpus: int, tensor_parallel: int, **options: Any) -> Any:
    worker: Any = GroupLoopWorker.__new__(GroupLoopWorker)  # its __init__ needs a running TransferQueue
    worker.llm_client, worker.seed = Balancer(), 7
    worker.options = RolloutSettings(tokenizer="t", **options)
    validation = SamplingConfig(n=3)
    worker.rollout_config = RolloutConfig(
        name="recast_sid", n=2, tensor_model_parallel_size=tensor_parallel, val_kwargs=validation
    )
    worker.config = OmegaConf.create({"trainer": {"n_gpus_per_node": gpus, "nnodes": 1, "device": "cpu"}})
    worker.catalogue = SimpleNamespace(num_levels=3)
    return worker


@pytest.mark.parametrize(
    ("gpus", "tensor_parallel", "budget", "sizes"),
    [
        (1, 1, 0, [5]),
        (3, 1, 0, [2, 2, 1]),
        (8, 1, 0, [1] * 5),
        (4, 2, 0, [3, 2]),
        # a prompt of 1 token and 2 answers that feed 2 tokens each: 5 of the budget
        (1, 1, 10, [2, 2, 1]),
        (2, 1, 9, [1] * 5),
        # [2, 2, 1] for two servers: one of the twos is halved, so that each has two requests
        (2, 1, 10, [2, 1, 1, 1]),
    ],
)
def test_a_request_is_what_a_server_reads_at_once_and_every_server_gets_as_many(
    gpus: int, tensor_parallel: int, budget: int, sizes: list[int]
) -> None:
    parts = make_worker(gpus, tensor_parallel, token_budget=budget)._parts([[9]] * 5, 2)
    assert sorted(map(len, parts), reverse=True) == sizes
    assert sorted(place for part in parts for place in part) == [0, 1, 2, 3, 4]


def test_validation_asks_for_its_own_number_of_answers_at_once() -> None:
    """Three answers to a prompt of 1 token feed 6 tokens: of a budget of 10 one prompt takes 7."""
    worker = make_worker(1, 1, token_budget=10)
    assert worker._num_answers(validate=False) == 2 and worker._num_answers(validate=True) == 3
    assert worker._parts([[9]] * 3, 3) == [[0], [1], [2]]


def test_a_request_that_fails_takes_its_own_prompts_along_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second request fails while the first is still being answered: all have ended before verl hears."""
    worker = make_worker(1, 1, token_budget=10)
    worker.options = RolloutSettings(tokenizer="t", token_budget=10)
    worker._encode = lambda conversations: [[9] for _ in conversations]
    ended: list[int] = []

    async def roll_out_part(rows: list[dict[str, Any]], *_: Any, **__: Any) -> Part:
        if rows[0]["uid"] == "u2":
            raise RuntimeError("no\nserver")
        await asyncio.sleep(0.05)
        ended.append(len(rows))
        return Part((), Columns(0, {}), [], np.zeros(0))

    told: dict[str, Any] = {}

    async def put(**given: Any) -> None:
        told.update(given, ended=list(ended))

    worker._roll_out_part = roll_out_part
    monkeypatch.setattr(agent_loop.tq, "async_kv_batch_put", put)
    rows = [
        {
            "uid": f"u{i}",
            "index": i,
            "global_steps": 7,
            "raw_prompt": [],
            "reward_model": {"ground_truth": "<|sid_begin|><s_a_1><s_b_1><s_c_1>"},
            "extra_info": {"history": []},
        }
        for i in range(5)
    ]
    asyncio.run(worker._run_batch(rows))
    assert told["ended"] == [2, 1], "stored before the prompts are told to be finished"
    assert told["keys"] == ["u0", "u1", "u2", "u3", "u4"]
    assert [tag["status"] for tag in told["tags"]] == ["finished"] * 2 + ["failure"] * 2 + ["finished"]
    assert told["tags"][2]["error"] == "RuntimeError: no server"


def test_an_answered_server_is_given_back() -> None:
    worker = make_worker(2, 1)
    rows = [{"index": i, "uid": f"u{i}", "global_steps": 2} for i in (3, 1, 4)]

    async def ask() -> list[dict[str, Any]]:
        return await asyncio.gather(
            *(worker._answers(some, [[9]] * len(some), validate=False) for some in (rows[:2], rows[2:]))
        )

    first, second = asyncio.run(ask())
    assert first["codes_BGL"][:, 0, 0].tolist() == [3, 1] and first["codes_BGL"].shape == (2, 2, 3)
    assert second["codes_BGL"][:, 0, 0].tolist() == [4] and second["global_steps"] == 4
    assert sorted(worker.llm_client.asked) == [[3, 1], [4]]
    assert not worker.llm_client.open, "a server that is not released is never asked again"
