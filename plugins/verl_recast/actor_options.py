"""Options of `actor_rollout_ref.rollout.custom` that change the engines of actor and reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Check = tuple[Any, str, Any, str]  # (holds, option, found, needed)


def wanted(worker: Any, option: str) -> bool:
    """Whether an `actor_rollout_ref` config asks for an option."""
    return bool((worker.rollout.get("custom") or {}).get(option, False))


def require_plain_engine(worker: Any, option: str, checks: Iterable[Check] = ()) -> None:
    """Refuse settings under which whole rows never become logits in the engine's own forward call.

    Args:
        worker: verl's `actor_rollout_ref` config.
        checks: What the option needs besides.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    actor, prefix = worker.actor, "actor_rollout_ref."
    fused, grouped = actor.get("use_fused_kernels", False), actor.get("use_prefix_grouper", False)
    all_checks = (
        *checks,
        (not fused, "model.use_fused_kernels", fused, "False (a fused kernel makes no logits)"),
        (not grouped, "actor.use_prefix_grouper", grouped, "False (it takes log-probs its own way)"),
        *_of_engine("actor", actor),
        *_of_engine("ref", worker.get("ref") or {}),
    )
    require(option, [(ok, prefix + name, found, needed) for ok, name, found, needed in all_checks])


def require(option: str, checks: Iterable[Check]) -> None:
    """Refuse the first check of an option that does not hold.

    Raises:
        ValueError: naming what does not fit, the value found and the value needed.
    """
    for ok, name, found, needed in checks:
        if not ok:
            raise ValueError(f"rollout.custom.{option}: {name} is {found}, needs {needed}")


def places_of_engine(part: str, section: Any) -> list[tuple[str, Any]]:
    """Name and config of both places where an option of an engine may stand."""
    return [(part, section), (f"{part}.fsdp_config", section.get("fsdp_config") or {})]


def _of_engine(part: str, section: Any) -> Iterator[Check]:
    """What the engine of the actor or of the reference must be."""
    strategy = section.get("strategy", "fsdp")
    yield strategy in ("fsdp", "fsdp2"), f"{part}.strategy", strategy, "fsdp or fsdp2"
    name = "ulysses_sequence_parallel_size"
    for prefix, place in places_of_engine(part, section):
        found = place.get(name, 1)
        yield found == 1, f"{prefix}.{name}", found, "1 (no rank has a whole answer)"


def extend_workers(
    worker_class: Any, option: str, require: Callable[[Any], None], change: Callable[[Any, Any], None]
) -> None:
    """Make verl's workers change their engines as they build them, where the rollout config asks for it.

    Args:
        require: Refuses a config that the option cannot work under.
        change: Called with the config and each of the workers of actor and reference.
    """
    stock = worker_class.init_model

    @functools.wraps(stock)  # with verl's own marks of a method that is called on every rank
    def init_model(self: Any) -> Any:
        if not wanted(self.config, option):
            return stock(self)
        require(self.config)
        built = stock(self)
        for role in ("actor", "ref"):
            if role in self.role:
                change(self.config, getattr(self, role))
        return built

    worker_class.init_model = init_model
