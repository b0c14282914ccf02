"""verl's replay buffer with a short poll (three-token answers are ready long before the stock 2 s have
passed) that names the cause of a failed rollout, and a worker that died.

Use it with `trainer.v1.sampler.custom_sampler.{path=pkg://verl_recast.sampler,name=QuickReplayBuffer}`.
"""

from __future__ import annotations

import time
from typing import Any

import ray
import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from verl_recast.garbage import keep_what_is_there

POLL_SECONDS = 0.02
WATCH_SECONDS = 2.0


class QuickReplayBuffer(ReplayBuffer):
    """ReplayBuffer that looks for finished groups every 20 ms and stops at the first failed one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "poll_interval": POLL_SECONDS})
        self._seen: set[str] = set()
        self._looked = 0.0

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        keep_what_is_there()
        return super().sample(*args, **kwargs)

    def _sync_metadata_from_transfer_queue(self) -> None:
        """Read the state of every group, as verl does.

        Raises:
            RuntimeError: a rollout failed, or a worker died. verl would train on the groups that are left,
                stop without the cause, or wait for ever.
        """
        self._require_workers()
        super()._sync_metadata_from_transfer_queue()
        if not any(self.failure_keys.values()):
            return
        tags = [tag for items in (tq.kv_list() or {}).values() for tag in items.values()]
        errors = [tag["error"] for tag in tags if tag.get("status") == "failure" and "error" in tag]
        raise RuntimeError(f"rollout failed: {errors[0] if errors else 'see the log of its worker above'}")

    def _require_workers(self) -> None:
        """Nobody tells the trainer that an agent loop or reward worker is gone, and its rollouts never come.

        Ray forgets the name of an actor that died. All that verl and we name (rollout servers, agent loop and
        reward workers) live as long as the job.
        """
        if time.monotonic() < self._looked + WATCH_SECONDS:
            return
        alive = {str(name) for name in ray.util.list_named_actors()}
        gone, self._seen = sorted(self._seen - alive), self._seen | alive
        self._looked = time.monotonic()
        if gone:
            raise RuntimeError(f"worker {gone[0]} died, see its last words above")
