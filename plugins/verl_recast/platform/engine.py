"""verl's FSDP engine on the CPU platform.

One rank runs the plain module: FSDP1 cannot run there (it insists on an accelerator for its state sync) and
FSDP2's reference model wants pinned memory.
"""

from __future__ import annotations

import torch
from verl.utils import torch_functional
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from verl_recast.platform import micro_batches
from verl_recast.platform.log_probs import log_probs_from_logits

# Both names are looked up at each call, and in a process on the CPU platform this is the only engine.
transformer_impl.prepare_micro_batches = micro_batches.prepare  # type: ignore[assignment]
torch_functional.logprobs_from_logits_v2 = log_probs_from_logits


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
