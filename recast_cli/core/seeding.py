"""Counter-based random numbers: the same (seed, step, row, rollout) gives the same draw in every run.

Nothing here has state, so results depend neither on arrival order nor on what else shares a batch, and a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), elementwise on uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hash64(*counters: int | np.ndarray) -> np.ndarray:
    """Hash integer counters to uint64, elementwise over their broadcast shape; order matters."""
    state: np.ndarray = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for counter in counters:
            value = np.asarray(counter, dtype=np.int64).astype(np.uint64)
            state = _mix(state + _GOLDEN + _mix(value + _GOLDEN))
    return state


def uniforms(seed: int, step: int, index_B: np.ndarray, num_rollouts: int, num_levels: int) -> np.ndarray:
    """Uniform numbers in [0, 1), one for each sampled code.

    Args:
        seed: Seed of the run.
        step: Global step.
        index_B: The row's own index (`extra_info.index`), never a random uid.
        num_rollouts: G.
        num_levels: L.

    Returns:
        float64 array of shape (B, G, L).
    """
    rows = np.asarray(index_B, dtype=np.int64)[:, None, None]
    rollouts = np.arange(num_rollouts, dtype=np.int64)[None, :, None]
    levels = np.arange(num_levels, dtype=np.int64)[None, None, :]
    # The top 53 bits fill a float64 mantissa exactly, so 1.0 can never come out.
    return (hash64(seed, step, rows, rollouts, levels) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def tie_keys(seed: int, step: int, index_B: np.ndarray, num_rollouts: int) -> np.ndarray:
    """Keys that break ties inside a group without favouring a position: uint64 array of shape (B, G)."""
    rows = np.asarray(index_B, dtype=np.int64)[:, None]
    rollouts = np.arange(num_rollouts, dtype=np.int64)[None, :]
    return hash64(seed, step, rows, rollouts)
