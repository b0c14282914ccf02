"""Going on with a run that was cut short: from which checkpoint, and what of its logs still holds.

A kill may come at any moment, also inside a checkpoint. verl 0.9.1 writes a checkpoint in this order, and
none of it atomically: weights, optimiser and Hugging Face folder, then `data.pt`, then the tracker file
beside the checkpoints, which names the newest whole one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from recast_cli.errors import ArtifactError
from recast_cli.outputs import atomic_text
from recast_cli.training.process import DAMAGED, checkpoints, read_metrics

TRACKER = "latest_checkpointed_iteration.txt"
RESUMED_METRICS = "metrics.resumed.jsonl"  # verl truncates its log when it starts


def last_checkpoint(folder: Path) -> int:
    """Step of the newest whole checkpoint of a run, 0 if there is none.

    Args:
        folder: The run's `checkpoints`.
    """
    found = checkpoints(folder)
    if not found or not (folder / TRACKER).exists():
        return 0
    text = (folder / TRACKER).read_text(encoding="ascii", errors="replace").strip()
    # An empty tracker was being written, after everything else of the newest checkpoint.
    named = int(text) if text.isdigit() else max(found)
    return max((step for step in found if step <= named), default=0)


def rewind(out: Path) -> int:
    """Bring a run directory back to its newest whole checkpoint; returns its step.

    What verl wrote after it goes: torn or later checkpoints, and records of later steps.
    """
    step = last_checkpoint(out / "checkpoints")
    for number, path in checkpoints(out / "checkpoints").items():
        if number > step:
            shutil.rmtree(path, ignore_errors=True)
    join_metrics(out, step)
    _keep_until(out / "rollouts.jsonl", step)
    return step


def join_metrics(out: Path, step: int | None = None) -> None:
    """Make one log of what the parts of a run logged, up to `step`; of a step the last record counts."""
    parts = [out / "metrics.jsonl", out / RESUMED_METRICS]
    if not any(path.exists() for path in parts):
        return
    records: dict[int, dict[str, Any]] = {}
    for path in parts:
        for record in read_metrics(path):
            number = record.pop("step")
            if step is None or number <= step:
                records[number] = record
    lines = [json.dumps({"step": number, "data": data}) for number, data in sorted(records.items())]
    atomic_text(out / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
    (out / RESUMED_METRICS).unlink(missing_ok=True)


def _keep_until(log: Path, step: int) -> None:
    """Keep the whole lines of a log that belong to steps up to `step`."""
    if not log.exists():
        return
    try:
        lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # the last is empty, or torn
        kept = [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError) as exc:
        raise ArtifactError(
            f"{log} holds a line that is no record of a batch ({exc!r:.80})",
            DAMAGED,
        ) from exc
    atomic_text(log, "".join(f"{line}\n" for line in kept))
