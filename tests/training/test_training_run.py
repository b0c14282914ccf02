"""Rows, reuse and estimates of a run: everything of the stage that starts nothing."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from sealing import reseal, whole
from training_artifacts import MODEL_BYTES, NUM_RL_ROWS, sid, write_artifacts
from typer.testing import CliRunner

from recast_cli.artifacts import weights_sha256, write_manifest
from recast_cli.demo import why_stale
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


# -- reuse -----------------------------------------------------------------------------------------------


def finish_run(recipe, inputs: Inputs) -> None:
    out = Path(recipe.out)
    out.mkdir(exist_ok=True)
    (out / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (out / "command.txt").write_text("python -m something\n", encoding="utf-8")
    start = {"model": "m", "sha256": weights_sha256(model_of(inputs))}
    run.close(out, inputs, {"recipe": recipe.model_dump(), "seed": recipe.seed, "start": start})


def model_of(inputs: Inputs) -> Path:
    return inputs.tokenizer / "model"


def test_no_run_is_found_in_a_folder_that_is_empty_or_holds_the_warm_start(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    assert run.find(make_recipe(), inputs, model_of(inputs)) is None
    (tmp_path / "run" / "warm_start").mkdir(parents=True)
    (tmp_path / "run" / "warm_start.log").touch()
    assert run.find(make_recipe(), inputs, model_of(inputs)) is None


def test_folder_of_something_else_is_refused_and_left_alone(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for name in ("model", "outputs"):
        (out / name).mkdir(parents=True)
        (out / name / "mine.txt").write_text("mine")
    (out / "recipe.yaml").write_text("mine")
    with pytest.raises(ArtifactError, match="holds model and is no run directory, needed an empty or a new"):
        run.find(make_recipe(), inputs, model_of(inputs))
    with pytest.raises(ArtifactError, match="no run directory"):
        run.train(make_recipe(), inputs, model_of(inputs))
    run.remove(out)  # --overwrite
    assert sorted(path.name for path in out.rglob("*")) == [
        "mine.txt",
        "mine.txt",
        "model",
        "outputs",
        "recipe.yaml",
    ]


def test_overwrite_removes_a_run_but_not_the_warm_start_or_a_strangers_file(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    finish_run(make_recipe(), inputs)
    out = tmp_path / "run"
    (out / "warm_start").mkdir()
    (out / "notes.txt").write_text("mine")
    run.remove(out)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "warm_start"]


def test_run_that_started_from_another_model_is_refused(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    finish_run(make_recipe(), inputs)
    other = tmp_path / "other-model"
    shutil.copytree(model_of(inputs), other)
    assert run.find(make_recipe(), inputs, other) is not None  # the same weights elsewhere
    (other / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ArtifactError, match=f"started from another model than {other}"):
        run.find(make_recipe(), inputs, other)


def test_run_without_its_checkpoints_is_still_whole(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "big.pt").touch()
    (tmp_path / "run" / "command.txt").touch()
    manifest = run.close(tmp_path / "run", inputs, {})
    assert list(manifest["files"]) == ["command.txt"]


def test_same_recipe_and_parents_reuse_a_finished_run(make_recipe, inputs: Inputs) -> None:
    recipe = make_recipe(rl={"learning_rate": 1e-5}, verl={"trainer.nnodes": 1})
    finish_run(recipe, inputs)
    found = run.find(recipe, inputs, model_of(inputs))
    assert found is not None and found["kind"] == "run" and found["parents"] == inputs.parents


def test_run_of_another_recipe_or_of_other_data_is_refused(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    finish_run(make_recipe(), inputs)
    with pytest.raises(ArtifactError, match="another recipe or data") as caught:
        run.find(make_recipe(seed=1), inputs, model_of(inputs))
    assert "--overwrite" in caught.value.hint
    with pytest.raises(ArtifactError, match="another recipe or data"):
        run.find(make_recipe(method={"name": "grpo"}), inputs, model_of(inputs))
    (tmp_path / "tokenizer" / "model" / "model.safetensors").write_bytes(b"others")
    reseal(tmp_path / "tokenizer")
    with pytest.raises(ArtifactError, match="another recipe or data"):
        run.find(make_recipe(), Inputs.load(make_recipe()), model_of(inputs))


def test_unfinished_run_is_refused(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    finish_run(make_recipe(), inputs)
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="did not finish") as caught:
        run.find(make_recipe(), inputs, model_of(inputs))
    assert "--overwrite" in caught.value.hint


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


def test_a_seed_gives_the_windows_of_the_warm_start_an_order_of_its_own(inputs: Inputs) -> None:
    """verl's SFT trainer shuffles by a seed that no option reaches."""
    windows = pq.read_table(inputs.sft_rows)
    first, again, other = (warm_start.shuffled(windows, seed) for seed in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)
    for shuffled in (first, other):
        assert sorted(map(str, shuffled.to_pylist())) == sorted(map(str, windows.to_pylist()))


