"""`recast verl-args`: what a recipe adds to somebody's launch script, as the shell and verl read it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from typer.testing import CliRunner, Result

from recast_cli.main import app
from recast_cli.recipe import dump_recipe


@pytest.fixture
def recipe_file(make_recipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(make_recipe(verl={"trainer.critic_warmup": 1})), encoding="utf-8")
    return path


def verl_args(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["verl-args", *map(str, arguments)])


def pasted(output: str) -> list[str]:
    """The words of a script that ends with what was printed."""
    script = "python -m verl.trainer.main_ppo \\\n" + output
    words = shlex.split(script.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    return words[3:]


def test_printed_lines_are_words_of_a_script_that_verl_reads(
    recipe_file: Path, folders: tuple[Path, Path]
) -> None:
    done = verl_args(recipe_file, "rl.group_size=5", "method.w_negative=0.25")
    assert done.exit_code == 0, done.output
    lines = pasted(done.stdout)
    with initialize_config_module("verl.trainer.config", version_base=None):
        stock, config = compose("ppo_trainer"), compose("ppo_trainer", overrides=lines)
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    assert (rollout.n, rollout.name, actor.clip_ratio_high) == (5, "recast_sid", 0.28)
    assert dict(rollout.custom) == {"tokenizer": str(folders[1].resolve())}
    assert config.algorithm.recast.w_negative == 0.25
    assert config.data.train_files == str(folders[1].resolve() / "verl" / "rl.parquet")
    # a run's own business is left to the script
    for section in ("ray_kwargs", "transfer_queue", "reward"):
        assert config[section] == stock[section]
    changed = {key for key in config.trainer if config.trainer[key] != stock.trainer[key]}
    assert changed == {"device", "v1"}
    assert "export VERL_PLATFORM=cpu" in done.stderr and "is not there yet: make it with" in done.stderr


def test_the_plugins_lines_alone(recipe_file: Path, folders: tuple[Path, Path]) -> None:
    done = verl_args(recipe_file, "--plugin-only")
    rollout = "actor_rollout_ref.rollout"
    method = {"w_positive": 1.0, "w_negative": 1.0, "tie_rule": "seeded", "anchor_rule": "seeded"}
    method |= {"arm": "recast", "loss_scale": "kept", "seed": 0}
    assert set(pasted(done.stdout)) == {
        "algorithm.adv_estimator=recast",
        "trainer.v1.trainer_mode=recast",
        "trainer.v1.sampler.custom_sampler.path=pkg://verl_recast.sampler",
        "trainer.v1.sampler.custom_sampler.name=QuickReplayBuffer",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        f"{rollout}.name=recast_sid",
        f"{rollout}.tensor_model_parallel_size=1",
        f"+{rollout}.custom={{tokenizer: '{folders[1].resolve()}'}}",
        f"+{rollout}.agent.agent_loop_manager_class=verl_recast.rollout.agent_loop.GroupLoopManager",
        *(f"+algorithm.recast.{name}={value}" for name, value in method.items()),
    }


def test_the_plugins_lines_for_vllm(recipe_file: Path) -> None:
    sid = set(pasted(verl_args(recipe_file, "--plugin-only").stdout))
    vllm = set(pasted(verl_args(recipe_file, "--plugin-only", "rollout=vllm").stdout))
    rollout = "actor_rollout_ref.rollout"
    assert sid - vllm == {f"{rollout}.name=recast_sid", f"{rollout}.tensor_model_parallel_size=1"}
    assert vllm - sid == {
        f"{rollout}.name=recast_vllm",
        f"{rollout}.logprobs_mode=raw_logprobs",
        f"{rollout}.calculate_log_probs=true",
    }


def test_json_holds_the_same_overrides(recipe_file: Path) -> None:
    found = json.loads(verl_args(recipe_file, "--json").stdout)
    assert found["overrides"] == pasted(verl_args(recipe_file).stdout)
    assert (found["module"], found["environment"]) == ("verl.trainer.main_ppo", {"VERL_PLATFORM": "cpu"})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.name=sft", "method.name is sft, which main_ppo does not run"),
        ("verl.actor_rollout_ref.rolout.x=1", "refuses an override of the recipe"),
        ("verl.data=3", "refuses an override of the recipe"),
        ("verl.=3", "refuses an override of the recipe"),
        ("rl.group_size=1", "rl.group_size: found"),
    ],
)
def test_a_mistake_is_an_error_of_the_recipe(recipe_file: Path, override: str, message: str) -> None:
    done = verl_args(recipe_file, override)
    assert message in str(done.exception) and done.stdout == ""


def test_histories_that_the_named_rows_do_not_have_are_refused(recipe_file: Path) -> None:
    done = verl_args(recipe_file, "rl.exclude_history=true")
    assert "rl.exclude_history is true, needed false" in str(done.exception) and done.stdout == ""
