"""The page of a profile: one file that holds its picture, and shows what it is given as text."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

from recast_cli.profiling.page import page

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))


class Seen(HTMLParser):
    """Text of each element, and the picture's source."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.cells: list[tuple[str, str]] = []
        self.source = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("th", "td", "p", "h1"):
            self.cells.append((tag, ""))
        if tag == "img":
            self.source = dict(attrs)["src"] or ""

    def handle_data(self, data: str) -> None:
        if self.cells:
            tag, before = self.cells[-1]
            self.cells[-1] = (tag, before + data.strip())


def test_a_page_holds_its_text_table_and_picture(tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(PNG)
    table = (["", "a < b"], [["phase & co", None], ["<script>", 1.5]])
    seen = Seen()
    seen.feed(page("Cost <of> a step", ["x < y"], tmp_path / "figure.png", 'a "picture"', table))
    assert seen.cells == [
        ("h1", "Cost <of> a step"),
        ("p", "x < y"),
        ("th", ""),
        ("th", "a < b"),
        ("td", "phase & co"),
        ("td", ""),
        ("td", "<script>"),
        ("td", "1.5"),
    ]
    head, _, data = seen.source.partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == PNG
