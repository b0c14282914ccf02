"""Rows, parents, command lines and estimates of a run: what is known before anything starts."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from sealing import whole
from training_artifacts import (
    MODEL_BYTES,
    NUM_RL_ROWS,
    model_of,
    sid,
    write_artifacts,
)
from typer.testing import CliRunner

from recast_cli.artifacts import write_manifest
from recast_cli.errors import ArtifactError, DataError, EnvironmentFault
from recast_cli.main import app
from recast_cli.recipe import dump_recipe
from recast_cli.training import run, warm_start
from recast_cli.training.inputs import Inputs
from recast_cli.training.process import hf_checkpoints


def indices(table) -> list[int]:
    return [info["index"] for info in table["extra_info"].to_pylist()]


# -- rows ------------------------------------------------------------------------------------------------


def test_rows_are_a_seeded_permutation(folders) -> None:
    source = folders[1] / "verl" / "rl.parquet"
    first = indices(run.draw_rows(source, NUM_RL_ROWS, seed=1))
    assert sorted(first) == list(range(NUM_RL_ROWS)) and first != sorted(first)
    assert indices(run.draw_rows(source, NUM_RL_ROWS, seed=1)) == first
    assert indices(run.draw_rows(source, NUM_RL_ROWS, seed=2)) != first
    # fewer rows are the beginning of the same order
    assert indices(run.draw_rows(source, 4, seed=1)) == first[:4]


def test_rows_repeat_only_after_all_were_seen(folders) -> None:
    found = indices(run.draw_rows(folders[1] / "verl" / "rl.parquet", 2 * NUM_RL_ROWS + 3, seed=1))
    assert len(found) == 2 * NUM_RL_ROWS + 3
    rounds = [found[:NUM_RL_ROWS], found[NUM_RL_ROWS : 2 * NUM_RL_ROWS], found[2 * NUM_RL_ROWS :]]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(NUM_RL_ROWS))
    assert len(set(rounds[2])) == 3
    assert rounds[0] != rounds[1]  # each round is shuffled anew


def test_rows_keep_their_columns(folders) -> None:
    source = folders[1] / "verl" / "rl.parquet"
    rows = run.draw_rows(source, 3, seed=0)
    assert rows.schema == pq.read_schema(source)


def test_no_rows_at_all_is_an_error(tmp_path: Path) -> None:
    _, tokenizer = write_artifacts(tmp_path / "empty", num_rl_rows=0)
    with pytest.raises(DataError, match="holds no RL rows"):
        run.draw_rows(tokenizer / "verl" / "rl.parquet", 3, seed=0)


def test_continued_sft_learns_the_target_and_nothing_else(folders) -> None:
    rows = run.draw_rows(folders[1] / "verl" / "rl.parquet", 4, seed=0)
    for index, messages in zip(
        indices(rows), run.continued_sft_rows(rows)["messages"].to_pylist(), strict=True
    ):
        assert messages == [
            {"role": "user", "content": sid(index)},
            {"role": "user", "content": sid(index + 1)},
            {"role": "assistant", "content": sid(index + 2)},
        ]


# -- parents ---------------------------------------------------------------------------------------------


def test_prompt_length_counts_a_full_history_and_the_question(inputs: Inputs) -> None:
    # 4 items of begin, 3 codes, end; then the begin that asks for the next one
    assert (inputs.num_levels, inputs.item_tokens, inputs.prompt_length) == (3, 5, 4 * 5 + 1)


def test_tokenizer_of_another_dataset_is_refused(make_recipe, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "items.parquet").write_bytes(b"13 items")
    write_manifest(other, "dataset", **whole("dataset", num_items=13, params={"history": 4}))
    with pytest.raises(ArtifactError, match=r"built for another dataset .*12 items against 13"):
        Inputs.load(make_recipe(data=str(other)))
    with pytest.raises(ArtifactError, match="holds a 'tokenizer' artifact, needed 'dataset'"):
        Inputs.load(make_recipe(data=make_recipe().tokenizer))


# -- before the start ------------------------------------------------------------------------------------


def test_a_full_disk_is_seen_before_anything_starts(
    make_recipe, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights, gradients, two moments: twice for a run (and its export), six times for 5 epochs (and theirs).
    free = 64 * 2**20 + 2 * 4 * MODEL_BYTES - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(EnvironmentFault, match="run has 64 MiB free, the checkpoints need 64 MiB"):
        run.train(make_recipe(), inputs, model_of(inputs))
    # seven steps with a checkpoint every three: after 3, 6 and 7
    free = 64 * 2**20 + 4 * 4 * MODEL_BYTES - 1
    with pytest.raises(EnvironmentFault, match="free, the checkpoints need"):
        run.train(make_recipe(rl={"steps": 7, "save_every": 3}), inputs, model_of(inputs))
    free = 64 * 2**20 + 6 * 4 * MODEL_BYTES - 1
    recipe = make_recipe(warm_start={"epochs": 5, "batch_size": 1})
    with pytest.raises(EnvironmentFault, match="free, the checkpoints need"):
        warm_start.train(recipe, inputs, score=lambda _: {})
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_commands_and_the_whole_recipe_and_starts_nothing(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe(warm_start={"epochs": 3})), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["train", str(recipe), "rl.group_size=5", "--dry-run"])
    assert done.exit_code == 0, done.output
    first, second, resolved = done.stdout.split("\n\n", 2)
    words = [shlex.split(part.replace("\\\n", " "), comments=True) for part in (first, second)]
    assert words[0][words[0].index("python") :][:3] == ["python", "-m", "torch.distributed.run"]
    rows = tmp_path.resolve() / "run" / "warm_start" / "work" / "rows.parquet"
    assert {"trainer.total_epochs=3", f"data.train_files='{rows}'"} <= set(words[0])
    assert words[1][words[1].index("python") :][:3] == ["python", "-m", "verl.trainer.main_ppo"]
    assert {"algorithm.adv_estimator=recast", "actor_rollout_ref.rollout.n=5"} <= set(words[1])
    assert "VERL_PLATFORM=cpu" in words[1][: words[1].index("python")]
    found = yaml.safe_load(resolved)
    assert (found["rl"]["group_size"], found["warm_start"]["epochs"]) == (5, 3)
    assert found["rl"]["clip_high"] == 0.28, "defaults are spelled out"
    assert sorted(tmp_path.rglob("*")) == before


# -- estimates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rollouts", "rows", "length"),
    [
        ("recast", 5 * 4 * 8, 5 * 4 * 2, 21 + 3),  # a pair of each group
        ("grpo", 5 * 4 * 8, 5 * 4 * 8, 21 + 3),
        ("sft-continued", 0, 5 * 4, 5 * 5),  # a history of 4 items and the target, 5 tokens each
        ("sft", 0, 10 * 3, 5 * 5),  # 10 windows, 3 epochs
    ],
)
def test_estimate_by_hand(
    make_recipe, inputs: Inputs, method: str, rollouts: int, rows: int, length: int
) -> None:
    rl = {"steps": 5, "prompts_per_step": 4, "group_size": 8}
    recipe = make_recipe(rl=rl, method={"name": method}, warm_start={"epochs": 3})
    assert run.estimate(recipe, inputs) == {
        "rollouts": rollouts,
        "actor_rows": rows,
        "actor_tokens_at_most": rows * length,
        "weights_and_optimizer_bytes": 4 * MODEL_BYTES,
    }


@pytest.mark.parametrize(
    ("key", "dtype", "factor"), [("dtype", "bfloat16", 8), ("torch_dtype", "float32", 4)]
)
def test_a_checkpoint_is_float32_whatever_the_model_is_stored_in(
    inputs: Inputs, tmp_path: Path, key: str, dtype: str, factor: int
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_of(inputs), model)
    (model / "config.json").write_text(json.dumps({key: dtype}), encoding="utf-8")
    assert inputs.checkpoint_bytes(str(model)) == factor * MODEL_BYTES


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"global_step_{step}" / "huggingface").mkdir(parents=True)
    (tmp_path / "global_step_11" / "actor" / "huggingface").mkdir(parents=True)
    (tmp_path / "global_step_12").mkdir()  # nothing exported
    found = [path.relative_to(tmp_path).parts[0] for path in hf_checkpoints(tmp_path)]
    assert found == [f"global_step_{step}" for step in (2, 9, 10, 11)]
