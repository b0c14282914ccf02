"""When a run directory is reused, refused or replaced."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from sealing import reseal
from training_artifacts import (
    finish_run,
    finish_warm_start,
    model_of,
)
from typer.testing import CliRunner

from recast_cli.demo import why_stale
from recast_cli.errors import ArtifactError, EnvironmentFault
from recast_cli.main import app
from recast_cli.recipe import Recipe, dump_recipe
from recast_cli.training import run, run_directory
from recast_cli.training.inputs import Inputs
from recast_cli.training.resume import TRACKER, last_checkpoint, rewind


def test_no_run_is_found_in_a_folder_that_is_empty_or_holds_the_warm_start(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    assert run_directory.find(make_recipe(), inputs, model_of(inputs)) is None
    (tmp_path / "run" / "warm_start").mkdir(parents=True)
    (tmp_path / "run" / "warm_start.log").touch()
    assert run_directory.find(make_recipe(), inputs, model_of(inputs)) is None


def test_folder_of_something_else_is_refused_and_left_alone(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for name in ("model", "outputs"):
        (out / name).mkdir(parents=True)
        (out / name / "mine.txt").write_text("mine")
    (out / "recipe.yaml").write_text("mine")
    with pytest.raises(ArtifactError, match="holds model and is no run directory, needed an empty or a new"):
        run_directory.find(make_recipe(), inputs, model_of(inputs))
    with pytest.raises(ArtifactError, match="no run directory"):
        run.train(make_recipe(), inputs, model_of(inputs))
    run_directory.remove(out)  # --overwrite
    assert sorted(path.name for path in out.rglob("*")) == [
        "mine.txt",
        "mine.txt",
        "model",
        "outputs",
        "recipe.yaml",
    ]


def test_an_out_that_cannot_be_made_is_refused(make_recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match=r"out= .*: .*/file is a file, needed a folder"):
        run_directory.require_room(make_recipe(out=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("start", ["run", "run/model", "run/checkpoints", "other/../run/logs"])
def test_a_warm_start_in_the_way_of_the_run_is_refused(make_recipe, tmp_path: Path, start: str) -> None:
    recipe = make_recipe(warm_start={"out": str(tmp_path / start)})
    with pytest.raises(ArtifactError, match=r"is where the run in .* writes, needed another folder"):
        run_directory.require_room(recipe)
    run_directory.require_room(
        recipe.model_copy(update={"method": recipe.method.model_copy(update={"name": "sft"})})
    )


def test_another_run_is_told_before_its_start_is_made(make_recipe, inputs: Inputs) -> None:
    finish_run(make_recipe(), inputs)
    assert run_directory.find(make_recipe(), inputs, None) is not None
    with pytest.raises(ArtifactError, match="holds a run of another recipe"):
        run_directory.find(make_recipe(seed=5), inputs, None)


def test_run_that_started_from_another_model_is_refused(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    finish_run(make_recipe(), inputs)
    other = tmp_path / "other-model"
    shutil.copytree(model_of(inputs), other)
    assert run_directory.find(make_recipe(), inputs, other) is not None  # the same weights elsewhere
    (other / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ArtifactError, match=f"started from another model than {other}"):
        run_directory.find(make_recipe(), inputs, other)


def test_run_without_its_checkpoints_is_still_whole(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "big.pt").touch()
    (tmp_path / "run" / "command.txt").touch()
    manifest = run.close(tmp_path / "run", inputs, {})
    assert list(manifest["files"]) == ["command.txt"]


def test_same_recipe_and_parents_reuse_a_finished_run(make_recipe, inputs: Inputs) -> None:
    recipe = make_recipe(rl={"learning_rate": 1e-5}, verl={"trainer.nnodes": 1})
    finish_run(recipe, inputs)
    found = run_directory.find(recipe, inputs, model_of(inputs))
    assert found is not None and found["kind"] == "run" and found["parents"] == inputs.parents


def unfinished(recipe: Recipe, inputs: Inputs, *, checkpoint: bool) -> Path:
    """What a killed run leaves: its origin, a step in its log, and perhaps a checkpoint."""
    out = Path(recipe.out)
    out.mkdir()
    run._begin(recipe, inputs, model_of(inputs), 0)
    (out / "metrics.jsonl").write_text('{"step": 1, "data": {}}\n')
    if checkpoint:
        (out / "checkpoints" / "global_step_1").mkdir(parents=True)
        (out / "checkpoints" / TRACKER).write_text("1")
    return out


@pytest.mark.parametrize("checkpoint", [False, True])
def test_another_recipe_cannot_go_on_with_a_run_nor_take_its_place(
    make_recipe, inputs: Inputs, checkpoint: bool
) -> None:
    out = unfinished(make_recipe(), inputs, checkpoint=checkpoint)
    with pytest.raises(ArtifactError, match="of another recipe: "):
        run_directory.find(make_recipe(seed=5), inputs, model_of(inputs), resume=True)
    assert run_directory.find(make_recipe(), inputs, model_of(inputs), resume=True) is None
    (out / "origin.json").unlink()  # of a version that wrote none
    for resume in (False, True):
        with pytest.raises(ArtifactError, match="did not finish") as caught:
            run_directory.find(make_recipe(), inputs, model_of(inputs), resume=resume)
        assert caught.value.hint == "pass --overwrite or choose another out="


def test_run_made_before_a_key_existed_had_its_default(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    finish_run(make_recipe(), inputs)
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["recipe"]["rollout"], manifest["recipe"]["rl"]["entropy_coef"]
    path.write_text(json.dumps(manifest))
    assert run_directory.find(make_recipe(), inputs, model_of(inputs)) is not None
    for changes in ({"rollout": "vllm"}, {"rl": {"entropy_coef": 0.1}}):
        with pytest.raises(ArtifactError, match="of another recipe: "):
            run_directory.find(make_recipe(**changes), inputs, model_of(inputs))
    manifest["recipe"]["gone"] = 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="of another recipe: "):
        run_directory.find(make_recipe(), inputs, model_of(inputs))


def test_run_of_another_recipe_or_of_other_data_is_refused(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    finish_run(make_recipe(), inputs)
    with pytest.raises(ArtifactError, match=r"of another recipe: seed is 0 there, 1 here\n") as caught:
        run_directory.find(make_recipe(seed=1), inputs, model_of(inputs))
    assert "--overwrite" in caught.value.hint
    many = {"method": {"name": "grpo"}, "seed": 1, "threads": 1, "rl": {"steps": 7}}
    found = r"method.name is recast there, grpo here, rl.steps .*, seed .* and 1 more\n"
    with pytest.raises(ArtifactError, match=found):
        run_directory.find(make_recipe(**many), inputs, model_of(inputs))
    (tmp_path / "tokenizer" / "model" / "model.safetensors").write_bytes(b"others")
    reseal(tmp_path / "tokenizer")
    with pytest.raises(ArtifactError, match=r"holds a run of another tokenizer than .*/tokenizer\n"):
        run_directory.find(make_recipe(), Inputs.load(make_recipe()), model_of(inputs))


def test_unfinished_run_is_refused(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    finish_run(make_recipe(), inputs)
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="did not finish") as caught:
        run_directory.find(make_recipe(), inputs, model_of(inputs))
    assert "--overwrite" in caught.value.hint


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


def test_overwrite_removes_a_run_but_not_the_warm_start_or_a_strangers_file(
    make_recipe, inputs: Inputs, tmp_path: Path
) -> None:
    finish_run(make_recipe(), inputs)
    out = tmp_path / "run"
    (out / "warm_start").mkdir()
    (out / "notes.txt").write_text("mine")
    run_directory.remove(out)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "warm_start"]


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
        with run_directory.replacing(out, model_of(inputs)):
            out.mkdir(exist_ok=True)
            (out / "command.txt").write_text("python -m another\n", encoding="utf-8")
            os._exit(2)
    exited = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert exited == (1 if 1 <= moves <= 7 else 2)
    if exited == 1:
        assert run_directory.find(make_recipe(), inputs, model_of(inputs)) is not None
    else:  # something is there, so only --overwrite may remove it
        with pytest.raises(ArtifactError, match="did not finish"):
            run_directory.find(make_recipe(), inputs, model_of(inputs))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 0, 1))
        with pytest.raises(EnvironmentFault, match="checkpoints need"):
            run.train(make_recipe(), inputs, model_of(inputs), overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if "replaced" in path.name] == []


def test_a_run_with_a_checkpoint_or_a_metric_is_worth_keeping(tmp_path: Path) -> None:
    assert not run_directory.made_a_step(tmp_path)
    (tmp_path / "checkpoints" / "global_step_1" / "actor" / "huggingface").mkdir(parents=True)
    assert run_directory.made_a_step(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text('{"step": 1, "data": {}}\n', encoding="utf-8")
    assert run_directory.made_a_step(tmp_path / "other")


def test_a_dry_run_shows_where_it_would_go_on(make_recipe, inputs: Inputs, tmp_path: Path) -> None:
    recipe = make_recipe()
    unfinished(recipe, inputs, checkpoint=True)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    shown = [
        CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--dry-run", *more]).stdout
        for more in ([], ["--resume"])
    ]
    found = ["global_step_1" in text for text in shown]
    assert found == [False, True] and "trainer.resume_mode=resume_path" in shown[1]


def test_a_warm_start_is_not_resumed(make_recipe, tmp_path: Path) -> None:
    text = dump_recipe(make_recipe(method={"name": "sft"}))
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--resume"])
    assert "method sft is the warm start alone" in str(done.exception)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("origin.json", b""),
        ("origin.json", b"{}"),
        ("origin.json", b"\xff\xfe"),
        ("origin.json", b'{"parents": {}, "facts": {"recipe": {}}}'),
        ("metrics.jsonl", b'{"step": 1, "data": {}}\n\n'),
        ("metrics.jsonl", b'{"step": 1}\n'),
        ("metrics.jsonl", b"\0\0\n"),
        ("rollouts.jsonl", b"[]\n"),
        ("rollouts.jsonl", b"garbage\n"),
    ],
)
def test_a_damaged_run_is_told_in_one_line(make_recipe, inputs: Inputs, name: str, content: bytes) -> None:
    out = unfinished(make_recipe(), inputs, checkpoint=True)
    (out / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} (holds a line|does not say)") as caught:
        run_directory.find(make_recipe(), inputs, model_of(inputs), resume=True)
        rewind(out)
    assert "--overwrite" in caught.value.hint
    assert "\n" not in caught.value.message


def test_what_else_lies_among_checkpoints_is_none(make_recipe, inputs: Inputs) -> None:
    out = unfinished(make_recipe(), inputs, checkpoint=True)
    (out / "checkpoints" / "global_step_2.bak").mkdir()
    (out / "checkpoints" / TRACKER).write_bytes("\u00b2".encode())  # a digit that int() does not read
    assert last_checkpoint(out / "checkpoints") == 1


def test_a_run_killed_in_its_export_is_finished_from_its_last_checkpoint(
    make_recipe, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last record there is no step left: a torn copy of the model is made whole, no job starts."""
    recipe = make_recipe(rl={"steps": 1})
    out = unfinished(recipe, inputs, checkpoint=True)
    exported = out / "checkpoints" / "global_step_1" / "actor" / "huggingface"
    shutil.copytree(model_of(inputs), exported)
    (out / "model").mkdir()
    whole = (exported / "model.safetensors").read_bytes()
    (out / "model" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(run, "run_verl", lambda *_, **__: pytest.fail("a job was started"))
    manifest = run.train(recipe, inputs, model_of(inputs), resume=True)
    assert (out / "model" / "model.safetensors").read_bytes() == whole
    assert run_directory.find(recipe, inputs, model_of(inputs)) == manifest
    assert len(manifest["resumed"]) == 1
