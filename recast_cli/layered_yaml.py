"""YAML files that extend one another, with `key=value` overrides on top."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recast_cli.errors import RecipeError
from recast_cli.nested import dotted

VERL = ("verl", "verl_sft")  # sections of verl's own keys, which have dots
_COMMENT = re.compile(r"\s#")
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys: the first of two `rl:` sections would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<: *base`
        keys = [self.construct_object(key, deep=True) for key in own]
        repeated = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
        if repeated is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {repeated!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    """Raises yaml.YAMLError for everything that is no YAML value, whatever the library raises."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as exc:  # a date like 2024-99-99, an endless number, deep nesting
        raise yaml.YAMLError(str(exc)) from exc


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise RecipeError(f"{path} extends itself", "remove the circular `extends:`")
    try:
        content = _yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"recipe {path} does not exist", "see the recipes/ folder for examples") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        problem = " ".join(str(exc).split())
        raise RecipeError(f"recipe {path} cannot be read: {problem}", "it must be a YAML mapping") from exc
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} holds a {type(content).__name__}, needed a mapping", "see recipes/")
    parent = content.pop("extends", None)
    for name in VERL:  # or a nested key of one layer and a dotted one of another would both stand
        if isinstance(content.get(name), dict):
            content[name] = dotted(content[name])
    return (
        content
        if parent is None
        else _merge(_read(path.parent / str(parent), (*seen, path.resolve())), content)
    )


def _override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override {text!r} is not of the form key=value", "for example rl.steps=20")
    if _COMMENT.search(value) and value.lstrip()[:1] not in tuple("'\"[{"):
        value = yaml.safe_dump(value.strip())  # a command line has no comments: out=runs/a #1 is all of it
    try:
        nested: Any = _yaml(value) if value else None
    except yaml.YAMLError as exc:
        raise RecipeError(f"override {text!r} has an unreadable value", "quote it as YAML") from exc
    if _EXPONENT.fullmatch(value.strip()):  # YAML 1.1 reads 1e-3 as text
        nested = float(value)
    parts = key.strip().split(".")
    if parts[0] in VERL and len(parts) > 1:
        return {parts[0]: dotted({".".join(parts[1:]): nested})}
    if parts[0] in VERL and isinstance(nested, dict):
        nested = dotted(nested)
    for part in reversed(parts):
        nested = {part: nested}
    return nested


def read_layers(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The mapping of a file, over that of the file it extends, under the overrides.

    Raises:
        RecipeError: a file or an override that cannot be read.
    """
    content = _read(path)
    for text in overrides:
        content = _merge(content, _override(text))
    return content
