"""A catalogue made elsewhere: item -> text of its semantic ID, from a table or MiniOneRec's index file."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from recast_cli.core.spelling import LEVELS, parse
from recast_cli.errors import DataError
from recast_cli.readers import read_bytes, read_table

logger = logging.getLogger(__name__)

COLUMNS = ("item_id", "sid")


def read_catalogue_file(path: Path) -> dict[tuple[int, ...], str]:
    """Every semantic ID of a catalogue, with the first item that has it.

    Args:
        path: csv, tsv, jsonl or parquet with the columns `item_id` and `sid` (text, or a list of code
            tokens), or MiniOneRec's index file: one JSON object, `{"0": ["<a_12>", "<b_3>", "<c_7>"], ...}`.

    Returns:
        Codes -> item id, in the order of the file. Items that share a semantic ID cannot be told apart by an
        answer; how many do is logged.

    Raises:
        DataError: the file cannot be read or lacks a column; a row without item or semantic ID, one whose
            text is no semantic ID or has another number of levels than the first; an item with two.
    """
    codes_of: dict[str, tuple[int, ...]] = {}
    for row, (item, sid) in enumerate(_read_pairs(path), start=1):
        if item is None or item != item or not str(item).strip() or not sid:  # NaN is not itself
            raise DataError(
                f"{path} row {row} has item_id {item!r} and sid {sid!r}, needed both", "complete or drop it"
            )
        codes = _codes(path, str(item), sid)
        first = next(iter(codes_of.items()), (item, codes))
        if len(codes) != len(first[1]):
            raise DataError(
                f"{path}: item {str(item)!r} has {len(codes)} codes, item {first[0]!r} has {len(first[1])}",
                "give every item a semantic ID of as many levels",
            )
        if codes_of.setdefault(str(item), codes) != codes:
            raise DataError(
                f"{path} row {row}: item {str(item)!r} has a second semantic ID, {_text(sid)}",
                "keep one of them",
            )
    item_of: dict[tuple[int, ...], str] = {}
    for name, codes in codes_of.items():
        item_of.setdefault(codes, name)
    sharing = [count for count in Counter(codes_of.values()).values() if count > 1]
    if sharing:
        logger.warning(
            "%s: %d of %d items share %d semantic IDs", path, sum(sharing), len(codes_of), len(sharing)
        )
    return item_of


def _read_pairs(path: Path) -> list[tuple[Any, Any]]:
    """(item id, semantic ID) of every row as the file has them."""
    if path.suffix.lower() == ".json":
        return _read_index(path)
    table = read_table(path)
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise DataError(
            f"{path} has columns {', '.join(table.columns)}, needed {' and '.join(COLUMNS)}",
            f"rename or add the column {missing[0]}",
        )
    return list(zip(table["item_id"].to_list(), table["sid"].to_list(), strict=True))


def _read_index(path: Path) -> list[tuple[Any, Any]]:
    needed = 'needed one object, {"ITEM": ["<a_12>", "<b_3>", "<c_7>"], ...}'
    content = read_bytes(path)
    try:  # as pairs: a dict would keep the last of two entries of one item without a word
        pairs = json.loads(content, object_pairs_hook=list)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path} is not readable JSON ({exc})", needed) from exc
    # an object came as a list of pairs, and an empty one as an empty list
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, tuple) for pair in pairs):
        found = "nothing" if pairs == [] else "something else"
        raise DataError(f"{path} holds {found}, {needed}", "name the index file (NAME.index.json)")
    return pairs


def _text(sid: Any) -> str:
    """A semantic ID as one text, from a text or from a list of its code tokens."""
    return "".join(map(str, sid)) if isinstance(sid, (list, tuple)) else str(sid)


def _codes(path: Path, item: str, sid: Any) -> tuple[int, ...]:
    text = _text(sid).strip()
    try:
        return parse(text)
    except ValueError as exc:
        levels = "".join(f"<s_{letter}_{code}>" for letter, code in zip(LEVELS, (12, 3, 7), strict=False))
        raise DataError(
            f"{path}: item {item!r} has the semantic ID {text!r}, needed code tokens of levels a, b, c, ...",
            f"spell it {levels} or {levels.replace('s_', '')}, with or without <|sid_begin|> and <|sid_end|>",
        ) from exc
