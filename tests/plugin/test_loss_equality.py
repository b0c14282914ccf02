"""What the drop does to verl's gradient: its own worker, engine and loss, a real model, one and two ranks.

The step: six prompts of up to four rollouts with ragged prompts and answers; one group lacks a rollout, one
is skipped. Old log-probs are not the actor's, so that ratios differ from 1 and clipping takes part.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recast_cli.core.contrast import select_pairs
from verl_recast.layout import kept_rows, minibatch_order
from verl_recast.loss_scale import dropped_tokens

GROUP, PROMPTS, MINI_BATCH = 4, 6, 2
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
TOKENS = range(3, 27)  # the code tokens of the test's vocabulary


@dataclass
class Step:
    """Rollouts of a step: row number -> columns, and what the core made of the groups."""

    rows_BG: np.ndarray
    columns: list[dict[str, torch.Tensor]]
    kept: dict[int, list[int]]
    tokens_BG: np.ndarray


def make_step() -> Step:
    rng = np.random.default_rng(5)
    rows_BG = np.arange(PROMPTS * GROUP).reshape(PROMPTS, GROUP)
    rows_BG[1, 3] = -1  # ragged: a rollout is missing
    present = rows_BG >= 0
    rewards = np.zeros((PROMPTS, GROUP))
    rewards[0, 2] = rewards[3, 1] = 1
    rewards[4] = 1  # hits everywhere: skipped
    scores = np.where(rewards > 0, 1, rng.choice([0, 0.01, 0.1], size=rewards.shape))
    keys = np.arange(rewards.size, dtype=np.uint64).reshape(rewards.shape)
    kept = kept_rows(select_pairs(rewards, scores, keys, present_BG=present), rows_BG, contrast=True)
    assert sorted(kept) == [0, 1, 2, 3, 5]
    columns = []
    for b, g in itertools.product(range(PROMPTS), range(GROUP)):
        prompt = torch.tensor(np.random.default_rng(b).choice(TOKENS, size=4 + b))
        response = torch.tensor(rng.choice(TOKENS, size=rng.integers(3, 7)))
        positive, negative = kept.get(b, (-1, -1))
        advantage = {positive: 1.0, negative: -1.0}.get(b * GROUP + g, 0.0)
        columns.append(row(prompt, response, advantage, rng))
    lengths = np.array([len(each["responses"]) for each in columns]).reshape(PROMPTS, GROUP)
    return Step(rows_BG, columns, kept, np.where(present, lengths, 0))


def row(
    prompt: torch.Tensor, response: torch.Tensor, advantage: float, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    ones = torch.ones_like(response)
    return {
        "prompts": prompt,
        "responses": response,
        "input_ids": torch.cat([prompt, response]),
        "position_ids": torch.arange(len(prompt) + len(response)),
        "response_mask": ones,
        "loss_mask": ones.clone(),
        "advantages": torch.full((len(response),), advantage),
        # a fresh model gives about log(1 / 30) = -3.4 to every token
        "old_log_probs": torch.tensor(rng.normal(-3.4, 0.3, len(response)), dtype=torch.float32),
        "ref_log_prob": torch.tensor(rng.normal(-3.4, 0.3, len(response)), dtype=torch.float32),
    }


def padding_row() -> dict[str, torch.Tensor]:
    """As verl pads a batch: one masked response token."""
    made = row(torch.full((9,), 4), torch.tensor([4]), 0.0, np.random.default_rng(0))
    return made | {"response_mask": torch.zeros(1).long(), "loss_mask": torch.zeros(1).long()}


def case(
    step: Step,
    rows_of_group: dict[int, list[int]],
    width: int,
    ranks: int,
    *,
    scale: str,
    mode: str,
    **more: Any,
) -> dict[str, Any]:
    """What the trainer hands to verl: rows in mini-batches of prompts, and what the loss divides by."""
    order, num_padding = minibatch_order(
        {b: len(rows) for b, rows in rows_of_group.items()}, PROMPTS, MINI_BATCH, width, ranks
    )
    flat = [number for rows in rows_of_group.values() for number in rows]
    chosen = {number: dict(step.columns[number]) for number in flat}
    if scale == "full-batch" and mode == "token-mean":
        for number, count in dropped_tokens(rows_of_group, step.tokens_BG, step.rows_BG, MINI_BATCH).items():
            chosen[number]["loss_mask"] = chosen[number]["loss_mask"].clone()
            chosen[number]["loss_mask"][0] += count
    rows = [chosen[number] for number in flat] + [padding_row() for _ in range(num_padding)]
    counted = GROUP if scale == "full-batch" else width
    extra = {
        "calculate_entropy": bool(more.get("entropy_coeff")),
        "distillation_use_topk": False,
        "distillation_only": False,
        "global_batch_size": MINI_BATCH * counted,
        "mini_batch_size": MINI_BATCH * width,
        "epochs": 1,
        "seed": 1,
        "dataloader_kwargs": {"shuffle": False},
        "temperature": 1.0,
        "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": more.pop("micro_batch_size", 2),
        "max_token_len_per_gpu": 128,
    }
    if extra["micro_batch_size_per_gpu"] is None:
        extra |= {"use_dynamic_bsz": True, "max_token_len_per_gpu": 30}
    factor = 5 if mode == "seq-mean-token-sum-norm" else None
    actor = {"loss_agg_mode": mode, "loss_scale_factor": factor, "use_kl_loss": False, "entropy_coeff": 0.0}
    names = rows[0] if more.get("use_kl_loss") else [name for name in rows[0] if name != "ref_log_prob"]
    columns = {name: [rows[place][name] for place in order] for name in names}
    return {"columns": columns, "extra": extra, "actor": actor | more}


def gradients(cases: list[dict[str, Any]], ranks: int, model: Path, folder: Path) -> list[list[torch.Tensor]]:
    """The gradient of each case before every optimiser step."""
    torch.save(cases, folder / f"cases-{ranks}.pt")
    script = Path(__file__).with_name("engine_gradients.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    files = [str(folder / f"cases-{ranks}.pt"), str(folder / f"out-{ranks}.pt"), str(model)]
    done = subprocess.run(
        [*launcher, str(script), *files],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return torch.load(folder / f"out-{ranks}.pt")


KL_AND_ENTROPY = {
    "use_kl_loss": True,
    "kl_loss_coef": 0.1,
    "kl_loss_type": "low_var_kl",
    "entropy_coeff": 0.05,
}
Found = dict[tuple[Any, ...], list[torch.Tensor]]


@pytest.fixture(scope="module")
def step() -> Step:
    return make_step()


@pytest.fixture(scope="module")
def found(step: Step, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Found]:
    """Gradients by (ranks, name, mode)."""
    folder, answers = tmp_path_factory.mktemp("gradients"), {}
    for ranks in (1, 2):
        made: dict[tuple[Any, ...], dict[str, Any]] = {}
        for mode in MODES:
            full = {"scale": "full-batch", "mode": mode}
            whole = {b: rows[rows >= 0].tolist() for b, rows in enumerate(step.rows_BG)}
            made[ranks, "whole", mode] = case(step, whole, GROUP, ranks, scale="kept", mode=mode)
            made[ranks, "pairs", mode] = case(step, step.kept, 2, ranks, **full)
            made[ranks, "kept", mode] = case(step, step.kept, 2, ranks, scale="kept", mode=mode)
        for mode, size in itertools.product(MODES, (1, 4 // ranks, None)):
            made[ranks, "micro", (mode, size)] = case(
                step, step.kept, 2, ranks, scale="full-batch", mode=mode, micro_batch_size=size
            )
        for scale in ("kept", "full-batch"):
            made[ranks, "terms", scale] = case(
                step, step.kept, 2, ranks, scale=scale, mode="token-mean", **KL_AND_ENTROPY
            )
        out = gradients(list(made.values()), ranks, tokenizer_folder / "model", folder)
        answers |= dict(zip(made, out, strict=True))
    yield answers


Close = Callable[[torch.Tensor, torch.Tensor], None]


@pytest.fixture
def close(record_property: Callable[[str, object], None]) -> Close:
    """Equal to float32 tolerance: accumulation order differs. benchmarks/equality.py reads how far off."""

    def check(one: torch.Tensor, other: torch.Tensor) -> None:
        assert one.norm() > 1e-4
        error = float((one - other).norm() / one.norm())
        record_property("relative_error", error)
        assert error <= 2e-5

    return check


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_each_mini_batch_of_pairs_has_the_gradient_of_its_whole_groups(
    found: Found, mode: str, ranks: int, close: Close
) -> None:
    whole, pairs = found[ranks, "whole", mode], found[ranks, "pairs", mode]
    assert len(whole) == len(pairs) == PROMPTS // MINI_BATCH
    for one, other in zip(whole, pairs, strict=True):
        close(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_do_not_change_the_gradient(found: Found, mode: str, close: Close) -> None:
    for name in ("pairs", "kept"):
        for one, other in zip(found[1, name, mode], found[2, name, mode], strict=True):
            close(one, other)


@pytest.mark.parametrize("scale", ["kept", "full-batch"])
def test_ranks_do_not_change_the_gradient_of_kl_and_entropy(found: Found, scale: str, close: Close) -> None:
    for one, other in zip(found[1, "terms", scale], found[2, "terms", scale], strict=True):
        close(one, other)


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_do_not_change_the_gradient(found: Found, ranks: int, close: Close) -> None:
    """One row at a time, a whole mini-batch at once, and dynamic ones."""
    sizes = [key for name, kind, key in found if name == ranks and kind == "micro"]
    assert len(sizes) == 3 * len(MODES)
    for mode, size in sizes:
        pairs = found[ranks, "pairs", mode]
        for one, other in zip(found[ranks, "micro", (mode, size)], pairs, strict=True):
            close(one, other)


def tokens_over_kept(step: Step, number: int) -> float:
    """Response tokens of the whole groups of a mini-batch over those that are kept."""
    groups = range(number * MINI_BATCH, (number + 1) * MINI_BATCH)
    rows = [row for b in groups for row in step.kept.get(b, ())]
    return int(step.tokens_BG[groups].sum()) / sum(len(step.columns[row]["responses"]) for row in rows)


def test_kept_is_the_mean_over_what_the_actor_receives(found: Found, step: Step, close: Close) -> None:
    """By how much the two scales differ: tokens or rows of the whole groups over those that are kept."""
    for number in range(PROMPTS // MINI_BATCH):
        factor = {"token-mean": tokens_over_kept(step, number), "token-sum": 1}
        for mode in MODES:
            by_rows = (MINI_BATCH * GROUP) / (MINI_BATCH * 2)
            scaled = factor.get(mode, by_rows) * found[1, "pairs", mode][number]
            close(found[1, "kept", mode][number], scaled)


def test_full_batch_scales_kl_and_entropy_like_the_policy_term(
    found: Found, step: Step, close: Close
) -> None:
    for number in range(PROMPTS // MINI_BATCH):
        factor = tokens_over_kept(step, number)
        close(found[1, "terms", "kept"][number], factor * found[1, "terms", "full-batch"][number])
        difference = found[1, "terms", "kept"][number] - found[1, "kept", "token-mean"][number]
        assert difference.norm() > 1e-3 * found[1, "kept", "token-mean"][number].norm(), "no term took part"
