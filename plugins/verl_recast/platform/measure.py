"""Cost of each actor phase, measured where it happens: inside the worker process.

Switched on by `RECAST_MEASURE=FILE` (one JSON line per call is appended) and `RECAST_MEASURE_MEMORY=1`
(tracks every tensor storage that an operator allocates; slow, so never together with a timing).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationTracker(TorchDispatchMode):
    """Bytes of tensor storage that operators allocate inside the block, now and at the peak.

    torch's CPU allocator keeps no statistics. Each storage is counted once, when it first comes out of an
    operator, and given back when it is freed; what existed before the block does not count.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._seen = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu" and not tensor.is_nested:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.current -= size


def phase_name(*, reference: bool, forward_only: bool) -> str:
    """The name verl's trainer uses for the phase that an engine call belongs to."""
    if reference:
        return "ref_log_prob"
    return "old_log_prob" if forward_only else "actor_update"


def _resident(engine: Any) -> list[torch.Tensor]:
    """Weights, gradients and optimiser state that live across phases."""
    tensors = [*engine.module.parameters(), *engine.module.buffers()]
    tensors += [p.grad for p in engine.module.parameters() if p.grad is not None]
    optimizer = getattr(engine, "optimizer", None)
    if optimizer is not None:
        tensors += [
            t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
        ]
    return tensors


@contextlib.contextmanager
def phase(name: str, engine: Any, data: Any) -> Iterator[None]:
    """Measure one engine call if `RECAST_MEASURE` names a file; else do nothing."""
    path = os.environ.get("RECAST_MEASURE")
    if not path:
        yield
        return
    tracker = None
    resident = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _resident(engine)}
    if os.environ.get("RECAST_MEASURE_MEMORY") == "1":
        tracker = AllocationTracker(set(resident))
    wall, cpu = time.perf_counter(), time.process_time()
    with tracker if tracker is not None else contextlib.nullcontext():
        yield
    record: dict[str, Any] = {
        "phase": name,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "resident_bytes": sum(resident.values()),
    }
    if tracker is not None:
        record["peak_bytes"] = tracker.peak
    if data is not None:
        record["rows"] = len(data)
        record["tokens"] = int(data["input_ids"].values().numel())
        record["square_tokens"] = int((data["input_ids"].offsets().diff() ** 2).sum())
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")
