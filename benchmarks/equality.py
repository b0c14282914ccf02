"""How far gradients of reduced mini-batches are from those of whole ones, as verl's own worker computes them.

    python benchmarks/equality.py

Runs tests/plugin/test_loss_equality.py (every `loss_agg_mode`, ragged groups and answers, fixed and dynamic
micro-batches, one and two ranks, float32) and gathers the relative errors that its comparisons record. The
bar is 2e-5.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import record

RESULT = Path(__file__).parent / "results" / "equality.json"
TEST = Path(__file__).parents[1] / "tests" / "plugin" / "test_loss_equality.py"


def errors(report: Path) -> dict[str, list[float]]:
    """Relative errors of each test, from a JUnit report."""
    found: dict[str, list[float]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        values = [float(p.attrib["value"]) for p in case.iter("property")]
        name = case.attrib["name"].removeprefix("test_").split("[")[0].replace("_", " ")
        found.setdefault(name, []).extend(values)
    return found


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    args = parser.parse_args()

    start = record.before()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:xdist", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        subprocess.run([sys.executable, "-m", "pytest", *options, str(TEST)], check=True)
        found = errors(report)
    for name, values in found.items():
        print(f"{max(values):.1e} at most of {len(values):3d}  {name}")
    record.write(args.result, start, {"errors": found})


if __name__ == "__main__":
    main()
