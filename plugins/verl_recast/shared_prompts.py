"""Actor and reference that read the prompt of a group once:
`+actor_rollout_ref.rollout.custom.share_prompt=true`; how it is done: shared_engine.py."""

from __future__ import annotations

import functools
from typing import Any

from verl_recast.masked_actor import of_engine


def wanted(worker: Any) -> bool:
    """Whether an `actor_rollout_ref` config asks for shared prompts."""
    return bool((worker.rollout.get("custom") or {}).get("share_prompt", False))


def require_shareable(worker: Any) -> None:
    """Refuse settings under which rows are not read by the engine's own plain forward call.

    Args:
        worker: verl's `actor_rollout_ref` config.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    actor = worker.actor
    fused, grouped = actor.get("use_fused_kernels", False), actor.get("use_prefix_grouper", False)
    padded = actor.get("pad_to_length", False) or (actor.get("fsdp_config") or {}).get("pad_to_length", False)
    for ok, name, found, needed in (
        (not fused, "model.use_fused_kernels", fused, "False (a fused kernel reads labels with every token)"),
        (not grouped, "actor.use_prefix_grouper", grouped, "False (it shares prompts its own way)"),
        (not padded, "actor.pad_to_length", padded, "False (packed rows have no such length)"),
        *of_engine("actor", actor),
        *of_engine("ref", worker.get("ref") or {}),
    ):
        if not ok:
            raise ValueError(
                f"rollout.custom.share_prompt: actor_rollout_ref.{name} is {found}, needs {needed}"
            )


def share_workers(worker_class: Any) -> None:
    """Make verl's actor and reference workers share prompts where the rollout config asks for it.

    Wraps what `masked_actor.mask_workers` has wrapped: the mask sees the answers as this leaves them.
    """
    stock = worker_class.init_model

    @functools.wraps(stock)  # with verl's own marks of a method that is called on every rank
    def init_model(self: Any) -> Any:
        if not wanted(self.config):
            return stock(self)
        require_shareable(self.config)
        built = stock(self)
        from verl_recast.shared_engine import share_engine

        for role in ("actor", "ref"):
            if role in self.role:
                share_engine(getattr(self, role).engine)
        return built

    worker_class.init_model = init_model
