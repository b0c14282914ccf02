"""The plugin's own settings in a verl config: of the method (`+algorithm.recast.KEY=VALUE`) and of rollouts
(`+actor_rollout_ref.rollout.custom.KEY=VALUE`)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

ESTIMATOR = "recast"  # algorithm.adv_estimator
TRAINER_MODE = "recast"  # trainer.v1.trainer_mode


class Arm(NamedTuple):
    """What happens to the groups of a step.

    Attributes:
        repairs: An all-zero group gets an anchor.
        contrasts: Only i+ and i- are kept, with the advantages of estimator `recast`; else every rollout
            is, and verl's own estimator (grpo, rloo, ...) normalises over the group.
    """

    repairs: bool
    contrasts: bool


# The paper's ablation (arXiv 2604.22169): both parts, one of them, none.
ARMS = {
    "recast": Arm(repairs=True, contrasts=True),
    "repair-only": Arm(repairs=True, contrasts=False),
    "contrast-only": Arm(repairs=False, contrasts=True),
    "stock": Arm(repairs=False, contrasts=False),
}
CHOICES = {
    "arm": tuple(ARMS),
    "tie_rule": ("seeded", "most-probable"),
    "anchor_rule": ("seeded", "first"),
    "loss_scale": ("kept", "full-batch"),
}


@dataclass(frozen=True)
class RecastSettings:
    """ReCast's knobs; the defaults are the paper's, and ours where it is silent.

    Attributes:
        arm: Key of `ARMS`.
        w_positive: Advantage of the strongest positive.
        w_negative: Minus the advantage of the hardest negative; 0 learns from the positive alone.
        tie_rule: Which of equally hard negatives is kept: `seeded` hash, or the `most-probable` one.
        anchor_rule: Which of several targets an anchor is built from: drawn by the seed (`seeded`), or the
            `first` of the ground truth.
        loss_scale: What the loss is averaged over: the rows that the actor receives (`kept`), or the whole
            groups as if the dropped rollouts were there with zero advantages (`full-batch`).
        seed: Seed of tie-breaking, of drawn targets and of the rollouts.
    """

    arm: str = "recast"
    w_positive: float = 1.0
    w_negative: float = 1.0
    tie_rule: str = "seeded"
    anchor_rule: str = "seeded"
    loss_scale: str = "kept"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("w_positive", "w_negative"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"algorithm.recast.{name} is {getattr(self, name)}, needs a number >= 0")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"algorithm.recast.{name} is {getattr(self, name)}, needs one of {', '.join(known)}"
                )

        if not self.contrasts and (self.w_positive, self.w_negative) != (1, 1):
            raise ValueError(
                f"algorithm.recast.w_positive is {self.w_positive} and w_negative {self.w_negative}, "
                f"arm {self.arm} needs both 1: they weigh the pair, which it does not select"
            )

    @property
    def repairs(self) -> bool:
        return ARMS[self.arm].repairs

    @property
    def contrasts(self) -> bool:
        return ARMS[self.arm].contrasts

    @classmethod
    def from_algorithm(cls, algorithm: Any) -> RecastSettings:
        """Read the section of a verl `algorithm` config (mapping or None); unknown keys are errors."""
        return _read(cls, "algorithm.recast", None if algorithm is None else algorithm.get("recast", None))


SAMPLINGS = ("iid", "without-replacement", "beam")


@dataclass(frozen=True)
class RolloutSettings:
    """What our rollout engines and agent loop read of `rollout.custom`.

    Attributes:
        tokenizer: Folder of `recast build-tokenizer`.
        catalogue: In its place, a catalogue made elsewhere (see `catalogue_file`).
        answer_prefix: What such a model writes between the generation prompt and the first code.
        sampling: How a group is drawn.
        exclude_history: No rollout answers an item of its row's `extra_info.history`.
        masked_actor: Log-probs of actor and reference are those over the trie.
        share_prompt: Actor and reference read the prompt of a group once.
        on_policy: Old log-probs come out of the update's own forward pass.
        token_budget: Most tokens that the SID engine reads at once; 0 leaves it the choice.
        log: File that gets a JSON line per batch of prompts: the statistics of its groups, a hash of them.
        replay: Recording to answer from (`replay.py`).
    """

    tokenizer: str | None = None
    catalogue: str | None = None
    answer_prefix: str = ""
    sampling: str = "iid"
    exclude_history: bool = False
    masked_actor: bool = False
    share_prompt: bool = False
    on_policy: bool = False
    token_budget: int = 0
    log: str | None = None
    replay: str | None = None

    def __post_init__(self) -> None:
        prefix = "actor_rollout_ref.rollout.custom"
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"{prefix}.sampling is {self.sampling!r}, needed one of {', '.join(SAMPLINGS)}")
        if self.exclude_history and self.catalogue:
            raise ValueError(
                f"{prefix}.exclude_history needs tokenizer, found catalogue={self.catalogue}: a row's "
                "history counts the items of a tokenizer folder"
            )

    @classmethod
    def from_custom(cls, custom: Any) -> RolloutSettings:
        """Read `rollout.custom` (mapping or None); unknown keys are errors."""
        return _read(cls, "actor_rollout_ref.rollout.custom", custom)


_Settings = TypeVar("_Settings")


def _read(cls: type[_Settings], prefix: str, section: Mapping[str, Any] | None) -> _Settings:
    section = section or {}
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(section) - known)
    if unknown:
        raise ValueError(f"{prefix} has unknown key {unknown[0]!r}, known: {sorted(known)}")
    kinds = get_type_hints(cls)
    for key in section:
        _require_kind(f"{prefix}.{key}", section[key], kinds[key])
    return cls(**{key: section[key] for key in section})


def _require_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of another type than its field has; a whole number is a number too."""
    types = set(get_args(kind) or (kind,))
    types |= {int} if float in types else set()
    if type(value) not in types:
        wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise ValueError(
            f"{name} is {value!r}, needs {next(wanted[t] for t in (float, *wanted) if t in types)}"
        )


def num_threads() -> int:
    """`RECAST_THREADS`, torch threads of a worker; 0 where it is not set, and torch decides.

    Raises:
        ValueError: it is no whole number.
    """
    text = os.environ.get("RECAST_THREADS", "0")
    if not text.isdecimal():
        raise ValueError(f"RECAST_THREADS is {text!r}, needs a whole number")
    return int(text)
