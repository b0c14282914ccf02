"""The warm start: its rows, the epoch that is kept, and when it is shared."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from training_artifacts import (
    finish_warm_start,
)

from recast_cli.errors import ArtifactError, DataError
from recast_cli.outputs import exclusive
from recast_cli.training import warm_start
from recast_cli.training.inputs import Inputs


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
        with exclusive(warm_start.folder_of(recipe), waiting.set):
            order.append("second")

    with exclusive(warm_start.folder_of(recipe), lambda: order.append("the first never waits")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        other = make_recipe(warm_start={"out": "elsewhere"})
        with exclusive(warm_start.folder_of(other), lambda: order.append("nor does another folder's")):
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


def test_warm_start_steps_drop_the_last_ragged_batch(make_recipe, inputs: Inputs) -> None:
    recipe = make_recipe(warm_start={"batch_size": 4, "epochs": 3})
    assert warm_start.num_steps(recipe, inputs) == 2 * 3  # 10 windows in batches of 4
