"""Data on stdout, the rest on stderr, readable without colour or a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import numpy as np
import pytest

from recast_cli import console


def test_json_holds_no_nan_and_takes_numpy(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "a": float("nan"),
        "b": [float("inf"), 1.5],
        "c": np.float64(0.25),
        "d": np.arange(2),
        3: None,
        "t": True,
    }
    console.print_json(facts)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": None, "b": [None, 1.5], "c": 0.25, "d": [0, 1], "3": None, "t": True}
    assert err == ""


def test_json_keeps_letters(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"title": "Amélie"})
    assert "Amélie" in capsys.readouterr().out


def test_a_table_is_plain_text_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("metrics", ("name", "hr@10"), [("[popularity]", 0.123456), ("knn", None)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["metrics", "name           hr@10", "[popularity]  0.1235", "knn                -"]


def test_a_long_cell_is_folded_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("", ("path",), [("x" * 300,)])
    assert capsys.readouterr().out.count("x") == 300


def test_messages_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("hello")
    console.warn("careful")
    console.error("wrong")
    console.hint("do this")
    console.hint("")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "hello\nwarning: careful\nerror: wrong\nhint: do this\n"


def test_progress_without_a_terminal_is_now_and_then_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.progress("users", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""  # too quick to be worth a line
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with console.progress("users", 10) as advance:
        advance(4)
        advance(6)
    with console.progress("rows") as advance:
        advance(3)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "users: 4/10\nusers: 10/10\nrows: 3\n")


def test_progress_on_a_terminal_is_a_bar() -> None:
    ours, theirs = pty.openpty()
    program = """
from recast_cli.console import progress
with progress("users", 2) as advance:
    advance(1)
    advance(1)
"""
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    env.pop("NO_COLOR", None)
    subprocess.run(
        [sys.executable, "-c", program], stderr=theirs, stdout=subprocess.DEVNULL, check=True, env=env
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    assert b"2/2" in shown and b"users" in shown


def test_a_title_is_text_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table("dataset shop[final] [/b]", ["a"], [["1"]])
    assert capsys.readouterr().out.splitlines()[0] == "dataset shop[final] [/b]"  # whole, and above the table
