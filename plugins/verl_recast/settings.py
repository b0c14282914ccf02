"""The plugin's own settings, read from `algorithm.recast` of a verl config
(`+algorithm.recast.KEY=VALUE`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class RecastSettings:
    """ReCast's knobs; the defaults are the paper's.

    Attributes:
        w_positive: Advantage of the strongest positive.
        w_negative: Minus the advantage of the hardest negative; 0 learns from the positive alone.
        seed: Seed of tie-breaking and of the rollouts.
    """

    w_positive: float = 1.0
    w_negative: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("w_positive", "w_negative"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"algorithm.recast.{name} is {getattr(self, name)}, needs a number >= 0")

    @classmethod
    def from_algorithm(cls, algorithm: Any) -> RecastSettings:
        """Read the section of a verl `algorithm` config (mapping or None); unknown keys are errors."""
        section: Mapping[str, Any] = {}
        if algorithm is not None:
            section = algorithm.get("recast", None) or {}
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(section) - known)
        if unknown:
            raise ValueError(f"algorithm.recast has unknown key {unknown[0]!r}, known: {sorted(known)}")
        return cls(**{key: section[key] for key in section})
