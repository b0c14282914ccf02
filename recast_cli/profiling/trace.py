"""Chrome traces of a step: what torch's profiler saw in each phase, one file an arm.

Open one at https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from recast_cli.outputs import atomic_file

FOLDER, CALL = "RECAST_TRACE", "RECAST_TRACE_CALL"  # environment of a worker, see verl_recast.measure


def merge(folder: Path, path: Path) -> None:
    """Write the traces of an arm's phases and ranks as one, gzipped.

    Args:
        folder: What `RECAST_TRACE` named.
        path: `.json.gz`.
    """
    parts = [json.loads(part.read_text(encoding="utf-8")) for part in sorted(folder.glob("*.json"))]
    events = [event for part in parts for event in part["traceEvents"]]
    whole = {**parts[0], "traceEvents": events}
    with atomic_file(path) as scratch:
        scratch.write_bytes(gzip.compress(json.dumps(whole).encode(), mtime=0))
