"""verl's FSDP engine on the CPU platform.

One rank runs the plain module, more are sharded by FSDP2 over gloo (FSDP1 insists on an accelerator for its
state sync). verl keeps a sharded reference model in pinned memory, which only an accelerator has.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.utils import torch_functional
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_recast.platform import micro_batches
from verl_recast.platform.log_probs import log_probs_from_logits

# These names are looked up at each call, and in a process on the CPU platform this is the only engine.
transformer_impl.prepare_micro_batches = micro_batches.prepare  # type: ignore[assignment]
torch_functional.logprobs_from_logits_v2 = log_probs_from_logits
setattr(transformer_impl, "CPUOffloadPolicy", lambda **_: CPUOffloadPolicy(pin_memory=False))  # noqa: B010


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device="cpu")
class CPUEngine(FSDPEngineWithLMHead):
    """FSDPEngineWithLMHead without the wrap when there is nothing to shard."""

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        if torch.distributed.get_world_size() > 1:
            return super()._build_fsdp_module(module)
        precision = self.engine_config.mixed_precision or {}
        self._autocast_dtype = PrecisionType.to_dtype(precision.get("param_dtype", "fp32"))
        self.scaler = None
        return module
