"""Read csv, tsv, jsonl, parquet and RecBole atomic files into raw frames; errors name file and place.

Text formats are read without type guessing, so that the id "007" stays "007". Files may be gzip-compressed.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import polars as pl

from recast_cli.errors import DataError

_UTF8_HINT = "save the file as UTF-8, for example with `iconv -f LATIN1 -t UTF-8`"


def _read_csv(content: bytes, separator: str = ",", quote: str | None = '"') -> pl.DataFrame:
    frame = pl.read_csv(io.BytesIO(content), infer_schema=False, separator=separator, quote_char=quote)
    # A header may have blanks after its commas, which nobody can name in a column map.
    tidy = [name.strip() for name in frame.columns]
    return frame.rename(dict(zip(frame.columns, tidy, strict=True))) if len({*tidy}) == len(tidy) else frame


def _read_atomic(content: bytes) -> pl.DataFrame:
    # RecBole atomic files: tab-separated, no quoting, a header of `name:type`.
    frame = _read_csv(content, separator="\t", quote=None)
    return frame.rename(lambda name: name.split(":", 1)[0])


def _read_jsonl(content: bytes) -> pl.DataFrame:
    return pl.read_ndjson(io.BytesIO(content.removeprefix(codecs.BOM_UTF8)), infer_schema_length=None)


def _read_parquet(content: bytes) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(content))


READERS: dict[str, Callable[[bytes], pl.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": lambda content: _read_csv(content, separator="\t"),
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".inter": _read_atomic,
    ".item": _read_atomic,
}


def read_table(path: Path) -> pl.DataFrame:
    """Read one file by its suffix (`.gz` may follow a text format).

    Raises:
        DataError: missing, unreadable, empty, cut off, not UTF-8, or not in the format its name says.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = bool(suffixes) and suffixes[-1] == ".gz"
    kind = suffixes[-2] if zipped and len(suffixes) > 1 else (suffixes[-1] if suffixes else "")
    if kind not in READERS or (zipped and kind == ".parquet"):
        raise DataError(
            f"{path} ends in {''.join(path.suffixes)!r}, needed one of {', '.join(READERS)} (text also .gz)",
            "rename the file to say what it holds, or convert it",
        )
    content = read_bytes(path, zipped)
    if not content.strip():
        raise DataError(f"{path} is empty", "needed a header or at least one record")
    if kind != ".parquet":
        for start, true_kind in ((b"PAR1", ".parquet"), (b"\x1f\x8b", f"{kind}.gz")):
            if content.startswith(start):
                raise DataError(
                    f"{path} holds {true_kind}, its name says {kind}", f"rename it to end in {true_kind}"
                )
        _check_encoding(path, content)
        if b"\n" not in content:
            content = content.replace(b"\r", b"\n")  # line ends of an old Macintosh
    try:
        frame = READERS[kind](content)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as exc:
        raise _explain(path, kind, content, exc) from exc
    if frame.height == 0:
        raise DataError(
            f"{path} has 0 rows (columns: {', '.join(frame.columns)})", "needed at least one data row"
        )
    return frame


def read_bytes(path: Path, zipped: bool = False) -> bytes:
    """The content of a file, unpacked if `zipped`.

    Raises:
        DataError: the file is missing, a folder, not permitted, or a damaged gzip.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, needed a file", "name the file inside it")
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise DataError(f"{path} is a pipe, socket or device, needed a file", "save its content in a file")
    try:
        return gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
    except FileNotFoundError as exc:
        raise DataError(f"{path} does not exist", "check the path") from exc
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise DataError(f"{path} is not a whole gzip file: {exc}", "fetch or compress it again") from exc
    except OSError as exc:
        raise DataError(f"{path} cannot be read: {exc.strerror or exc}", "check its permissions") from exc


def _check_encoding(path: Path, content: bytes) -> None:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16, needed UTF-8", "save the file as UTF-8")
    try:
        # str() of a whole log would double its memory: decode the header here, the rest only after a failure.
        content[: content.find(b"\n") + 1 or len(content)].decode("utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(_not_utf8(path, exc), _UTF8_HINT) from exc


def _not_utf8(path: Path, exc: UnicodeDecodeError) -> str:
    line = exc.object.count(b"\n", 0, exc.start) + 1
    return f"{path} is not UTF-8: byte 0x{exc.object[exc.start]:02x} in line {line}"


def _explain(path: Path, kind: str, content: bytes, exc: Exception) -> DataError:
    """Turn a parser's failure into one line that names the place."""
    first_line = str(exc).strip().split("\n", 1)[0]
    if kind == ".parquet":
        return DataError(f"{path} is not a readable parquet file: {first_line}", "write or fetch it again")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as decode_error:
        return DataError(_not_utf8(path, decode_error), _UTF8_HINT)
    if kind in (".jsonl", ".ndjson"):
        for number, line in enumerate(content.splitlines(), start=1):
            problem = _json_problem(line)
            if problem:
                return DataError(f"{path} line {number}: {problem}", "needed one JSON object a line")
    elif kind in (".csv", ".tsv"):
        problem = _csv_problem(content.decode("utf-8-sig"), "," if kind == ".csv" else "\t")
        if problem:
            return DataError(
                f"{path} {problem}",
                'quote a field that holds the separator, a line break or a quote, and write that quote as ""',
            )
    return DataError(f"{path} cannot be read as {kind[1:]}: {first_line}", "check the file")


def _csv_problem(text: str, separator: str) -> str:
    """The first line that breaks the rules of csv, and how; empty if none does."""
    reader, line = csv.reader(io.StringIO(text), delimiter=separator, strict=True), 1
    try:
        width = len(next(reader))
        line = reader.line_num + 1
        for record in reader:
            if len(record) > width:
                return f"line {line} has {len(record)} fields, the header {width}"
            line = reader.line_num + 1
    except csv.Error as exc:
        words = "a quote that is never closed" if "end of data" in str(exc) else str(exc)
        return f"line {line}: {words}"
    return ""


def _json_problem(line: bytes) -> str:
    """Why a line is not a JSON object; empty if it is one (or blank)."""
    if not line.strip():
        return ""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        record = json.loads(line, parse_constant=refuse)
    except ValueError as exc:
        return f"not readable JSON ({exc})"
    return "" if isinstance(record, dict) else f"found a JSON {type(record).__name__}, needed an object"
