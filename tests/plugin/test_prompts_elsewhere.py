"""Prompts of data made elsewhere: as stock verl reads them, up to where the first code comes next."""

from __future__ import annotations

from typing import Any

import pytest
from foreign import ITEMS, minionerec, openonerec, text_tokenizer
from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

from recast_cli.vocabulary import encode_prompts
from verl_recast.rollout.agent_loop import require_answer_next

BEGIN, END = "<|sid_begin|>", "<|sid_end|>"
MESSAGES = [{"role": "user", "content": "<s_a_2><s_b_3><s_c_10>"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return text_tokenizer([BEGIN, END, *(token for codes in ITEMS.values() for token in openonerec(codes))])


@pytest.mark.parametrize("options", [{}, {"brief": ":"}])
def test_a_prompt_is_stock_verls_and_then_the_answers_prefix(tokenizer: Any, options: dict[str, str]) -> None:
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3", chat_template_kwargs=options)
    stock = builder.build_initial_tokens(MESSAGES)
    assert encode_prompts(tokenizer, [MESSAGES], template_options=options) == [stock]
    begin = tokenizer.convert_tokens_to_ids(BEGIN)
    found = encode_prompts(tokenizer, [MESSAGES], template_options=options, answer_prefix=BEGIN)
    assert found == [[*stock, begin]]
    require_answer_next(tokenizer, found)
    with pytest.raises(
        ValueError, match=r"a prompt ends with '.*answer.*', .*set rollout.custom.answer_prefix"
    ):
        require_answer_next(tokenizer, [*found, stock])


def test_a_model_without_a_begin_token_may_answer_at_once() -> None:
    tokenizer = text_tokenizer([token for codes in ITEMS.values() for token in minionerec(codes)])
    require_answer_next(tokenizer, encode_prompts(tokenizer, [MESSAGES]))
