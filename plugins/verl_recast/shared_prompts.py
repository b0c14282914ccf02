"""Actor and reference that read the prompt of a group once:
`+actor_rollout_ref.rollout.custom.share_prompt=true`; how it is done: shared_engine.py."""

from __future__ import annotations

from typing import Any

from verl_recast.actor_options import extend_workers, require_plain_engine

OPTION = "share_prompt"
SHARED = "recast_shared_prompts"  # set in the data of an engine that shares


def require_shareable(worker: Any) -> None:
    """Refuse settings under which rows are not read by the engine's own plain forward call.

    Args:
        worker: verl's `actor_rollout_ref` config.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    actor = worker.actor
    padded = actor.get("pad_to_length", False) or (actor.get("fsdp_config") or {}).get("pad_to_length", False)
    needed = "False (packed rows have no such length)"
    require_plain_engine(worker, OPTION, [(not padded, "actor.pad_to_length", padded, needed)])


def share_workers(worker_class: Any) -> None:
    """Make verl's actor and reference workers share prompts where the rollout config asks for it.

    Wraps what `masked_actor.mask_workers` has wrapped: the mask sees the answers as this leaves them.
    """
    extend_workers(worker_class, OPTION, require_shareable, _share)


def _share(_: Any, worker: Any) -> None:
    from verl_recast.shared_engine import share_engine

    share_engine(worker.engine)
