"""The rollouts of a batch as columns for the TransferQueue, made at once: a step has thousands of them.

A prompt is most of a row, and most rows are dropped before anybody reads it. Where the trainer's hook keeps
pairs only, the first rollout of a group alone is stored whole; the hook completes the few others it keeps.

Shapes: B prompts, G rollouts, N of them that were answered, R rows, L levels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta

ROLLOUT = "rollout"  # key of a tag: what the hook wants to know of a rollout without fetching its row


class Columns(dict[str, Any]):
    """Columns of rows as TransferQueue's `kv_batch_put` reads them: tensors (R, L), jagged ones and lists.

    A TensorDict wraps every Python object of a list in one of its own, when it is made and again when it is
    put: for thousands of rows that takes longer than the rest of a put.
    """

    def __init__(self, num_rows: int, columns: dict[str, Any]) -> None:
        super().__init__(columns)
        self.batch_size = torch.Size([num_rows])

    def take(self, places: list[int]) -> Columns:
        """Some of the rows; no jagged columns."""
        taken = {
            name: [column[place] for place in places] if isinstance(column, list) else column[places]
            for name, column in self.items()
        }
        return Columns(len(places), taken)

    def without(self, names: Collection[str]) -> Columns:
        """All rows, without some of the columns."""
        return Columns(self.batch_size[0], {name: self[name] for name in self if name not in names})


def answer_columns(tokens_NL: torch.Tensor, rewards_N: np.ndarray) -> dict[str, torch.Tensor]:
    """What `groups.response_fields` says of answers without prompts; the reward is on the last token."""
    mask_NL = torch.ones_like(tokens_NL)
    scores_NL = torch.zeros(tokens_NL.shape, dtype=torch.float32)
    scores_NL[:, -1] = torch.from_numpy(rewards_N).float()
    return {"responses": tokens_NL, "response_mask": mask_NL, "loss_mask": mask_NL, "rm_scores": scores_NL}


def prompt_columns(prompts: Sequence[Sequence[int]], tokens_RL: torch.Tensor) -> dict[str, torch.Tensor]:
    """Prompt, whole text and positions of rows, jagged.

    Args:
        prompts: Tokens of each row's prompt.
        tokens_RL: Tokens of each answer.
    """
    heads = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    texts = [np.concatenate(both) for both in zip(heads, tokens_RL.numpy(), strict=True)]
    return {
        "prompts": _jagged(heads),
        "input_ids": _jagged(texts),
        "position_ids": _jagged([np.arange(len(text)) for text in texts]),
    }


def _jagged(rows: Sequence[np.ndarray]) -> torch.Tensor:
    ends = np.cumsum([0, *(len(row) for row in rows)])
    return torch.nested.nested_tensor_from_jagged(
        torch.from_numpy(np.concatenate(rows)), torch.from_numpy(ends)
    )


def rollout_tag(
    row: dict[str, Any],
    prompt_len: int,
    answer: list[int],
    info: dict[str, float],
    weights_step: int,
    sampled: dict[str, Any],
) -> dict[str, Any]:
    """What verl's replay buffer and metrics read without fetching a row, and what our trainer's hook does."""
    facts = {"index": int(row["index"]), "response": answer, "reward": info["hit"]}
    facts["structural_score"] = info["structural_score"]
    if "catalogue_mass" in sampled:
        facts["catalogue_mass"] = sampled["catalogue_mass"]
    return {
        "status": "success",
        "prompt_len": prompt_len,
        "response_len": len(answer),
        "seq_len": prompt_len + len(answer),
        "global_steps": int(row["global_steps"]),
        "min_global_steps": weights_step,
        "max_global_steps": weights_step,
        ROLLOUT: facts,
    }


async def store(
    partition: str,
    keys: Sequence[str],
    columns: Columns,
    tags: Sequence[dict[str, Any]],
    prompts: Sequence[Sequence[int]],
    b_N: np.ndarray,
    *,
    whole: bool,
) -> None:
    """Put the rollouts of a batch, with their prompts.

    Args:
        prompts: Tokens of the B prompts.
        b_N: Prompt of each rollout, ascending.
        whole: Every row gets its prompt; else the first of each group does.
    """
    is_whole_N = np.ones(len(b_N), dtype=bool)
    if not whole:
        is_whole_N[1:] = b_N[1:] != b_N[:-1]
    for place, is_whole in enumerate(is_whole_N.tolist()):
        tags[place][ROLLOUT]["whole"] = is_whole
    for with_prompts in (True, False):
        places = np.flatnonzero(is_whole_N == with_prompts).tolist()
        if len(places):
            chosen = columns.take(places)
            if with_prompts:
                chosen |= prompt_columns([prompts[b] for b in b_N[places].tolist()], chosen["responses"])
            await tq.async_kv_batch_put(
                keys=[keys[place] for place in places],
                fields=chosen,
                tags=[tags[place] for place in places],
                partition_id=partition,
            )


def complete(batch: KVBatchMeta, prompt_of_row: dict[int, list[int]]) -> None:
    """Give their prompts to the rows among these that were stored without."""
    lacking = [row for row in prompt_of_row if not batch.tags[row].get(ROLLOUT, {}).get("whole", True)]
    if lacking:
        tokens_RL = torch.tensor([batch.tags[row][ROLLOUT]["response"] for row in lacking])
        columns = prompt_columns([prompt_of_row[row] for row in lacking], tokens_RL)
        tq.kv_batch_put(
            keys=[batch.keys[row] for row in lacking],
            partition_id=batch.partition_id,
            fields=Columns(len(lacking), columns),
        )
