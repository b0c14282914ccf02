"""Agent loop that answers from a file of recorded rollouts instead of asking the rollout server.

`recast profile` gives two jobs the same rollouts with it. Everything behind the answer (scoring, validity,
the TransferQueue records) is the code of a normal run. Name it with
`+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_recast.rollout.replay.ReplayLoopManager`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import transfer_queue as tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_recast.rollout.agent_loop import GroupLoopManager, GroupLoopWorker


class ReplayLoopWorker(GroupLoopWorker):
    """`rollout.custom.replay` names the recording (npz: index_B, codes_BGL, log_probs_BGL) and
    `rollout.custom.replay_log` a file that gets one JSON line per batch: what was stored, as a hash."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        custom = self.rollout_config.custom or {}
        with np.load(custom["replay"]) as recording:
            self.codes_BGL, self.log_probs_BGL = recording["codes_BGL"], recording["log_probs_BGL"]
            self.place = {int(index): b for b, index in enumerate(recording["index_B"])}
        self.log = custom["replay_log"]

    async def _roll_out(self, rows: list[dict[str, Any]], *, validate: bool, partition: str) -> None:
        prompts = [self._encode(row["raw_prompt"]) for row in rows]
        places = [self.place[int(row["index"])] for row in rows]
        step, num_rollouts = int(rows[0]["global_steps"]), self.rollout_config.n
        out = {
            "codes_BGL": self.codes_BGL[places, :num_rollouts],
            "log_probs_BGL": self.log_probs_BGL[places, :num_rollouts],
            "global_steps": step,
        }
        keys, fields, tags = self._records(rows, prompts, out)
        await tq.async_kv_batch_put(
            keys=keys, fields=list_of_dict_to_tensordict(fields), tags=tags, partition_id=partition
        )
        with open(self.log, "a", encoding="utf-8") as log:
            line = {"step": step, "rollouts": len(fields), "sha256": _digest(fields)}
            log.write(json.dumps(line) + "\n")


class ReplayLoopManager(GroupLoopManager):
    """GroupLoopManager with the replaying worker."""

    worker_class = ReplayLoopWorker


def _digest(fields: list[dict[str, Any]]) -> str:
    """Hash of the rollouts as they were stored: row, rollout number, tokens and reward, in that order."""
    rows = sorted(
        (int(f["index"]), int(f["session_id"]), f["input_ids"].tolist(), f["rm_scores"].tolist())
        for f in fields
    )
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
