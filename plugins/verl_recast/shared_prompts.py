"""Actor and reference that read the prompt of a group once:
`+actor_rollout_ref.rollout.custom.share_prompt=true`; how it is done: shared_engine.py."""

from __future__ import annotations

from typing import Any

from verl_recast.actor_options import Check, extend_workers, places_of_engine, require_plain_engine

OPTION = "share_prompt"
SHARED = "recast_shared_prompts"  # set in the data of an engine that shares


def require_shareable(worker: Any) -> None:
    """Refuse settings under which rows are not read by the engine's own plain forward call.

    Args:
        worker: verl's `actor_rollout_ref` config.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    checks: list[Check] = []
    for part in ("actor", "ref"):
        for name, place in places_of_engine(part, worker.get(part) or {}):
            padded = place.get("pad_to_length", False)
            needed = "False (packed rows have no such length)"
            checks.append((not padded, f"{name}.pad_to_length", padded, needed))
    require_plain_engine(worker, OPTION, checks)


def share_workers(worker_class: Any) -> None:
    """Make verl's actor and reference workers share prompts where the rollout config asks for it.

    Wraps what `masked_actor.mask_workers` has wrapped: the mask sees the answers as this leaves them.
    """
    extend_workers(worker_class, OPTION, require_shareable, _share)


def _share(_: Any, worker: Any) -> None:
    from verl_recast.shared_engine import share_engine

    share_engine(worker.engine)
