"""Command lines for verl: parsed by Hydra's own parser and composed into verl's own configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import verl
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from recast_cli.errors import RecipeError
from recast_cli.recipe import Recipe, load_recipe
from recast_cli.training import run, verl_args
from recast_cli.training.hydra_overrides import CONFIGS, require_config
from recast_cli.training.inputs import Inputs

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted(path for path in ROOT.glob("recipes/**/*.yaml") if path.stem != "base")
AWKWARD = (
    "plain",
    "with blank",
    "comma,comma",
    "a=b",
    "it's",
    'say "no"',
    "back\\slash",
    "end\\",
    "{brace}",
    "[list]",
    "colon: x",
    "hash #1",
    "$(HOME) ${x}",
    "100%",
    "Übergröße",
    "null",
    "~tilde",
    "a'\\'b",
)


def parse(arguments: list[str]) -> dict[str, Any]:
    """key -> value, as Hydra reads a command line."""
    return {
        override.key_or_group: override.value()
        for override in OverridesParser.create().parse_overrides(arguments)
    }


def composed(module: str, arguments: list[str]) -> DictConfig:
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose(CONFIGS[module], overrides=arguments)


def rl(recipe: Recipe, **paths: Path) -> list[str]:
    given = {name: Path("/x") / name for name in ("model", "train_file", "val_file", "out", "rollout_log")}
    return verl_args.rl_arguments(recipe, **{**given, **paths}, prompt_length=21, num_levels=3)


# -- quoting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AWKWARD)
def test_paths_survive_hydras_parser(make_recipe, name: str) -> None:
    path = Path("/data") / name
    recipe = make_recipe(tokenizer=str(path))
    found = parse(rl(recipe, model=path, train_file=path, val_file=path, out=path))
    for key in (
        "actor_rollout_ref.model.path",
        "data.train_files",
        "data.val_files",
        "trainer.default_local_dir",
    ):
        assert found[key] == str(path), key
    assert found["actor_rollout_ref.rollout.custom"] == {"tokenizer": str(path), "log": "/x/rollout_log"}
    arguments = verl_args.sft_arguments(
        recipe, model=path, train_file=path, out=path, epochs=1, batch_size=2, learning_rate=0.1, max_length=9
    )
    found = parse(arguments)
    assert {found[key] for key in ("model.path", "data.train_files", "trainer.default_local_dir")} == {
        str(path)
    }


@pytest.mark.parametrize("name", ["with blank", "comma,comma", "a=b", "it's", "back\\slash"])
def test_paths_survive_the_composed_config(make_recipe, name: str) -> None:
    path = Path("/data") / name
    config = composed("verl.trainer.main_ppo", rl(make_recipe(tokenizer=str(path)), model=path))
    assert config.actor_rollout_ref.model.path == str(path)
    assert config.actor_rollout_ref.rollout.custom.tokenizer == str(path)


def test_how_groups_are_drawn_reaches_the_engine(make_recipe) -> None:
    plain = parse(rl(make_recipe()))
    assert set(plain["actor_rollout_ref.rollout.custom"]) == {"tokenizer", "log"}
    assert plain["actor_rollout_ref.rollout.top_p"] == 1.0
    options = {"sampling": "without-replacement", "exclude_history": True, "masked_actor": True}
    options["share_prompt"] = True
    found = parse(rl(make_recipe(rl=options)))["actor_rollout_ref.rollout.custom"]
    assert {name: found[name] for name in options} == options
    assert parse(rl(make_recipe(rl={"top_p": 0.9})))["actor_rollout_ref.rollout.top_p"] == 0.9


def test_a_recipes_own_verl_keys_come_last(make_recipe) -> None:
    recipe = make_recipe(
        verl={"trainer.nnodes": 2, "+trainer.note": None, "data.shuffle": True, "+trainer.l": [1, "x"]}
    )
    found = parse(rl(recipe))
    assert found["trainer.nnodes"] == 2 and found["data.shuffle"] is True
    assert found["trainer.note"] is None and found["trainer.l"] == [1, "x"]
    assert len(rl(recipe)) == len(rl(make_recipe())) + 2  # two are new, two replace ours


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.no_such", 1, r"Could not override 'trainer\.no_such'"),
        ("data.a b", 1, r"data\.a b=1"),
        ("+trainer.total_epochs", 1, r"already at 'trainer\.total_epochs'"),
    ],
)
def test_an_override_that_verl_does_not_know_is_refused(make_recipe, key: str, value, message: str) -> None:
    require_config(verl_args.RL_MODULE, rl(make_recipe()))
    with pytest.raises(RecipeError, match=message) as caught:
        require_config(verl_args.RL_MODULE, rl(make_recipe(verl={key: value})))
    assert caught.value.message.startswith("verl.trainer.main_ppo refuses an override of the recipe: ")
    assert "\n" not in caught.value.message


# -- every recipe, on verl's own configs -----------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_verl_accepts_every_recipe(path: Path, device: str, folders, tmp_path: Path) -> None:
    data, tokenizer = folders
    recipe = load_recipe(path, [f"data={data}", f"tokenizer={tokenizer}", f"device={device}"])
    module, arguments = run.job(recipe, Inputs.load(recipe), tmp_path / "model", tmp_path / "out")
    assert len({argument.partition("=")[0] for argument in arguments}) == len(arguments)
    config = composed(module[-1], arguments)
    assert OmegaConf.to_container(config, resolve=True)
    if module[-1].endswith("main_ppo"):
        from verl.trainer.ppo.utils import need_critic, need_reference_policy
        from verl.utils.config import validate_config

        validate_config(
            config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
        )
        assert not need_critic(config)


def test_recast_recipe_is_accepted_by_its_trainer(make_recipe) -> None:
    from verl_recast.check_config import check_config
    from verl_recast.settings import RecastSettings

    chosen = {"w_negative": 0.25, "tie_rule": "most-probable", "loss_scale": "full-batch"}
    recipe = make_recipe(method={"name": "recast", "anchor_rule": "first", **chosen}, seed=7)
    config = composed("verl.trainer.main_ppo", rl(recipe))
    check_config(config)
    expected = RecastSettings("recast", 1.0, 0.25, "most-probable", "first", "full-batch", 7)
    assert RecastSettings.from_algorithm(config.algorithm) == expected


@pytest.mark.parametrize(("name", "estimator"), [("repair-only", "grpo"), ("contrast-only", "recast")])
def test_the_arms_of_the_ablation_are_accepted_too(make_recipe, name: str, estimator: str) -> None:
    from verl_recast.check_config import check_config
    from verl_recast.settings import RecastSettings

    config = composed("verl.trainer.main_ppo", rl(make_recipe(method={"name": name}, seed=7)))
    check_config(config)
    assert (config.algorithm.adv_estimator, config.trainer.v1.trainer_mode) == (estimator, "recast")
    assert RecastSettings.from_algorithm(config.algorithm) == RecastSettings(arm=name, seed=7)


def test_methods_differ_in_trainer_and_estimator_alone(make_recipe) -> None:
    recast, grpo = (parse(rl(make_recipe(method={"name": name}))) for name in ("recast", "grpo"))
    differing = {key for key in recast.keys() | grpo.keys() if recast.get(key) != grpo.get(key)}
    assert differing == {
        "trainer.v1.trainer_mode",
        "algorithm.adv_estimator",
        *(
            f"algorithm.recast.{name}"
            for name in ("arm", "w_positive", "w_negative", "tie_rule", "anchor_rule", "loss_scale")
        ),
        "trainer.experiment_name",
    }
    assert recast["algorithm.recast.seed"] == grpo["algorithm.recast.seed"]  # the rollouts' seed


def test_numbers_of_the_recipe_reach_verl(make_recipe) -> None:
    recipe = make_recipe(
        seed=5,
        threads=3,
        rl={
            "steps": 7,
            "prompts_per_step": 12,
            "mini_batch_prompts": 6,
            "group_size": 9,
            "temperature": 0.8,
            "learning_rate": 3e-5,
            "kl_coef": 0.0,
            "clip_low": 0.1,
            "clip_high": 0.3,
        },
    )
    config = composed("verl.trainer.main_ppo", rl(recipe))
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (config.data.train_batch_size, actor.ppo_mini_batch_size, rollout.n) == (12, 6, 9)
    assert (rollout.temperature, actor.optim.lr, actor.optim.lr_warmup_steps) == (0.8, 3e-5, 10)
    assert (actor.use_kl_loss, actor.kl_loss_coef) == (False, 0.0)
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.1, 0.3)
    assert (rollout.prompt_length, rollout.response_length, rollout.name) == (21, 3, "recast_sid")
    assert (config.trainer.total_training_steps, config.trainer.save_freq) == (7, 7)
    assert (rollout.seed, actor.data_loader_seed, config.algorithm.recast.seed) == (5, 5, 5)
    assert not config.data.shuffle and not actor.shuffle
    tokens = [OmegaConf.select(config, key) for key in verl_args.MICRO_BATCH_TOKENS]
    assert tokens == [8192] * 3
    # the longest row must fit, and so must verl's padding row of 128 tokens
    small = composed("verl.trainer.main_ppo", rl(make_recipe(rl={"max_tokens_per_micro_batch": 7})))
    assert [OmegaConf.select(small, key) for key in verl_args.MICRO_BATCH_TOKENS] == [128] * 3
    assert (config.trainer.test_freq, config.trainer.val_before_train) == (-1, False)
    assert (actor.entropy_coeff, actor.loss_scale_factor) == (0, None)
    chosen = {"validate_every": 3, "validate_beams": 20, "entropy_coef": 0.01}
    numbers = {"save_every": 2, "loss_agg_mode": "seq-mean-token-sum-norm", **chosen}
    every = composed("verl.trainer.main_ppo", rl(make_recipe(rl=numbers)))
    assert (every.trainer.save_freq, every.trainer.test_freq, every.trainer.val_before_train) == (2, 3, True)
    values = every.actor_rollout_ref.rollout.val_kwargs
    assert (values.n, values.temperature, values.do_sample) == (20, 0, False)  # beams
    actor = every.actor_rollout_ref.actor
    assert (actor.entropy_coeff, actor.loss_scale_factor) == (0.01, 3)  # every answer has three codes


def test_warm_start_saves_every_epoch_and_control_has_the_schedule_of_rl(make_recipe) -> None:
    common = {"model": Path("m"), "train_file": Path("t"), "out": Path("o"), "max_length": 25}
    warm = composed(
        "verl.trainer.sft_trainer",
        verl_args.sft_arguments(make_recipe(), **common, epochs=3, batch_size=8, learning_rate=1e-3),
    )
    assert (warm.trainer.total_epochs, warm.trainer.save_freq) == (3, "after_each_epoch")
    assert warm.trainer.total_training_steps is None
    assert (warm.optim.lr_scheduler_type, warm.optim.lr_warmup_steps_ratio) == ("cosine", 0.05)
    control = composed(
        "verl.trainer.sft_trainer",
        verl_args.sft_arguments(
            make_recipe(rl={"warmup_steps": 4, "weight_decay": 0.03}, verl_sft={"optim.clip_grad": 9}),
            **common,
            epochs=1,
            batch_size=8,
            learning_rate=1e-5,
            steps=9,
        ),
    )
    assert (control.trainer.total_training_steps, control.trainer.save_freq) == (9, -1)
    assert (control.optim.lr_scheduler_type, control.optim.lr_warmup_steps) == ("constant", 4)
    assert (control.optim.weight_decay, control.optim.clip_grad) == (0.03, 9)
    assert control.data.max_length == 25 and control.data.truncation == "error"


def test_the_control_makes_as_many_updates_as_rl_at_the_same_rates(make_recipe, inputs: Inputs) -> None:
    rl = {"steps": 5, "prompts_per_step": 12, "mini_batch_prompts": 4, "warmup_steps": 2}
    recipe = make_recipe(rl=rl, method={"name": "sft-continued"})
    module, arguments = run.job(recipe, inputs, Path("model"), Path("out"))
    config = composed(module[-1], arguments)
    # three mini-batches of four prompts in each of five steps; RL's rate moves once a step
    assert config.data.train_batch_size == 4
    assert config.trainer.total_training_steps == run.num_records(recipe) == 15
    assert config.optim.lr_warmup_steps == 2 * 3
    assert run.num_records(make_recipe(rl=rl)) == 5
    assert run.num_records(make_recipe(rl={**rl, "validate_every": 2})) == 6  # and the start


@pytest.mark.parametrize("name", ["grpo", "recast", "repair-only"])
def test_on_policy_is_our_trainers_business_under_any_method(make_recipe, name: str) -> None:
    from verl_recast.check_config import check_config

    section = {"on_policy": True, "sampled_log_probs": False}
    config = composed("verl.trainer.main_ppo", rl(make_recipe(method={"name": name}, rl=section)))
    check_config(config)
    assert config.trainer.v1.trainer_mode == "recast"
    assert config.actor_rollout_ref.rollout.custom.on_policy is True
    assert config.algorithm.recast.arm == {"grpo": "stock"}.get(name, name)
    assert config.algorithm.adv_estimator == ("recast" if name == "recast" else "grpo")


# -- the rollout engine ----------------------------------------------------------------------------------


def test_vllm_gets_the_question_of_the_sid_engine(make_recipe) -> None:
    """The trie, and what the CPU build cannot do, are the server's business."""
    sid, vllm = (parse(rl(make_recipe(rollout=name))) for name in ("sid", "vllm"))
    prefix = "actor_rollout_ref.rollout"
    differing = {key: (sid.get(key), vllm.get(key)) for key in sid | vllm if sid.get(key) != vllm.get(key)}
    assert differing == {
        f"{prefix}.name": ("recast_sid", "recast_vllm"),
        f"{prefix}.logprobs_mode": (None, "raw_logprobs"),
        f"{prefix}.calculate_log_probs": (None, True),
        f"{prefix}.enforce_eager": (None, True),
    }
    silent = [
        parse(rl(make_recipe(rollout=name, rl={"sampled_log_probs": False}))) for name in ("sid", "vllm")
    ]
    assert [args[f"{prefix}.calculate_log_probs"] for args in silent] == [False, False]
    cool = parse(rl(make_recipe(rollout="vllm", rl={"temperature": 0.7})))
    assert cool[f"{prefix}.calculate_log_probs"] is False
    # what vLLM says of its samples is over the full vocabulary: not to be compared with a masked actor
    masked = parse(rl(make_recipe(rollout="vllm", rl={"masked_actor": True})))
    assert masked[f"{prefix}.calculate_log_probs"] is False


def test_vllm_on_a_gpu_frees_its_cache_and_keeps_its_graphs(make_recipe) -> None:
    found = parse(rl(make_recipe(rollout="vllm", device="cuda")))
    assert not {"enforce_eager", "free_cache_engine"} & {key.rsplit(".", 1)[-1] for key in found}


def test_recast_over_vllm_is_accepted_by_its_trainer(make_recipe) -> None:
    from verl_recast.check_config import check_config

    rl_section = {"loss_agg_mode": "seq-mean-token-sum-norm"}
    check_config(composed("verl.trainer.main_ppo", rl(make_recipe(rollout="vllm", rl=rl_section))))
