"""Real verl jobs on a small synthetic dataset, through the command line: the main path; see jobs.py.

Most jobs share one warm start; each of them starts Ray and takes half a minute to a minute and a half.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jobs import GROUP, PROMPTS, SEED, STEPS, Job, succeed, train, weights
from sealing import reseal
from transformers import AutoModelForCausalLM, AutoTokenizer

from recast_cli.artifacts import load_manifest
from recast_cli.core.sampling import sample
from recast_cli.core.seeding import uniforms
from recast_cli.evaluation.evaluate import evaluate_model
from verl_recast.catalogue import Catalogue

# One worker for all that may meet the Ray cluster which a test here starts.
pytestmark = [pytest.mark.verl, pytest.mark.xdist_group("jobs")]


@pytest.fixture(scope="module")
def grpo_job(workspace: Path, recast_job: Job) -> Job:
    return succeed(train(workspace, "grpo", "method.name=grpo"))


def drawn(workspace: Path, tokenizer_folder: Path, job: Job, step: int, model: Path) -> list[list[str]]:
    """The rollouts of a step as text, group by group, drawn here from a model on disk."""
    catalogue = Catalogue.load(tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    rows = pq.read_table(job.out / "rows.parquet").slice((step - 1) * PROMPTS, PROMPTS).to_pylist()
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False),
            add_special_tokens=False,
        )["input_ids"]
        for row in rows
    ]
    draws = uniforms(SEED, step, np.array([row["extra_info"]["index"] for row in rows]), GROUP, 3)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = sample(
        policy, catalogue.trie, catalogue.level_offsets, prompts, draws, pad_token_id=catalogue.pad_token_id
    )
    tokens_BGL = catalogue.token_ids(samples.codes_BGL.numpy())
    return [[tokenizer.decode(tokens) for tokens in group] for group in tokens_BGL]


def pairs(prompts: list[list[str]], inputs: list[str]) -> Counter[tuple[str, str]]:
    return Counter((text, answer) for text, group in zip(inputs, prompts, strict=True) for answer in group)


def prompt_texts(job: Job, tokenizer_folder: Path, step: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    rows = pq.read_table(job.out / "rows.parquet").slice((step - 1) * PROMPTS, PROMPTS).to_pylist()
    return [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]


# -- (a) the main path -----------------------------------------------------------------------------------


def test_recast_keeps_two_rows_of_every_group_and_repairs_the_empty_ones(recast_job: Job) -> None:
    assert len(recast_job.metrics) == STEPS
    for found in recast_job.metrics:
        trainable = PROMPTS - found["signal/skipped_groups"]
        assert found["signal/rollouts"] == PROMPTS * GROUP
        assert found["signal/kept_samples"] == 2 * trainable
        assert found["signal/padding_samples"] == 2 * found["signal/skipped_groups"]
        assert found["signal/all_zero_after_repair"] == 0
        assert found["signal/repaired_groups"] == found["signal/all_zero"] * PROMPTS
        assert found["signal/invalid"] == 0
        assert found["signal/all_zero"] + found["signal/single_hit"] + found["signal/multi_hit"] == 1
        assert found["critic/advantages/max"] == 1 and found["critic/advantages/min"] == -1
        # nobody sampled the anchors: they are no part of the comparison of rollout with actor
        assert found["training/rollout_probs_diff_max"] < 1e-5
    assert sum(found["signal/repaired_groups"] for found in recast_job.metrics) > 0


def test_every_kept_pair_is_a_hit_and_a_miss_of_one_prompt(recast_job: Job) -> None:
    for step in range(1, STEPS + 1):
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for row in recast_job.dump(step):
            by_prompt.setdefault(row["uid"].split("_")[0], []).append(row)
        for rows in by_prompt.values():
            assert sorted(row["score"] for row in rows) == [0, 1]
            positive = next(row for row in rows if row["score"] == 1)
            negative = next(row for row in rows if row["score"] == 0)
            assert positive["output"] == positive["gts"]
            assert negative["output"] != negative["gts"]


def test_run_directory_is_whole_and_the_model_moved(recast_job: Job, workspace: Path) -> None:
    manifest = load_manifest(recast_job.out, "run")
    assert manifest["recipe"]["method"]["name"] == "recast"
    assert manifest["seed"] == SEED and manifest["versions"]["verl"] == "0.9.1"
    assert set(manifest["parents"]) == {"dataset", "tokenizer"}
    for name in ("recipe.yaml", "command.txt", "metrics.jsonl", "rows.parquet", "logs/train.log"):
        assert (recast_job.out / name).stat().st_size > 0, name
    assert not (recast_job.out / "outputs").exists()
    assert (workspace / "warm_start" / "warm_start.log").is_file()
    start, end = weights(workspace / "warm_start" / "model"), weights(recast_job.out / "model")
    assert start.keys() == end.keys()
    assert all(torch.isfinite(tensor).all() for tensor in end.values())
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_the_warm_start_is_the_epoch_that_validates_best(
    recast_job: Job, workspace: Path, artifacts: tuple[Path, Path]
) -> None:
    manifest = load_manifest(workspace / "warm_start", "warm-start")
    ndcg = [epoch["ndcg@10"] for epoch in manifest["epochs"]]
    assert len(ndcg) == 2 and ndcg[0] != ndcg[1]
    assert manifest["best_epoch"] == 1 + int(np.argmax(ndcg))
    model, (data, tokenizer) = workspace / "warm_start" / "model", artifacts
    kept = evaluate_model(model, tokenizer, data, "validation", modes=("history_removed",)).means()
    assert kept["ndcg@10"] == pytest.approx(max(ndcg), abs=1e-9)
    assert kept["target_log_prob"] == pytest.approx(
        manifest["epochs"][manifest["best_epoch"] - 1]["target_log_prob"], abs=1e-5
    )


def test_second_call_reuses_the_run_and_says_so(recast_job: Job, workspace: Path) -> None:
    before = (recast_job.out / "manifest.json").read_bytes()
    again = train(workspace, "recast")
    assert again.code == 0
    assert "reusing the finished run in recast" in again.stdout + again.stderr
    assert (recast_job.out / "manifest.json").read_bytes() == before


def test_run_directory_of_another_recipe_is_an_error(recast_job: Job, workspace: Path) -> None:
    other = train(workspace, "recast", "method.w_negative=0.5")
    assert other.code == 2
    assert "error: recast holds a run of another recipe" in other.stderr
    assert "hint:" in other.stderr and "Traceback" not in other.stderr


# -- (b) the same rollouts for every method, (c) from the newest weights ---------------------------------


def test_stock_grpo_sees_the_same_first_rollouts_as_recast(
    recast_job: Job, grpo_job: Job, workspace: Path, tokenizer_folder: Path
) -> None:
    inputs = prompt_texts(grpo_job, tokenizer_folder, 1)
    start = workspace / "warm_start" / "model"
    expected = pairs(drawn(workspace, tokenizer_folder, grpo_job, 1, start), inputs)
    assert expected.total() == PROMPTS * GROUP
    assert Counter((row["input"], row["output"]) for row in grpo_job.dump(1)) == expected
    # ReCast's rows are among them, but for its anchors (which are the target)
    kept = Counter((row["input"], row["output"]) for row in recast_job.dump(1) if row["score"] == 0)
    assert kept and kept <= expected
    assert "reusing the warm start" in grpo_job.stdout + grpo_job.stderr
    first, stock = recast_job.metrics[0], grpo_job.metrics[0]
    assert first["signal/hit_rate"] == pytest.approx(stock["critic/score/mean"])


def leading(answer: str, target: str) -> int:
    """Codes that agree before the first that does not."""
    codes = [re.findall(r"<s_[a-z]_\d+>", text) for text in (answer, target)]
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*codes, strict=True))))


def test_the_negative_is_the_hardest_of_its_group(
    recast_job: Job, workspace: Path, tokenizer_folder: Path
) -> None:
    inputs = prompt_texts(recast_job, tokenizer_folder, 1)
    groups = drawn(workspace, tokenizer_folder, recast_job, 1, workspace / "warm_start" / "model")
    rows = recast_job.dump(1)
    hardness = []
    for text, group in zip(inputs, groups, strict=True):
        (kept,) = [row for row in rows if row["input"] == text and row["score"] == 0]
        target = kept["gts"]
        misses = [leading(answer, target) for answer in group if answer != target]
        hardness.append((leading(kept["output"], target), max(misses), min(misses)))
    assert [kept for kept, _, _ in hardness] == [hardest for _, hardest, _ in hardness]
    assert any(easiest < hardest for _, hardest, easiest in hardness), "or any choice would pass"
    # and tokens by hand: four rollouts a group, of which two are kept, each a prompt and three codes
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 3 for text in inputs]
    assert recast_job.metrics[0]["signal/rollout_tokens"] == GROUP * sum(lengths)
    assert recast_job.metrics[0]["signal/kept_tokens"] == 2 * sum(lengths)


def test_second_steps_rollouts_come_from_the_first_steps_weights(
    recast_job: Job, workspace: Path, tokenizer_folder: Path
) -> None:
    inputs = prompt_texts(recast_job, tokenizer_folder, 2)
    updated = recast_job.out / "checkpoints" / "global_step_1" / "actor" / "huggingface"
    stale = workspace / "warm_start" / "model"
    fresh = pairs(drawn(workspace, tokenizer_folder, recast_job, 2, updated), inputs)
    old = pairs(drawn(workspace, tokenizer_folder, recast_job, 2, stale), inputs)
    kept = Counter((row["input"], row["output"]) for row in recast_job.dump(2) if row["score"] == 0)
    assert kept and kept <= fresh
    assert not kept <= old  # the start model would have drawn something else
    # and what the server said of them is what the actor says of them, step by step
    for found in recast_job.metrics:
        assert found["training/rollout_probs_diff_max"] < 1e-5


# -- (d) control, (e) no signal ------------------------------------------------------------------------


def test_continued_sft_trains_on_the_same_prompts(recast_job: Job, workspace: Path) -> None:
    job = succeed(train(workspace, "sft", "method.name=sft-continued"))
    assert len(job.metrics) == STEPS
    assert all(np.isfinite(found["train/loss"]) for found in job.metrics)
    start, end = weights(workspace / "warm_start" / "model"), weights(job.out / "model")
    assert any(not torch.equal(start[name], end[name]) for name in start)
    messages = pq.read_table(job.out / "rows.parquet")["messages"].to_pylist()
    rows = pq.read_table(recast_job.out / "rows.parquet").to_pylist()
    assert [row[-1]["content"] for row in messages] == [row["reward_model"]["ground_truth"] for row in rows]


def test_step_in_which_every_rollout_hits_does_no_harm(workspace: Path, artifacts: tuple[Path, Path]) -> None:
    """The whole catalogue is the target, so no group has a legal negative."""
    tokenizer = workspace / "all-hit-tokenizer"
    shutil.copytree(artifacts[1], tokenizer)
    everything = "".join(
        sid.removeprefix("<|sid_begin|>").removesuffix("<|sid_end|>")
        for sid in pq.read_table(tokenizer / "semantic_ids.parquet")["sid"].to_pylist()
    )
    rows = pq.read_table(tokenizer / "verl" / "rl.parquet")
    column = [{"style": "rule", "ground_truth": everything}] * rows.num_rows
    place = rows.schema.get_field_index("reward_model")
    field = rows.schema.field(place)
    all_hit = rows.set_column(place, field, pa.array(column, field.type))
    pq.write_table(all_hit, tokenizer / "verl" / "rl.parquet")
    reseal(tokenizer)
    job = succeed(
        train(
            workspace, "all-hit", f"tokenizer={tokenizer}", "warm_start.out=all-hit-warm-start", "rl.steps=1"
        )
    )
    (found,) = job.metrics
    assert found["signal/multi_hit"] == 1 and found["signal/hit_rate"] == 1
    assert found["signal/skipped_groups"] == PROMPTS
    assert found["signal/repaired_groups"] == 0
    assert found["signal/kept_samples"] == 0
    assert not [name for name in found if name.startswith("actor/grad")]  # no update, so no decay either
    start, end = weights(workspace / "all-hit-warm-start" / "model"), weights(job.out / "model")
    for name, tensor in end.items():
        assert torch.equal(tensor, start[name]), name
