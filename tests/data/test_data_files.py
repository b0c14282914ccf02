"""The user's own files: formats, column map, timestamps, and everything that can be wrong with them."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import polars as pl
import pytest

from recast_cli.data.files import ColumnMap, clean_ids, items_frame, parse_columns, source
from recast_cli.errors import DataError, RecipeError
from recast_cli.readers import read_table


def test_all_formats_give_the_same_tables(csv_files: tuple[Path, Path], tmp_path: Path) -> None:
    log, catalogue = csv_files
    expected = source(log, catalogue).load()
    frame = pl.read_csv(log)  # typed: timestamps are integers
    frame.write_parquet(tmp_path / "log.parquet")
    frame.write_ndjson(tmp_path / "log.jsonl")
    frame.write_csv(tmp_path / "log.tsv", separator="\t")
    for name in ("log.csv", "log.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    atomic = "user_id:token\titem_id:token\ttimestamp:float\trating:float\n"
    (tmp_path / "log.inter").write_text(
        atomic + "".join("\t".join(map(str, row)) + "\n" for row in frame.rows())
    )
    for name in ("log.parquet", "log.jsonl", "log.tsv", "log.csv.gz", "log.jsonl.gz", "log.inter"):
        found = source(tmp_path / name, catalogue).load()
        columns = ["row", "user_id", "item_id", "timestamp"]
        assert found.interactions.select(columns).equals(expected.interactions.select(columns)), name
        assert found.items.equals(expected.items)


def test_text_joins_title_and_text_columns_but_no_numbers(csv_files: tuple[Path, Path]) -> None:
    items = source(*csv_files).load().items
    assert items["text"].to_list() == ["Alpha | Action", "Beta | Drama", "Gamma", "Delta | Comedy", "Eta"]
    chosen = source(*csv_files, ColumnMap(text=("price", "genre"))).load().items
    assert chosen["text"].to_list()[:3] == ["Alpha | 1 | Action", "Beta | 2 | Drama", "Gamma | 3"]
    assert source(*csv_files, ColumnMap(text=())).load().items["text"].to_list()[0] == "Alpha"


def test_text_is_tidied_and_lists_are_joined() -> None:
    table = pl.DataFrame(
        {
            "item_id": ["1", "2", "3"],
            "title": ["  Two\n lines ", " ", None],
            "tags": [["x", "y"], ["z", None], []],
        }
    )
    items = items_frame(table, ColumnMap(), "t")
    assert items["title"].to_list() == ["Two lines", None, None]
    assert items["text"].to_list() == ["Two lines | x, y", "z", None]


def test_ids_stay_as_they_are(tmp_path: Path) -> None:
    log, catalogue = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text("\ufeffuser_id,item_id,timestamp\n007, 1.0 ,1\n,x,2\n", encoding="utf-8")
    catalogue.write_text("item_id,title\nx,X\n")
    interactions = source(log, catalogue).load().interactions
    assert interactions["user_id"].to_list() == ["007", None]
    assert interactions["item_id"].to_list() == ["1.0", "x"]


def test_float_ids_of_pandas_become_whole_numbers(tmp_path: Path) -> None:
    log, catalogue = tmp_path / "log.parquet", tmp_path / "items.csv"
    frame = pl.DataFrame({"user_id": [1.0, float("nan"), 3.0], "item_id": [0.0, 1.0, 2.0], "timestamp": 1})
    frame.write_parquet(log)
    catalogue.write_text("item_id,title\nx,X\n")
    interactions = source(log, catalogue).load().interactions
    assert interactions["user_id"].to_list() == ["1", None, "3"]
    assert interactions["item_id"].to_list() == ["0", "1", "2"]


def test_column_map(csv_files: tuple[Path, Path]) -> None:
    log, catalogue = csv_files
    log.write_text(log.read_text().replace("user_id,item_id,timestamp", "who,what,when"))
    catalogue.write_text(catalogue.read_text().replace("item_id,title", "sku,name"))
    columns = parse_columns("user_id=who, item_id=what,timestamp=when,title=name,items.item_id=sku", "genre")
    expected = ColumnMap("who", "what", "when", catalogue_item_id="sku", title="name", text=("genre",))
    assert columns == expected
    tables = source(log, catalogue, columns).load()
    assert tables.interactions["user_id"].to_list()[0] == "u1"
    assert tables.items["text"].to_list()[0] == "Alpha | Action"


def test_one_column_for_two() -> None:
    with pytest.raises(RecipeError, match="from who, who and timestamp, needed three columns"):
        parse_columns("user_id=who,item_id=who")


def test_line_ends_of_old_macintoshes(tmp_path: Path) -> None:
    for name, end in (("mac", b"\r"), ("windows", b"\r\n")):
        (tmp_path / f"{name}.csv").write_bytes(HEAD.strip() + end + b"u,1,1" + end + b"v,2,2" + end)
        assert read_table(tmp_path / f"{name}.csv")["item_id"].to_list() == ["1", "2"]


def test_a_column_mapped_twice() -> None:
    with pytest.raises(RecipeError, match="has timestamp=a and timestamp=b, needed one of them"):
        parse_columns("timestamp=a,timestamp=b")
    assert parse_columns("timestamp=a,timestamp=a").timestamp == "a"


@pytest.mark.parametrize("text", ["user=who", "user_id", "user_id=", "=x"])
def test_bad_column_map(text: str) -> None:
    with pytest.raises(RecipeError, match="needed ours=theirs"):
        parse_columns(text)


HEAD = b"user_id,item_id,timestamp\n"


def gzipped(data: bytes) -> bytes:
    """The same bytes at any time: they are part of a test's name, and workers must collect the same names."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", "is empty"),
        ("log.csv", b" \n\n", "is empty"),
        ("log.csv", HEAD, "has 0 rows"),
        ("log.csv", HEAD + b"u,caf\xe9,1\n", "is not UTF-8: byte 0xe9 in line 2"),
        ("log.csv", "us\xe9r,item_id\nu,1\n".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 1"),
        ("log.csv", (HEAD.decode() + "u,1,1\n").encode("utf-16"), "is UTF-16, needed UTF-8"),
        ("log.csv", HEAD + b"u,1,1\nu,1,1,7\n", "line 3 has 4 fields, the header 3"),
        ("log.csv", HEAD + b'"u,1,1\nu,2,2\n', "line 2: a quote that is never closed"),
        ("log.csv", HEAD + b'"u\nv",1,1\n"ab"c,1,1\n', r"line 4: ',' expected after '\"'"),
        ("log.csv", HEAD + b"u,1,1700000000000000001\n", "holds 1700000000000000001, needed numbers below 2"),
        ("log.csv", b"PAR1 and so on", r"holds \.parquet, its name says \.csv"),
        ("log.jsonl", gzipped(b"{}\n"), r"holds \.jsonl\.gz, its name says \.jsonl"),
        ("log.csv", b"user,item_id,timestamp\nu,1,1\n", r"no column 'user_id' \(found: user, item_id,"),
        ("log.csv.gz", gzipped(HEAD + b"u,1,1\n" * 99)[:-9], "is not a whole gzip file"),
        ("log.csv.gz", HEAD, "is not a whole gzip file"),
        ("log.jsonl", b'{"user_id": 1}\n{"user_id": \n', r"line 2: not readable JSON"),
        ("log.jsonl", b'{"user_id": 1}\n[1, 2]\n', r"line 2: found a JSON list, needed an object"),
        (
            "log.jsonl",
            b'{"timestamp": 1.0}\n{"timestamp": NaN}\n',
            r"line 2: not readable JSON \(NaN is not JSON",
        ),
        ("log.jsonl", b'{"user_id": "caf\xe9"}\n', "is not UTF-8"),
        ("log.parquet", b"PAR1 not really", "is not a readable parquet file"),
        ("log.xlsx", b"PK", r"ends in '.xlsx', needed one of .csv"),
        ("log.parquet.gz", b"PK", r"ends in '.parquet.gz', needed one of"),
        ("log", HEAD, r"ends in '', needed one of"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path, catalogue = tmp_path / name, tmp_path / "items.csv"
    path.write_bytes(content)
    catalogue.write_text("item_id,title\n1,One\n")
    with pytest.raises(DataError, match=message) as caught:
        source(path, catalogue).load()
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message and caught.value.hint


def test_missing_file_and_folder(csv_files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.csv does not exist"):
        source(tmp_path / "nowhere.csv", csv_files[1])
    with pytest.raises(DataError, match="is a folder, needed a file"):
        source(csv_files[0], tmp_path)


def test_nested_ids_are_refused(tmp_path: Path, csv_files: tuple[Path, Path]) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"user_id": {"a": 1}, "item_id": 1, "timestamp": 1}) + "\n")
    with pytest.raises(DataError, match="column 'user_id' holds Struct"):
        source(path, csv_files[1]).load()


