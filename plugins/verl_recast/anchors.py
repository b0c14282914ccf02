"""Anchors: the target's own answer, in the place of a rollout of a group that did not hit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from recast_cli.core.seeding import hash64
from verl_recast.answers import AnswerReader
from verl_recast.groups import plain, response_fields
from verl_recast.rollout.columns import ROLLOUT
from verl_recast.rollout.sampled import SAMPLED_FIELDS

PRODUCER = "anchor"


def is_anchor(tag: dict[str, Any]) -> bool:
    """Whether a row's tag says that nobody sampled it."""
    return tag.get("producer") == PRODUCER


def choose_targets(
    targets: Sequence[Sequence[tuple[int, ...]]], index_B: np.ndarray, *, seed: int, step: int, rule: str
) -> list[tuple[int, ...]]:
    """The target that each group's anchor is built from (the paper has one target a prompt).

    Args:
        targets: Codes of each group's targets.
        index_B: The prompts' `extra_info.index`.
        rule: `seeded` draws one by (seed, step, index), `first` takes the first.
    """
    if rule == "first":
        return [each[0] for each in targets]
    draws = hash64(seed, step, index_B)
    return [each[int(draw) % len(each)] for each, draw in zip(targets, draws, strict=True)]


def anchor_fields(
    batch: KVBatchMeta,
    rows: list[int],
    prompts: list[list[int]],
    targets: list[tuple[int, ...]],
    reader: AnswerReader,
) -> tuple[TensorDict, list[dict[str, Any]]]:
    """Fields and tags that turn rollouts into anchors (see `AnswerReader.anchor`), reward 1.

    No sampling log-prob is imported for an anchor: its old log-prob is computed by the actor like any
    other's.
    """
    keys = [batch.keys[row] for row in rows]
    data = tq.kv_batch_get(
        keys=keys, partition_id=batch.partition_id, select_fields=["responses", "extra_fields"]
    )
    replaced = zip(data["responses"].unbind(), plain(data["extra_fields"]), prompts, strict=True)
    records, tags = [], []
    for (old, extra_fields, tokens), target, row in zip(replaced, targets, rows, strict=True):
        prompt = torch.tensor(tokens)
        response = torch.tensor(reader.anchor(old.tolist(), target), dtype=torch.int64)
        info = {"hit": 1.0, "structural_score": 1.0}
        kept = {name: value for name, value in extra_fields.items() if name not in SAMPLED_FIELDS}
        extra_fields = {**kept, "reward_extra_info": info, "producer": PRODUCER}
        fields = {"prompts": prompt, **response_fields(prompt, response, 1.0)}
        records.append({**fields, "extra_fields": extra_fields})
        lengths = {"response_len": len(response), "seq_len": len(prompt) + len(response)}
        known = {name: value for name, value in batch.tags[row].items() if name != ROLLOUT}
        tags.append({**known, **lengths, "producer": PRODUCER})
    return list_of_dict_to_tensordict(records), tags
