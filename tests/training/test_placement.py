"""Device, threads and variables of a job."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from recast_cli.errors import EnvironmentFault, RecipeError
from recast_cli.training import placement


def test_more_threads_than_the_cores_can_bear_are_refused(make_recipe) -> None:
    placement.require_cores(make_recipe(threads=1))
    placement.require_cores(make_recipe())
    with pytest.raises(RecipeError, match=r"threads is 1000, needed 1 to \d+ on \d+ cores"):
        placement.require_cores(make_recipe(threads=1000))
    placement.require_cores(make_recipe(threads=1000, device="cuda"))


def test_environment_of_the_cpu(make_recipe) -> None:
    found = placement.environment(make_recipe(threads=3), Path("/x/metrics.jsonl"))
    assert found["VERL_PLATFORM"] == "cpu"
    assert found["VERL_FILE_LOGGER_PATH"] == "/x/metrics.jsonl"
    assert found["OMP_NUM_THREADS"] == found["RECAST_THREADS"] == "3"
    assert found["HF_HUB_OFFLINE"] == "1"
    assert all(isinstance(value, str) for value in found.values())
    every = placement.environment(make_recipe(), Path("m"))
    assert every["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


def test_environment_of_a_gpu_leaves_platform_and_threads_alone(make_recipe) -> None:
    found = placement.environment(make_recipe(device="cuda"), Path("m"))
    assert not {"VERL_PLATFORM", "OMP_NUM_THREADS", "RECAST_THREADS"} & found.keys()


def test_vllm_on_the_cpu_gets_a_small_cache_or_the_one_that_was_asked_for(
    make_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert placement.environment(make_recipe(rollout="vllm"), Path("m"))["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in placement.environment(make_recipe(), Path("m"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert placement.environment(make_recipe(rollout="vllm"), Path("m"))["VLLM_CPU_KVCACHE_SPACE"] == "4"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_named_before_anything_starts(make_recipe) -> None:
    placement.require_engine(make_recipe())
    with pytest.raises(EnvironmentFault, match="rollout is vllm, which is not installed here") as caught:
        placement.require_engine(make_recipe(rollout="vllm"))
    assert "make setup-vllm" in caught.value.hint


def test_device_auto_looks_for_a_driver(make_recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(device="auto")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert placement.resolve_device(recipe) == "cpu"
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert placement.resolve_device(recipe) == "cuda"
    assert placement.resolve_device(make_recipe(device="cpu")) == "cpu"


def test_the_cpu_runs_one_worker(make_recipe) -> None:
    with pytest.raises(RecipeError, match="num_gpus is 2, needed 1: device cpu is the CPU"):
        placement.resolve_device(make_recipe(num_gpus=2))