@pytest.mark.parametrize(("ndcg", "best"), [([0.1, 0.3, 0.2], 1), ([0.3, 0.1, 0.3], 0), ([0.1, 0.2], 1)])
def test_the_epoch_that_validates_best_is_kept(ndcg: list[float], best: int) -> None:
    epochs = [{"ndcg@10": value, "hr@10": 1 - value} for value in ndcg]
    assert warm_start.best_of(epochs) == best


@pytest.mark.parametrize(
    "change",
    [{"epochs": 2}, {"learning_rate": 0.5}, {"batch_size": 7}, {"weight_decay": 0.5}, {"warmup_ratio": 0.5}],
)
def test_a_warm_start_of_another_schedule_is_refused(make_recipe, inputs: Inputs, change: dict) -> None:
    finish_warm_start(make_recipe(), inputs)
    assert warm_start.find(make_recipe(), inputs) is not None
    for other in (
        make_recipe(warm_start=change),
        make_recipe(verl_sft={"optim.lr_scheduler_type": "constant"}),
    ):
        with pytest.raises(ArtifactError, match="other data or settings"):
            warm_start.find(other, inputs)


def test_the_demo_makes_again_what_another_recipe_made(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    recipes = {}
    for name in ("sft", "recast"):
        recipes[name] = str(tmp_path / f"{name}.yaml")
        resolved = dump_recipe(make_recipe(method={"name": name}))
        Path(recipes[name]).write_text(resolved, encoding="utf-8")
        assert why_stale(["train", recipes[name]]) == "", "nothing is there yet"
    shutil.copytree(model_of(inputs), finish_warm_start(make_recipe(), inputs) / "model")
    finish_run(make_recipe(), inputs)
    assert why_stale(["train", recipes["sft"]]) == why_stale(["train", recipes["recast"]]) == ""
    assert "another recipe" in why_stale(["train", recipes["recast"], "rl.steps=7"])
    assert "other data or settings" in why_stale(["train", recipes["sft"], "warm_start.epochs=7"])


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


def finish_warm_start(recipe, inputs: Inputs) -> Path:
    folder = warm_start.folder_of(recipe)
    folder.mkdir(parents=True)
    write_manifest(
        folder, "warm-start", parents=inputs.parents, **whole("warm-start", **warm_start.facts(recipe))
    )
    return folder


def test_warm_start_is_shared_by_recipes_that_start_alike(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    assert warm_start.folder_of(make_recipe()) == tmp_path / "run" / "warm_start"
    shared = {"out": str(tmp_path / "shared"), "epochs": 2}
    recipe = make_recipe(warm_start=shared)
    assert warm_start.find(recipe, inputs) is None
    finish_warm_start(recipe, inputs)
    other = make_recipe(warm_start=shared, out=str(tmp_path / "b"), method={"name": "grpo"}, rl={"steps": 3})
    found = warm_start.find(other, inputs)
    assert found is not None and found["params"]["epochs"] == 2
    for changed in ({"warm_start": {**shared, "epochs": 3}}, {"warm_start": shared, "seed": 9}):
        with pytest.raises(ArtifactError, match="warm start of other data or settings"):
            warm_start.find(make_recipe(**changed), inputs)


def test_a_second_process_waits_for_a_warm_start_that_is_being_made(make_recipe) -> None:
    recipe, order = make_recipe(), []
    waiting = threading.Event()

    def second() -> None:
        with warm_start.exclusive(recipe, waiting.set):
            order.append("second")

    with warm_start.exclusive(recipe, lambda: order.append("the first never waits")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        other = make_recipe(warm_start={"out": "elsewhere"})
        with warm_start.exclusive(other, lambda: order.append("nor does another folder's")):
            order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_unfinished_warm_start_is_refused(make_recipe, inputs: Inputs) -> None:
    folder = finish_warm_start(make_recipe(), inputs)
    (folder / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no warm-start in"):
        warm_start.find(make_recipe(), inputs)
    shutil.rmtree(folder)
    assert warm_start.find(make_recipe(), inputs) is None


def test_warm_start_of_fewer_windows_than_a_batch_is_refused(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="10 SFT windows are less than one batch of 64") as caught:
        warm_start.train(make_recipe(), inputs, score=lambda _: {"ndcg@10": 0.0})
    assert "warm_start.batch_size" in caught.value.hint
    assert not (tmp_path / "run").exists()


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


def test_warm_start_steps_drop_the_last_ragged_batch(make_recipe, inputs: Inputs) -> None:
    recipe = make_recipe(warm_start={"batch_size": 4, "epochs": 3})
    assert warm_start.num_steps(recipe, inputs) == 2 * 3  # 10 windows in batches of 4


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        (tmp_path / f"global_step_{step}" / "huggingface").mkdir(parents=True)
    (tmp_path / "global_step_11" / "actor" / "huggingface").mkdir(parents=True)
    (tmp_path / "global_step_12").mkdir()  # nothing exported
    found = [path.relative_to(tmp_path).parts[0] for path in hf_checkpoints(tmp_path)]
    assert found == [f"global_step_{step}" for step in (2, 9, 10, 11)]


@pytest.mark.parametrize("where", ["model", "checkpoints/global_step_8/actor/huggingface"])
def test_overwrite_refuses_to_remove_the_model_it_starts_from(
    make_recipe, inputs: Inputs, tmp_path: Path, where: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(model_of(inputs), out / where)
    finish_run(make_recipe(model=str(out / where)), inputs)
    before = sorted(out.rglob("*"))
    with pytest.raises(ArtifactError, match=f"would remove the start model {out / where}"):
        run.train(make_recipe(), inputs, out / where, overwrite=True)
    assert sorted(out.rglob("*")) == before


def test_overwrite_keeps_the_old_run_if_the_new_one_makes_no_step(
    make_recipe, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_run(make_recipe(), inputs)
    out = tmp_path / "run"
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "weights.pt").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # a job that verl refuses when it reads the command line
    refused = make_recipe(verl={"no.such.key": 1}, ray_cpus=8)
    with pytest.raises(EnvironmentFault, match=r"main_ppo exited with 1: .*no\.such"):
        run.train(refused, inputs, model_of(inputs), overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # or one that the disk cannot hold
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 0, 1))
    with pytest.raises(EnvironmentFault, match="free, the checkpoints need"):
        run.train(make_recipe(), inputs, model_of(inputs), overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if "replaced" in path.name] == []


@pytest.mark.parametrize("moves", range(9))
def test_killed_overwrite_leaves_the_old_run_to_the_next_command(
    make_recipe, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """Killed after so many of its renames, or before the new run has made a step."""
    finish_run(make_recipe(), inputs)
    out = tmp_path / "run"
    (out / "checkpoints").mkdir()
    for name in ("checkpoints/weights.pt", "metrics.jsonl", "rows.parquet", "rollouts.jsonl"):
        (out / name).write_text("{}", encoding="utf-8")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    child = os.fork()
    if child == 0:  # a process that nothing can tidy up after
        rename, count = Path.rename, itertools.count(1)

        def counted(path: Path, target: Path) -> Path:
            moved = rename(path, target)
            if next(count) == moves:
                os._exit(1)
            return moved

        Path.rename = counted  # type: ignore[method-assign]
        with run._replacing(out, model_of(inputs)):
            out.mkdir(exist_ok=True)
            (out / "command.txt").write_text("python -m another\n", encoding="utf-8")
            os._exit(2)
    exited = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert exited == (1 if 1 <= moves <= 7 else 2)
    if exited == 1:
        assert run.find(make_recipe(), inputs, model_of(inputs)) is not None
    else:  # something is there, so only --overwrite may remove it
        with pytest.raises(ArtifactError, match="did not finish"):
            run.find(make_recipe(), inputs, model_of(inputs))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 0, 1))
        with pytest.raises(EnvironmentFault, match="checkpoints need"):
            run.train(make_recipe(), inputs, model_of(inputs), overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if "replaced" in path.name] == []
