"""Real verl jobs of the other arms, other models, several mini-batches and ranks; see jobs.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import GROUP, PROMPTS, STEPS, Job, main_ppo, succeed, train, weights
from plugin_artifacts import write_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recast_cli.evaluation.evaluate import evaluate_model

# One worker for all that may meet the Ray cluster which a test here starts.
pytestmark = [pytest.mark.verl, pytest.mark.xdist_group("jobs")]


def test_a_named_model_with_more_vocabulary_trains(
    workspace: Path, artifacts: tuple[Path, Path], tmp_path: Path
) -> None:
    """Words of its own, a padded vocabulary, an untied head and half precision, as real ones have."""
    words = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(40))]
    rule = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    rule.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=rule, **specials).save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, tie_word_embeddings=False, **sizes, **heads))
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    write_tokenizer(artifacts[0], tmp_path / "tokenizer", tmp_path / "base")

    overrides = (f"tokenizer={tmp_path / 'tokenizer'}", "warm_start.out=named-warm-start", "rl.steps=1")
    job = succeed(train(workspace, "named", *overrides))
    (found,) = job.metrics
    assert found["signal/invalid"] == 0 and found["signal/kept_samples"] > 0
    assert found["training/rollout_probs_diff_max"] < 1e-5
    start, end = weights(workspace / "named-warm-start" / "model"), weights(job.out / "model")
    assert end["lm_head.weight"].shape == (128, 64), "43 words, 26 new tokens and what padded them before"
    moved = (start["lm_head.weight"] != end["lm_head.weight"]).any(dim=1)
    assert moved[43:69].any()
    tokenizer = AutoTokenizer.from_pretrained(job.out / "model")
    assert tokenizer("word3 word7")["input_ids"] == [6, 10]


def test_mini_batches_of_prompts_are_one_update_each(
    recast_job: Job, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = workspace / "measured.jsonl"
    monkeypatch.setenv("RECAST_MEASURE", str(measured))
    job = succeed(train(workspace, "mini-batches", "rl.mini_batch_prompts=2"))
    calls = [json.loads(line) for line in measured.read_text(encoding="utf-8").splitlines()]
    kept = [found["signal/kept_samples"] for found in job.metrics]
    assert all(found["signal/skipped_groups"] == 0 for found in job.metrics), "else rows below would differ"
    rows = {
        phase: [call["rows"] for call in calls if call["phase"] == phase]
        for phase in ("old_log_prob", "actor_update")
    }
    assert rows == {"old_log_prob": kept, "actor_update": [2 * 2] * (2 * STEPS)}
    assert len([call for call in calls if call["phase"] == "optimizer"]) == 2 * STEPS
    # the first step saw the same rollouts as one update for all, but its second update from a moved policy
    first, whole = job.metrics[0], recast_job.metrics[0]
    assert first["signal/hit_rate"] == whole["signal/hit_rate"]
    updated = [
        weights(run.out / "checkpoints" / "global_step_1" / "actor" / "huggingface")
        for run in (job, recast_job)
    ]
    assert any(not torch.equal(updated[0][name], updated[1][name]) for name in updated[0])


def test_two_ranks_share_whole_groups_and_make_the_same_update(recast_job: Job, workspace: Path) -> None:
    """FSDP2 over gloo, actor and reference sharded, a rollout server beside each rank."""
    out = workspace / "two-ranks"
    out.mkdir()
    shutil.copy(recast_job.out / "rows.parquet", out)
    _, *arguments = (recast_job.out / "command.txt").read_text(encoding="utf-8").splitlines()
    options = dict(line.replace(str(recast_job.out), str(out)).split("=", 1) for line in arguments)
    options |= dict.fromkeys(("trainer.n_gpus_per_node", "+ray_kwargs.ray_init.num_gpus"), "2")
    options |= {f"actor_rollout_ref.{part}.strategy": "fsdp2" for part in ("actor", "ref")}
    options["trainer.save_freq"] = "-1"
    del options["trainer.rollout_data_dir"]
    found = main_ppo([*map("=".join, options.items())], out, RECAST_MEASURE=str(out / "measured.jsonl"))
    calls = [json.loads(line) for line in (out / "measured.jsonl").read_text().splitlines()]
    shared = [call for call in calls if call["phase"] == "actor_update"]
    updates = [(call["rank"], call["rows"] + call["padding_rows"]) for call in shared]
    assert sorted(updates) == [(rank, PROMPTS) for rank in (0, 0, 1, 1)], "two groups of two rows"
    assert len(found) == STEPS
    first, alone = found[0], recast_job.metrics[0]
    names = [name for name in alone if name.startswith("signal/")]
    # log-probs of other batches differ in their last digit
    assert {name: first[name] for name in names} == pytest.approx({name: alone[name] for name in names})
    for name in ("actor/grad_norm", "actor/entropy", "actor/kl_loss"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    # both servers answer with the newest weights, which each of them got whole
    assert all(step["training/rollout_probs_diff_max"] < 1e-5 for step in found)


def test_repair_alone_trains_on_whole_groups_and_validates_exactly(
    recast_job: Job, workspace: Path, artifacts: tuple[Path, Path]
) -> None:
    """With verl's own estimator, an entropy bonus, fixed micro-batches and two updates a step."""
    micro = [
        f"verl.actor_rollout_ref.{name}_per_gpu={size}"
        for name, size in (
            ("actor.ppo_micro_batch_size", 4),
            ("ref.log_prob_micro_batch_size", 2),
            ("rollout.log_prob_micro_batch_size", 8),
        )
    ]
    fixed = [
        "verl.actor_rollout_ref.actor.use_dynamic_bsz=false",
        "verl.actor_rollout_ref.ref.log_prob_use_dynamic_bsz=false",
        "verl.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=false",
    ]
    terms = ["rl.entropy_coef=0.01", "rl.mini_batch_prompts=2", "rl.validate_every=2"]
    job = succeed(train(workspace, "repair-only", "method.name=repair-only", *micro, *fixed, *terms))
    start, *steps = job.metrics
    for found in steps:
        assert found["signal/kept_samples"] == PROMPTS * GROUP and found["signal/skipped_groups"] == 0
        assert found["signal/repaired_groups"] == found["signal/all_zero"] * PROMPTS
        assert found["signal/all_zero_after_repair"] == 0
        assert np.isfinite(found["actor/entropy_loss"]) and found["actor/entropy_loss"] > 0
    assert steps[0]["signal/hit_rate"] == recast_job.metrics[0]["signal/hit_rate"], "the same rollouts"
    by_prompt: dict[str, list[float]] = {}
    for row in job.dump(1):
        by_prompt.setdefault(row["uid"].split("_")[0], []).append(row["score"])
    assert all(len(scores) == GROUP and sum(scores) >= 1 for scores in by_prompt.values())

    # verl's log holds what `recast evaluate` says of the same model, with the history kept
    (source,) = {name.split("/")[1] for name in start if name.startswith("val-core/")}
    for logged, model in ((start, workspace / "warm_start" / "model"), (steps[-1], job.out / "model")):
        data, tokenizer = artifacts
        evaluated = evaluate_model(model, tokenizer, data, "validation", modes=("history_kept",))
        means = evaluated.means(mode="history_kept")
        for logged_name, name in (("pass@10", "hr@10"), ("recall@5", "recall@5"), ("ndcg@10", "ndcg@10")):
            assert logged[f"val-core/{source}/{logged_name}"] == pytest.approx(means[name], abs=1e-9)
        assert logged[f"val-aux/{source}/invalid"] == 0
    assert not [name for found in job.metrics for name in found if "best@" in name], "verl's bootstrap"


