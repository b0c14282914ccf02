"""The one prompt builder, for SFT windows, RL, evaluation and `recast recommend`.

A history is a list of chat messages, one per item. The chat template below, stored in the tokenizer, renders
each as `<|sid_begin|>codes<|sid_end|>` and the generation prompt as `<|sid_begin|>`, so that

- verl's stock multi-turn SFT data set learns the codes and the end token of every assistant message in one
  pass (it masks the generation prompt, here the begin token, at the head of each),
- an RL prompt is, token for token, a prefix of the SFT window in which its target is learned,
- the response is exactly the L code tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from recast_cli.core.spelling import SID_BEGIN, SID_END, parse, spell
from recast_cli.errors import DataError

# Both roles look alike: the role says only whether SFT learns the item.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '" + SID_BEGIN + "' + message['content'] + '" + SID_END + "' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + SID_BEGIN + "' -}}{%- endif -%}"
)

Message = dict[str, str]


def build_messages(sids: Sequence[str], learn_from: int | None = None) -> list[Message]:
    """The messages of a history or window, oldest item first.

    Args:
        sids: Semantic IDs as in `semantic_ids.parquet`: `<|sid_begin|><s_a_1><s_b_7><s_c_0><|sid_end|>`.
        learn_from: Items from this place on are learned (assistant); None: all are context, as in a prompt.

    Raises:
        DataError: a semantic ID is misspelt.
    """
    first_learned = len(sids) if learn_from is None else learn_from
    return [
        {"role": "assistant" if place >= first_learned else "user", "content": code_text(sid)}
        for place, sid in enumerate(sids)
    ]


@lru_cache(maxsize=1 << 20)
def code_text(sid: str) -> str:
    """The code tokens of a semantic ID without its begin and end: `<s_a_1><s_b_7><s_c_0>`.

    Raises:
        DataError: it is not spelt begin, levels a, b, c, ... once each in this order, end.
    """
    try:
        codes = parse(sid)
    except ValueError:
        codes = ()
    if not codes or spell(codes) != sid:
        raise DataError(
            f"{sid!r} is not a semantic ID, needed {SID_BEGIN}<s_a_i><s_b_j>...{SID_END}",
            "rerun recast build-tokenizer",
        )
    return spell(codes, enclose=False)
