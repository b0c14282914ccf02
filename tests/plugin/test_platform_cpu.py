"""The CPU platform answers everything verl may ask."""

from __future__ import annotations

import inspect
import mmap

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from verl_recast.platform.cpu import PlatformCPU, fix_process_group_backend, is_selected


def test_implements_every_abstract_member_of_verls_interface() -> None:
    assert PlatformCPU.__abstractmethods__ == frozenset()
    assert len(PlatformBase.__abstractmethods__) > 15  # the check above is not empty
    for name in PlatformBase.__abstractmethods__:
        ours, theirs = getattr(PlatformCPU, name), getattr(PlatformBase, name)
        if callable(ours):
            needed = set(inspect.signature(theirs).parameters)
            assert needed <= set(inspect.signature(ours).parameters), name


def test_is_registered_but_never_detected() -> None:
    assert PlatformRegistry.get("cpu") is PlatformCPU
    assert PlatformCPU().is_available()
    assert not PlatformCPU().is_platform_available(use_smi_check=True)


def test_device_and_random_state() -> None:
    platform = PlatformCPU()
    assert platform.device_name == "cpu"
    assert platform.communication_backend_name() == "gloo"
    assert torch.ones(1).to(platform.current_device()).device == torch.device("cpu")
    platform.manual_seed_all(5)
    first = torch.rand(3)
    module = platform.device_module
    module.manual_seed(5)
    state = module.get_rng_state()
    assert torch.equal(torch.rand(3), first)
    module.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_memory_figures_are_those_of_the_process() -> None:
    module = PlatformCPU().device_module
    before = module.memory_allocated()
    assert 10 << 20 < before < 1 << 40
    # Pages of its own: an allocator may have that much at hand from tests before.
    block = mmap.mmap(-1, 64 << 20)
    for page in range(0, len(block), mmap.PAGESIZE):
        block[page] = 1
    after = module.memory_allocated()
    assert after - before > 60 << 20
    assert module.max_memory_allocated() >= after
    block.close()
    module.reset_peak_memory_stats()
    assert module.max_memory_allocated() < after
    available, total = module.mem_get_info()
    assert 0 < available <= total


def test_is_selected_by_the_environment_alone(monkeypatch) -> None:
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    assert not is_selected()
    monkeypatch.setenv("VERL_PLATFORM", " CPU ")
    assert is_selected()


def test_other_backends_pass_through_the_process_group_fix(monkeypatch) -> None:
    import torch.distributed as dist

    calls = []

    def record(*args, **kwargs):  # torch's own function would want a rendezvous
        calls.append((args, kwargs))

    monkeypatch.setattr(dist, "init_process_group", record)
    fix_process_group_backend()
    fix_process_group_backend()  # wraps once
    dist.init_process_group(backend="cpu:gloo,cpu:gloo", rank=0)
    dist.init_process_group(backend="cpu:gloo,cuda:nccl")
    dist.init_process_group("gloo", world_size=2)
    assert calls == [
        ((), {"backend": "cpu:gloo", "rank": 0}),
        ((), {"backend": "cpu:gloo,cuda:nccl"}),
        (("gloo",), {"world_size": 2}),
    ]
