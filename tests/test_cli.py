"""The command line: quick and light help, errors in words, exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

import recast_cli.commands
from recast_cli import __version__
from recast_cli.main import COMMANDS, HIDDEN

FULL = Path("/dev/full")  # Linux: every write fails with ENOSPC
# Too slow to import for a help text.
HEAVY = (
    "torch",
    "numpy",
    "polars",
    "pyarrow",
    "transformers",
    "verl",
    "ray",
    "faiss",
    "matplotlib",
    "pydantic",
)

SHOWN = tuple(name for name in COMMANDS if name not in HIDDEN)


def run(program: str, *args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a fresh process, with a plain environment of 100 columns."""
    plain = {key: value for key, value in os.environ.items() if key not in ("RECAST_DEBUG", "FORCE_COLOR")}
    settings = {**plain, "COLUMNS": "100", "NO_COLOR": "1", **(env or {})}
    command = [sys.executable, "-c", textwrap.dedent(program), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=settings)


def recast(*args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return run("import sys; from recast_cli.main import main; sys.argv[0] = 'recast'; main()", *args, env=env)


def boom(body: str, *args: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real app with one more command, `boom`, that does `body`."""
    program = f"""
import sys
from recast_cli import main
def boom():
{textwrap.indent(textwrap.dedent(body), "    ")}
main.app.command("boom")(boom)
sys.argv = ["recast", *sys.argv[1:], "boom"]
main.main()
"""
    return run(program, *args, env=env)


# --- help


def test_every_command_is_there() -> None:
    files = Path(recast_cli.commands.__file__).parent.glob("[!_]*.py")
    assert sorted(COMMANDS) == sorted(path.stem for path in files)


@pytest.mark.parametrize("args", [[], *([name.replace("_", "-")] for name in COMMANDS)], ids=str)
def test_help_loads_nothing_heavy(args: list[str], record_property: Callable[[str, object], None]) -> None:
    program = f"""
import sys, time
start = time.perf_counter()
from recast_cli.main import main
try:
    main()
except SystemExit as done:
    assert done.code == 0, done.code
seconds = time.perf_counter() - start
loaded = [name for name in {HEAVY!r} if name in sys.modules]
import json
print("RESULT " + json.dumps([loaded, seconds]))
"""
    done = run(program, *args, "--help")
    assert done.returncode == 0, done.stderr
    loaded, seconds = json.loads(done.stdout.rpartition("RESULT ")[2])
    record_property("help_seconds", seconds)  # reported, not asserted: the goal is 0.3 s on two cores
    assert loaded == []


def test_help_lists_the_commands_in_the_order_of_the_data_flow() -> None:
    text = recast("--help").stdout
    places = [text.index(f" {name.replace('_', '-')} ") for name in SHOWN]
    assert places == sorted(places)
    for name in HIDDEN:
        assert f" {name} " not in text


@pytest.mark.parametrize("name", SHOWN)
def test_help_of_a_command_shows_an_example_and_json(name: str) -> None:
    command = name.replace("_", "-")
    text = recast(command, "--help").stdout
    assert "--json" in text
    after_usage = text.partition("Usage: ")[2].partition("\n")[2]
    assert f"recast {command}" in after_usage, "no example"


def test_no_arguments_print_the_help() -> None:
    done = recast()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == recast("--help").stdout.strip()
    assert recast("-h").stdout == recast("--debug", "--help").stdout == done.stdout


def test_version() -> None:
    done = recast("--version")
    assert (done.returncode, done.stdout) == (0, f"recast {__version__}\n")


# --- errors in words


def test_a_recast_error_is_two_lines_and_exit_code_2() -> None:
    done = boom(
        """
        from recast_cli.errors import DataError
        raise DataError("column [bold]x[/bold] " + "not found" + " again" * 50, "install verl-recast[cpu]")
        """
    )
    assert done.returncode == 2
    assert done.stdout == ""
    # one line however long, and brackets are text
    assert done.stderr.splitlines() == [
        "error: column [bold]x[/bold] not found" + " again" * 50,
        "hint: install verl-recast[cpu]",
    ]


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["docto"], "error: No such command 'docto'. Did you mean 'doctor'?", "hint: see `recast --help`"),
        (["doctor", "--jsn"], "error: No such option: --jsn", "hint: see `recast doctor --help`"),
        (["doctor", "x"], "error: Got unexpected extra argument", "hint: see `recast doctor --help`"),
    ],
)
def test_usage_errors_are_two_lines_too(args: list[str], error: str, hint: str) -> None:
    done = recast(*args)
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert lines[0].startswith(error)
    assert lines[1:] == [hint]


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this system")
def test_a_full_disk() -> None:
    done = boom("open('/dev/full', 'wb', buffering=0).write(b'x')")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: No space left on device",
        "hint: free some space on that disk, or choose another --out",
    ]


def test_a_file_too_large(tmp_path: Path) -> None:
    done = boom(
        f"""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with open({str(tmp_path / "big")!r}, "wb", buffering=0) as handle:
            while True:
                handle.write(bytes(600))
        """
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: File too large\nhint: ")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("missing/file.csv", "No such file or directory"),
        (".", "Is a directory"),
        ("file/x", "Not a directory"),
    ],
)
def test_paths_are_named(tmp_path: Path, path: str, error: str) -> None:
    (tmp_path / "file").write_text("")
    done = boom(f"open({str(tmp_path / path)!r})")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {error}: {tmp_path / path}\nhint: ")


def test_no_permission() -> None:
    done = boom("import errno, os; raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), '/root/x')")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Permission denied: /root/x\nhint: check the permissions")


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    program = f"""
        import os, sys
        os.mkdir({str(tmp_path / "gone")!r}); os.chdir({str(tmp_path / "gone")!r}); os.rmdir(os.getcwd())
        from recast_cli.main import main
        sys.argv = ["recast", "doctor"]
        main()
    """
    done = run(program)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the working directory no longer exists\nhint: ")


def test_a_link_to_itself(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    done = boom(f"from pathlib import Path; Path({str(loop)!r}).resolve()")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: Symlink loop from '{loop}'\nhint: ")


def test_a_size_for_a_named_model_is_refused(tmp_path: Path) -> None:
    words = ("--data", "d", "--out", str(tmp_path / "t"), "--base-model", "m", "--layers", "2")
    done = recast("build-tokenizer", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --base-model m has its own size, found --hidden-size or --layers")


def test_a_missing_extra_is_named() -> None:
    done = boom("sys.modules['faiss'] = None; import faiss")  # None: Python's own way to hide a module
    assert done.returncode == 2
    assert (
        done.stderr == "error: faiss is not installed\nhint: pip install '.[cpu]' in a checkout of recast\n"
    )


# --- our own bugs, interruptions, pipes

BUG = "from recast_cli.console import print_table; print_table('t', ['a', 'b'], [[1]])"


def test_a_bug_is_short_and_says_how_to_see_more() -> None:
    done = boom(BUG)
    assert done.returncode == 1
    first, *frames, last = done.stderr.splitlines()
    assert first == "error: internal error, AssertionError: row of 1 cells under 2 columns"
    assert any(re.fullmatch(r"  recast_cli/console\.py:\d+ in print_table", line) for line in frames)
    assert len(frames) <= 3
    assert last.startswith("hint: ") and "RECAST_DEBUG=1" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("args", "env"), [(["--debug"], {}), ([], {"RECAST_DEBUG": "1"})])
def test_debug_shows_the_whole_traceback(args: list[str], env: dict[str, str]) -> None:
    done = boom(BUG, *args, env=env)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


def test_debug_may_stand_anywhere_but_after_two_dashes() -> None:
    assert "Traceback" in recast("doctor", "--jsn", "--debug").stderr
    done = recast("doctor", "--", "--debug")
    assert done.stderr.startswith("error: Got unexpected extra argument")


def test_an_interruption_is_130() -> None:
    done = boom("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_closed_pipe_is_quiet(lines: int) -> None:
    # `recast ... | true`: the reader is gone before, or while, we write
    reading, writing = os.pipe()
    os.close(reading)
    program = f"""
import sys
from recast_cli import main
main.app.command("boom")(lambda: print("x\\n" * {lines}))
sys.argv = ["recast", "boom"]
main.main()
"""
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False, env=buffered
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_command_that_returns_something_still_succeeds() -> None:
    assert boom("return {'a': 1}").returncode == 0
    assert boom("return True").returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize(
    ("body", "code"), [("print('found')", 0), ("raise main.RecastError('bad', 'mend it')", 2)]
)
def test_closed_streams_change_no_exit_code(closed: str, body: str, code: int) -> None:
    program = (
        "import sys\nfrom recast_cli import main\n"
        f"def boom(): {body}\n"
        "main.app.command('boom')(boom)\nsys.argv = ['recast', 'boom']\nmain.main()\n"
    )
    command = ["sh", "-c", f'exec "$1" -c "$2" {closed}', "sh", sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_a_path_that_is_not_utf8_is_printed() -> None:
    done = boom("from recast_cli.console import print_json; print_json({'out': '/tmp/\\udcff'})")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"out": "/tmp/\udcff"}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("evaluate", "--seed", "-1"),
        ("evaluate", "--seed", str(2**31)),
        ("evaluate", "--beam-width", "0"),
        ("evaluate", "--max-users", "0"),
        ("evaluate", "--batch-tokens", "0"),
        ("recommend", "-k", "0"),
        ("prepare-data", "--seed", "-1"),
        ("build-tokenizer", "--seed", "-1"),
    ],
)
def test_integer_options_have_bounds(command: str, option: str, value: str) -> None:
    needed = ["--data", "d", "--tokenizer", "t"] if command in ("evaluate", "recommend") else ["--out", "o"]
    done = recast(command, *needed, option, value)
    assert done.returncode == 2 and "Invalid value for" in done.stderr and "than or equal to" in done.stderr
    assert f"see `recast {command} --help`" in done.stderr


EXAMPLES = ("prepare-data", "build-tokenizer", "train", "evaluate", "recommend", "profile")


@pytest.mark.parametrize("command", EXAMPLES)
def test_examples_can_be_pasted(command: str) -> None:
    """Each is whole: click would fill its lines like prose, and put words behind a backslash."""
    shown = recast(command, "--help").stdout
    text = shown.split("Examples:")[1].split("Options:")[0].split("Arguments:")[0]
    examples = [shlex.split(part) for part in text.replace("\\\n", " ").strip().split("\n\n")]
    assert examples and all(words[:2] == ["recast", command] for words in examples)
    known = set(re.findall(r"--?[\w-]+", shown.split("Options:")[1]))
    assert {word for words in examples for word in words if word.startswith("-")} <= known
