"""Actor and reference of a verl job on given rollouts, without trainer, queue or Ray: what they alone cost.

`python -m torch.distributed.run --nproc_per_node=R -m verl_recast.actor_alone SPEC.json`

The workers are verl's own, from the overrides of a real job, and each call gets the rows and settings that
the trainer sends. SPEC.json holds `arguments` (those overrides), `rollouts` (an npz file, see `Rollouts`),
`kept` (`groups` or `pairs`), `steps`, and `memory_tokens`, of a micro-batch in the last step. Seconds go
where verl's own metrics go, a line each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import verl
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.padding import response_from_nested

from recast_cli.core.pairs import choose_pairs
from verl_recast.groups import response_fields
from verl_recast.settings import num_threads


@dataclass(frozen=True)
class Rollouts:
    """B prompts of P tokens, G rollouts of L codes each, and what would have been right.

    Attributes:
        prompts_BP, codes_BGL, targets_BL: As the names say.
        level_offsets: Token id of code 0 of each level.
    """

    prompts_BP: np.ndarray
    codes_BGL: np.ndarray
    targets_BL: np.ndarray
    level_offsets: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Rollouts:
        with np.load(path) as found:
            return cls(**found)

    def share(self, rank: int, ranks: int) -> Rollouts:
        """The prompts of one rank, whole groups.

        Raises:
            ValueError: prompts that ranks cannot share evenly.
        """
        if len(self.prompts_BP) % ranks:
            raise ValueError(f"{len(self.prompts_BP)} prompts for {ranks} ranks, needs a multiple")
        size = len(self.prompts_BP) // ranks
        mine = slice(rank * size, (rank + 1) * size)
        return Rollouts(
            self.prompts_BP[mine], self.codes_BGL[mine], self.targets_BL[mine], self.level_offsets
        )


def whole_groups(rollouts: Rollouts) -> tuple[np.ndarray, np.ndarray]:
    """Codes of every rollout, and GRPO's advantages (verl's `compute_grpo_outcome_advantage`)."""
    hits_BG = (rollouts.codes_BGL == rollouts.targets_BL[:, None]).all(axis=2).astype(np.float32)
    centred_BG = hits_BG - hits_BG.mean(axis=1, keepdims=True)
    return rollouts.codes_BGL, centred_BG / (hits_BG.std(axis=1, ddof=1, keepdims=True) + 1e-6)


def pairs(rollouts: Rollouts) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the two rollouts that ReCast keeps of each group, and their advantages."""
    codes_BGL = rollouts.codes_BGL
    valid_BG = np.ones(codes_BGL.shape[:2], dtype=bool)
    targets = [[tuple(map(int, target))] for target in rollouts.targets_BL]
    found = choose_pairs(codes_BGL, valid_BG, targets, np.arange(len(codes_BGL)), seed=0, step=0)
    return found.codes_B2L, found.advantages_B2


KEPT: dict[str, Callable[[Rollouts], tuple[np.ndarray, np.ndarray]]] = {
    "groups": whole_groups,
    "pairs": pairs,
}


def rows_of(rollouts: Rollouts, kept: str) -> dict[str, list[torch.Tensor]]:
    """What the trainer sends of each row, prompt by prompt."""
    codes_BKL, advantages_BK = KEPT[kept](rollouts)
    columns: dict[str, list[torch.Tensor]] = {}
    for prompt, codes_KL, advantages_K in zip(rollouts.prompts_BP, codes_BKL, advantages_BK, strict=True):
        for codes, advantage in zip(codes_KL, advantages_K, strict=True):
            response = torch.from_numpy(codes + rollouts.level_offsets)
            row = response_fields(torch.from_numpy(prompt), response, 0.0)
            row["prompts"] = torch.from_numpy(prompt)
            row["advantages"] = row["returns"] = torch.full(response.shape, float(advantage))
            for name, column in row.items():
                columns.setdefault(name, []).append(column)
    return columns


def configuration(arguments: list[str]) -> Any:
    """verl's own, as its trainer composes it."""
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides=arguments)


class ActorAlone:
    """The workers of a job, and the calls that its trainer makes of them in a step."""

    def __init__(self, config: Any) -> None:
        self.config = config.actor_rollout_ref
        self.actor = ActorRolloutRefWorker(self.config, "actor")
        self.actor.init_model()
        self.ref = None
        if self.config.actor.use_kl_loss:  # else a job has no reference
            self.ref = ActorRolloutRefWorker(self.config, "ref")
            self.ref.init_model()

    def step(self, columns: dict[str, list[torch.Tensor]], max_tokens: int | None = None) -> dict[str, float]:
        """Old log-probs, reference log-probs and update of one batch: wall and processor seconds of each.

        Args:
            max_tokens: Of a micro-batch, in place of the job's own.
        """
        settings = {"compute_loss": False, "temperature": self.config.rollout.temperature}
        if max_tokens is not None:
            settings["max_token_len_per_gpu"] = max_tokens
        nested: dict[str, Any] = {
            name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()
        }
        data, took = tu.get_tensordict(nested, settings), {}

        def timed(phase: str, call: Callable[[TensorDict], Any], **settings: Any) -> Any:
            given = data.copy()
            tu.assign_non_tensor(given, **settings)
            wall, cpu = time.perf_counter(), time.process_time()
            found = call(given)
            took[f"{phase}_s"] = time.perf_counter() - wall
            took[f"{phase}_cpu_s"] = time.process_time() - cpu
            return found

        mask = data["response_mask"]
        found = timed("old_log_prob", self.actor.compute_log_prob, calculate_entropy=True)
        data["old_log_probs"] = response_from_nested(found["log_probs"], mask)
        if self.ref is not None:
            found = timed("ref_log_prob", self.ref.compute_ref_log_prob, calculate_entropy=False)
            data["ref_log_prob"] = response_from_nested(found["log_probs"], mask)
        actor, size = self.config.actor, len(data) * torch.distributed.get_world_size()
        timed(
            "actor_update",
            self.actor.update_actor,
            compute_loss=True,
            calculate_entropy=actor.calculate_entropy or actor.entropy_coeff != 0,
            distillation_use_topk=False,
            distillation_only=False,
            global_batch_size=size,
            mini_batch_size=size,
            epochs=1,
            seed=actor.data_loader_seed,
            dataloader_kwargs={"shuffle": False},
        )
        return took


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if threads := num_threads():
        torch.set_num_threads(threads)
    alone = ActorAlone(configuration(spec["arguments"]))
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    columns = rows_of(Rollouts.load(Path(spec["rollouts"])).share(rank, ranks), spec["kept"])
    log = Path(os.environ["VERL_FILE_LOGGER_PATH"])
    for step in range(1, spec["steps"] + 1):
        last = step == spec["steps"]
        took = alone.step(columns, spec["memory_tokens"] if last else None)
        if rank == 0:
            with log.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, "data": took}) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
