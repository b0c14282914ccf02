"""Log-probabilities of tokens on the CPU.

Without flash attention verl 0.9.1 takes one `logsumexp` per row of the logits to save memory. The rows it
passes are single tokens, so a batch of 35,000 tokens pays 35,000 calls each way. Blocks of tokens cost the
same memory within a constant.
"""

from __future__ import annotations

import torch

BLOCK_TOKENS = 1024


def log_probs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[label] of every token.

    Args:
        logits: Shape (..., V); half precision is widened block by block.
        labels: Shape (...), token ids.

    Returns:
        Shape (...), at least float32.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    blocks = logits.reshape(-1, logits.shape[-1]).split(BLOCK_TOKENS)
    normaliser = torch.cat([torch.logsumexp(block.to(dtype), dim=-1) for block in blocks])
    return torch.gather(logits, -1, labels.unsqueeze(-1)).squeeze(-1) - normaliser.view(labels.shape)
