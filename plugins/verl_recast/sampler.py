"""verl's replay buffer with a short poll (three-token answers are ready long before the stock 2 s have
passed) that names the cause of a failed rollout.

Use it with `trainer.v1.sampler.custom_sampler.{path=pkg://verl_recast.sampler,name=QuickReplayBuffer}`.
"""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

POLL_SECONDS = 0.02


class QuickReplayBuffer(ReplayBuffer):
    """ReplayBuffer that looks for finished groups every 20 ms and stops at the first failed one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "poll_interval": POLL_SECONDS})

    def _sync_metadata_from_transfer_queue(self) -> None:
        """Read the state of every group, as verl does.

        Raises:
            RuntimeError: a rollout failed. verl would train on the groups that are left, or stop without the
                cause.
        """
        super()._sync_metadata_from_transfer_queue()
        if not any(self.failure_keys.values()):
            return
        tags = [tag for items in (tq.kv_list() or {}).values() for tag in items.values()]
        errors = [tag["error"] for tag in tags if tag.get("status") == "failure" and "error" in tag]
        raise RuntimeError(f"rollout failed: {errors[0] if errors else 'see the log of its worker above'}")
