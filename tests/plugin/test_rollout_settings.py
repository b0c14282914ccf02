"""What `rollout.custom` may say, and how a chunk of prompts reaches the rollout servers."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from verl.workers.config import RolloutConfig

from verl_recast.rollout.agent_loop import GroupLoopWorker
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


@pytest.mark.parametrize(
    ("gpus", "tensor_parallel", "chunks"), [(1, 1, [5]), (3, 1, [2, 2, 1]), (8, 1, [1] * 5), (4, 2, [3, 2])]
)
def test_every_replica_gets_its_share_and_the_order_stays(
    gpus: int, tensor_parallel: int, chunks: list[int]
) -> None:
    worker: Any = GroupLoopWorker.__new__(GroupLoopWorker)  # its __init__ needs a running TransferQueue
    worker.llm_client, worker.seed, worker.options = Balancer(), 7, RolloutSettings(tokenizer="t")
    worker.rollout_config = RolloutConfig(name="recast_sid", n=2, tensor_model_parallel_size=tensor_parallel)
    worker.config = OmegaConf.create({"trainer": {"n_gpus_per_node": gpus, "nnodes": 1}})
    rows = [{"index": i, "uid": f"u{i}", "global_steps": 2} for i in (3, 1, 4, 9, 5)]
    out = asyncio.run(worker._answers(rows, [[9]] * 5, validate=False))
    assert out["codes_BGL"][:, 0, 0].tolist() == [3, 1, 4, 9, 5] and out["codes_BGL"].shape == (5, 2, 3)
    assert out["log_probs_BGL"].dtype == np.float32 and out["global_steps"] == 4
    assert sorted(map(len, worker.llm_client.asked), reverse=True) == chunks
    assert not worker.llm_client.open, "a server that is not released is never asked again"
