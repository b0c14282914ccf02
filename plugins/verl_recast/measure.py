"""Cost of each phase, measured where it happens: in the process of the actor's worker or of the SID engine.

`RECAST_MEASURE=FILE` appends one JSON line per call. `RECAST_MEASURE_MEMORY_FROM=K` tracks memory
from the K-th call of each phase on (calls count from 1): tracking slows a call down, so the calls before it
are for timing and the others for memory. `RECAST_TRACE=FOLDER` and `RECAST_TRACE_CALL=K` write what torch's
profiler sees in the K-th call of each phase, as a Chrome trace of its own. Without the first variable nothing
is measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from verl.utils import tensordict_utils as tu

from recast_cli.core.cost import Work
from recast_cli.core.shared_prompt import rows_by_prompt
from verl_recast.shared_prompts import SHARED

_calls: Counter[str] = Counter()  # of each phase, in this process


class AllocationTracker(TorchDispatchMode):
    """Bytes of tensor storage that operators allocate inside the block, now and at the peak.

    torch's CPU allocator keeps no statistics. Each storage is counted once, when it first comes out of an
    operator, and given back when it is freed; what existed before the block does not count. Memory that a
    kernel takes and returns within one operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        # A view or an in-place result shares the storage of an argument.
        fresh = {s._cdata: s for s in _storages(result) if s._cdata not in given}
        for storage in fresh.values():
            size = storage.nbytes()
            self.current += size
            # The storage's Python object lives as long as the storage, also when only autograd holds it.
            weakref.finalize(storage, self._give_back, size).atexit = False
        self.peak = max(self.peak, self.current)
        return result

    def _give_back(self, size: int) -> None:
        self.current -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """CPU storages of the tensors in a nest of containers; of a jagged tensor, those of its parts."""
    for value in tree_leaves(values):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages([getattr(value, name) for name in names])
        elif isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_nested:
            yield value.untyped_storage()


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


def _resident_bytes(module: torch.nn.Module, optimizer: Any) -> int:
    """Bytes of the weights, gradients and optimiser state that are there before the call."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [p.grad for p in module.parameters() if p.grad is not None]
    if optimizer is not None:
        tensors += [
            t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)
        ]
    tensors = [getattr(t, "_local_tensor", t) for t in tensors]  # FSDP2 shards: this rank's part
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _tracker(name: str, on_gpu: bool) -> AllocationTracker | AcceleratorPeak | None:
    first = os.environ.get("RECAST_MEASURE_MEMORY_FROM")
    if not first or _calls[name] < int(first):
        return None
    return AcceleratorPeak() if on_gpu else AllocationTracker()


@contextlib.contextmanager
def _traced(name: str, on_gpu: bool) -> Iterator[None]:
    """torch's profiler around one call of a phase: number `RECAST_TRACE_CALL`, the second by default."""
    folder = os.environ.get("RECAST_TRACE")
    if not folder or _calls[name] != int(os.environ.get("RECAST_TRACE_CALL", "2")):
        yield
        return
    from torch.profiler import ProfilerActivity, profile, record_function

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler, record_function(name):
        yield
    os.makedirs(folder, exist_ok=True)
    rank = os.environ.get("RANK", "0")
    profiler.export_chrome_trace(os.path.join(folder, f"{name}-{rank}.json"))


@contextlib.contextmanager
def phase(name: str, module: torch.nn.Module, data: Any = None, optimizer: Any = None) -> Iterator[None]:
    """Measure one call if `RECAST_MEASURE` names a file; else do nothing.

    Args:
        name: Phase, see `phase_name`, or `optimizer`, or `rollout`.
        module: The model.
        optimizer: Where there is one: its state is memory too.
        data: The call's TensorDict with a jagged `input_ids`; None where there is none.
    """
    path = os.environ.get("RECAST_MEASURE")
    if not path:
        yield
        return
    _calls[name] += 1
    on_gpu = next(module.parameters()).device.type == "cuda"
    resident = _resident_bytes(module, optimizer)
    tracker = _tracker(name, on_gpu)
    if on_gpu:
        torch.cuda.synchronize()  # earlier work must not be counted here, nor this call's later
    wall, cpu = time.perf_counter(), time.process_time()
    with tracker if tracker is not None else contextlib.nullcontext(), _traced(name, on_gpu):
        yield
    if on_gpu:
        torch.cuda.synchronize()
    record: dict[str, Any] = {
        "phase": name,
        "call": _calls[name],
        "rank": int(os.environ.get("RANK", "0")),
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "resident_bytes": resident,
    }
    if tracker is not None:
        record["peak_bytes"] = tracker.peak
    if data is not None:
        record |= _size(data)
    with open(path, "a", encoding="utf-8") as log:
        log.write(json.dumps(record) + "\n")


def wrap(engine_class: type) -> None:
    """Measure what a class of verl engines (and every subclass) does in a step, on whatever device it runs.

    Args:
        engine_class: Has `forward_backward_batch`, `optimizer_step` and, on its instances, `engine_config`.
    """
    forward_backward, step = engine_class.forward_backward_batch, engine_class.optimizer_step  # type: ignore[attr-defined]

    @functools.wraps(forward_backward)
    def measured_batch(self: Any, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        name = phase_name(reference=self.engine_config.forward_only, forward_only=forward_only)
        with phase(name, self.module, data, getattr(self, "optimizer", None)):
            return forward_backward(self, data, loss_function, forward_only)

    @functools.wraps(step)
    def measured_step(self: Any) -> Any:
        with phase("optimizer", self.module, optimizer=self.optimizer):
            return step(self)

    engine_class.forward_backward_batch = measured_batch  # type: ignore[attr-defined]
    engine_class.optimizer_step = measured_step  # type: ignore[attr-defined]


def _size(data: Any) -> dict[str, int]:
    """Rows of a call's jagged `input_ids`, and the work that they ask for (`recast_cli.core.cost.Work`).

    Neither padding within a row nor the rows that verl adds to fill a batch (nothing in them is learned)
    count; `padding_rows` says how many of the latter there were. A prompt that is shared counts once, also
    where its rows do not fit in one micro-batch.
    """
    lengths_B = data["input_ids"].offsets().diff()
    filled_B = torch.stack([mask.sum() for mask in data["loss_mask"].unbind()]) > 0
    rows = filled_B.nonzero().flatten().tolist()
    work = Work.of_rows(lengths_B[rows].tolist())
    if tu.get_non_tensor_data(data=data, key=SHARED, default=False):
        tokens = data["input_ids"].cpu().unbind()
        work = _shared_work([tokens[row] for row in rows], data["responses"].offsets().diff()[rows])
    return {"rows": len(rows), "padding_rows": len(filled_B) - len(rows), **asdict(work)}


def _shared_work(tokens: list[torch.Tensor], responses_B: torch.Tensor) -> Work:
    if not tokens:  # nothing but rows that fill a batch
        return Work(0, 0, 0)
    lengths_B, ends_B = np.array([len(row) for row in tokens]), responses_B.cpu().numpy()
    total = Work(0, 0, 0)
    for rows in rows_by_prompt(torch.cat(tokens).numpy(), lengths_B, ends_B):
        total += Work.of_group(int(lengths_B[rows[0]] - ends_B[rows[0]]), ends_B[rows].tolist())
    return total
