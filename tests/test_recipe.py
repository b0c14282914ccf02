"""Recipes: reading, merging, overriding, and every violation at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recast_cli.errors import RecipeError
from recast_cli.recipe import Recipe, dump_recipe, load_recipe

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(ROOT.glob("recipes/**/*.yaml"))
MINIMAL = "data: d\ntokenizer: t\nout: o\n"


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return make


def test_smallest_recipe_has_the_papers_defaults(write) -> None:
    recipe = load_recipe(write(MINIMAL))
    assert (recipe.data, recipe.tokenizer, recipe.out) == ("d", "t", "o")
    assert (recipe.method.name, recipe.method.w_positive, recipe.method.w_negative) == ("recast", 1, 1)
    rl = recipe.rl
    assert (rl.group_size, rl.learning_rate, rl.warmup_steps, rl.weight_decay) == (32, 2e-6, 10, 0.1)
    assert (rl.kl_coef, rl.clip_low, rl.clip_high, rl.temperature) == (0.001, 0.2, 0.28, 1)


# -- extends ---------------------------------------------------------------------------------------------


def test_extends_merges_sections_key_by_key_through_several_files(write) -> None:
    write(MINIMAL + "seed: 1\nrl: {steps: 5, group_size: 8}\nverl: {a.b: 1}\n", "base/root.yaml")
    write("extends: root.yaml\nrl: {steps: 6}\nverl: {a.c: 2}\n", "base/middle.yaml")
    top = write("extends: base/middle.yaml\nout: other\nrl: {kl_coef: 0}\n", "top.yaml")
    recipe = load_recipe(top)
    assert (recipe.out, recipe.seed) == ("other", 1)
    assert (recipe.rl.steps, recipe.rl.group_size, recipe.rl.kl_coef) == (6, 8, 0)
    assert recipe.verl == {"a.b": 1, "a.c": 2}


def test_circular_extends_is_an_error(write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(write("extends: a.yaml\n", "b.yaml"))
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(write("extends: ../self/c.yaml\n", "self/c.yaml"))


def test_one_base_may_be_extended_twice_in_a_row(write) -> None:
    write(MINIMAL, "base.yaml")
    assert load_recipe(write("extends: base.yaml\nseed: 1\n", "one.yaml")).seed == 1
    assert load_recipe(write("extends: base.yaml\nseed: 2\n", "two.yaml")).seed == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere.yaml\n", r"nowhere\.yaml does not exist"),
        ("- a\n- b\n", "holds a list, needed a mapping"),
        ("", "holds a NoneType, needed a mapping"),
        ("just words\n", "holds a str, needed a mapping"),
        ("a: [1\nb: 2\n", "cannot be read"),
    ],
)
def test_file_that_is_no_recipe(write, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(text))
    assert caught.value.hint and "\n" not in caught.value.message


def test_missing_binary_or_unreadable_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a: 1")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


# -- overrides -------------------------------------------------------------------------------------------


def test_overrides_come_last_and_reach_nested_keys(write) -> None:
    path = write(MINIMAL + "rl: {steps: 5}\n")
    found = load_recipe(path, ["rl.steps=7", "rl.steps=9", "out=runs/a=b c", "method.w_negative=0"])
    assert found.rl.steps == 9
    assert found.out == "runs/a=b c"  # only the first = parts key from value
    assert found.method.w_negative == 0


def test_values_are_read_as_yaml(write) -> None:
    path = write(MINIMAL)
    found = load_recipe(path, ["rl.learning_rate=1e-3", "model=null", "warm_start={epochs: 2}", "seed= 4 "])
    assert found.rl.learning_rate == 0.001
    assert found.model is None and found.warm_start.epochs == 2 and found.seed == 4
    assert load_recipe(path, ["model="]).model is None
    assert load_recipe(path, ["rl.save_every=5"]).rl.save_every == 5
    # a command line has no comments: cut at the #, --overwrite would remove another run
    for text in ("out=runs/a #1", "out='runs/a #1'", "out= runs/a #1 "):
        assert load_recipe(path, [text]).out == "runs/a #1"
    with pytest.raises(RecipeError, match=r"rl\.steps: found '20 # many'"):
        load_recipe(path, ["rl.steps=20 # many"])


def test_text_that_could_be_a_number_stays_text(write) -> None:
    path = write(MINIMAL)
    for name in ("nan", "infinity", "1_000e", "'1e5'", '"2024"'):
        assert load_recipe(path, [f"out={name}"]).out == name.strip("'\"")
    with pytest.raises(RecipeError, match=r"out: found 2024, input should be a valid string"):
        load_recipe(path, ["out=2024"])


def test_verls_own_keys_keep_their_dots(write) -> None:
    path = write(MINIMAL + "verl: {trainer.nnodes: 1}\n")
    found = load_recipe(path, ["verl.+trainer.foo.bar=1e-3", "verl.trainer.nnodes=2", "verl.a.b=[1, 2]"])
    assert found.verl == {"trainer.nnodes": 2, "+trainer.foo.bar": 0.001, "a.b": [1, 2]}


@pytest.mark.parametrize("text", ["rl.steps", "=3", " =3", "rl.steps 3", "rl.steps=[1"])
def test_override_that_is_none(write, text: str) -> None:
    with pytest.raises(RecipeError, match="override") as caught:
        load_recipe(write(MINIMAL), [text])
    assert caught.value.hint


def test_override_below_a_value_that_is_no_section(write) -> None:
    with pytest.raises(RecipeError, match="seed: found"):
        load_recipe(write(MINIMAL + "seed: 3\n"), ["seed.value=4"])


# -- validation ------------------------------------------------------------------------------------------


def test_every_violation_is_reported_at_once(write) -> None:
    text = "data: d\nrl: {steps: 0, stepps: 3}\nseeed: 1\nmethod: {name: ppo}\nwarm_start: {epochs: many}\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), ["ray_cpus=2", "rl.learning_rate=0"])
    message = caught.value.message
    for problem in (
        "tokenizer: missing",
        "out: missing",
        "rl.stepps: unknown key",
        "seeed: unknown key",
        "rl.steps: found 0",
        "method.name: found 'ppo'",
        "warm_start.epochs: found 'many'",
        "ray_cpus: found 2",
        "rl.learning_rate: found 0",
    ):
        assert problem in message
    assert "\n" not in message
    assert caught.value.hint.startswith("known keys of rl: steps, prompts_per_step,")


def test_sections_of_verl_may_be_nested(write) -> None:
    """As people write them; `recast verl-args` picks by the dotted key."""
    text = MINIMAL + "verl: {data: {max_prompt_length: 77, a: {b: 1}}, +trainer.c: {d: 2}, trainer.e: 3}\n"
    loaded = load_recipe(write(text), ["verl.data.seed=4"])
    dotted = {"data.max_prompt_length": 77, "data.a.b": 1, "data.seed": 4}
    assert loaded.verl == {**dotted, "+trainer.c": {"d": 2}, "trainer.e": 3}
    # an empty mapping is a value, and what a section adds is an addition
    text = MINIMAL + "verl: {trainer: {kwargs: {}, +x: {y: 1}}}\n"
    assert load_recipe(write(text)).verl == {"trainer.kwargs": {}, "+trainer.x.y": 1}


def test_the_last_layer_counts_however_it_is_written(write, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MINIMAL + "verl: {trainer.project_name: a, data.seed: 1}\n")
    child = write("extends: base.yaml\nverl: {trainer: {project_name: b}}\n")
    assert load_recipe(child).verl == {"trainer.project_name": "b", "data.seed": 1}
    for override in (
        "verl.trainer.project_name=c",
        "verl.trainer={project_name: c}",
        "verl={trainer: {project_name: c}}",
    ):
        assert load_recipe(child, [override]).verl == {"trainer.project_name": "c", "data.seed": 1}


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (
            ["rl.prompts_per_step=1000000"],
            "rl.prompts_per_step times rl.group_size is 32000000, needed at most",
        ),
        (["rl.group_size=9999999999999"], "needed at most 10000000"),
        (["rl.steps=1000000", "rl.prompts_per_step=101"], "is 101000000, needed at most 100000000"),
    ],
)
def test_sizes_that_no_machine_holds_are_refused(write, overrides: list[str], found: str) -> None:
    with pytest.raises(RecipeError, match=found):
        load_recipe(write(MINIMAL), overrides)


def test_a_mapping_that_holds_itself_is_refused(write) -> None:
    with pytest.raises(RecipeError, match="holds a mapping that holds itself"):
        load_recipe(write(MINIMAL + "verl: &v {a: *v}\n"))


@pytest.mark.parametrize(
    "override",
    [
        "rl.group_size=1",
        "rl.temperature=0",
        "rl.temperature=1e-300",
        "rl.temperature=1000",
        "out=''",
        "warm_start.out=''",
        "rl.learning_rate=1.5",
        "rl.learning_rate=nan",
        "rl.kl_coef=-1",
        "rl.kl_coef=inf",
        "rl.clip_low=0",
        "method.w_negative=-0.1",
        "method.w_positive=nan",
        "warm_start.warmup_ratio=1",
        "device=tpu",
        "threads=-1",
        "num_gpus=0",
        "rl.steps=1.5",
        "rl.save_every=-2",
        "rl.temperature=inf",
        "seed=-1",
        "seed=4294967296",
    ],
)
def test_bounds(write, override: str) -> None:
    with pytest.raises(RecipeError, match=override.partition("=")[0]):
        load_recipe(write(MINIMAL), [override])


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("verl.trainer.total_training_steps=9", "rl.steps"),
        ("verl.trainer.save_freq=-1", "rl.save_every"),
        ("verl.actor_rollout_ref.rollout.n=1", "rl.group_size"),
        ("verl.actor_rollout_ref.model.path=/nowhere", "model"),
        ("verl.algorithm.adv_estimator=gae", "method.name"),
    ],
)
def test_an_option_of_verl_that_has_a_field_is_set_there(write, override: str, field: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(RecipeError, match=f"{key} is {value}: set {field} instead, which is checked"):
        load_recipe(write(MINIMAL), [override])


def test_a_tilde_is_the_home_folder(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe(write(MINIMAL), ["out=~/a", "warm_start.out=~/b", "data=c~"])
    assert (recipe.out, recipe.warm_start.out, recipe.data) == ("/home/me/a", "/home/me/b", "c~")


def test_minibatches_must_divide_the_prompts_of_a_step(write) -> None:
    path = write(MINIMAL)
    recipe = load_recipe(path, ["rl.prompts_per_step=12", "rl.mini_batch_prompts=4"])
    assert recipe.rl.mini_batch_prompts == 4
    with pytest.raises(RecipeError, match="prompts_per_step 12 is no multiple of mini_batch_prompts 5"):
        load_recipe(path, ["rl.prompts_per_step=12", "rl.mini_batch_prompts=5"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.sampling=gumbel"], "rl.sampling: found 'gumbel'"),
        (["rl.top_p=0"], "rl.top_p: found 0"),
        (["rl.sampling=beam", "rl.top_p=0.9"], "top_p 0.9 is an option of sampling iid, not of beam"),
        (["rl.sampling=beam", "rl.temperature=0.5"], "temperature 0.5 needs to be 1 with sampling beam"),
        (["verl.actor_rollout_ref.rollout.top_p=0.9"], "set rl.top_p instead"),
    ],
)
def test_how_a_group_is_drawn(write, overrides: list[str], message: str) -> None:
    path = write(MINIMAL)
    assert load_recipe(
        path, ["rl.sampling=without-replacement", "rl.exclude_history=true"]
    ).rl.exclude_history
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("option", "name", "owners"),
    [
        ("w_negative=0.25", "grpo", "recast and contrast-only"),
        ("w_positive=2", "repair-only", "recast and contrast-only"),
        ("tie_rule=most-probable", "repair-only", "recast and contrast-only"),
        ("loss_scale=full-batch", "sft-continued", "recast and contrast-only"),
        ("anchor_rule=first", "contrast-only", "recast and repair-only"),
    ],
)
def test_an_option_of_one_method_is_none_of_another(write, option: str, name: str, owners: str) -> None:
    path, (key, value) = write(MINIMAL), option.split("=")
    for owner in owners.split(" and "):
        method = load_recipe(path, [f"method.{option}", f"method.name={owner}"]).method
        assert str(getattr(method, key)).startswith(value)
    with pytest.raises(RecipeError, match=f"{key} {value} is an option of {owners}, not of {name}"):
        load_recipe(path, [f"method.{option}", f"method.name={name}"])


def test_resolved_recipe_reads_back_as_itself(write, tmp_path: Path) -> None:
    recipe = load_recipe(write(MINIMAL), ["rl.learning_rate=1e-7", "verl.a.b=x", "out=Übung"])
    again = load_recipe(write(dump_recipe(recipe), "again.yaml"))
    assert again == recipe
    assert yaml.safe_load(dump_recipe(recipe)) == recipe.model_dump()


# -- what we ship ----------------------------------------------------------------------------------------


def test_recipes_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"base", "recast", "grpo", "sft-continued"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_recipe_loads(path: Path) -> None:
    overrides = ["out=runs/x"] if path.stem == "base" else []
    recipe = load_recipe(path, overrides)
    assert isinstance(recipe, Recipe)
    head = path.read_text(encoding="utf-8").splitlines()[0]
    assert head.startswith("# ") and len(head) > 20  # says what it is for


def test_shipped_methods_differ_in_method_folder_and_tuned_rate_alone() -> None:
    folder = ROOT / "recipes" / "ml-100k"
    names = ("recast", "grpo", "sft-continued", "repair-only", "contrast-only")
    found = {name: load_recipe(folder / f"{name}.yaml") for name in names}
    for name, recipe in found.items():
        assert recipe.method.name == name
        own = {"method": True, "out": True, "rl": {"learning_rate"}}
        assert recipe.model_dump(exclude=own) == found["recast"].model_dump(exclude=own)
    assert len({recipe.out for recipe in found.values()}) == len(names)


def test_ray_needs_three_cpus_for_each_training_worker(write) -> None:
    text = "data: d\ntokenizer: t\nout: o\nnum_gpus: 4\n"
    assert load_recipe(write(text), ["ray_cpus=17"]).ray_cpus == 5 + 3 * 4
    with pytest.raises(RecipeError, match="verl needs 17"):
        load_recipe(write(text), ["ray_cpus=16"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("transfer_queue.backend.SimpleStorage.num_data_storage_units", 12),
        ("actor_rollout_ref.rollout.agent.num_workers", 12),
        ("reward.num_workers", 12),
    ],
)
def test_more_of_verls_processes_need_more_ray_cpus(write, key: str, value: int) -> None:
    enough = load_recipe(write(MINIMAL), [f"verl.{key}={value}", "ray_cpus=19"])
    assert enough.ray_cpus_needed() == 8 + 11
    assert load_recipe(write(MINIMAL), ["verl.trainer.nnodes=3"]).ray_cpus_needed() == 5 + 3 * 3
    with pytest.raises(RecipeError, match="ray_cpus 18 is too few for num_gpus 1: verl needs 19"):
        load_recipe(write(MINIMAL), [f"verl.{key}={value}", "ray_cpus=18"])


def test_options_of_verl_with_a_field_of_their_own_are_refused(write) -> None:
    for option, field in (("trainer.n_gpus_per_node=2", "num_gpus"), ("trainer.device=cuda", "device")):
        with pytest.raises(RecipeError, match=f"set {field} instead, which is checked"):
            load_recipe(write(MINIMAL), [f"verl.{option}"])


def test_what_would_be_ignored_or_hang_is_refused(write) -> None:
    with pytest.raises(RecipeError, match="set ray_cpus instead, which is checked"):
        load_recipe(write(MINIMAL), ["verl.ray_kwargs.ray_init.num_cpus=2"])
    nested = MINIMAL + "verl: {ray_kwargs: {ray_init: {num_cpus: 3}}}\n"
    with pytest.raises(RecipeError, match=r"verl\.ray_kwargs\.ray_init\.num_cpus is 3"):
        load_recipe(write(nested))
    with pytest.raises(RecipeError, match=r"model\.lora_rank is 8, needs 0: verl saves adapters as no model"):
        load_recipe(write(MINIMAL), ["verl.actor_rollout_ref.model.lora_rank=8"])
    with pytest.raises(RecipeError, match="method sft is the warm start alone, and model names a start: M"):
        load_recipe(write(MINIMAL), ["method.name=sft", "model=M"])


@pytest.mark.parametrize(
    "text",
    [
        "rl: {steps: 1}\nrl: {group_size: 2}\n",
        "seed: 2024-99-99\n",
        "seed: " + "[" * 3000,
        "seed: " + "9" * 5000,
    ],
)
def test_yaml_that_would_lose_a_section_or_break_the_reader_is_an_error(write, text: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read|seed: found"):
        load_recipe(write(MINIMAL + text))


def test_a_check_of_ours_prints_its_own_words_and_not_the_whole_recipe(write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(MINIMAL), ["verl.trainer.logger=[console]"])
    message = caught.value.message
    assert "verl.trainer.logger is ['console'], needed file in it" in message
    assert "found" not in message and len(message) < 200
    load_recipe(write(MINIMAL), ["verl.trainer.logger=[console, file, wandb]"])
    with pytest.raises(RecipeError, match=r"verl_sft\.trainer\.default_local_dir is /x: set out instead"):
        load_recipe(write(MINIMAL), ["verl_sft.trainer.default_local_dir=/x"])


def test_yaml_merge_keys_work(write) -> None:
    text = MINIMAL + "warm_start: &shared {learning_rate: 0.1}\nrl: {<<: *shared, steps: 4}\n"
    recipe = load_recipe(write(text))
    assert (recipe.rl.learning_rate, recipe.rl.steps) == (0.1, 4)


def test_the_most_probable_negative_needs_log_probs(write) -> None:
    path, options = write(MINIMAL), ["method.tie_rule=most-probable"]
    load_recipe(path, [*options, "rollout=vllm"])
    for more in ([], ["rollout=vllm"]):
        with pytest.raises(RecipeError, match=r"most-probable needs rl\.sampled_log_probs true, found false"):
            load_recipe(path, [*options, *more, "rl.sampled_log_probs=false"])


def test_one_forward_pass_needs_one_update_and_nothing_to_compare(write) -> None:
    path, options = write(MINIMAL), ["rl.on_policy=true", "rl.sampled_log_probs=false"]
    load_recipe(path, options)
    with pytest.raises(RecipeError, match=r"mini_batch_prompts 4 makes 4: the second one meets another"):
        load_recipe(path, [*options, "rl.mini_batch_prompts=4"])
    with pytest.raises(RecipeError, match=r"on_policy needs sampled_log_probs false"):
        load_recipe(path, options[:1])


def test_what_vllm_cannot_do_is_refused(write) -> None:
    path, likeliest = write(MINIMAL), ["method.tie_rule=most-probable", "rl.temperature=0.7"]
    load_recipe(path, [likeliest[0], "rollout=vllm", "rl.sampling=beam"])
    for options, found in (
        (likeliest, "most-probable needs rollout sid, .* found 0.7 and false"),
        ([likeliest[0], "rl.masked_actor=true"], "found 1 and true"),
        (["rl.sampling=without-replacement"], "rl.sampling without-replacement needs rollout sid"),
        (["rl.exclude_history=true"], "rl.exclude_history true needs rollout sid"),
    ):
        load_recipe(path, options)
        with pytest.raises(RecipeError, match=found):
            load_recipe(path, [*options, "rollout=vllm"])
