"""One HTML file with everything in it: text, a picture, a table."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STYLE = (
    "body{font:14px system-ui,sans-serif;max-width:1100px;margin:2em auto;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse}"
    "td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #e5e8eb}"
    "td:first-child,th:first-child{text-align:left}"
)


def page(
    title: str,
    lines: Sequence[str],
    picture: Path,
    description: str,
    table: tuple[Sequence[str], Sequence[Sequence[Any]]],
) -> str:
    """The page's text.

    Args:
        lines: Paragraphs above the picture.
        picture: A PNG, which is put into the page.
        description: Of the picture, for those who do not see it.
        table: Headers and cells; None is an empty cell.
    """
    headers, cells = table
    head = "".join(f"<th>{html.escape(text)}</th>" for text in headers)
    rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in cells)
    image = base64.b64encode(picture.read_bytes()).decode()
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{html.escape(title)}</h1>"
        + "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        + f'<img alt="{html.escape(description)}" src="data:image/png;base64,{image}">'
        f"<table><tr>{head}</tr>{rows}</table>\n"
    )


def _cell(value: Any) -> str:
    return f"<td>{'' if value is None else html.escape(str(value))}</td>"
