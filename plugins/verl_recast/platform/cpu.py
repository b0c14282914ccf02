"""verl's platform interface for the CPU; select it with the environment variable `VERL_PLATFORM=cpu`.

verl calls a CUDA-like module for memory figures and a communication backend; torch.cpu has no memory
figures, so a small namespace fills them in from the process (resident set size).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase


def _resident_bytes(*_: Any) -> int:
    return psutil.Process().memory_info().rss


def _peak_resident_bytes(*_: Any) -> int:
    """High-water mark of resident memory (Linux VmHWM); falls back to the current figure elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return _resident_bytes()


def _reset_peak(*_: Any) -> None:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")  # proc(5): resets VmHWM to the current resident size
    except OSError:
        pass  # not Linux, or not permitted: the peak stays the process's own


def _device_module() -> ModuleType:
    """torch.cpu with the parts of torch.cuda that verl calls."""
    module = ModuleType("verl_recast.cpu_device")
    module.__dict__.update(
        {name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")}
    )

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def memory_info(*_: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    module.__dict__.update(
        memory_allocated=_resident_bytes,
        memory_reserved=_resident_bytes,
        max_memory_allocated=_peak_resident_bytes,
        max_memory_reserved=_peak_resident_bytes,
        reset_peak_memory_stats=_reset_peak,
        mem_get_info=memory_info,
        empty_cache=nothing,
        ipc_collect=nothing,
        set_per_process_memory_fraction=nothing,
        set_device=nothing,
        get_device_name=lambda *_: "cpu",
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
    )
    return module


class PlatformCPU(PlatformBase):
    """One CPU "device" per Ray accelerator slot (Ray is told `num_gpus=1`; nothing checks that it is a
    GPU)."""

    _module: ModuleType | None = None

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "generic"

    @property
    def device_module(self) -> ModuleType:
        if PlatformCPU._module is None:
            PlatformCPU._module = _device_module()
        return PlatformCPU._module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Never chosen by detection: a GPU job on a head node without GPUs must not fall back to the CPU.
        return False

    def current_device(self) -> Any:
        return torch.device("cpu")  # verl passes it to Tensor.to(); an index would mean cuda:0

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


def fix_process_group_backend() -> None:
    """Make verl's two process-group initialisers ask for `cpu:gloo` once.

    Both build `cpu:gloo,{device}:{backend}`, which on this platform repeats the device and is refused by
    torch.
    """
    import torch.distributed as dist

    if getattr(dist.init_process_group, "_recast_wrapped", False):
        return
    original = dist.init_process_group

    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "cpu:gloo,cpu:gloo":
            kwargs["backend"] = "cpu:gloo"
        return original(*args, **kwargs)

    init_process_group._recast_wrapped = True  # type: ignore[attr-defined]
    dist.init_process_group = init_process_group


def is_selected() -> bool:
    """True in a process that asked for the CPU platform."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
