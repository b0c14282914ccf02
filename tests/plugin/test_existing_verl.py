"""README and guide on an existing verl setup: their lines in somebody else's script, real verl jobs."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from jobs import main_ppo
from sealing import reseal

ROOT = Path(__file__).parents[2]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guides" / "existing-verl.md"
EXAMPLE = GUIDE.parent / "examples" / "existing-verl"

# A GRPO command as verl's examples write it, with small numbers, and what a CPU needs.
STOCK_SCRIPT = """
    algorithm.adv_estimator=grpo
    data.train_files={tokenizer}/verl/rl.parquet
    data.val_files={tokenizer}/verl/validation.parquet
    data.train_batch_size=4
    data.max_prompt_length=26
    data.max_response_length=3
    data.truncation=error
    actor_rollout_ref.model.path={tokenizer}/model
    actor_rollout_ref.model.use_remove_padding=False
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    actor_rollout_ref.actor.optim.lr=1e-3
    actor_rollout_ref.actor.ppo_mini_batch_size=4
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
    actor_rollout_ref.actor.use_kl_loss=True
    actor_rollout_ref.actor.kl_loss_coef=0.001
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.model_dtype=fp32
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.ref.fsdp_config.model_dtype=fp32
    actor_rollout_ref.ref.fsdp_config.use_torch_compile=False
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4
    actor_rollout_ref.rollout.n=4
    actor_rollout_ref.rollout.dtype=float32
    actor_rollout_ref.rollout.agent.num_workers=1
    reward.num_workers=1
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    algorithm.use_kl_in_reward=False
    trainer.logger=[console,file]
    trainer.val_before_train=False
    trainer.test_freq=-1
    trainer.save_freq=-1
    trainer.total_training_steps=2
    trainer.n_gpus_per_node=1
    trainer.nnodes=1
    trainer.device=cpu
    ray_kwargs.ray_init.num_cpus=16
    +ray_kwargs.ray_init.num_gpus=1
    +actor_rollout_ref.model.override_config.attn_implementation=sdpa
    +actor_rollout_ref.actor.fsdp_config.mixed_precision={fp32}
    +actor_rollout_ref.ref.fsdp_config.mixed_precision={fp32}
"""


def code_blocks(path: Path) -> list[str]:
    """The shell blocks of a document, with what continues a line joined."""
    parts = path.read_text(encoding="utf-8").split("```bash\n")[1:]
    return [part.split("```")[0].replace("\\\n", " ") for part in parts]


def lines_of_the_method(path: Path) -> list[str]:
    """The overrides of the block that sets the trainer mode, as a shell reads them."""
    (block,) = (block for block in code_blocks(path) if "trainer_mode=recast" in block)
    return shlex.split(block)


def without_half_its_items(tokenizer_folder: Path, out: Path) -> Path:
    """A copy whose catalogue parquet lost every other row, while its trie still allows them."""
    shutil.copytree(tokenizer_folder, out)
    path = out / "semantic_ids.parquet"
    pl.read_parquet(path).gather_every(2).write_parquet(path)
    reseal(out)
    return out


def test_readme_and_guide_give_the_same_lines() -> None:
    found = lines_of_the_method(README)
    assert found == lines_of_the_method(GUIDE)
    assert {"algorithm.adv_estimator=recast", "trainer.v1.trainer_mode=recast"} < set(found)


@pytest.mark.verl
@pytest.mark.xdist_group("jobs")
def test_readmes_lines_turn_a_stock_grpo_command_into_recast(tokenizer_folder: Path, tmp_path: Path) -> None:
    """With verl's own agent loop: one request a rollout, and the reward from decoded text. The catalogue
    lacks half its items, so that invalid answers must be counted, and targets that nobody may be taught."""
    tokenizer_folder = without_half_its_items(tokenizer_folder, tmp_path / "tokenizer")
    ours = [
        *lines_of_the_method(README),
        "actor_rollout_ref.rollout.name=recast_sid",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        f"+actor_rollout_ref.rollout.custom={{tokenizer: '{tokenizer_folder}'}}",
    ]
    named = {line.split("=")[0] for line in ours}
    fp32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    text = STOCK_SCRIPT.format(tokenizer=tokenizer_folder, fp32=fp32)
    script = [line.strip() for line in text.strip().splitlines()]
    command = [line for line in script if line.split("=")[0] not in named] + ours
    steps = main_ppo(command, tmp_path)
    for found in steps:
        assert found["signal/rollouts"] == 16
        assert found["signal/invalid"] > 0
        assert found["signal/kept_samples"] == 2 * (4 - found["signal/skipped_groups"])
        assert found["signal/all_zero_after_repair"] == found["signal/unrepairable_groups"] / 4
        assert found["signal/unrepairable_groups"] <= found["signal/foreign_targets"]
    assert sum(found["signal/foreign_targets"] for found in steps) > 0


def catalogue_texts(form: str, folder: Path) -> set[str]:
    """Every semantic ID of the example's catalogue as text, read without our code."""
    if form == "minionerec":
        index = json.loads((folder / "toys.index.json").read_text(encoding="utf-8"))
        return {"".join(tokens) for tokens in index.values()}
    codes = pl.read_parquet(folder / "pid2sid.parquet")["sid"].to_list()
    return {f"<s_a_{a}><s_b_{b}><s_c_{c}>" for a, b, c in codes}


