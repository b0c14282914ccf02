"""Where a job runs: device, threads, and the variables of its processes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from recast_cli.errors import EnvironmentFault, RecipeError
from recast_cli.host import cpu_count, require_threads
from recast_cli.recipe import Recipe


def resolve_device(recipe: Recipe) -> str:
    """`cuda` if asked for, or if a driver is present and the recipe says `auto`; else `cpu`.

    Raises:
        RecipeError: several GPUs asked for on the CPU platform, which runs one worker.
    """
    device = recipe.device
    if device == "auto":
        device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    if device == "cpu" and recipe.num_gpus > 1:
        raise RecipeError(
            f"num_gpus is {recipe.num_gpus}, needed 1: device {recipe.device} is the CPU and runs one worker",
            "set threads to give it more cores",
        )
    return device


def packs_rows(device: str) -> bool:
    """True if rows can be packed without padding, which takes flash attention's variable-length kernels."""
    return device == "cuda" and importlib.util.find_spec("flash_attn") is not None


def num_threads(recipe: Recipe) -> int:
    """Torch threads of a worker: verl runs rollout and actor in turns, so each may have every core."""
    return recipe.threads or cpu_count()


def require_cores(recipe: Recipe) -> None:
    """Refuse more threads than this machine's cores can bear; on a GPU the recipe's number is not used.

    Raises:
        RecipeError: naming the most.
    """
    if resolve_device(recipe) == "cpu":
        require_threads(num_threads(recipe))


def require_gpu(recipe: Recipe) -> None:
    """Refuse `device: cuda` where torch sees too few GPUs: verl finds out half a minute later.

    Raises:
        RecipeError: naming how many there are.
    """
    if resolve_device(recipe) != "cuda":
        return
    import torch

    found = torch.cuda.device_count()
    if found < recipe.num_gpus and not os.environ.get("RAY_ADDRESS"):
        raise RecipeError(
            f"device is cuda with num_gpus {recipe.num_gpus}, torch sees {found} GPUs here",
            "set device=cpu, or num_gpus to what there is",
        )


def require_engine(recipe: Recipe) -> None:
    """Refuse rollouts from an engine that is not installed.

    Raises:
        EnvironmentFault: naming how to get it.
    """
    if recipe.rollout == "vllm" and importlib.util.find_spec("vllm") is None:
        raise EnvironmentFault(
            "rollout is vllm, which is not installed here",
            "in a checkout of recast: pip install '.[vllm]' with a GPU, else make setup-vllm; or rollout=sid",
        )


def environment(recipe: Recipe, metrics: Path) -> dict[str, str]:
    """Variables that verl's processes need on top of the caller's."""
    variables = {
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "HYDRA_FULL_ERROR": "1",
    }
    if resolve_device(recipe) == "cpu":
        threads = str(num_threads(recipe))
        variables |= {
            "VERL_PLATFORM": "cpu",
            "OMP_NUM_THREADS": threads,
            "RECAST_THREADS": threads,
            # Threads that spin while they wait take the cores from whichever worker is at work (see main.py).
            "OMP_WAIT_POLICY": "PASSIVE",
            # glibc hands large tensors back to the system when they die, and each new one then costs a page
            # fault per 4 KiB: a quarter of a forward pass (docs/log.md). Elsewhere these have no meaning.
            "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
        }
        if recipe.rollout == "vllm":  # GiB; unset, vLLM takes half the memory of the machine
            variables["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    return variables
