"""Real verl jobs on a small synthetic dataset, through the command line, each in a child process.

Most jobs share one warm start; each of them starts Ray and takes half a minute to a minute and a half. The
learning rate is far too high on purpose: weights that did not reach the rollout server show at once.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from killed_runs import kill_all, start, train_until, wait_for
from plugin_artifacts import write_tokenizer
from sealing import reseal
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from recast_cli.artifacts import load_manifest
from recast_cli.core.sampling import sample
from recast_cli.core.seeding import uniforms
from recast_cli.evaluation.evaluate import evaluate_model
from recast_cli.training.process import read_metrics
from verl_recast.catalogue import Catalogue

# One worker for all that may meet the Ray cluster which a test here starts.
pytestmark = [pytest.mark.verl, pytest.mark.xdist_group("jobs")]

SEED, PROMPTS, GROUP, STEPS = 3, 4, 4, 2
RECIPE = f"""
seed: {SEED}
device: cpu
threads: 1
ray_cpus: 8
data: {{data}}
tokenizer: {{tokenizer}}
warm_start: {{{{out: warm_start, epochs: 2, batch_size: 32, learning_rate: 3.0e-3}}}}
rl:
  steps: {STEPS}
  prompts_per_step: {PROMPTS}
  group_size: {GROUP}
  learning_rate: 0.01
  warmup_steps: 0
  save_every: 1
"""


@dataclass(frozen=True)
class Job:
    """A finished `recast train`."""

    code: int
    stdout: str
    stderr: str
    out: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["data"] for line in lines]

    def dump(self, step: int) -> list[dict[str, Any]]:
        """verl's own record of the rollouts that reached the end of a step."""
        path = self.out.parent / f"{self.out.name}-rollouts" / f"{step}.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def workspace(artifacts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose paths are relative to the working directory, as a user's are."""
    folder = tmp_path_factory.mktemp("jobs")
    text = RECIPE.format(data=artifacts[0], tokenizer=artifacts[1])
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder


def recast(workspace: Path, *arguments: str, timeout: float = 420, path: str = "") -> tuple[int, str, str]:
    """Run `recast` in its own session and end all of it if it takes too long."""
    program = "import sys; from recast_cli.main import main; sys.argv[0] = 'recast'; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        cwd=workspace,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        stdout, stderr = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)  # `recast` ends verl's process group
        stdout, stderr = child.communicate(timeout=60)
        pytest.fail(f"recast {' '.join(arguments)} took over {timeout} s\n{stdout[-2000:]}{stderr[-2000:]}")
    return child.returncode, stdout, stderr


def train(workspace: Path, name: str, *overrides: str) -> Job:
    out = workspace / name
    arguments = ["train", "recipe.yaml", f"out={name}", *overrides]
    if "method.name=sft-continued" not in overrides:
        arguments.append(f"verl.trainer.rollout_data_dir={workspace / f'{name}-rollouts'}")
    return Job(*recast(workspace, *arguments), out)


def succeed(job: Job) -> Job:
    assert job.code == 0, job.stdout[-2000:] + job.stderr[-2000:]
    return job


@pytest.fixture(scope="module")
def recast_job(workspace: Path) -> Job:
    return succeed(train(workspace, "recast"))