ONE_PASS = ("rl.on_policy=true", "rl.sampled_log_probs=false", "rl.steps=1")
ITS_PHASES = ["rollout", "ref_log_prob", "actor_update", "optimizer"]


def one_pass(workspace: Path, out: str, *options: str) -> tuple[Job, list[str]]:
    """A job of one step without the pass for old log-probs, and the phases that its worker went through."""
    measured = workspace / f"{out}.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECAST_MEASURE", str(measured))
        job = succeed(train(workspace, out, *ONE_PASS, *options))
    lines = measured.read_text(encoding="utf-8").splitlines()
    return job, [json.loads(line)["phase"] for line in lines]


def test_one_forward_pass_makes_the_update_of_two(recast_job: Job, workspace: Path) -> None:
    job, phases = one_pass(workspace, "on-policy", "method.name=recast")
    assert phases == ITS_PHASES
    (found,) = job.metrics
    first = recast_job.metrics[0]
    assert found["signal/hit_rate"] == first["signal/hit_rate"], "the same rollouts"
    assert found["actor/ppo_kl"] == 0 and found["actor/pg_clipfrac"] == 0
    assert found["actor/grad_norm"] == pytest.approx(first["actor/grad_norm"], rel=1e-5)
    saved = recast_job.out / "checkpoints" / "global_step_1" / "actor" / "huggingface"
    start = weights(workspace / "warm_start" / "model")
    ours, theirs = weights(job.out / "model"), weights(saved)
    for name, weight in theirs.items():
        step, other = weight - start[name], ours[name] - start[name]
        assert float((step - other).norm()) <= 1e-3 * float(step.norm()), name


def test_one_forward_pass_makes_the_update_of_stock_grpo(workspace: Path) -> None:
    """Beside verl's own trainer with its two passes, in a step that has a hit."""
    sizes = ("method.name=grpo", "rl.prompts_per_step=8", "rl.group_size=6")
    job, phases = one_pass(workspace, "on-policy-grpo", *sizes)
    assert phases == ITS_PHASES
    (found,) = job.metrics
    assert found["signal/hit_rate"] > 0 and found["signal/kept_samples"] == 8 * 6
    stock = succeed(train(workspace, "two-passes", "rl.steps=1", *sizes)).metrics[0]
    assert found["actor/grad_norm"] > 0
    assert found["actor/grad_norm"] == pytest.approx(stock["actor/grad_norm"], rel=1e-4)


def test_contrast_alone_under_the_full_batch_scale_skips_the_empty_groups(
    recast_job: Job, workspace: Path
) -> None:
    prompts, sizes = 8, ("rl.steps=1", "rl.prompts_per_step=8", "rl.group_size=6")
    options = ("method.loss_scale=full-batch", "method.tie_rule=most-probable", *sizes)
    job = succeed(train(workspace, "contrast-only", "method.name=contrast-only", *options))
    (found,) = job.metrics
    empty = round(found["signal/all_zero"] * prompts)
    assert 0 < empty < prompts, "or nothing is shown"
    assert found["signal/repaired_groups"] == found["signal/anchor_share"] == 0
    assert found["signal/skipped_groups"] == empty  # nobody hits with all of 6
    assert found["signal/kept_samples"] == 2 * (prompts - empty)
    assert found["signal/all_zero_after_repair"] == found["signal/all_zero"]
    assert found["actor/grad_norm"] > 0
