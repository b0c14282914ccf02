"""The README's lines for an existing verl setup, in somebody else's launch script: real verl jobs."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import polars as pl
import pytest
from jobs import main_ppo
from sealing import reseal

pytestmark = [pytest.mark.verl, pytest.mark.xdist_group("jobs")]

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


def readme_lines(tokenizer_folder: Path) -> list[str]:
    """The overrides of both code blocks in the README's section on existing setups, as a shell reads them."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = text.split("## In an existing verl setup")[1].split("\n## ")[0]
    blocks = [part.split("```")[0] for part in section.split("```bash\n")[1:]]
    blocks = [block for block in blocks if not block.startswith("pip install")]
    lines = [line for block in blocks for line in shlex.split(block.replace("\\\n", " "))]
    return [line.replace("$PWD/data/mine-tokenizer", str(tokenizer_folder)) for line in lines]


def without_half_its_items(tokenizer_folder: Path, out: Path) -> Path:
    """A copy whose catalogue parquet lost every other row, while its trie still allows them."""
    shutil.copytree(tokenizer_folder, out)
    path = out / "semantic_ids.parquet"
    pl.read_parquet(path).gather_every(2).write_parquet(path)
    reseal(out)
    return out


@pytest.mark.parametrize("agent_loop", ["ours", "verl's"])
def test_readmes_lines_turn_a_stock_grpo_command_into_recast(
    tokenizer_folder: Path, tmp_path: Path, agent_loop: str
) -> None:
    """With verl's own loop the catalogue lacks half its items, so that invalid answers must be counted."""
    if agent_loop == "verl's":
        tokenizer_folder = without_half_its_items(tokenizer_folder, tmp_path / "tokenizer")
    ours = readme_lines(tokenizer_folder)
    if agent_loop == "verl's":  # one request a rollout, and the reward from decoded text
        ours = [line for line in ours if "agent_loop_manager_class" not in line]
    assert {"algorithm.adv_estimator=recast", "trainer.v1.trainer_mode=recast"} < set(ours)
    named = {line.split("=")[0] for line in ours}
    fp32 = "{param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    text = STOCK_SCRIPT.format(tokenizer=tokenizer_folder, fp32=fp32)
    script = [line.strip() for line in text.strip().splitlines()]
    command = [line for line in script if line.split("=")[0] not in named] + ours
    for found in main_ppo(command, tmp_path):
        assert found["signal/rollouts"] == 16
        assert found["signal/invalid"] == 0 if agent_loop == "ours" else found["signal/invalid"] > 0
        assert found["signal/kept_samples"] == 2 * (4 - found["signal/skipped_groups"])
        assert found["signal/all_zero_after_repair"] == 0
