"""The guide's TRL example, with TRL's own GRPOTrainer on a real tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import trl_recast
from datasets import Dataset
from transformers import TrainerCallback

from recast_cli.core.sampling import sample
from recast_cli.core.seeding import tie_keys, uniforms
from recast_cli.core.spelling import find_all, spell
from recast_cli.errors import RecipeError
from recast_cli.vocabulary import encode_prompts

PROMPTS, WIDTH = 6, 8


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    command = (
        f"--tokenizer {folder} --model {folder / 'model'} --out {out} --prompts {PROMPTS} --width {WIDTH}"
    )
    return [*command.split(), *more]


class Gradients(TrainerCallback):
    """Keeps the gradient of the first update."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        if not self.first:
            self.first = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def record_rows(model: torch.nn.Module, pad: int, *, grad: bool) -> list[tuple[int, ...]]:
    """Rows that go through a model from now on, without their left padding."""
    rows: list[tuple[int, ...]] = []

    def keep(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() == grad:
            for ids in inputs["input_ids"].tolist():
                rows.append(tuple(ids[next(i for i, token in enumerate(ids) if token != pad) :]))

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return rows


# --- a real update ---


def expected_pairs(
    codes_GL: list[tuple[int, ...]], targets: list[tuple[int, ...]], keys_G: list[int]
) -> tuple[list[tuple[int, ...]], tuple[int, int] | None]:
    """The group after repair, and the places of i+ and i- in it, by plain loops over the definition."""

    def shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        return next((i for i in range(3) if a[i] != b[i]), 3)

    u = [max((0, 0.01, 0.1, 1)[shared(codes, target)] for target in targets) for codes in codes_GL]
    hits = [codes in targets for codes in codes_GL]
    places, group = range(len(codes_GL)), list(codes_GL)
    if not any(hits):
        positive = max(places, key=lambda i: (-u[i], keys_G[i]))
        (group[positive],) = targets
    else:
        positive = max(places, key=lambda i: (hits[i], keys_G[i]))
    misses = [i for i in places if not hits[i] and i != positive]
    if not misses:
        return group, None
    return group, (positive, max(misses, key=lambda i: (u[i], keys_G[i])))


def mean_gradient(
    model: torch.nn.Module, rows: list[tuple[list[int], list[int], float]], num_tokens: int
) -> dict[str, torch.Tensor]:
    """Gradient of -sum(advantage * log-prob of the answer's tokens) / num_tokens, one row at a time."""
    model.zero_grad()
    for prompt, answer, advantage in rows:
        log_probs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        loss = sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
        (-advantage * loss / num_tokens).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.fixture(scope="module")
def update(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One update by TRL, what went through actor and reference, and the groups by plain loops."""
    out = tmp_path_factory.mktemp("trl")
    steps = ("--steps", "1", "--kl-coef", "0", "--w-negative", "0.25")
    trainer = trl_recast.make_trainer(trl_recast.arguments(arguments(tokenizer_folder, out, *steps)))
    rows = trainer.train_dataset.select(range(PROMPTS)).to_list()
    everything = pl.read_parquet(tokenizer_folder / "semantic_ids.parquet")["sid"].to_list()
    # every rollout hits: a group without a negative; several semantic IDs in one text are several targets
    rows[2]["targets"] = [everything[0], "".join(everything[1:])]
    trainer.args.max_grad_norm = 0.0

    start = trl_recast.load_model(tokenizer_folder / "model", trainer.vocabulary.vocab_size, "cpu")
    index_B = np.array([row["index"] for row in rows])
    prompts = encode_prompts(trainer.processing_class, [row["prompt"] for row in rows])
    draws_BGL = uniforms(0, 0, index_B, WIDTH, 3)
    offsets, pad = trainer.vocabulary.level_offsets, trainer.vocabulary.pad
    codes_BGL = sample(start, trainer.trie, offsets, prompts, draws_BGL, pad_token_id=pad).codes_BGL
    rows[4]["targets"] = [spell(codes_BGL[4, 5].tolist())]  # a natural hit
    trainer.train_dataset = Dataset.from_list(rows)
    groups = []
    for b, row in enumerate(rows):
        keys_G = tie_keys(0, 0, index_B, WIDTH)[b].tolist()
        group, pair = expected_pairs(
            [tuple(codes) for codes in codes_BGL[b].tolist()],
            find_all("".join(row["targets"])),
            keys_G,
        )
        answers = [[offsets[level] + code for level, code in enumerate(codes)] for codes in group]
        groups.append((prompts[b], answers, pair))

    gradients = Gradients()
    trainer.add_callback(gradients)
    seen = record_rows(trainer.model, trainer.vocabulary.pad, grad=True)
    trainer.train()
    return {"trainer": trainer, "start": start, "groups": groups, "seen": seen, "gradients": gradients.first}


def test_the_actor_sees_the_pair_of_each_group_only(update: dict[str, Any]) -> None:
    expected = [
        (*prompt, *answers[place])
        for prompt, answers, pair in update["groups"]
        if pair is not None
        for place in pair
    ]
    assert len(expected) == 2 * (PROMPTS - 1)
    assert len(update["seen"]) == 2 * PROMPTS  # of 8 * PROMPTS; the skipped group is there, masked
    everyone = [(*prompt, *answer) for prompt, answers, _ in update["groups"] for answer in answers]
    assert set(expected) <= set(update["seen"]) <= set(everyone)


def test_the_update_is_that_of_the_pairs_row_by_row(update: dict[str, Any]) -> None:
    rows = [
        (prompt, answers[place], advantage)
        for prompt, answers, pair in update["groups"]
        if pair is not None
        for place, advantage in zip(pair, (1.0, -0.25), strict=True)
    ]
    expected = mean_gradient(update["start"], rows, num_tokens=3 * len(rows))
    assert expected.keys() == update["gradients"].keys()
    for name, found in update["gradients"].items():
        torch.testing.assert_close(found, expected[name], rtol=2e-4, atol=1e-7, msg=name)


def test_trl_gives_whole_groups_with_zero_advantages_the_same_gradient(update: dict[str, Any]) -> None:
    trainer, model = update["trainer"], update["start"]
    rows = [
        (prompt, answer, 0.0 if i not in pair else (1.0, -0.25)[pair.index(i)])
        for prompt, answers, pair in update["groups"]
        if pair is not None
        for i, answer in enumerate(answers)
    ]
    longest = max(len(prompt) for prompt, _, _ in rows)
    pad = trainer.vocabulary.pad
    prompts = [[pad] * (longest - len(prompt)) + prompt for prompt, _, _ in rows]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _, _ in rows]
    whole = {
        "prompt_ids": torch.tensor(prompts),
        "prompt_mask": torch.tensor(masks),
        "completion_ids": torch.tensor([answer for _, answer, _ in rows]),
        "completion_mask": torch.ones(len(rows), 3, dtype=torch.long),
        "advantages": torch.tensor([advantage for _, _, advantage in rows]),
        "num_items_in_batch": torch.tensor(3 * len(rows)),
    }
    actor = trainer.model  # has TRL's forward; back to the weights before the update
    actor.load_state_dict(model.state_dict())
    actor.zero_grad()
    trainer.compute_loss(actor, whole).backward()
    found = {name: weight.grad * WIDTH / 2 for name, weight in actor.named_parameters()}
    for name, expected in update["gradients"].items():
        torch.testing.assert_close(found[name], expected, rtol=2e-4, atol=1e-7, msg=name)


def test_the_reference_sees_two_rows_of_a_group_as_well(tokenizer_folder: Path, tmp_path: Path) -> None:
    given = trl_recast.arguments(arguments(tokenizer_folder, tmp_path, "--steps", "1"))
    trainer = trl_recast.make_trainer(given)
    rows = record_rows(trainer.ref_model, trainer.vocabulary.pad, grad=False)
    trainer.train()
    assert len(rows) == 2 * PROMPTS


# --- the command ---


def test_the_command_trains_logs_the_signal_and_repeats_itself(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    logs = []
    for name in ("one", "two"):
        given = trl_recast.arguments(arguments(tokenizer_folder, tmp_path / name, "--steps", "2"))
        trainer = trl_recast.make_trainer(given)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "signal/all_zero" in entry])
    assert len(logs[0]) == 2
    for entry, again in zip(*logs, strict=True):
        assert entry["signal/all_zero"] > 0
        assert entry["signal/all_zero_after_repair"] == 0.0
        assert entry["signal/invalid"] == 0.0
        assert entry["rewards/kept_hit/mean"] == 0.5  # i+ hits, natural or repaired, and i- does not
        assert [entry[name] for name in ("grad_norm", "entropy")] == [again["grad_norm"], again["entropy"]]


def test_the_command_leaves_a_model_that_moved(tokenizer_folder: Path, tmp_path: Path) -> None:
    trl_recast.main(arguments(tokenizer_folder, tmp_path, "--steps", "1"))
    before = trl_recast.load_model(tokenizer_folder / "model", 0, "cpu").state_dict()
    after = trl_recast.load_model(tmp_path / "model", 0, "cpu").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_two_processes_update_as_one_does(tokenizer_folder: Path, tmp_path: Path) -> None:
    trl_recast.main(arguments(tokenizer_folder, tmp_path / "one", "--steps", "1", "--prompts", "8"))
    options = arguments(tokenizer_folder, tmp_path / "two", "--steps", "1", "--prompts", "4")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, trl_recast.__file__, *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]

    def weights(folder: Path) -> torch.Tensor:
        state = trl_recast.load_model(folder / "model", 0, "cpu").state_dict()
        return torch.cat([weight.ravel() for weight in state.values()])

    one, two = (weights(tmp_path / name) - weights(tokenizer_folder) for name in ("one", "two"))
    # Adam's first step is the sign of the gradient, so a sum in another order may flip what is next to 0.
    assert one.abs().max() == pytest.approx(3e-5, rel=0.01)
    assert ((one - two).abs() > 1e-6).float().mean() < 0.002


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_generations", 4, "num_generations is 4, needed 2"),
        ("per_device_train_batch_size", 3, "per_device_train_batch_size is 3, needed an even number"),
        ("mask_truncated_completions", True, "mask_truncated_completions is True, needed False"),
    ],
)
def test_options_that_would_not_see_pairs_are_refused(
    tokenizer_folder: Path, tmp_path: Path, name: str, value: Any, message: str
) -> None:
    config = trl_recast.GRPOConfig(
        output_dir=str(tmp_path), num_generations=2, use_cpu=True, bf16=False, report_to="none"
    )
    setattr(config, name, value)
    with pytest.raises(RecipeError, match=message):
        trl_recast.RecastTrainer(tokenizer_dir=tokenizer_folder, width=4, args=config, model="unused")


def test_an_evaluation_over_repaired_rollouts_is_refused(update: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="cannot evaluate"):
        update["trainer"].evaluate()


def test_verl_builds_its_models_where_this_trl_is_installed(tokenizer_folder: Path) -> None:
    # verl looks for TRL and imports a class of it. In its own process, since it patches transformers too.
    program = f"""
from recast_cli.models import load_model
from pathlib import Path
from verl.models.transformers.monkey_patch import apply_monkey_patch, is_trl_available
assert is_trl_available()
apply_monkey_patch(load_model(Path({str(tokenizer_folder / "model")!r}), 0, "cpu"), use_remove_padding=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
