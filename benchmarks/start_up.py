"""Seconds until `recast --help` has printed, against the same interpreter doing nothing.

    python benchmarks/start_up.py

Both alternate, so that a busy machine slows both. The bar is 0.3 s for the median.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import record

RESULT = Path(__file__).parent / "results" / "start_up.json"
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "recast --help": [str(Path(sys.executable).parent / "recast"), "--help"],
    "recast --version": [str(Path(sys.executable).parent / "recast"), "--version"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()

    start = record.before()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(args.repeats + 1):  # the first reads the files from the disk
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(
            f"{name:17} {medians[name]:.3f} s ({min(values[1:]):.3f}-{max(values[1:]):.3f}), "
            f"first {values[0]:.3f} s, {medians[name] / medians['python']:.1f} x python"
        )
    record.write(args.result, start, {"seconds": seconds, "median": medians})


if __name__ == "__main__":
    main()
