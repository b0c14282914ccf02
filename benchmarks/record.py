"""What every result says beside its figures: command, commit, versions, machine and how busy that was."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recast_cli.outputs import atomic_text
from recast_cli.profiling.profile import machine
from recast_cli.provenance import git_state, versions

_PLACES = ("--out", "--result")  # folders of one machine: not recorded


def parser(description: str | None, result: Path) -> argparse.ArgumentParser:
    """Of a script's arguments: where its result goes, and what the script adds."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--result", type=Path, default=result)
    return made


def before() -> dict[str, Any]:
    """Command, commit and load as the script starts."""
    words = [f"python benchmarks/{Path(sys.argv[0]).name}"]
    for previous, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        if word.split("=")[0] not in _PLACES and previous not in _PLACES:
            words.append(word)
    return {"command": " ".join(words), "git": git_state(), "load_average_before": os.getloadavg()}


def write(path: Path, start: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Store a result.

    Args:
        start: What `before` gave.
        facts: The figures; ready for JSON.
    """
    result = {**start, **facts, "versions": versions(), "machine": machine()}
    atomic_text(path, json.dumps(result, indent=2) + "\n")
