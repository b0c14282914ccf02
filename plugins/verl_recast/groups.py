"""Between verl's TransferQueue rows and the arrays of the numeric core."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_recast.answers import AnswerReader
from verl_recast.reward import require_targets


@dataclass(frozen=True)
class Groups:
    """The rollouts of a step, sorted by row index, then rollout number; `present_BG` is False where one is
    missing.

    Attributes:
        rows_BG: Position of each rollout in the batch's keys.
        index_B: The prompt's `extra_info.index`.
        valid_BG, lends_BG, codes_BGL: See `answers.Answers`; -1 and False where a rollout is missing.
        targets: Per prompt, the codes of its target, or of each of them.
    """

    rows_BG: np.ndarray
    index_B: np.ndarray
    present_BG: np.ndarray
    valid_BG: np.ndarray
    rewards_BG: np.ndarray
    scores_BG: np.ndarray
    lends_BG: np.ndarray
    codes_BGL: np.ndarray
    targets: list[list[tuple[int, ...]]]


def _group_rows(keys: list[str], index_N: np.ndarray) -> list[list[int]]:
    """Row numbers of each group in the order (index, uid), each sorted by rollout number.

    Keys are `{uid}_{session}_{output}` and arrive in arrival order, groups interleaved.
    """
    groups: dict[str, list[tuple[int, int]]] = {}
    for row, key in enumerate(keys):
        uid, session, _ = key.rsplit("_", 2)
        groups.setdefault(uid, []).append((int(session), row))
    ordered = sorted(groups.items(), key=lambda item: (int(index_N[item[1][0][1]]), item[0]))
    return [[row for _, row in sorted(members)] for _, members in ordered]


def gather_groups(
    batch: KVBatchMeta, reader: AnswerReader, members: Set[tuple[int, ...]] | None = None
) -> Groups:
    """Read reward, response and target of every rollout of a step.

    Args:
        members: Every semantic ID of the catalogue, where it is known.

    Raises:
        RuntimeError: no rollout arrived (the rollout server failed; its log says why).
    """
    if len(batch) == 0:
        raise RuntimeError("no rollout arrived: the rollout server or agent loop failed, see its log above")
    names = ["rm_scores", "prompts", "responses", "reward_model", "extra_fields", "index"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    responses = [response.tolist() for response in data["responses"].unbind()]
    rewards_N = np.array([float(scores.sum()) for scores in data["rm_scores"].unbind()])
    infos = [fields.get("reward_extra_info", {}) for fields in _plain(data["extra_fields"])]
    index_N = np.array([int(index) for index in _plain(data["index"])])
    grouped = _group_rows(batch.keys, index_N)
    targets = [require_targets(entry["ground_truth"]) for entry in _plain(data["reward_model"])]
    prompts = data["prompts"].unbind()
    require_own_index([(int(index_N[r]), (prompts[r].tolist(), targets[r])) for r, *_ in grouped])
    lacking = next((info for info in infos if "structural_score" not in info), None)
    if lacking is not None:
        raise ValueError(
            f"the reward returned {sorted(lacking) or 'a score only'}, needed structural_score too: set "
            "reward.custom_reward_function.path=pkg://verl_recast.reward"
        )

    answers = reader.read(responses, len(targets[0][0]), members)
    rows_BG = np.full((len(grouped), max(len(rows) for rows in grouped)), -1, dtype=np.int64)
    for b, rows in enumerate(grouped):
        rows_BG[b, : len(rows)] = rows
    present_BG = rows_BG >= 0

    def spread(values_N: np.ndarray) -> np.ndarray:
        return np.where(present_BG, values_N[rows_BG], 0)

    # What is no item of the catalogue has no prefix in common with one, whoever scored it.
    scores_N = np.array([float(info["structural_score"]) for info in infos]) * answers.valid_N
    return Groups(
        rows_BG=rows_BG,
        index_B=index_N[rows_BG[:, 0]],
        present_BG=present_BG,
        valid_BG=spread(answers.valid_N).astype(bool),
        lends_BG=spread(answers.lends_N).astype(bool),
        rewards_BG=spread(rewards_N),
        scores_BG=spread(scores_N),
        codes_BGL=np.where(present_BG[:, :, None], answers.codes_NL[rows_BG], -1),
        targets=[targets[rows[0]] for rows in grouped],
    )


def require_own_index(rows: Sequence[tuple[int, Any]]) -> None:
    """Two rows with one index would draw alike and break ties alike; a row that comes twice may.

    Args:
        rows: (index, prompt and targets) of each prompt.

    Raises:
        ValueError: an index that belongs to different prompts or targets.
    """
    known: dict[int, Any] = {}
    for index, content in rows:
        if known.setdefault(index, content) != content:
            count = sum(index == other for other, _ in rows)
            raise ValueError(
                f"{count} of {len(rows)} prompts have extra_info.index {index}, each row needs its own "
                "(verl takes 0 where it is missing): add a unique integer column extra_info.index to the data"
            )


def _plain(column: Any) -> list[Any]:
    return column.tolist() if hasattr(column, "tolist") else list(column)


def response_fields(prompt: torch.Tensor, response: torch.Tensor, reward: float) -> dict[str, torch.Tensor]:
    """What the actor reads of one rollout, as verl's own agent loop writes it; the reward sits on the last
    token."""
    mask = torch.ones_like(response)
    scores = torch.zeros(len(response), dtype=torch.float32)
    scores[-1] = reward
    return {
        "responses": response,
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": torch.cat([prompt, response]),
        "position_ids": torch.arange(len(prompt) + len(response)),
        "rm_scores": scores,
    }


def anchor_fields(
    batch: KVBatchMeta, rows: list[int], targets: list[tuple[int, ...]], reader: AnswerReader
) -> tuple[TensorDict, list[dict[str, Any]]]:
    """Fields and tags that turn rollouts into anchors (see `AnswerReader.anchor`), reward 1.

    No sampling log-prob is imported for an anchor: its old log-prob is computed by the actor like any
    other's.
    """
    keys = [batch.keys[row] for row in rows]
    data = tq.kv_batch_get(
        keys=keys, partition_id=batch.partition_id, select_fields=["prompts", "responses", "extra_fields"]
    )
    replaced = zip(
        data["prompts"].unbind(), data["responses"].unbind(), _plain(data["extra_fields"]), strict=True
    )
    records, tags = [], []
    for (prompt, old, extra_fields), target, row in zip(replaced, targets, rows, strict=True):
        response = torch.tensor(reader.anchor(old.tolist(), target), dtype=torch.int64)
        info = {"hit": 1.0, "structural_score": 1.0}
        extra_fields = {**extra_fields, "reward_extra_info": info, "producer": "anchor"}
        records.append({**response_fields(prompt, response, 1.0), "extra_fields": extra_fields})
        lengths = {"response_len": len(response), "seq_len": len(prompt) + len(response)}
        tags.append({**batch.tags[row], **lengths, "producer": "anchor"})
    return list_of_dict_to_tensordict(records), tags


def share_without_hit(rows_of_groups: Sequence[Sequence[int]], hits: Set[int]) -> float:
    """Share of the groups none of whose rows is a hit.

    Args:
        rows_of_groups: Row numbers of every group.
        hits: Row numbers with a reward above 0.
    """
    return sum(hits.isdisjoint(rows) for rows in rows_of_groups) / len(rows_of_groups)


def minibatch_order(
    groups: list[int], num_groups: int, minibatch_prompts: int, kept_per_group: int, dp_size: int
) -> tuple[list[int], int]:
    """Where each kept row goes, so that every PPO mini-batch holds the rows of its own prompts.

    Prompts are cut into mini-batches first; inside one, skipped groups leave holes that masked padding rows
    fill. Rows are laid out rank-major: the dispatcher gives rank k the k-th contiguous block, whose i-th
    slice is its share of mini-batch i.

    Args:
        groups: Numbers (0..num_groups-1, ascending) of the groups that kept rows, `kept_per_group` each.
        num_groups: Prompts of the step.
        minibatch_prompts: Prompts of a PPO mini-batch.
        kept_per_group: Rows kept of each trainable group.
        dp_size: Data-parallel ranks.

    Returns:
        A permutation of the kept rows followed by the padding rows, and how many padding rows it counts on.
    """
    num_minibatches = math.ceil(num_groups / minibatch_prompts)
    size = minibatch_prompts * kept_per_group
    if size % dp_size:
        raise ValueError(
            f"a mini-batch keeps {size} rows, which {dp_size} data-parallel ranks cannot share: "
            f"set actor.ppo_mini_batch_size to a multiple of {dp_size}"
        )
    slots: list[list[int]] = [[] for _ in range(num_minibatches)]
    for place, group in enumerate(groups):
        slots[group // minibatch_prompts] += range(place * kept_per_group, (place + 1) * kept_per_group)
    used = [rows for rows in slots if rows]  # a mini-batch without any signal is no update at all
    next_padding = len(groups) * kept_per_group
    for rows in used:
        missing = size - len(rows)
        rows += range(next_padding, next_padding + missing)
        next_padding += missing
    share = size // dp_size
    order = [
        row for rank in range(dp_size) for rows in used for row in rows[rank * share : (rank + 1) * share]
    ]
    return order, next_padding - len(groups) * kept_per_group
