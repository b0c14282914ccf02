"""Nested mappings: their leaves by dotted key, sections of verl's configuration as overrides, differences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of a nested mapping."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dotted(values: dict[str, Any]) -> dict[str, Any]:
    """Overrides of verl as its command line has them, of sections that may be nested as YAML has them.

    A key that begins with `+`, which adds to verl's configuration, keeps its mapping; below a section the `+`
    moves to the front.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not (isinstance(value, dict) and value and key.isidentifier()):
            found[key] = value
            continue
        for path, leaf in flat({key: value}):
            added = "+" * path.count("+")
            found[added + path.replace("+", "")] = leaf
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any], most: int = 3) -> str:
    """Which keys of two nested mappings differ, and how, in one line."""
    there, here = dict(flat(found)), dict(flat(wanted))
    absent = object()
    names = [
        name
        for name in sorted(there.keys() | here.keys())
        if there.get(name, absent) != here.get(name, absent)
    ]
    shown = [
        f"{name} is {there.get(name, 'not set')} there, {here.get(name, 'not set')} here"
        for name in names[:most]
    ]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(shown) or "a key that this version does not know") + more
