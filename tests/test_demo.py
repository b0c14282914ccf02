"""The demo's own arithmetic: which commands it runs, and what its summary takes from their files."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import polars as pl
import pytest

from recast_cli.commands.demo import COLUMNS, CUT, demo, run_lanes, table_rows
from recast_cli.console import print_table
from recast_cli.demo import ARMS, Layout, commands, is_current, summarise
from recast_cli.errors import ArtifactError, EnvironmentFault
from recast_cli.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "ml-100k"
MODES = ("history_removed", "history_kept")
# Ranks of three users: the warm start hits one of them at rank 2, every other arm at rank 1.
RANKS = {"warm_start": [2, None, 11], "other": [1, None, 11]}
LOG_PROBS = {"warm_start": [-2.0, -4.0, -6.0], "other": [-1.0, -4.0, -5.0]}


def _write(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def layout(tmp_path):
    layout = Layout(data=tmp_path / "data", run=tmp_path / "run", recipes=RECIPES)
    _write(layout.dataset / "manifest.json", {"params": {"rl_rows": "sft"}})
    for arm in ARMS:
        kind = "warm_start" if arm == "warm_start" else "other"
        for number, split in enumerate(("validation", "test")):
            metrics = {
                mode: {
                    "model": {
                        "hr@10": len(arm) + number + 0.5 * (mode == "history_kept"),
                        "invalid_items": 1,
                    },
                    "popularity": {"hr@10": 0.25 + 0.5 * (mode == "history_kept")},
                    "item_knn": {"hr@10": 0.125 + 0.5 * (mode == "history_kept")},
                }
                for mode in MODES
            }
            path = layout.evaluation(arm, split)
            _write(path, {"num_users": 3, "num_items": 7, "metrics": metrics})
            users = {"index": [5, 6, 7], "rank_removed": RANKS[kind], "target_log_prob": LOG_PROBS[kind]}
            pl.DataFrame(users).sample(fraction=1.0, shuffle=True, seed=len(arm)).write_parquet(
                path.with_suffix(".users.parquet")
            )
    _write(layout.run / "warm_start" / "manifest.json", {"best_epoch": 1, "epochs": [{}]})
    for name in ("recast", "grpo", "sft-continued"):
        _write(layout.run / name / "manifest.json", {"recipe": {"out": name}})
    for name, shares in (("recast", (0.5, 1.0)), ("grpo", (0.25, 0.25))):
        names = ("all_zero", "single_hit", "multi_hit", "hit_rate", "mean_score", "invalid", "duplicate")
        lines = [
            {"partition": "train", "rollouts": 8, **dict.fromkeys(names, share), "invalid": number / 8}
            for number, share in enumerate(shares)
        ]
        # verl's last validation: greedy, and no part of the signal
        lines.append({"partition": "val", "rollouts": 99, **dict.fromkeys(names, 0.9)})
        (layout.run / name / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [
        {"step": n, "data": {"signal/all_zero_after_repair": value}} for n, value in ((1, 0.0), (2, 0.5))
    ]
    (layout.run / "recast" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    ratio = {
        "actor_update": 12.0,
        "old_log_prob": 6.0,
        "actor_total": 9.0,
        "peak_memory": 3.0,
        "tokens": 16.0,
    }
    seconds = {name: {"median": 6.0} for name in ("old_log_prob", "actor_update", "actor_total")}
    recipe = load_recipe(RECIPES / "recast.yaml", ["out=profiled"]).model_dump()
    profile = {
        "cost": {"ratio": ratio},
        "arms": {"stock": {"seconds": seconds}, "recast": {"seconds": seconds}},
        "setting": {"recipe": recipe},
    }
    _write(layout.run / "profile" / "profile.json", profile)
    return layout


def test_summary_takes_every_table_from_its_own_split_and_mode(layout):
    summary = summarise(layout)
    assert summary["evaluation"]["rl"]["hr@10"] == 2 + 1
    assert summary["validation"]["rl"]["hr@10"] == 2 + 0
    assert summary["evaluation_history_kept"]["grpo"]["hr@10"] == 4 + 1 + 0.5
    assert summary["validation_history_kept"]["grpo"]["hr@10"] == 4 + 0 + 0.5
    assert set(summary["evaluation"]) == {"warm_start", "rl", "grpo", "sft_continued"}
    assert summary["invalid_items"] == 4 * 2 * 2 + 2 * (0 + 1)  # arms, splits, modes; the steps of two runs
    assert summary["rollouts"] == {"rl": 16, "grpo": 16}
    assert summary["signal"]["all_zero"] == pytest.approx((0.5 + 1.0) / 2)
    assert summary["signal"]["all_zero_after_repair"] == pytest.approx((0.0 + 0.5) / 2)
    assert summary["signal_grpo"]["all_zero"] == 0.25
    assert summary["cost"]["seconds"]["stock"]["actor_update"] == 6.0
    assert summary["cost"]["ratio"]["actor_update"] == 12.0
    assert summary["baselines"]["item_knn"]["hr@10"] == 0.125


def test_differences_pair_the_same_users_whatever_their_order(layout):
    found = summarise(layout)["difference"]["rl"]
    assert found["target_log_prob"][0] == pytest.approx((1.0 + 0.0 + 1.0) / 3)
    assert found["hr@1"][0] == pytest.approx(1 / 3)
    assert found["hr@10"][0] == 0.0  # rank 11 is no hit, rank 2 was one already
    assert found["ndcg@10"][0] == pytest.approx((1 - 0.6309297535714575) / 3)  # 1/log2(3)
    low, high = found["target_log_prob"][1:]
    assert 0 <= low <= found["target_log_prob"][0] <= high <= 1


def test_evaluation_older_than_its_model_is_stale(layout):
    arguments = ["evaluate", "--model", str(layout.run / "m"), "--out", str(layout.evaluation("rl", "test"))]
    (layout.run / "m").mkdir()
    weights = layout.run / "m" / "model.safetensors"
    assert not is_current(layout, arguments)
    weights.touch()
    os.utime(weights, (1, 1))
    assert is_current(layout, arguments)
    os.utime(weights, (2e9, 2e9))
    assert not is_current(layout, arguments)


def test_profile_of_another_recipe_or_an_older_model_is_stale(layout):
    weights = layout.run / ARMS["warm_start"] / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.touch()
    os.utime(weights, (1, 1))
    command = ["profile", str(RECIPES / "recast.yaml"), "out=profiled", "--out", "x", "--repeats", "1"]
    assert is_current(layout, command)
    assert not is_current(layout, [*command[:3], "rl.steps=1", *command[3:]])
    os.utime(weights, (2e9, 2e9))
    assert not is_current(layout, command)


def test_memory_of_child_processes_counts():
    """In a process of its own: this one has 1 GB after a thousand tests, of which some comes and goes."""
    program = """
        import subprocess, sys, time
        from recast_cli.demo import peak_memory

        held = "held = bytearray(300 << 20); import time; time.sleep(1.5)"
        with peak_memory(0.2) as peak:
            subprocess.run([sys.executable, "-c", held], check=True)
        with_child = peak[0]
        with peak_memory(0.2) as peak:
            time.sleep(0.5)
        print(with_child - peak[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert 300 << 20 <= int(done.stdout) < 350 << 20


def test_one_table_holds_metrics_signal_and_cost(layout):
    table = table_rows(summarise(layout))
    kept = [row[0] for row in table].index("test, history kept") + 1
    assert table[kept] == ["  hr@10", *(len(arm) + 1.5 for arm in ARMS), 0.75, 0.625]
    rows = {row[0].strip(): row[1:] for row in table[: kept - 1] + table[kept + 2 :]}
    order = list(COLUMNS)
    assert order[:3] == ["warm_start", "rl", "grpo"]
    assert rows["hr@10"][:4] == [len(arm) + 1 for arm in ARMS]
    assert rows["hr@10"][4:] == [0.25, 0.125]
    assert rows["ndcg@10 gained"] == ["", "+0.1230", "+0.1230", "+0.1230", "", ""]
    assert rows["no hit, as sampled"] == ["", 0.75, 0.25, "", "", ""]
    assert rows["no hit, after repair"] == ["", 0.25, None, "", "", ""]
    assert rows["update: 12.0x less"] == ["", 6.0, 6.0, "", "", ""]
    assert "reference: 1.0x less" not in rows and "peak memory: 3.0x less" in rows


def test_the_table_fits_a_terminal_of_80_columns(layout, capsys):
    summary = summarise(layout)
    for arm in ARMS:
        summary["evaluation"][arm]["target_log_prob"] = -6.0230
    for name in ("old_log_prob", "ref_log_prob", "actor_update"):
        summary["cost"]["ratio"][name] = 12.3
        summary["cost"]["seconds"]["stock"][name] = summary["cost"]["seconds"]["recast"][name] = 12.3456
    print_table("", ["", *COLUMNS.values()], table_rows(summary))
    lines = capsys.readouterr().out.splitlines()
    assert any("-6.0230" in line for line in lines) and any("12.3456" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines) <= 80


@pytest.mark.parametrize("option", ["out", "data"])
def test_a_file_in_the_place_of_a_folder_is_refused_at_once(tmp_path, option):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=f"--{option} {tmp_path / 'file'} is a file, needed a folder"):
        demo(**{"out": tmp_path, "data": tmp_path, option: tmp_path / "file"})


def test_the_readme_shows_this_table_with_the_recorded_numbers():
    text = (RECIPES.parents[1] / "README.md").read_text(encoding="utf-8")
    shown = text.split("<!-- demo:begin -->")[1].split("```")[1].splitlines()[2:]
    recorded = json.loads((RECIPES.parents[1] / "benchmarks/results/demo.json").read_text(encoding="utf-8"))
    assert shown[0].split() == ["start", "ReCast", "GRPO", "more", "SFT", "popular", "kNN"]
    for line, (label, *cells) in zip(shown[1:], table_rows(recorded), strict=False):
        values = (
            "-" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else cell for cell in cells
        )
        assert line.split() == [*label.split(), *filter(None, values)]
    assert shown[-2].startswith(f"{recorded['seconds']:.0f} s, at most ")


def test_commands_walk_the_data_flow_and_their_recipes_load(tmp_path):
    layout = Layout(data=tmp_path / "data", run=tmp_path / "run", recipes=RECIPES)
    batches = commands(layout, [*CUT, "rl.steps=2"], ["--steps", "1"])
    assert [[[step[0] for step in lane] for lane in batch] for batch in batches[:2]] == [
        [["prepare-data"]],
        [["build-tokenizer"]],
    ]
    assert [[step[0] for step in lane] for lane in batches[-1]] == [["profile"]]  # alone: it takes the time
    trained, evaluated, models = [], [], set()
    for batch in batches[2:-1]:
        before, rl_lanes = frozenset(models), 0
        assert len(batch) <= 2
        for lane in batch:
            ready, rl = set(before), 0  # what another lane of the batch makes may come too late
            for step in lane:
                if step[0] == "evaluate":
                    model = step[step.index("--model") + 1]
                    assert model in ready
                    evaluated.append((model, step[step.index("--split") + 1]))
                else:
                    recipe = load_recipe(step[1], step[2:])
                    out = recipe.warm_start.out if recipe.method.name == "sft" else recipe.out
                    ready.add(f"{out}/model")
                    trained.append(recipe)
                    rl += recipe.method.name in ("recast", "grpo")
            models |= ready
            rl_lanes += rl > 0
        assert rl_lanes <= 1  # two RL jobs at a time would not fit into 8 GB
    assert sorted(evaluated) == sorted((model, split) for model in models for split in ("validation", "test"))
    assert {recipe.method.name for recipe in trained} == {"sft", "recast", "grpo", "sft-continued"}
    assert len(trained) == 4
    assert {recipe.rl.steps for recipe in trained} == {2}
    assert len({recipe.warm_start.out for recipe in trained}) == 1  # all arms start from one warm start
    assert len({str(recipe.rl) for recipe in trained}) == 1  # and get the same budget


def test_lanes_run_in_order_and_skip_what_is_there(capfd):
    asked = []

    def prepare(command):
        asked.append(command)
        return None if command == ["doctor"] else command

    run_lanes([[["--version"], ["doctor"], ["build-tokenizer", "--help"]]], prepare)
    assert asked == [["--version"], ["doctor"], ["build-tokenizer", "--help"]]
    printed = capfd.readouterr().out
    assert 0 <= printed.index("recast 0.") < printed.index("codebook")
    assert "transformers" not in printed  # `doctor` lists it


def test_a_failed_command_ends_its_lane_and_the_others(tmp_path):
    asked = []
    slow = ["prepare-data", "synthetic", "--num-users", "200000", "--out", str(tmp_path / "data")]

    def prepare(command):
        asked.append(command)
        return command

    with pytest.raises(EnvironmentFault, match="`recast no-such-command` ended with exit code 2"):
        run_lanes([[slow, ["doctor"]], [["no-such-command"], ["--version"]]], prepare)
    assert sorted(asked) == sorted([slow, ["no-such-command"]])
    assert list(tmp_path.iterdir()) == []  # ended, and nothing half-written
