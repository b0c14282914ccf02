"""The stage and its command: artifact contents, leaks, determinism, reuse, and nothing half-written."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from recast_cli.artifacts import identity, load_manifest
from recast_cli.commands.prepare_data import prepare_data
from recast_cli.data.prepare import Params, prepare
from recast_cli.data.source import Source
from recast_cli.errors import ArtifactError, DataError, RecastError, RecipeError

Sources = Callable[..., Source]
FILES = ("items", "interactions", "sft", "rl", "validation", "test")


def random_events(num_users: int = 30, num_items: int = 12, seed: int = 0) -> list[tuple[str, str, float]]:
    """Users of 3 to 40 events with repeated items and many ties, in mixed source order."""
    rng = random.Random(seed)
    events = [
        (f"u{user}", f"i{rng.randrange(num_items)}", float(rng.randrange(1000)))
        for user in range(num_users)
        for _ in range(rng.randint(3, 40))
    ]
    return list(dict.fromkeys(events))


def tables_in(folder: Path) -> dict[str, pl.DataFrame]:
    return {name: pl.read_parquet(folder / f"{name}.parquet") for name in FILES}


def test_artifact_by_hand(make_source: Sources, tmp_path: Path) -> None:
    # u2's events arrive unordered; its b and c are tied, so c (first in the source) comes first.
    events = [
        ("u2", "c", 2),
        ("u2", "a", 1),
        ("u2", "b", 2),
        ("u2", "d", 9),
        ("u10", "a", 1),
        ("u10", "b", 2),
    ]
    events += [("u10", "c", 3), ("u10", "d", 4), ("u10", "e", 5)]
    manifest, reused = prepare(make_source(events), Params(history=2), tmp_path / "d", seed=7)
    found = tables_in(tmp_path / "d")
    assert not reused
    assert found["interactions"].rows() == [
        ("u10", "a", 1.0, 0),
        ("u10", "b", 2.0, 1),
        ("u10", "c", 3.0, 2),
        ("u10", "d", 4.0, 3),
        ("u10", "e", 5.0, 4),
        ("u2", "a", 1.0, 0),
        ("u2", "c", 2.0, 1),
        ("u2", "b", 2.0, 2),
        ("u2", "d", 9.0, 3),
    ]
    assert found["items"]["item_id"].to_list() == ["a", "b", "c", "d", "e"]
    # training: u10 a b c, u2 a c; windows of 3
    assert found["sft"].rows() == [(0, "u10", ["a", "b", "c"], 0), (1, "u2", ["a", "c"], 0)]
    # index = row of the target in interactions.parquet
    assert found["rl"].rows() == [
        (1, "u10", 1, ["a"], "b"),
        (2, "u10", 2, ["a", "b"], "c"),
        (6, "u2", 1, ["a"], "c"),
    ]
    assert found["validation"].rows() == [(3, "u10", 3, ["b", "c"], "d"), (7, "u2", 2, ["a", "c"], "b")]
    assert found["test"].rows() == [(4, "u10", 4, ["c", "d"], "e"), (8, "u2", 3, ["c", "b"], "d")]
    schema = {"index": pl.Int64, "user_id": pl.String, "position": pl.Int32}
    schema |= {"history": pl.List(pl.String), "target": pl.String}
    assert dict(found["rl"].schema) == schema
    assert found["sft"].schema["learn_from"] == pl.Int32
    facts = {key: manifest[key] for key in ("seed", "num_users", "num_items", "num_interactions", "dropped")}
    assert facts == {"seed": 7, "num_users": 2, "num_items": 5, "num_interactions": 9, "dropped": {}}
    assert manifest["tie_share"] == 1 / 7  # 4 + 3 neighbours, one tied
    assert manifest["target_tie_share"] == 1 / 2  # u2's validation target b is tied with c
    assert manifest["rows"] == {"sft_windows": 2, "sft_positions": 5, "rl": 3, "validation": 2, "test": 2}
    assert manifest == load_manifest(tmp_path / "d", "dataset")


@pytest.mark.parametrize("rl_rows", ["sft", "held-out"])
def test_no_leak_and_unique_index(make_source: Sources, tmp_path: Path, rl_rows: str) -> None:
    params = Params(history=5, rl_rows=rl_rows, k_core=3)
    prepare(make_source(random_events()), params, tmp_path / "d")
    found = tables_in(tmp_path / "d")
    events = found["interactions"].with_row_index("row")
    length = dict(events.group_by("user_id").len().iter_rows())
    sequence = {
        key[0]: part["item_id"].to_list() for key, part in events.group_by("user_id", maintain_order=True)
    }
    rows = {name: found[name].rows(named=True) for name in ("rl", "validation", "test", "sft")}
    index = [row["index"] for name in ("rl", "validation", "test") for row in rows[name]]
    assert len(set(index)) == len(index)
    for name, back in (("validation", 2), ("test", 1)):
        assert {row["user_id"]: row["position"] for row in rows[name]} == {
            u: n - back for u, n in length.items()
        }
    for name in ("rl", "validation", "test"):
        for row in rows[name]:
            whole, position = sequence[row["user_id"]], row["position"]
            assert row["target"] == whole[position]
            assert row["history"] == whole[position - len(row["history"]) : position]
            assert 1 <= len(row["history"]) <= 5
    assert all(row["position"] < length[row["user_id"]] - 2 for row in rows["rl"])
    learned = dict.fromkeys(length, 0)
    for row in rows["sft"]:
        # windows come in order, each learning on from where the last one stopped
        start = learned[row["user_id"]] - row["learn_from"]
        whole = sequence[row["user_id"]]
        assert row["items"] == whole[start : start + len(row["items"])]
        learned[row["user_id"]] = start + len(row["items"])
    for user, n in length.items():
        reserved = min(max(1, (n - 2) // 10), n - 3) if rl_rows == "held-out" else 0
        assert learned[user] == n - 2 - reserved
        rl_positions = [row["position"] for row in rows["rl"] if row["user_id"] == user]
        first = n - 2 - reserved if rl_rows == "held-out" else 1
        assert rl_positions == list(range(first, n - 2))


def test_equal_histories_keep_their_own_targets(make_source: Sources, tmp_path: Path) -> None:
    events = [(user, item, t) for user in ("u1", "u2") for t, item in enumerate("abc")]
    events += [("u1", "d", 3), ("u2", "e", 3), ("u1", "e", 4), ("u2", "d", 4)]
    prepare(make_source(events), Params(), tmp_path / "d")
    rows = tables_in(tmp_path / "d")["validation"].rows(named=True)
    assert [row["history"] for row in rows] == [["a", "b", "c"]] * 2
    assert [row["target"] for row in rows] == ["d", "e"]


def test_second_run_gives_identical_bytes(make_source: Sources, tmp_path: Path) -> None:
    made = [prepare(make_source(random_events()), Params(), tmp_path / name)[0] for name in "ab"]
    assert identity(made[0]) == identity(made[1])
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {f"{name}.parquet" for name in FILES} | {"manifest.json", "dropped.csv"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_rl_mode_does_not_move_indices_or_evaluation(make_source: Sources, tmp_path: Path) -> None:
    for mode in ("sft", "held-out"):
        prepare(make_source(random_events()), Params(rl_rows=mode), tmp_path / mode)
    sft, held_out = tables_in(tmp_path / "sft"), tables_in(tmp_path / "held-out")
    for name in ("validation", "test"):
        assert sft[name].equals(held_out[name])
    # a held-out row is the very row, prompt and index included, of mode sft
    assert held_out["rl"].join(sft["rl"], on=sft["rl"].columns, how="anti").height == 0


def test_items_never_seen_stay_without_k_core_and_go_with_it(
    csv_files: tuple[Path, Path], tmp_path: Path
) -> None:
    csv_files[1].write_text(csv_files[1].read_text() + "f,Never seen,,6\n")
    for k_core, items in (
        (0, ["a", "b", "c", "d", "e", "f"]),
        (1, ["a", "b", "c", "d", "e"]),
        (2, ["b", "c", "d"]),
    ):
        out = tmp_path / str(k_core)
        prepare_data(interactions=csv_files[0], items=csv_files[1], out=out, k_core=k_core)
        assert tables_in(out)["items"]["item_id"].to_list() == items


def test_dropped_rows_are_listed(csv_files: tuple[Path, Path], tmp_path: Path) -> None:
    csv_files[0].write_text(csv_files[0].read_text() + "u1,a,1,5\nu3,a,1,5\n")
    prepare_data(interactions=csv_files[0], items=csv_files[1], out=tmp_path / "d")
    assert (tmp_path / "d" / "dropped.csv").read_text() == (
        "table,row,reason,user_id,item_id\ninteractions,9,duplicate_event,u1,a\ninteractions,10,short_user,u3,a\n"
    )
    assert load_manifest(tmp_path / "d", "dataset")["dropped"] == {"duplicate_event": 1, "short_user": 1}


def test_reuse_and_refusal(make_source: Sources, tmp_path: Path) -> None:
    source, params, out = make_source(random_events()), Params(), tmp_path / "d"
    first, _ = prepare(source, params, out)
    before = (out / "manifest.json").stat().st_mtime_ns
    assert prepare(source, params, out) == (first, True)
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="holds a dataset with history 20, needed 3"):
        prepare(source, Params(history=3), out)
    with pytest.raises(ArtifactError, match="with other content of source toy"):
        prepare(replace(source, sha256="1"), params, out)
    with pytest.raises(ArtifactError, match="with source toy, needed other"):
        prepare(replace(source, name="other"), params, out)
    manifest, reused = prepare(source, Params(history=3), out, overwrite=True)
    assert manifest["params"]["history"] == 3 and not reused
    (out / "rl.parquet").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"rl.parquet differs from its manifest"):
        prepare(source, Params(history=3), out)
    (out / "rl.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"lacks rl.parquet"):
        prepare(source, Params(history=3), out)
    assert prepare(source, Params(history=3), out, overwrite=True)[0] == manifest


def test_overwrite_never_replaces_what_is_no_dataset(make_source: Sources, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="already exists and holds no dataset"):
        prepare(make_source(random_events()), Params(), home, overwrite=True)
    for text in (json.dumps({"kind": "tokenizer"}), '{"name": "a browser extension"}', "{", "[]"):
        (home / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match="already exists and holds no dataset"):
            prepare(make_source(random_events()), Params(), home, overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"


def test_failure_leaves_nothing_and_keeps_the_old(make_source: Sources, tmp_path: Path) -> None:
    out = tmp_path / "d"
    short = make_source([("u", "a", 1)])
    with pytest.raises(DataError, match="none of 1 interactions is usable"):
        prepare(short, Params(), out)
    assert list(tmp_path.iterdir()) == []
    manifest, _ = prepare(make_source(random_events()), Params(), out)
    with pytest.raises(DataError):
        prepare(short, Params(), out, overwrite=True)
    assert load_manifest(out, "dataset") == manifest
    assert list(tmp_path.iterdir()) == [out]


def test_empty_k_core_is_an_error(make_source: Sources, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the 99-core of \d+ interactions \(30 users, 12 items\) is empty"):
        prepare(make_source(random_events()), Params(k_core=99), tmp_path / "d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_core": -1}, "k-core is -1, needed 0 or more"),
        ({"history": 0}, "history is 0, needed 1 to 100000"),
        ({"history": 10**12}, "history is 1000000000000, needed 1 to 100000"),
        ({"rl_rows": "all"}, "rl-rows is 'all', needed one of sft, held-out"),
        ({"held_out_share": 1.0}, "held-out-share is 1.0, needed above 0 and below 1"),
    ],
)
def test_parameters_out_of_bounds(options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Params(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no source, needed ml-100k or synthetic"),
        ({"source": "ml-1m"}, "unknown source 'ml-1m'"),
        ({"interactions": Path("log.csv")}, "only --interactions"),
        ({"source": "ml-100k", "noise": 0.1}, "--noise has no meaning for ml-100k"),
        ({"source": "synthetic", "items": Path("i.csv")}, "--items has no meaning for synthetic"),
        ({"source": "synthetic", "num_items": 5}, "num-items is 5, needed 2 or more a cluster"),
        (
            {"interactions": Path("l"), "items": Path("i"), "num_users": 3},
            "--num-users has no meaning for your own files",
        ),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(RecastError, match=message):
        prepare_data(**options, out=tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_command_prints_json_and_reuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"out": tmp_path / "d", "num_users": 20, "num_items": 60, "json_output": True}
    prepare_data("synthetic", **options)
    made = json.loads(capsys.readouterr().out)
    assert (made["reused"], made["num_users"], made["source"]["name"]) == (False, 20, "synthetic")
    assert made["source"]["config"]["num_items"] == 60
    prepare_data("synthetic", **options)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == made | {"reused": True}
    assert "reused, same source and parameters" in captured.err
    with pytest.raises(ArtifactError, match="other content of source synthetic"):
        prepare_data("synthetic", **options, seed=1)


def test_command_prints_a_table(
    csv_files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv_files[0].write_text(csv_files[0].read_text() + "u1,a,1,5\n")
    prepare_data(
        interactions=csv_files[0], items=csv_files[1], out=tmp_path / "d", rl_rows="held-out", name="shop"
    )
    captured = capsys.readouterr()
    lines = {line.split("  ")[0].strip(): line for line in captured.out.splitlines()}
    assert "dataset shop" in lines
    assert "the last 10% of a user's training events, unseen by SFT" in lines["RL rows"]
    assert " 0.0% " in lines["tied neighbours"]
    assert " 1 " in lines["dropped: duplicate_event"]
    assert "dropped.csv" in captured.err


@pytest.mark.parametrize("content", ["", "user_id,item_id\nu,a\n", "user_id,item_id,timestamp\nu,a,NaN\n"])
def test_user_mistakes_exit_with_two_lines_and_code_2(
    csv_files: tuple[Path, Path], tmp_path: Path, content: str
) -> None:
    csv_files[0].write_text(content)
    command = ["prepare-data", "--interactions", str(csv_files[0]), "--items", str(csv_files[1])]
    program = [sys.executable, "-c", "from recast_cli.main import main; main()"]
    done = subprocess.run(
        [*program, *command, "--out", str(tmp_path / "d")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ") and second.startswith("hint: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.csv", "log.csv"]