@pytest.fixture(scope="module")
def grpo_job(workspace: Path, recast_job: Job) -> Job:
    return succeed(train(workspace, "grpo", "method.name=grpo"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


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


def test_second_call_reuses_the_run_and_says_so(recast_job: Job, workspace: Path) -> None:
    before = (recast_job.out / "manifest.json").read_bytes()
    again = train(workspace, "recast")
    assert again.code == 0
    assert "reusing the finished run in recast" in again.stdout + again.stderr
    assert (recast_job.out / "manifest.json").read_bytes() == before


def test_run_directory_of_another_recipe_is_an_error(recast_job: Job, workspace: Path) -> None:
    other = train(workspace, "recast", "method.w_negative=0.5")
    assert other.code == 2
    assert "error: recast holds a run of another recipe or data" in other.stderr
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


# -- (d) reproducibility, (g) control, (h) no signal -----------------------------------------------------


def test_same_recipe_gives_the_same_weights_bit_for_bit(recast_job: Job, workspace: Path) -> None:
    again = succeed(train(workspace, "recast-again"))
    first, second = weights(recast_job.out / "model"), weights(again.out / "model")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert "reusing the warm start" in again.stdout + again.stderr


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
    for name in [name for name in options if name.startswith("trainer.rollout_data_dir")]:
        del options[name]
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *map("=".join, options.items())],
        cwd=out,
        env={
            **os.environ,
            "VERL_PLATFORM": "cpu",
            "VERL_FILE_LOGGER_PATH": str(out / "metrics.jsonl"),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RECAST_MEASURE": str(out / "measured.jsonl"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    calls = [json.loads(line) for line in (out / "measured.jsonl").read_text().splitlines()]
    shared = [call for call in calls if call["phase"] == "actor_update"]
    updates = [(call["rank"], call["rows"] + call["padding_rows"]) for call in shared]
    assert sorted(updates) == [(rank, PROMPTS) for rank in (0, 0, 1, 1)], "two groups of two rows"
    found = Job(0, "", "", out).metrics
    assert len(found) == STEPS
    first, alone = found[0], recast_job.metrics[0]
    assert {name: value for name, value in first.items() if name.startswith("signal/")} == {
        name: value for name, value in alone.items() if name.startswith("signal/")
    }
    for name in ("actor/grad_norm", "actor/entropy", "actor/kl_loss"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    # both servers answer with the newest weights, which each of them got whole
    assert all(step["training/rollout_probs_diff_max"] < 1e-5 for step in found)


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


@pytest.mark.parametrize("moment", ["in the second step", "inside the second checkpoint"])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(
    recast_job: Job, workspace: Path, moment: str
) -> None:
    """SIGKILL to all of it. The uninterrupted run of the same seed is `recast_job`."""
    for attempt in range(3):  # a machine that is busy elsewhere may let the checkpoint be finished first
        out = workspace / f"{moment.replace(' ', '-')}-{attempt}"
        torn, logged = out / "checkpoints" / "global_step_2", out / "metrics.jsonl"
        inside = "checkpoint" in moment
        killed = train_until(
            lambda: torn.is_dir() if inside else bool(read_metrics(logged)),  # noqa: B023
            ["recipe.yaml", f"out={out.name}"],
            workspace,
        )
        tracker = out / "checkpoints" / "latest_checkpointed_iteration.txt"
        if killed.returncode == -9 and tracker.read_text() == "1" and torn.is_dir() == inside:
            break
    else:
        pytest.fail(f"killed too late three times, last with {killed.returncode}")

    refused = train(workspace, out.name)
    assert refused.code == 2 and "pass --resume to go on from step 1" in refused.stderr
    other = train(workspace, out.name, "--resume", "method.w_negative=0.5")
    assert other.code == 2 and "holds a run of another recipe or data" in other.stderr
    code, stdout, stderr = recast(workspace, "train", "recipe.yaml", f"out={out.name}", "--resume")
    assert code == 0, stdout[-2000:] + stderr[-2000:]
    assert "going on from step 1" in stdout + stderr
    resumed, whole = weights(out / "model"), weights(recast_job.out / "model")
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    found = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in found] == [1, 2]
    rollouts = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    uncut = [json.loads(line) for line in (recast_job.out / "rollouts.jsonl").read_text().splitlines()]
    assert rollouts == uncut, "the same rollouts, each step once"
    manifest = load_manifest(out, "run")
    assert [entry["step"] for entry in manifest["resumed"]] == [1] and "origin.json" not in manifest["files"]


# -- (i) the other arms, the other terms of the loss, validation -----------------------------------------


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


# -- (e) failures ----------------------------------------------------------------------------------------


def test_failed_rollout_ends_the_run_with_its_cause(recast_job: Job, workspace: Path) -> None:
    job = train(workspace, "too-long", "verl.actor_rollout_ref.rollout.prompt_length=6")
    assert job.code == 2
    lines = [line for line in job.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2, job.stderr
    assert "prompt has 26 tokens, actor_rollout_ref.rollout.prompt_length is 6" in lines[0]
    assert "read too-long.log" in lines[1]
    assert "prompt has 26 tokens" in (workspace / "too-long.log").read_text(encoding="utf-8")
    assert not job.out.exists(), "no step was made: the next try needs no --overwrite"


@pytest.mark.parametrize(
    ("title", "named"),
    [
        ("ray::GroupLoopWorker", "agent_loop_worker_0"),
        ("ray::SIDServer", "recast_sid_server_0"),
        ("ray::RewardLoopWorker", "worker reward_loop_worker_0 died"),
    ],
)
def test_a_worker_that_dies_ends_the_run_with_its_name(
    recast_job: Job, workspace: Path, title: str, named: str
) -> None:
    out = workspace / title.removeprefix("ray::")
    options = [f"out={out.name}", "rl.steps=200", "rl.save_every=200"]
    child = start(workspace, "train", "recipe.yaml", *options)
    try:
        wait_for(lambda: bool(read_metrics(out / "metrics.jsonl")), child)
        victims = [
            process
            for process in psutil.Process(child.pid).children(recursive=True)
            if " ".join(process.cmdline()).startswith(title)
        ]
        assert len(victims) == 1
        victims[0].kill()
        _, stderr = child.communicate(timeout=90)  # and does not hang
    finally:
        kill_all(child)
    assert child.returncode == 2
    lines = [line for line in stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2 and named in lines[0], stderr[-2000:]
    assert lines[1] == f"hint: read {out.name}.log"


def test_plugin_that_failed_to_load_is_named(recast_job: Job, workspace: Path) -> None:
    """verl swallows what went wrong; all it shows is a platform it does not know."""
    broken = workspace / "broken" / "verl_recast"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')\n", encoding="utf-8")
    code, _, stderr = recast(workspace, "train", "recipe.yaml", "out=no-plugin", path=str(broken.parent))
    assert code == 2
    lines = [line for line in stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2, stderr
    assert "the plugin is not registered in verl (ImportError: broken on purpose" in lines[0]
    assert lines[1].startswith("hint: run `recast doctor`; the log is ")
    assert not (workspace / "no-plugin").exists()


def test_a_cluster_that_is_too_small_or_not_there_is_named_before_the_launch(
    recast_job: Job, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=6399", "--num-cpus=7"]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temp:  # a socket's path must be short
        options = ["--include-dashboard=false", f"--temp-dir={temp}", "--block"]
        # a group of its own, ended by its id: nobody else's Ray is touched
        head = subprocess.Popen([*start, *options], start_new_session=True, stdout=subprocess.PIPE, text=True)
        try:
            assert head.stdout is not None
            address = next(match[1] for line in head.stdout if (match := re.search("address='(.+)'", line)))
            monkeypatch.setenv("RAY_ADDRESS", address)
            small = train(workspace, "small-cluster")
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            head.communicate(timeout=60)
    assert small.code == 2
    assert f"RAY_ADDRESS={address} has 7 CPUs, verl needs 8" in small.stderr
    assert "hint: start it with --num-cpus=8" in small.stderr and not small.out.exists()
    absent = train(workspace, "no-cluster")
    assert absent.code == 2 and f"no Ray cluster answers at RAY_ADDRESS={address}" in absent.stderr
    assert not absent.out.exists()