@pytest.mark.parametrize(
    ("title", "kind"),
    [([{"a": 1}], "Struct"), ([[{"a": 1}]], "List"), ([[["x"]]], "List"), ([b"\xff"], "Binary")],
)
def test_a_title_that_is_no_text_is_refused(title: list[object], kind: str) -> None:
    table = pl.DataFrame({"item_id": ["a"], "title": pl.Series(title)})
    with pytest.raises(DataError, match=f"items column 'title' holds {kind}.*needed text") as caught:
        items_frame(table, ColumnMap(), "items")
    assert caught.value.hint


def test_binary_ids_are_refused() -> None:
    table = pl.DataFrame({"item_id": [b"\xff"], "title": ["x"]})
    with pytest.raises(DataError, match="column 'item_id' holds Binary, needed ids"):
        items_frame(table, ColumnMap(), "items")


def test_categories_are_text() -> None:
    kinds = {"genre": pl.Categorical, "mood": pl.Enum(["glad"])}
    table = pl.DataFrame({"item_id": ["a"], "title": ["A"], "genre": ["Drama"], "mood": ["glad"]})
    assert items_frame(table.cast(kinds), ColumnMap(), "items")["text"].to_list() == ["A | Drama | glad"]


def test_a_missing_column_hints_at_the_closest_under_our_name(tmp_path: Path, csv_files) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,tstamp\nu,a,1\n")
    with pytest.raises(DataError, match="has no column 'timestamp'") as caught:
        source(path, csv_files[1]).load()
    assert caught.value.hint == "name the right one with --columns timestamp=tstamp"
    with pytest.raises(DataError, match="has no column 'genres'") as caught:
        table = pl.DataFrame({"item_id": ["a"], "title": ["A"], "genre": ["Drama"]})
        items_frame(table, ColumnMap(text=("genres",)), "items")
    assert caught.value.hint == "name the right one with --text-columns genre"


