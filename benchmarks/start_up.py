"""Seconds until `recast --help` has printed, against the same interpreter doing nothing.

    python benchmarks/start_up.py

Both alternate, so that a busy machine slows both. The bar is 0.3 s for the median.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import record
from timing import in_turns, wall

RESULT = Path(__file__).parent / "results" / "start_up.json"
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "recast --help": [str(Path(sys.executable).parent / "recast"), "--help"],
    "recast --version": [str(Path(sys.executable).parent / "recast"), "--version"],
}


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of each command, in turns; a first one, which reads the files from the disk, is left out."""
    arms = {
        name: partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        for name, command in COMMANDS.items()
    }
    return in_turns(arms, repeats, wall)


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()

    start = record.before()
    seconds = measure(args.repeats)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        spread = f"({min(values):.3f}-{max(values):.3f})"
        print(f"{name:17} {medians[name]:.3f} s {spread}, {medians[name] / medians['python']:.1f} x python")
    record.write(args.result, start, {"seconds": seconds, "median": medians})


if __name__ == "__main__":
    main()
