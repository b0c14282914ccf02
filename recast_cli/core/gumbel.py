"""Gumbel noise as a function of counters, and the step that makes it a sample of a tree from the root down.

Maddison et al., arXiv 1411.0030; Kool et al., arXiv 1903.06059, section 4. Everything is float64, on the
device of its input.
"""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN, _FIRST, _SECOND = (
    constant - (1 << 64) for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def as_signed(keys: np.ndarray) -> torch.Tensor:
    """uint64 hashes as int64 tensors with the same bits: torch has no arithmetic on uint64."""
    return torch.from_numpy(np.ascontiguousarray(keys, dtype=np.uint64).view(np.int64))


def extend_hash(state: torch.Tensor, *counters: int | torch.Tensor) -> torch.Tensor:
    """Hash further counters onto `state`: the bits of `seeding.hash64`, on any device; shapes broadcast."""
    for counter in counters:
        value = torch.as_tensor(counter, dtype=torch.int64, device=state.device)
        state = _mix(state + _GOLDEN + _mix(value + _GOLDEN))
    return state


def gumbel(keys: torch.Tensor) -> torch.Tensor:
    """A standard Gumbel draw of each hash; finite for every hash."""
    # 52 bits and a half: the uniform is a float64 exactly, and neither 0 nor 1.
    uniforms = (_shift(keys, 12).double() + 0.5) * 2.0**-52
    return -(-uniforms.log()).log()


def with_maximum(perturbed_RK: torch.Tensor, maximum_R: torch.Tensor) -> torch.Tensor:
    """Perturbed log-probs of siblings, moved so that they are as if drawn with the given maximum.

    -log(exp(-maximum) - exp(-max(row)) + exp(-perturbed)): monotone, and the largest becomes the maximum.

    Args:
        perturbed_RK: log-prob plus Gumbel noise of K siblings; -inf marks none, and stays. Some are finite.
        maximum_R: Perturbed log-prob of their parent; finite.

    Returns:
        float64 (R, K).
    """
    gap = perturbed_RK - perturbed_RK.amax(dim=-1, keepdim=True)
    maximum = maximum_R[..., None]
    # Kool et al., appendix B.3: no difference of exponentials that could overflow or cancel.
    shifted = maximum - perturbed_RK + torch.log(-torch.expm1(gap))
    return maximum - shifted.clamp(min=0) - torch.log1p(torch.exp(-shifted.abs()))


def _mix(state: torch.Tensor) -> torch.Tensor:
    """As in seeding.py; int64 products wrap round like uint64 ones."""
    state = (state ^ _shift(state, 30)) * _FIRST
    state = (state ^ _shift(state, 27)) * _SECOND
    return state ^ _shift(state, 31)


def _shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that fills with zeros: torch repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
