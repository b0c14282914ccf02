"""The user's own files as a source: a column map turns their tables into ours."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from recast_cli.artifacts import file_sha256
from recast_cli.data.source import RawTables, Source, hash_json
from recast_cli.data.timestamps import parse_timestamps
from recast_cli.errors import DataError, RecipeError
from recast_cli.readers import read_bytes, read_table


@dataclass(frozen=True)
class ColumnMap:
    """Where our columns are found in the user's files.

    Attributes:
        user_id, item_id, timestamp: In the interactions file.
        catalogue_item_id: The item id in the items file; None: the same name as `item_id`.
        title: In the items file.
        text: Further text columns of the items file, joined in this order; None: every other text column.
    """

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    catalogue_item_id: str | None = None
    title: str = "title"
    text: tuple[str, ...] | None = None


def source(
    interactions: Path, items: Path, columns: ColumnMap | None = None, name: str | None = None
) -> Source:
    """The user's files as a source; they are hashed now and read on `load`.

    Raises:
        DataError: a file is missing or cannot be opened.
    """
    columns = columns or ColumnMap()
    for path in (interactions, items):
        if not path.is_file():
            read_bytes(path)  # raises with the reason
    try:
        digests = [file_sha256(interactions), file_sha256(items)]
    except OSError as exc:
        raise DataError(f"{exc.filename} cannot be read: {exc.strerror}", "check its permissions") from exc

    def load() -> RawTables:
        return RawTables(
            interactions_frame(read_table(interactions), columns, str(interactions)),
            items_frame(read_table(items), columns, str(items)),
        )

    return Source(
        name=name or interactions.name.split(".", 1)[0] or interactions.name,
        sha256=hash_json({"files": digests, "columns": asdict(columns)}),
        load=load,
        facts={"interactions": interactions.name, "items": items.name, "columns": asdict(columns)},
    )


def interactions_frame(table: pl.DataFrame, columns: ColumnMap, path: str) -> pl.DataFrame:
    """A user's log in the shape of `RawTables.interactions`."""
    names = ("user_id", "item_id", "timestamp")
    require_columns(table, [(f"--columns {name}=", getattr(columns, name)) for name in names], path)
    timestamp, text = parse_timestamps(table[columns.timestamp], path)
    return pl.DataFrame(
        {
            "user_id": clean_ids(table[columns.user_id], path),
            "item_id": clean_ids(table[columns.item_id], path),
            "timestamp": timestamp,
            "timestamp_text": text,
        }
    ).with_row_index("row", offset=1)


def items_frame(table: pl.DataFrame, columns: ColumnMap, path: str) -> pl.DataFrame:
    """A user's catalogue in the shape of `RawTables.items`; `text` joins title and other texts by " | "."""
    id_column = columns.catalogue_item_id or columns.item_id
    needed = [("--columns items.item_id=", id_column), ("--columns title=", columns.title)]
    needed += [("--text-columns ", name) for name in columns.text or ()]
    require_columns(table, needed, path)
    others = columns.text
    if others is None:
        others = tuple(
            name for name in table.columns if name not in (id_column, columns.title) and _is_text(table[name])
        )
    title = clean_text(table[columns.title], path)
    texts = [title, *(clean_text(table[name], path) for name in others)]
    parts = pl.DataFrame([text.alias(str(place)) for place, text in enumerate(texts)])
    text = parts.select(pl.concat_str(pl.all(), separator=" | ", ignore_nulls=True)).to_series()
    return pl.DataFrame(
        {"item_id": clean_ids(table[id_column], path), "title": title, "text": _null_if_empty(text)}
    ).with_row_index("row", offset=1)


def require_columns(table: pl.DataFrame, needed: Sequence[tuple[str, str]], path: str) -> None:
    """Refuse a table that lacks a column.

    Args:
        table: What was read.
        needed: Pairs of the option that names a column, up to its value, and the column.
        path: Of the file, for the message.

    Raises:
        DataError: naming the first missing column and those that are there, or one that is there twice.
    """
    for option, name in needed:
        if name not in table.columns:
            close = [*difflib.get_close_matches(name, table.columns, n=1), "COLUMN"][0]
            raise DataError(
                f"{path} has no column {name!r} (found: {', '.join(table.columns)})",
                f"name the right one with {option}{close}",
            )
        if f"{name}_duplicated_0" in table.columns:  # polars' name for the second
            raise DataError(f"{path} has several columns {name!r}", "rename or remove all but one")


