"""What the plugin adds to `import verl`, in processor seconds of fresh processes.

    python benchmarks/plugin_import.py

verl is imported without plugins and then ours is, in the same process: pairs of processes differ by more
than what is measured. The bar is 0.05 s for the median.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import record

RESULT = Path(__file__).parent / "results" / "plugin_import.json"
PROGRAM = """
import sys, time
import verl
middle = time.process_time()
import verl_recast
sys.stderr.write(f"\\n{middle} {time.process_time() - middle}")
"""


def seconds() -> tuple[float, float]:
    """Processor seconds until verl is imported, and of our plugin after it."""
    env = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, check=True, capture_output=True, text=True
    )
    verl, plugin = done.stderr.splitlines()[-1].split()
    return float(verl), float(plugin)


def measure(repeats: int) -> list[tuple[float, float]]:
    """`seconds` of fresh processes; a first one, which reads the files from the disk, is left out."""
    return [seconds() for _ in range(repeats + 1)][1:]


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    start = record.before()
    found = measure(args.repeats)
    verl = statistics.median(verl for verl, _ in found)
    plugin = sorted(plugin for _, plugin in found)
    median = statistics.median(plugin)
    print(f"import verl: {verl:.2f} s; the plugin: {median:.4f} s ({plugin[0]:.4f} to {plugin[-1]:.4f})")
    record.write(args.result, start, {"seconds": found, "median": median})


if __name__ == "__main__":
    main()
