"""`rollout.custom.log`: a JSON line for each batch of rollouts, statistics of its groups and a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from recast_cli.core.signal import group_statistics
from verl_recast.rollout.columns import Columns
from verl_recast.rollout.sampled import mean_catalogue_mass


class Part(NamedTuple):
    """The rollouts of some of a batch's prompts.

    Attributes:
        groups: Hits, scores, codes and validity, the groups of a prompt each.
        columns: Of each rollout; for training not all of them are stored.
        prompts: Tokens of each prompt.
        b_N: Prompt of each rollout.
    """

    groups: tuple[np.ndarray, ...]
    columns: Columns
    prompts: list[list[int]]
    b_N: np.ndarray


def append(path: str, step: int, partition: str, parts: Sequence[Part]) -> None:
    """Write the line of a batch."""
    hits_BG, scores_BG, codes_BGL, valid_BG = (
        np.concatenate(arrays) for arrays in zip(*(part.groups for part in parts), strict=True)
    )
    present_BG = codes_BGL[:, :, 0] >= 0
    line = {
        "step": step,
        "partition": partition,
        "prompts": len(hits_BG),
        "rollouts": int(present_BG.sum()),
        **group_statistics(hits_BG, scores_BG, codes_BGL, valid_BG, present_BG),
        **mean_catalogue_mass([fields for part in parts for fields in part.columns["extra_fields"]]),
        "sha256": _digest(parts),
    }
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def _digest(parts: Sequence[Part]) -> str:
    """Hash of the rollouts as they were stored, by row and rollout number: tokens and reward."""
    digest = hashlib.sha256()
    for (index, session), content in sorted(stored for part in parts for stored in _stored(part)):
        digest.update(f"{index} {session} ".encode() + content)
    return digest.hexdigest()


def _stored(part: Part) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Index and number of each rollout, and the bytes of its tokens and reward."""
    heads = [np.array(prompt, dtype=np.int64).tobytes() for prompt in part.prompts]
    names = "index", "session_id", "responses", "rm_scores"
    columns = (part.columns[name] for name in names)
    for b, index, session, tokens_L, scores_L in zip(part.b_N.tolist(), *columns, strict=True):
        content = heads[b] + tokens_L.numpy().tobytes() + scores_L.numpy().tobytes()
        yield (int(index), session), content
