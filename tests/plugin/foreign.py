"""A vocabulary and catalogues made elsewhere, in the forms of OpenOneRec and MiniOneRec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recast_cli.tokenizer.model import bare_tokenizer

# Codes of three items, two of which begin alike; code 0 of a level need not occur.
ITEMS = {"7": (12, 3, 7), "shoe": (2, 3, 10), "100": (2, 30, 7)}


def openonerec(codes: Iterable[int]) -> list[str]:
    return [f"<s_{level}_{code}>" for level, code in zip("abc", codes, strict=True)]


def minionerec(codes: Iterable[int]) -> list[str]:
    return [f"<{level}_{code}>" for level, code in zip("abc", codes, strict=True)]


def text_tokenizer(tokens: Iterable[str]) -> Any:
    """A tokenizer that knows a few words and then, in this order, the given tokens."""
    tokenizer = bare_tokenizer()
    tokenizer.add_tokens(["user", "answer", ":", *tokens])
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ m.role }}:{{ m.content }}{%- endfor %}"
        "{%- if add_generation_prompt %}answer:{%- if brief %}{{ brief }}{%- endif %}{%- endif %}"
    )
    return tokenizer
