"""Cost of each actor phase, measured where it happens: inside the worker process.

`RECAST_MEASURE=FILE` appends one JSON line per engine call. `RECAST_MEASURE_MEMORY_FROM=K` tracks memory
from the K-th call of each phase on (calls count from 1): tracking slows a call down, so the calls before it
are for timing and the others for memory. Without the first variable nothing is measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_calls: Counter[str] = Counter()  # of each phase, in this process


class AllocationTracker(TorchDispatchMode):
    """Bytes of tensor storage that operators allocate inside the block, now and at the peak.

    torch's CPU allocator keeps no statistics. Each storage is counted once, when it first comes out of an
    operator, and given back when it is freed; what existed before the block does not count. Memory that a
    kernel takes and returns within one operator is not seen.

    Args:
        known: `StorageImpl` addresses (`untyped_storage()._cdata`) that do not count.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._seen = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        for tensor in tree_leaves(result):
            if _has_storage(tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._seen or key in given:  # a view or an in-place result of what was there before
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        # The storage's Python object lives as long as the storage, also when only autograd holds it.
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.current -= size


def _has_storage(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_nested


class AcceleratorPeak:
    """The CUDA caching allocator's peak inside the block, above what was allocated when it began."""

    peak = 0

    def __enter__(self) -> AcceleratorPeak:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.peak = torch.cuda.max_memory_allocated() - self._before


def phase_name(*, reference: bool, forward_only: bool) -> str:
    """The name the profile uses for the phase that an engine call belongs to."""
    if reference:
        return "ref_log_prob"
    return "old_log_prob" if forward_only else "actor_update"


def _resident(engine: Any) -> dict[int, int]:
    """Storage -> bytes of the weights, gradients and optimiser state that are there before the call."""
    tensors = [*engine.module.parameters(), *engine.module.buffers()]
    tensors += [p.grad for p in engine.module.parameters() if p.grad is not None]
    optimizer = getattr(engine, "optimizer", None)
    if optimizer is not None:
        tensors += [
            t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
        ]
    tensors = [getattr(t, "_local_tensor", t) for t in tensors]  # FSDP2 shards: this rank's part
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def _tracker(name: str, resident: dict[int, int], on_gpu: bool) -> AllocationTracker | AcceleratorPeak | None:
    first = os.environ.get("RECAST_MEASURE_MEMORY_FROM")
    if not first or _calls[name] < int(first):
        return None
    return AcceleratorPeak() if on_gpu else AllocationTracker(set(resident))


@contextlib.contextmanager
def phase(name: str, engine: Any, data: Any) -> Iterator[None]:
    """Measure one engine call if `RECAST_MEASURE` names a file; else do nothing.

    Args:
        name: Phase, see `phase_name`, or `optimizer`.
        engine: verl's engine: `module` and, where it trains, `optimizer`.
        data: The call's TensorDict with a jagged `input_ids`; None where there is none.
    """
    path = os.environ.get("RECAST_MEASURE")
    if not path:
        yield
        return
    _calls[name] += 1
    on_gpu = next(engine.module.parameters()).device.type == "cuda"
    resident = _resident(engine)
    tracker = _tracker(name, resident, on_gpu)
    if on_gpu:
        torch.cuda.synchronize()  # earlier work must not be counted here, nor this call's later
    wall, cpu = time.perf_counter(), time.process_time()
    with tracker if tracker is not None else contextlib.nullcontext():
        yield
    if on_gpu:
        torch.cuda.synchronize()
    record: dict[str, Any] = {
        "phase": name,
        "call": _calls[name],
        "rank": int(os.environ.get("RANK", "0")),
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "resident_bytes": sum(resident.values()),
    }
    if tracker is not None:
        record["peak_bytes"] = tracker.peak
    if data is not None:
        record |= _size(data["input_ids"])
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


def _size(input_ids: Any) -> dict[str, int]:
    """Rows, real tokens (no padding) and the sum of squared lengths of a jagged tensor."""
    lengths = input_ids.offsets().diff()
    return {
        "rows": len(lengths),
        "tokens": int(lengths.sum()),
        "square_tokens": int((lengths**2).sum()),
    }
