"""Real verl jobs whose groups are drawn otherwise than by default: from the newest weights, and masked.

See jobs.py; both share the warm start of the other jobs.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jobs import GROUP, PROMPTS, SEED, STEPS, Job, succeed, train
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.workers.config import HFModelConfig, RolloutConfig

from recast_cli.vocabulary import encode_prompts
from verl_recast.rollout.server import SIDServer

# One worker for all that may meet the Ray cluster which a test here starts.
pytestmark = [pytest.mark.verl, pytest.mark.xdist_group("jobs")]


@pytest.fixture(scope="module")
def distinct_job(workspace: Path) -> Job:
    """Whole groups of distinct items that the user did not have; stock trainer, each prompt read once."""
    options = ("rl.sampling=without-replacement", "rl.exclude_history=true", "rl.share_prompt=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECAST_MEASURE", str(workspace / "distinct-measured.jsonl"))
        return succeed(train(workspace, "distinct", "method.name=grpo", *options))


@pytest.fixture(scope="module")
def masked_job(workspace: Path) -> Job:
    return succeed(train(workspace, "masked", "rl.masked_actor=true"))


def rows_of(job: Job, step: int) -> list[dict[str, Any]]:
    return pq.read_table(job.out / "rows.parquet").slice((step - 1) * PROMPTS, PROMPTS).to_pylist()


def redrawn(tokenizer_folder: Path, job: Job, step: int, weights: Path) -> Counter[tuple[str, str]]:
    """(prompt, answer) of the rollouts of a step, drawn here by a server with weights from disk."""
    config = RolloutConfig(name="recast_sid", dtype="float32", custom={"tokenizer": str(tokenizer_folder)})
    server = SIDServer(config, HFModelConfig(path=str(weights)), "cpu")
    state = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).state_dict()
    server.update_weights(state, step - 1, True)
    tokenizer, rows = AutoTokenizer.from_pretrained(tokenizer_folder / "model"), rows_of(job, step)
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    out = asyncio.run(
        server.generate_groups(
            prompts,
            [row["extra_info"]["index"] for row in rows],
            GROUP,
            step=step,
            seed=SEED,
            temperature=1.0,
            sampling="without-replacement",
            history=[row["extra_info"]["history"] for row in rows],
        )
    )
    tokens_BGL = server.catalogue.token_ids(out["codes_BGL"])
    return Counter(
        (tokenizer.decode(prompt), tokenizer.decode(tokens))
        for prompt, group in zip(prompts, tokens_BGL, strict=True)
        for tokens in group
    )


def test_rollouts_of_each_step_come_from_the_newest_weights(
    distinct_job: Job, workspace: Path, tokenizer_folder: Path
) -> None:
    start = workspace / "warm_start" / "model"
    updated = distinct_job.out / "checkpoints" / "global_step_1" / "actor" / "huggingface"
    for step, weights in ((1, start), (2, updated)):
        seen = Counter((row["input"], row["output"]) for row in distinct_job.dump(step))
        assert seen.total() == PROMPTS * GROUP
        assert seen == redrawn(tokenizer_folder, distinct_job, step, weights)
    assert seen != redrawn(tokenizer_folder, distinct_job, 2, start)  # or old weights would pass too
    lines = (workspace / "distinct-measured.jsonl").read_text(encoding="utf-8").splitlines()
    # Before them stands the warm start, where this job had to make it.
    measured = list(map(json.loads, lines))
    assert len([call for call in measured if call["phase"] == "rollout"]) == STEPS
    calls = [call for call in measured if call["phase"] not in ("optimizer", "rollout")][-3 * STEPS :]
    assert {call["phase"] for call in calls} == {"old_log_prob", "ref_log_prob", "actor_update"}
    for call in calls:  # of a group of four the prompt is read once, of rows alone every token has logits
        assert call["rows"] == PROMPTS * GROUP and call["read_tokens"] == 4 * PROMPTS * GROUP < call["tokens"]
    for found in distinct_job.metrics:  # what the server said of them is what the actor says
        assert found["training/rollout_probs_diff_max"] < 1e-5


def answer_log_probs(rows: list[dict[str, Any]], tokenizer_folder: Path, weights: Path) -> torch.Tensor:
    """Of the tokens of every answer, each row read alone by a plain forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    found = []
    for row in rows:
        prompt, answer = (
            tokenizer.encode(row[name], add_special_tokens=False) for name in ("input", "output")
        )
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_probs_TV = model(ids).logits[0].log_softmax(-1)
        found.append(log_probs_TV[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.stack(found)


def test_the_reference_reads_a_shared_prompt_as_its_model_would(
    distinct_job: Job, workspace: Path, tokenizer_folder: Path
) -> None:
    """The divergence that verl logs, from plain forward passes: `low_var_kl` is exp(k) - k - 1 of the
    difference k of reference and actor, averaged over tokens."""
    assert distinct_job.metrics[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-9)  # both are the start
    start = workspace / "warm_start" / "model"
    updated = distinct_job.out / "checkpoints" / "global_step_1" / "actor" / "huggingface"
    rows = distinct_job.dump(2)
    reference, actor = (answer_log_probs(rows, tokenizer_folder, weights) for weights in (start, updated))
    difference = reference - actor
    expected = float((difference.exp() - difference - 1).clamp(max=10).mean())
    assert expected > 1e-3
    assert distinct_job.metrics[1]["actor/kl_loss"] == pytest.approx(expected, rel=1e-4)


def test_groups_hold_distinct_items_that_the_user_did_not_have(
    distinct_job: Job, tokenizer_folder: Path
) -> None:
    sids = pq.read_table(tokenizer_folder / "semantic_ids.parquet")["sid"].to_pylist()
    had_more = 0
    for step in range(1, STEPS + 1):
        texts = [row["output"] for row in distinct_job.dump(step)]
        assert all(f"<|sid_begin|>{text}<|sid_end|>" in sids for text in texts)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
        by_prompt: dict[str, list[str]] = {}
        for row in distinct_job.dump(step):
            by_prompt.setdefault(row["input"], []).append(f"<|sid_begin|>{row['output']}<|sid_end|>")
        for row in rows_of(distinct_job, step):
            text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            history = [sids[item] for item in row["extra_info"]["history"]]
            assert len(set(by_prompt[text])) == GROUP
            assert not set(by_prompt[text]) & set(history)
            had_more += len(history) > len(row["prompt"])
    assert had_more  # the prompt alone would not have been enough somewhere
    lines = (distinct_job.out / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    for line in map(json.loads, lines):
        assert line["duplicate"] == 0 and line["invalid"] == 0
        assert 0 < line["catalogue_mass"] < 1


def test_a_masked_actor_says_of_rollouts_what_they_were_drawn_with(masked_job: Job, recast_job: Job) -> None:
    for masked, full in zip(masked_job.metrics, recast_job.metrics, strict=True):
        assert masked["training/rollout_probs_diff_max"] < 1e-5
        assert 0 < masked["signal/catalogue_mass"] < 1
        # less is left to be uncertain of, and the prompts of the first step are the same
        assert masked["actor/entropy"] < full["actor/entropy"]
    first, other = masked_job.metrics[0], recast_job.metrics[0]
    assert first["signal/catalogue_mass"] == other["signal/catalogue_mass"]
    assert first["actor/grad_norm"] != pytest.approx(other["actor/grad_norm"], rel=1e-3)
    assert np.isfinite(first["actor/grad_norm"])
    assert sum(found["signal/repaired_groups"] for found in masked_job.metrics) > 0  # anchors were there
