"""Exact validation metrics in verl's logger, in the place of its bootstrap.

verl's `best@k` draws k of n answers with replacement; Pass@k asks whether any of k hits. Shapes: U prompts, K
answers of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recast_cli.core.ranking import ndcg, pass_at_k, pass_at_k_unbiased, recall

CUTOFFS = (1, 5, 10, 20, 50, 100)


def beam_info(
    codes: Sequence[int], rank: int, targets: Sequence[tuple[int, ...]], *, valid: bool
) -> dict[str, float]:
    """What the metrics need of one beam, as numbers: they travel through verl's reward extras.

    Args:
        codes: The beam's semantic ID.
        rank: Its place in the group, from 0.
        targets: Codes of the prompt's targets.
        valid: Whether it is an item of the catalogue.
    """
    distinct = sorted(set(targets))
    target = distinct.index(tuple(codes)) if valid and tuple(codes) in distinct else -1
    return {"rank": float(rank), "target": float(target), "num_targets": float(len(distinct))} | {
        "valid": float(valid)
    }


def validation_metrics(
    data_sources: Sequence[str],
    uids: Sequence[str],
    infos: Mapping[str, Sequence[Any]],
    expected: Mapping[tuple[str, str], int],
) -> dict[str, float]:
    """Metrics of every data source, means over its prompts.

    Beams (answers with a `rank`) give Pass@k, Recall@k and NDCG@k of the ranked list, at the level of
    semantic IDs and with the history kept; samples give the unbiased Pass@k. A prompt that came back
    without an answer scores 0.

    Args:
        data_sources: Source of each answer.
        uids: Prompt of each answer.
        infos: verl's reward extras, a column for each name: `hit`, and see `beam_info`.
        expected: How many answers were asked for, by (source, uid).

    Returns:
        `val-core/SOURCE/{pass,recall,ndcg}@k` and `val-aux/SOURCE/{answers,invalid}`.
    """
    metrics: dict[str, float] = {}
    for source in sorted({str(source) for source, _ in expected}):
        asked = {uid: count for (name, uid), count in expected.items() if name == source}
        answers: dict[str, list[dict[str, Any]]] = {uid: [] for uid in asked}
        for place, (name, uid) in enumerate(zip(data_sources, uids, strict=True)):
            if str(name) == source:
                answers[str(uid)].append({key: column[place] for key, column in infos.items()})
        groups, width = list(answers.values()), max(asked.values(), default=0)
        ranked = any(answer.get("rank") is not None for group in groups for answer in group)
        core, aux = _of_beams(groups, width) if ranked else _of_samples(groups, width)
        metrics |= {f"val-core/{source}/{name}": value for name, value in core.items()}
        metrics |= {f"val-aux/{source}/{name}": value for name, value in aux.items()}
    return metrics


def _cutoffs(width: int) -> list[int]:
    return [k for k in CUTOFFS if k <= width] or [width]


def _of_beams(groups: list[list[dict[str, Any]]], width: int) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of ranked lists; a target counts at its first place only."""
    hits_UK = np.zeros((len(groups), width), dtype=bool)
    sizes_U = np.ones(len(groups), dtype=np.int64)  # a prompt without an answer: its targets are not known
    num_answers = num_invalid = 0
    for u, group in enumerate(groups):
        seen: set[int] = set()
        for answer in sorted(group, key=lambda answer: answer["rank"]):
            target, num_answers = int(answer["target"]), num_answers + 1
            num_invalid += not answer["valid"]
            sizes_U[u] = int(answer["num_targets"])
            if target >= 0 and target not in seen:
                hits_UK[u, int(answer["rank"])] = True
                seen.add(target)
    core = {}
    for k in _cutoffs(width):
        for name, metric in (("pass", pass_at_k), ("recall", recall), ("ndcg", ndcg)):
            core[f"{name}@{k}"] = float(metric(hits_UK, sizes_U, k).mean())
    return core, {"invalid": num_invalid / max(num_answers, 1), "answers": float(num_answers)}


def _of_samples(groups: list[list[dict[str, Any]]], width: int) -> tuple[dict[str, float], dict[str, float]]:
    """Unbiased Pass@k of i.i.d. samples; one that never came is a miss."""
    hits_U = np.array([sum(float(answer.get("hit") or 0) > 0 for answer in group) for group in groups])
    core = {f"pass@{k}": float(pass_at_k_unbiased(width, hits_U, k).mean()) for k in _cutoffs(width)}
    return core, {"answers": float(sum(map(len, groups)))}
