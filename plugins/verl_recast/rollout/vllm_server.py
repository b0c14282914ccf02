"""Rollout engine `recast_vllm`: verl's vLLM server with the trie inside, asked as the SID engine is.

It needs `actor_rollout_ref.rollout.name=recast_vllm`, `rollout.logprobs_mode=raw_logprobs`, a catalogue in
`rollout.custom` and the agent loop of `agent_loop.py`; what else verl hands to vLLM
(`rollout.tensor_model_parallel_size`, `rollout.engine_kwargs.vllm`, ...) stays where it is.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import uuid
from collections.abc import Generator
from typing import Any

import numpy as np
import ray
import torch
from verl.plugin.platform import get_platform
from verl.workers.rollout.vllm_rollout import ServerAdapter
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from verl_recast import VLLM_ROLLOUT_NAME
from verl_recast.catalogue import require_catalogue
from verl_recast.garbage import keep_what_is_there
from verl_recast.rollout.vllm_beams import Request, expand_beams
from verl_recast.rollout.vllm_groups import GIVEN, add_trie, require_fitting, sample_groups

_POLL_MS = 500
_LOOK_SECONDS = 1.0
_LAST_WORDS_SECONDS = 5.0


async def end_with(engine: AsyncLLM) -> None:
    """End this process after its engine, which is a process below it.

    vLLM fails the requests of an engine that died, but a call of one of its methods (to take new weights, to
    empty a cache) is never answered. Ray answers for a server that ended, whoever asked it whatever.
    """
    while not engine.errored:
        await asyncio.sleep(_LOOK_SECONDS)
    await asyncio.sleep(_LAST_WORDS_SECONDS)  # failed requests say more than an ended process
    print("EngineDeadError: vLLM's engine died, and its server ends with it", file=sys.stderr, flush=True)
    os._exit(1)


class TrieVLLMServer(vLLMHttpServer):
    """vLLM whose answers are items of the catalogue, in groups."""

    def _validate_configs(self) -> None:
        super()._validate_configs()
        require_fitting(self.config)
        self.catalogue = require_catalogue(self.config.custom, self.model_config.tokenizer)

    def _preprocess_engine_kwargs(self, engine_kwargs: dict[str, Any]) -> None:
        super()._preprocess_engine_kwargs(engine_kwargs)
        add_trie(engine_kwargs, self.config.custom)
        if get_platform().device_name == "cpu":
            engine_kwargs["enable_sleep_mode"] = False  # vLLM's CPU build has no memory to give back

    async def run_server(self, args: argparse.Namespace) -> None:
        await super().run_server(args)
        self._ending = asyncio.create_task(end_with(self.engine))  # a task that nobody holds may vanish

    async def generate_groups(
        self,
        prompts: list[list[int]],
        index_B: list[int],
        num_rollouts: int,
        *,
        step: int,
        seed: int,
        temperature: float,
        sampling: str = "iid",
        top_p: float = 1.0,
        history: None = None,
    ) -> dict[str, Any]:
        """A group of answers for every prompt: question and answer of `SIDServer.generate_groups`.

        Log-probs are those of temperature 1, and of samples nobody knows the share of the trie.
        """
        catalogue = self.catalogue
        if temperature == 0 or sampling == "beam":
            beams = await expand_beams(
                self._child_log_probs, catalogue.trie, catalogue.level_offsets, prompts, num_rollouts
            )
            return {
                "codes_BGL": beams.codes_BGL.numpy(),
                "log_probs_BGL": beams.log_probs_BGL.numpy(),
                "trie_log_probs_BGL": beams.trie_log_probs_BGL.numpy(),
                "global_steps": self.global_steps,
            }
        tokens_BGL, log_probs_BGL = await sample_groups(
            self.generate,
            prompts,
            index_B,
            num_rollouts,
            num_levels=catalogue.num_levels,
            step=step,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
        )
        return {
            "codes_BGL": tokens_BGL - np.asarray(catalogue.level_offsets),
            "log_probs_BGL": log_probs_BGL,
            "trie_log_probs_BGL": np.full_like(log_probs_BGL, np.nan),
            "global_steps": self.global_steps,
        }

    async def _child_log_probs(self, requests: list[Request]) -> list[list[float]]:
        if self.lora_as_adapter:
            raise ValueError("beams need whole weights: set actor_rollout_ref.model.lora.merge=True")
        return await asyncio.gather(*map(self._log_probs, requests))

    async def _log_probs(self, request: Request) -> list[float]:
        """Full-vocabulary log-probs of some next tokens; verl's `generate` gives the drawn one's only."""
        prompt, given, tokens = request
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=len(tokens),
            logprob_token_ids=tokens,
            extra_args={GIVEN: given},
        )
        answers = self.engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex)
        output = [answer async for answer in answers][-1].outputs[0]
        return [output.logprobs[0][token].logprob for token in tokens]


class TrieVLLMReplica(vLLMReplica):
    """verl's replica of vLLM, with the server above."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(TrieVLLMServer)

    def _get_server_name_prefix(self) -> str:
        return f"{VLLM_ROLLOUT_NAME}_"  # where the adapter looks for it


class TrieVLLMAdapter(ServerAdapter):
    """Worker side: verl's, which however waits for ever if vLLM fails while it takes new weights."""

    async def update_weights(  # type: ignore[override]  # verl's own departs from its base class so
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        global_steps: Any = None,
        wire_format: str = "named_tensors",
        **kwargs: Any,
    ) -> None:
        """Send every parameter; raises what the server raised."""
        if wire_format != "named_tensors":
            await super().update_weights(weights, global_steps, wire_format, **kwargs)
            return
        keep_what_is_there()
        options = {**kwargs, "use_shm": self.use_shm}
        received = await self._execute_method("update_weights_from_ipc", non_block=True, kwargs=options)
        megabytes = self.config.checkpoint_engine.update_weights_bucket_megabytes
        sender = WatchedSender(
            received, zmq_handle=self.zmq_handle, bucket_size_mb=megabytes, use_shm=self.use_shm
        )
        await sender.async_send_weights(weights)
        if received is None:  # another rank of the replica speaks with the server
            return
        await received
        await self.server_handle.clear_kv_cache.remote()
        if global_steps is not None:
            await self.server_handle.set_global_steps.remote(global_steps)


class WatchedSender(BucketedWeightSender):
    """Sends weights as long as there is somebody to take them.

    Args:
        received: Ray's reference of the call that takes them; None leaves it at waiting.
    """

    def __init__(self, received: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.received = received

    def _init_socket(self) -> None:
        super()._init_socket()
        if self.received is not None:
            self.socket: Any = _WatchedSocket(self.socket, self.received)


class _WatchedSocket:
    def __init__(self, socket: Any, received: Any) -> None:
        self._socket, self._received = socket, received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv(self) -> bytes:
        """As the socket's own, but raises what the other side raised, should it have ended without answer."""
        while not self._socket.poll(_POLL_MS):
            if ray.wait([self._received], timeout=0)[0] and not self._socket.poll(0):
                ray.get(self._received)
                raise RuntimeError("vLLM took no more weights, and there were more to come")
        return self._socket.recv()