OVER_VLLM = """actor_rollout_ref.rollout.name=recast_vllm
    actor_rollout_ref.rollout.logprobs_mode=raw_logprobs actor_rollout_ref.rollout.enforce_eager=True
    actor_rollout_ref.rollout.free_cache_engine=False"""
WITH_VLLM = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.verl
@pytest.mark.xdist_group("jobs")
@pytest.mark.parametrize(
    ("form", "prompt_ends", "targets", "options"),
    [
        ("openonerec", "<|im_start|>assistant\n<think>\n\n</think>\n\n<|sid_begin|>", 2, ""),
        ("minionerec", "\n\n### Response:\n", 1, ""),
        pytest.param("minionerec", "\n\n### Response:\n", 1, OVER_VLLM, marks=WITH_VLLM, id="vllm"),
    ],
)
def test_guides_example_runs_as_it_is_written(
    tmp_path: Path,
    form: str,
    prompt_ends: str,
    targets: int,
    options: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data and model as another project leaves them: every answer is an item of its catalogue."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    (variables,) = (block for block in code_blocks(GUIDE) if "export VERL_PLATFORM=cpu" in block)
    (commands,) = (block for block in code_blocks(GUIDE) if f"make_data.py {form} " in block)
    data, dump = tmp_path / form, tmp_path / "dump"
    commands = commands.replace(f"/tmp/{form}", str(data)).rstrip() + f" trainer.rollout_data_dir={dump}"
    commands += " " + " ".join(options.split())
    steps = run_script(variables + commands, tmp_path)
    items = catalogue_texts(form, data)
    assert len(items) < 60, "some items share a semantic ID"
    assert [found["signal/rollouts"] for found in steps] == [32, 32]  # 8 prompts of 4
    for step, found in enumerate(steps, start=1):
        assert found["signal/invalid"] == 0 and found["signal/all_zero_after_repair"] == 0
        assert found["signal/kept_samples"] == 2 * (8 - found["signal/skipped_groups"])
        rows = [json.loads(line) for line in (dump / f"{step}.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) == found["signal/kept_samples"]
        for row in rows:
            assert row["input"].endswith(prompt_ends) and row["output"] in items
            assert row["gts"].count("<a_" if form == "minionerec" else "<s_a_") == targets
            assert row["score"] == (row["output"] in row["gts"])
        assert {row["score"] for row in rows} == {0, 1}


def test_guides_example_knows_verl_and_the_plugin_only() -> None:
    for path in EXAMPLE.glob("*.*"):
        assert "recast_cli" not in path.read_text(encoding="utf-8"), path


def run_script(script: str, out: Path) -> list[dict[str, Any]]:
    """Run a shell script from the top of the repository; the metrics of its verl job's steps."""
    metrics = out / "metrics.jsonl"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line)["data"] for line in metrics.read_text(encoding="utf-8").splitlines()]
