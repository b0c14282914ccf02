"""Where output goes: data to stdout, the rest to stderr, all of it readable without colour or a terminal.

Rich's progress and table parts are imported on first use, so that `recast --help` stays quick.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 120  # columns of a table written to a file or a pipe; Rich would take 80 and cut cells
PLAIN_SECONDS = 5.0  # without a terminal, at most one progress line in this time


def console(*, stderr: bool = False) -> Console:
    """A Rich console on stdout, or on stderr. Made on each call, so that redirected streams are honoured."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False)


def _say(label: str, style: str, text: str) -> None:
    from rich.text import Text

    # Text, not markup: messages hold brackets, as in verl-recast[cpu]. soft_wrap keeps them on one line.
    line = Text.assemble((label, style), text) if label else Text(text)
    console(stderr=True).print(line, soft_wrap=True)


def note(text: str) -> None:
    """Tell the user something on stderr."""
    _say("", "", text)


def warn(text: str) -> None:
    """Print `warning: ...` on stderr."""
    _say("warning: ", "bold yellow", text)


def error(message: str) -> None:
    """Print `error: ...` on stderr."""
    _say("error: ", "bold red", message)


def hint(text: str) -> None:
    """Print `hint: ...` on stderr; nothing for an empty text."""
    if text:
        _say("hint: ", "bold cyan", text)


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null. Anything that is not JSON becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays, without importing either
        return _plain(value.tolist())
    return str(value)


def print_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(_plain(data), indent=2, ensure_ascii=False) + "\n")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, numeric: bool = True
) -> None:
    """Print a table on stdout.

    Args:
        title: Line above the table; empty for none.
        columns: Headers.
        rows: One sequence a row, as long as `columns`. Floats are shown with four decimals, None as a dash.
        numeric: Align every column but the first to the right.
    """
    from rich.table import Table
    from rich.text import Text

    if title:  # a line of its own: Rich would break a table's title at the table's width
        console().print(Text(title, style="italic"), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if numeric and place > 0 else "left", overflow="fold")
    for row in rows:
        assert len(row) == len(columns), f"row of {len(row)} cells under {len(columns)} columns"
        table.add_row(*(Text(_cell(value)) for value in row))
    console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return str(value)


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far a loop is: a Rich bar on a terminal, now and then a plain line elsewhere. All on stderr.

    Args:
        label: What is being done, e.g. `scoring users`.
        total: Number of steps, where known.

    Yields:
        `advance(count)`, to be called with the steps done since the last call.
    """
    if sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)

            def advance_bar(count: int = 1) -> None:
                bar.advance(task, count)

            yield advance_bar
        return

    done, last = 0, time.monotonic()

    def advance(count: int = 1) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            note(f"{label}: {done}/{total}" if total else f"{label}: {done}")

    yield advance