def parse_columns(text: str | None, text_columns: str | None = None) -> ColumnMap:
    """Read a column map such as `user_id=userId,item_id=movieId,items.item_id=id`.

    Raises:
        RecipeError: an unknown key, or an entry that is not `ours=theirs`.
    """
    keys = {
        "user_id": "user_id",
        "item_id": "item_id",
        "timestamp": "timestamp",
        "title": "title",
        "items.item_id": "catalogue_item_id",
    }
    chosen: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in (text or "").split(","))):
        ours, equals, theirs = (part.strip() for part in entry.partition("="))
        if ours not in keys or not equals or not theirs:
            raise RecipeError(
                f"--columns has {entry!r}, needed ours=theirs with ours one of {', '.join(keys)}",
                "example: --columns user_id=userId,timestamp=ts",
            )
        if chosen.setdefault(keys[ours], theirs) != theirs:
            raise RecipeError(
                f"--columns has {ours}={chosen[keys[ours]]} and {ours}={theirs}, needed one of them",
                "leave one out",
            )
    names = (
        tuple(filter(None, (name.strip() for name in text_columns.split(","))))
        if text_columns is not None
        else None
    )
    columns = ColumnMap(**chosen, text=names)
    if len({columns.user_id, columns.item_id, columns.timestamp}) < 3:
        raise RecipeError(
            f"--columns takes user_id, item_id and timestamp from {columns.user_id}, {columns.item_id} and "
            f"{columns.timestamp}, needed three columns",
            "name another column for one of them",
        )
    return columns


def clean_ids(column: pl.Series, path: str) -> pl.Series:
    """Ids as text, null where missing or blank.

    A float column (pandas makes one of integers with gaps) gives "1", not "1.0".

    Raises:
        DataError: the column holds neither text nor numbers, or floats that are not whole or too large to be
            told from their neighbours.
    """
    if column.dtype.is_nested() or column.dtype in (pl.Object, pl.Binary):
        raise DataError(
            f"{path} column {column.name!r} holds {column.dtype}, needed ids (text or numbers)",
            "map another column",
        )
    if column.dtype.is_float():
        column = column.fill_nan(None)
        found = column.drop_nulls()
        bad = found.filter(~((found == found.round()) & (found.abs() < 2**53)).fill_null(False))
        if len(bad):
            raise DataError(
                f"{path} column {column.name!r} holds the id {bad[0]!r}, needed whole numbers below 2^53",
                "write ids as integers or text",
            )
        column = column.cast(pl.Int64)
    return _null_if_empty(column.cast(pl.String).str.strip_chars())


def clean_text(column: pl.Series, path: str) -> pl.Series:
    """Text on one line, null where blank; a list of texts is joined by ", ".

    Raises:
        DataError: the column holds neither text, numbers nor lists of them.
    """
    kind = column.dtype.inner if isinstance(column.dtype, pl.List) else column.dtype
    if kind.is_nested() or kind in (pl.Object, pl.Binary):
        raise DataError(
            f"{path} column {column.name!r} holds {column.dtype}, needed text or lists of text",
            "name another column, or write this one as text",
        )
    if isinstance(column.dtype, pl.List):
        column = column.cast(pl.List(pl.String)).list.drop_nulls().list.join(", ")
    return _null_if_empty(column.cast(pl.String).str.replace_all(r"\s+", " ").str.strip_chars())


def _is_text(column: pl.Series) -> bool:
    """Whether a column is worth embedding: text that is not merely numbers."""
    if isinstance(column.dtype, pl.List):
        return column.dtype.inner == pl.String
    if column.dtype in (pl.Categorical, pl.Enum):
        column = column.cast(pl.String)
    if column.dtype != pl.String:
        return False
    filled = _null_if_empty(column.str.strip_chars()).drop_nulls()
    return len(filled) > 0 and bool(filled.cast(pl.Float64, strict=False).is_null().any())


def _null_if_empty(text: pl.Series) -> pl.Series:
    return text.set(text == "", None)
