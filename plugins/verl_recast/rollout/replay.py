"""Agent loop that answers from a file of recorded rollouts instead of asking the rollout server.

`recast profile` gives two jobs the same rollouts with it. Everything behind the answer (scoring, validity,
the TransferQueue records, the log) is the code of a normal run. Name it with
`+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_recast.rollout.replay.ReplayLoopManager`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from verl_recast.rollout.agent_loop import GroupLoopManager, GroupLoopWorker


class ReplayLoopWorker(GroupLoopWorker):
    """`rollout.custom.replay` names the recording (npz: index_B, codes_BGL, log_probs_BGL)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.options.replay is not None
        with np.load(self.options.replay) as recording:
            self.codes_BGL, self.log_probs_BGL = recording["codes_BGL"], recording["log_probs_BGL"]
            self.place = {int(index): b for b, index in enumerate(recording["index_B"])}

    async def _answers(
        self, rows: list[dict[str, Any]], prompts: list[list[int]], *, validate: bool
    ) -> dict[str, Any]:
        places, num_rollouts = [self.place[int(row["index"])] for row in rows], self.rollout_config.n
        return {
            "codes_BGL": self.codes_BGL[places, :num_rollouts],
            "log_probs_BGL": self.log_probs_BGL[places, :num_rollouts],
            "global_steps": int(rows[0]["global_steps"]),
        }


class ReplayLoopManager(GroupLoopManager):
    """GroupLoopManager with the replaying worker."""

    worker_class = ReplayLoopWorker
