"""Between verl's TransferQueue rows and the arrays of the numeric core."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transfer_queue as tq
from transfer_queue import KVBatchMeta

from verl_recast.answers import AnswerReader
from verl_recast.reward import require_targets
from verl_recast.rollout.columns import ROLLOUT
from verl_recast.rollout.sampled import mean_catalogue_mass


@dataclass(frozen=True)
class Groups:
    """The rollouts of a step, sorted by row index, then rollout number; `present_BG` is False where one is
    missing.

    Attributes:
        rows_BG: Position of each rollout in the batch's keys.
        index_B: The prompt's `extra_info.index`.
        valid_BG, lends_BG, codes_BGL: See `answers.Answers`; -1 and False where a rollout is missing.
        tokens_BG: Response tokens that a loss counts, 0 where a rollout is missing.
        log_probs_BG: Sampling log-prob of each rollout's semantic ID, NaN where there is none; None if
            nobody asked.
        catalogue_mass: `catalogue_mass` of the rollouts, mean; empty if the sampler did not say.
        targets: Per prompt, the codes of its target, or of each of them; those of no item are left out where
            there are others.
        prompts: Tokens of each prompt.
        foreign_B: True where no target is an item of the catalogue: nobody could hit it, and an anchor would
            teach what the catalogue does not hold, so that nothing lends there.
    """

    rows_BG: np.ndarray
    index_B: np.ndarray
    present_BG: np.ndarray
    valid_BG: np.ndarray
    rewards_BG: np.ndarray
    scores_BG: np.ndarray
    lends_BG: np.ndarray
    codes_BGL: np.ndarray
    tokens_BG: np.ndarray
    log_probs_BG: np.ndarray | None
    catalogue_mass: dict[str, float]
    targets: list[list[tuple[int, ...]]]
    prompts: list[list[int]]
    foreign_B: np.ndarray


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
    batch: KVBatchMeta,
    reader: AnswerReader,
    members: Set[tuple[int, ...]] | None = None,
    *,
    log_probs: bool = False,
) -> Groups:
    """Read reward, response and target of every rollout of a step.

    Our own agent loop says of a rollout what is wanted in its tag, which the trainer has already. Only what
    all rollouts of a group share is read for one of them.

    Args:
        members: Every semantic ID of the catalogue, where it is known.
        log_probs: Read the sampling log-probs too.

    Raises:
        RuntimeError: no rollout arrived (the rollout server failed; its log says why).
    """
    if len(batch) == 0:
        raise RuntimeError("no rollout arrived: the rollout server or agent loop failed, see its log above")
    found = _from_tags(batch) if all(ROLLOUT in tag for tag in batch.tags) else _read(batch)
    grouped = _group_rows(batch.keys, found.index_N)
    first = [rows[0] for rows in grouped]
    prompts, targets = _read_prompts(batch, first)
    require_own_index(
        list(zip(found.index_N[first].tolist(), zip(prompts, targets, strict=True), strict=True))
    )
    known = [[sid for sid in sids if members is None or sid in members] for sids in targets]
    foreign_B = np.array([not sids for sids in known])

    answers = reader.read(found.responses, len(targets[0][0]), members)
    rows_BG = np.full((len(grouped), max(len(rows) for rows in grouped)), -1, dtype=np.int64)
    for b, rows in enumerate(grouped):
        rows_BG[b, : len(rows)] = rows
    present_BG = rows_BG >= 0

    def spread(values_N: np.ndarray, absent: float = 0) -> np.ndarray:
        return np.where(present_BG, values_N[rows_BG], absent)

    sampled = answers.sum_over_codes(_read_log_probs(batch)) if log_probs else None
    return Groups(
        rows_BG=rows_BG,
        index_B=found.index_N[first],
        present_BG=present_BG,
        valid_BG=spread(answers.valid_N).astype(bool),
        rewards_BG=spread(found.rewards_N),
        # What is no item of the catalogue has no prefix in common with one, whoever scored it.
        scores_BG=spread(found.scores_N * answers.valid_N),
        lends_BG=spread(answers.lends_N).astype(bool) & ~foreign_B[:, None],
        codes_BGL=np.where(present_BG[:, :, None], answers.codes_NL[rows_BG], -1),
        tokens_BG=spread(found.tokens_N),
        log_probs_BG=None if sampled is None else spread(sampled, np.nan),
        catalogue_mass=mean_catalogue_mass(found.sampled),
        targets=[items or sids for items, sids in zip(known, targets, strict=True)],
        prompts=prompts,
        foreign_B=foreign_B,
    )


class _Rollouts(NamedTuple):
    """The N rollouts of a batch as they arrived."""

    index_N: np.ndarray
    rewards_N: np.ndarray
    scores_N: np.ndarray
    tokens_N: np.ndarray
    responses: list[list[int]]
    sampled: list[dict[str, Any]]


def _from_tags(batch: KVBatchMeta) -> _Rollouts:
    facts = [tag[ROLLOUT] for tag in batch.tags]
    return _Rollouts(
        index_N=np.array([each["index"] for each in facts]),
        rewards_N=np.array([each["reward"] for each in facts]),
        scores_N=np.array([each["structural_score"] for each in facts]),
        tokens_N=np.array([tag["response_len"] for tag in batch.tags]),
        responses=[each["response"] for each in facts],
        sampled=facts,
    )


def _read(batch: KVBatchMeta) -> _Rollouts:
    names = ["rm_scores", "responses", "response_mask", "extra_fields", "index"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    extra_fields = plain(data["extra_fields"])
    infos = [fields.get("reward_extra_info", {}) for fields in extra_fields]
    _require_structural_scores(infos)
    return _Rollouts(
        index_N=np.array([int(index) for index in plain(data["index"])]),
        rewards_N=np.array([float(scores.sum()) for scores in data["rm_scores"].unbind()]),
        scores_N=np.array([float(info["structural_score"]) for info in infos]),
        tokens_N=np.array([int(mask.sum()) for mask in data["response_mask"].unbind()]),
        responses=[response.tolist() for response in data["responses"].unbind()],
        sampled=extra_fields,
    )


def _read_log_probs(batch: KVBatchMeta) -> list[list[float]]:
    data = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["rollout_log_probs"]
    )
    return [row.tolist() for row in data["rollout_log_probs"].unbind()]


def _read_prompts(batch: KVBatchMeta, rows: list[int]) -> tuple[list[list[int]], list[list[tuple[int, ...]]]]:
    """Tokens and targets of the prompts of these rows; a prompt is most of what the queue holds of a row."""
    keys = [batch.keys[row] for row in rows]
    names = ["prompts", "reward_model"]
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=names)
    targets = [require_targets(entry["ground_truth"]) for entry in plain(data["reward_model"])]
    return [prompt.tolist() for prompt in data["prompts"].unbind()], targets


def _require_structural_scores(infos: Sequence[dict[str, Any]]) -> None:
    lacking = next((info for info in infos if "structural_score" not in info), None)
    if lacking is not None:
        raise ValueError(
            f"the reward returned {sorted(lacking) or 'a score only'}, needed structural_score too: set "
            "reward.custom_reward_function.path=pkg://verl_recast.reward"
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


def plain(column: Any) -> list[Any]:
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
