"""Hit reward for OpenRLHF, by the core: `--reward.remote_url FILE`; see docs/guides/openrlhf.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from recast_cli.core.scoring import score_sets
from recast_cli.core.spelling import find_all

Label = str | Sequence[str] | Mapping[str, Any]


def targets_of(label: Label) -> list[tuple[int, ...]]:
    """Codes of the targets: of one text, of several, or of the column `reward_model` of `verl/rl.parquet`.

    Raises:
        ValueError: no semantic ID in it.
    """
    truth = label["ground_truth"] if isinstance(label, Mapping) else label
    targets = [codes for text in ([truth] if isinstance(truth, str) else truth) for codes in find_all(text)]
    if not targets:
        raise ValueError(f"label holds no semantic ID: {label!r}")
    return targets


def answer_of(query: str, prompt: str) -> str:
    """What follows the prompt. A prompt spells the history in semantic IDs too, and those are no answers.

    Raises:
        ValueError: the query does not begin with the prompt, nor with an end of it (OpenRLHF cuts a long
            prompt on the left).
    """
    for start in range(len(prompt)):
        if query.startswith(prompt[start:]):
            return query[len(prompt) - start :]
    raise ValueError(f"query {query[:80]!r}... does not begin with an end of the prompt {prompt[-80:]!r}")


def reward_func(
    queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Label], **_: Any
) -> dict[str, Any]:
    """Sparse hit and structural score of each answer (ReCast, arXiv 2604.22169).

    Args:
        queries: Prompt and answer as one text.
        prompts: The prompts alone.
        labels: See `targets_of`.

    Returns:
        `rewards` (1 for a hit, else 0: what trains), `scores` (the same, in 0..1: what OpenRLHF's dynamic
        filtering reads), and the structural score for the log. It only measures and is never a reward.
    """
    scored = []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        targets = targets_of(label)
        answers = [codes for codes in find_all(answer_of(query, prompt)) if len(codes) == len(targets[0])]
        scored.append(score_sets(answers, targets))
    hits, structural_scores = torch.tensor(scored, dtype=torch.float32).reshape(-1, 2).unbind(dim=1)
    return {"rewards": hits, "scores": hits, "extra_logs": {"structural_score": structural_scores}}
