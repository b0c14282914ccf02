"""How verl starts a SID server (replica) and how a training worker reaches it (adapter)."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import ray
import torch
from verl.plugin.platform import get_platform
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica

from verl_recast.garbage import keep_what_is_there
from verl_recast.rollout.server import SIDServer

_BUCKET_BYTES = 256 << 20


def _server_name(replica_rank: int) -> str:
    return f"recast_sid_server_{replica_rank}"


class SIDReplica(RolloutReplica):
    """One SID server beside one training worker."""

    async def launch_servers(self) -> None:
        if self.world_size != 1:
            raise ValueError(
                "rollout engine recast_sid runs one server per GPU, found a tensor x data x pipeline size of "
                f"{self.world_size}: set actor_rollout_ref.rollout.tensor_model_parallel_size=1"
            )
        node_id, accelerator = await self.workers[0].__ray_call__.remote(
            lambda worker: (
                ray.get_runtime_context().get_node_id(),
                ray.get_runtime_context()
                .get_accelerator_ids()
                .get(get_platform().ray_resource_name(), [""])[0],
            )
        )
        platform = get_platform()
        env = dict.fromkeys(platform.ray_noset_envvars(), "1") | dict(platform.rollout_env_vars())
        if platform.device_name != "cpu":
            env[platform.visible_devices_envvar()] = accelerator
        server = (
            ray.remote(SIDServer)
            .options(
                name=_server_name(self.replica_rank),
                num_cpus=0,  # shares the training worker's cores: verl never runs both at once
                max_concurrency=self.max_concurrency,
                runtime_env={"env_vars": env},
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                    node_id, soft=False
                ),
            )
            .remote(self.config, omega_conf_to_dataclass(self.model_config), platform.device_name)
        )
        await server.__ray_ready__.remote()  # raises here, with its traceback, if the server could not start
        self.servers = [server]
        self._server_handle = server
        self._server_address = _server_name(self.replica_rank)


class SIDRolloutAdapter(BaseRollout):
    """Worker side: sends fresh weights to the server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, **_: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        self._server: Any = None
        self._rank = int(os.environ["RANK"])

    async def resume(self, tags: list[str]) -> None:
        return None

    async def release(self) -> None:
        return None

    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        wire_format: str = "named_tensors",
        **kwargs: Any,
    ) -> None:
        """Send every parameter to the server, in buckets, through Ray's object store."""
        if wire_format != "named_tensors":
            raise ValueError(
                f"rollout engine recast_sid takes whole tensors, found wire format {wire_format!r}"
            )
        if kwargs.get("peft_config") is not None:
            raise ValueError("rollout engine recast_sid needs merged LoRA weights: set model.lora.merge=True")
        keep_what_is_there()
        if self._server is None:
            self._server = ray.get_actor(_server_name(self._rank))
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        for name, tensor in weights:
            if bucket and size + tensor.nbytes > _BUCKET_BYTES:
                await self._server.update_weights.remote(bucket, None, False)
                bucket, size = {}, 0
            bucket[name] = tensor.detach().cpu()
            size += tensor.nbytes
        await self._server.update_weights.remote(bucket, kwargs.get("global_steps"), True)
