"""How a semantic ID is spelled in text, as OpenOneRec does: `<|sid_begin|><s_a_1><s_b_7><s_c_0><|sid_end|>`.

One tag is one token; levels are a, b, c, ... MiniOneRec's spelling, `<a_1><b_7><c_0>`, is read, not written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SID_BEGIN = "<|sid_begin|>"
SID_END = "<|sid_end|>"
LEVELS = "abcdefghijklmnopqrstuvwxyz"
_CODE = re.compile(r"<(?:s_)?([a-z])_(0|[1-9]\d*)>")


def code_token(level: int, code: int) -> str:
    """Token of one code, e.g. `<s_b_7>` for code 7 of level 1."""
    return f"<s_{LEVELS[level]}_{code}>"


def read_code(token: str) -> tuple[int, int]:
    """Level and code of a code token, e.g. (1, 7) for `<s_b_7>` or `<b_7>`; (-1, -1) for any other token."""
    match = _CODE.fullmatch(token)
    return (LEVELS.index(match[1]), int(match[2])) if match else (-1, -1)


def spell(codes: Sequence[int], *, enclose: bool = True) -> str:
    """Text of one semantic ID; without `enclose`, its codes only."""
    text = "".join(code_token(level, int(code)) for level, code in enumerate(codes))
    return f"{SID_BEGIN}{text}{SID_END}" if enclose else text


def parse(text: str) -> tuple[int, ...]:
    """Codes of one spelled semantic ID, enclosed or not; the inverse of `spell`.

    Raises:
        ValueError: anything but one well-formed semantic ID.
    """
    inner = text
    if text.startswith(SID_BEGIN) and text.endswith(SID_END):
        inner = text[len(SID_BEGIN) : -len(SID_END)]
    matches = list(_CODE.finditer(inner))
    levels = [LEVELS.index(match[1]) for match in matches]
    whole = "".join(match[0] for match in matches) == inner
    if not matches or not whole or levels != list(range(len(levels))):
        raise ValueError(f"not a semantic ID: {text!r}")
    return tuple(int(match[2]) for match in matches)


def find_all(text: str) -> list[tuple[int, ...]]:
    """Every semantic ID in a free text, in order, as tuples of codes.

    A semantic ID is a run of code tokens of levels a, b, c, ... in order with nothing between them. A run
    that breaks off is read as far as it goes; whoever knows L leaves out what is shorter.
    """
    found: list[tuple[int, ...]] = []
    run: list[int] = []
    end = -1
    for match in _CODE.finditer(text):
        level = LEVELS.index(match[1])
        if level == len(run) and (not run or match.start() == end):
            run.append(int(match[2]))
        else:
            if run:
                found.append(tuple(run))
            run = [int(match[2])] if level == 0 else []
        end = match.end()
    if run:
        found.append(tuple(run))
    return found