def test_a_column_that_is_there_twice_is_refused_if_it_is_needed(tmp_path: Path, csv_files) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id,timestamp,timestamp\nu1,i1,5,6\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"log\.csv has several columns 'timestamp'"):
        source(path, csv_files[1]).load()
    path.write_text("user_id,item_id,timestamp,note,note\nu1,i1,5,x,y\n", encoding="utf-8")
    source(path, csv_files[1]).load()


def test_a_pipe_is_refused(tmp_path: Path, csv_files: tuple[Path, Path]) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="is a pipe, socket or device, needed a file"):
        source(tmp_path / "pipe.csv", csv_files[1])


def test_read_table_keeps_row_order(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a\n" + "".join(f"{n}\n" for n in range(5000)))
    assert read_table(path)["a"].to_list() == [str(n) for n in range(5000)]


@pytest.mark.parametrize("bad", [2.5, float("inf"), 2.0**53])
def test_floats_that_are_no_ids_are_refused(bad: float) -> None:
    whole = pl.Series("user_id", [1.0, None, 2.0**53 - 1])
    assert clean_ids(whole, "log").to_list() == ["1", None, "9007199254740991"]
    with pytest.raises(DataError, match=r"log column 'user_id' holds the id .*, needed whole numbers below"):
        clean_ids(pl.Series("user_id", [1.0, bad]), "log")


def test_blanks_in_a_header_and_a_byte_order_mark_are_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id, item_id ,timestamp\nu1,i1,5\n", encoding="utf-8")
    assert read_table(tmp_path / "log.csv").columns == ["user_id", "item_id", "timestamp"]
    (tmp_path / "log.jsonl").write_text('{"user_id": "u1"}\n', encoding="utf-8-sig")
    assert read_table(tmp_path / "log.jsonl").columns == ["user_id"]
