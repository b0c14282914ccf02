"""A sweep: its points, what its arms ask of a model, and one real run of four arms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from profiles import recast, traced

from recast_cli.core.cost import Work
from recast_cli.errors import RecipeError
from recast_cli.profiling.sweep import ARMS, Codes, Point, parse_points, write_rollouts

DEFAULT = Point(prompt_length=10, group_size=4, batch=2)


def test_every_combination_the_last_name_fastest() -> None:
    points = parse_points(["prompt_length=64,256", "batch=1,3"], DEFAULT)
    assert points == parse_points(["prompt_length=64,256,64", "batch=1,3,3"], DEFAULT)
    assert [(p.prompt_length, p.batch) for p in points] == [(64, 1), (64, 3), (256, 1), (256, 3)]
    assert {(p.group_size, p.hidden_size, p.layers) for p in points} == {(4, None, None)}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["prompt=64"], "--sweep 'prompt' is unknown, needed one of prompt_length, group_size,"),
        (["64"], "--sweep '64' is unknown"),
        (["batch=2", "batch=3"], "--sweep batch comes twice"),
        (["batch="], "--sweep batch= has a value that is no whole number"),
        (["batch=2,1.5"], "has a value that is no whole number"),
        (["group_size=8,1"], "--sweep group_size holds 1, needed at least 2"),
        (["prompt_length=0"], "holds 0, needed at least 1"),
        (["hidden_size=100"], "--sweep hidden_size holds 100, needed a multiple of 64"),
    ],
)
def test_bad_sweeps_are_told(texts: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as found:
        parse_points(texts, DEFAULT)
    assert message in str(found.value)


def test_work_of_the_arms_by_hand() -> None:
    """Two groups of four, prompts of 10 tokens, answers of 3."""
    works = {name: DEFAULT.work(arm, 3) for name, arm in ARMS.items()}
    assert works["stock"] == Work(2 * 4 * 13, 2 * 4 * 13, 2 * 4 * 169)
    assert works["recast"] == Work(2 * 2 * 13, 2 * 2 * 13, 2 * 2 * 169)
    assert works["stock_shared"] == Work(2 * (10 + 12), 2 * 4 * 4, 2 * (100 + 2 * 10 * 12 + 4 * 9))
    assert works["recast_shared"] == Work(2 * (10 + 6), 2 * 2 * 4, 2 * (100 + 2 * 10 * 6 + 2 * 9))
    assert DEFAULT.group_tokens(ARMS["stock"], 3) == 4 * 13
    assert DEFAULT.group_tokens(ARMS["recast_shared"], 3) == 16


def test_rollouts_are_codes_and_one_group_in_seven_has_a_hit(tmp_path: Path) -> None:
    codes = Codes(level_offsets=[5, 25], codebook_sizes=[20, 300])
    point = Point(prompt_length=500, group_size=3, batch=15)
    for name in ("one", "other"):
        write_rollouts(point, codes, 4, tmp_path / f"{name}.npz")
    found = np.load(tmp_path / "one.npz")
    assert all(np.array_equal(found[name], np.load(tmp_path / "other.npz")[name]) for name in found)
    assert found["prompts_BP"].shape == (15, 500)
    assert found["codes_BGL"].shape == (15, 3, 2)
    assert (found["prompts_BP"].min(), found["prompts_BP"].max()) == (5, 324)
    hits_BG = (found["codes_BGL"] == found["targets_BL"][:, None]).all(axis=2)
    assert np.flatnonzero(hits_BG.any(axis=1)).tolist() == [0, 7, 14]


@pytest.mark.verl
def test_four_arms_of_a_real_worker(workspace: Path) -> None:
    """What they read is counted by the worker itself; the sweep's own count must be the same."""
    sizes = ["--prompts", "3", "--group-size", "4", "--steps", "1", "--repeats", "2"]
    sweep = ["--sweep", "prompt_length=240", "--sweep", "layers=1"]
    done = recast(workspace, "profile", "recipe.yaml", *sizes, *sweep, "--out", "sweep", "--trace", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["arm"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(ARMS)
    for name, row in rows.items():
        assert (row["prompt_length"], row["group_size"], row["batch"]) == (240, 4, 3)
        assert (row["hidden_size"], row["layers"]) == (64, 1)  # as wide as the model that is there
        jobs = workspace / "sweep" / "jobs" / "point-1"
        repeats = [(jobs / f"{name}-{repeat}" / "measured.jsonl").read_text() for repeat in (1, 2)]
        calls = [json.loads(line) for text in repeats for line in text.splitlines()]
        work = Point(240, 4, 3).work(ARMS[name], 3)
        for phase in ("old_log_prob", "ref_log_prob", "actor_update"):
            found = [call for call in calls if call["phase"] == phase]
            assert len(found) == 2 * 4  # warm-up, timed, traced, memory
            assert {(call["tokens"], call["read_tokens"]) for call in found} == {
                (work.tokens, work.read_tokens)
            }
            low, high = row[f"{phase}_s_range"]
            assert 0 < low < row[f"{phase}_s"] < high, "the two timed steps are pooled"
        assert row["timed_steps"] == 2
        assert len(traced(workspace / "sweep" / "trace" / f"point-1-{name}.json.gz")) == 4
        assert row["tokens"] == work.tokens
        assert row["peak_memory_bytes"] > 0
    assert rows["stock"]["peak_memory_bytes"] > 3 * rows["recast_shared"]["peak_memory_bytes"]
    assert rows["stock"]["flops"] > rows["recast_shared"]["flops"]
    for name in ("sweep.json", "sweep.png", "sweep.html"):
        assert (workspace / "sweep" / name).stat().st_size > 100
