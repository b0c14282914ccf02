"""Which models a tree of answers can be walked in: those in which a token sees exactly what its mask and its
position say. In any other the walk would give wrong probabilities, mostly without an error.
"""

from __future__ import annotations

import inspect
from typing import Any

# Kinds of layers in a config. The windowed ones are told by their caches: some models name a window they
# do not use.
FULL_ATTENTION = frozenset({"full_attention", "attention", "global"})
_ATTENTION = FULL_ATTENTION | {"sliding_attention", "chunked_attention"}


def attention_of(model: Any) -> str:
    """Name of the attention, `eager` where a model does not say."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager"


def require_walkable(model: Any) -> None:
    """Refuse a model by its attention, its signature and its config.

    Raises:
        ValueError: saying what the model has and what is needed.
    """
    if attention_of(model) not in ("sdpa", "eager"):
        raise ValueError(
            f"attention {attention_of(model)!r} takes no mask per token; load the model with 'sdpa'"
        )
    require_layers(model, _ATTENTION, "constrained decoding")


def require_layers(model: Any, kinds: frozenset[str], purpose: str) -> None:
    """Refuse a model that counts positions itself, or has layers of another kind than `kinds`.

    Raises:
        ValueError: saying what the model has and what `purpose` needs.
    """
    config = getattr(model, "config", None)
    if "position_ids" not in inspect.signature(model.forward).parameters or getattr(config, "alibi", False):
        raise ValueError(
            f"{type(model).__name__} counts positions itself; {purpose} needs a model that takes position_ids"
        )
    found = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ()
    strange = sorted(set(found) - kinds)
    if strange:
        raise ValueError(
            f"the model has layers of kind {strange[0]!r}; {purpose} needs full attention in all"
        )


def require_whole_cache(cache: Any) -> None:
    """Refuse what a model has cached of its prompts if any of it is missing.

    Raises:
        ValueError: no cache, or one with sliding windows.
    """
    if cache is None:
        raise ValueError("the model returned no key-value cache")
    # A windowed cache drops prompt tokens, and a mask of ours replaces the model's window.
    if any(getattr(cache, "is_sliding", ())):
        raise ValueError("the model has sliding-window attention; constrained decoding needs full attention")
