"""Semantic IDs in token ids: found as the reward finds them in text, and swapped for the target's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from foreign import text_tokenizer

from recast_cli.core.spelling import find_all
from recast_cli.tokenizer.model import bare_tokenizer
from recast_cli.tokenizer.vocabulary import add_semantic_ids
from verl_recast.answers import AnswerReader

THOUGHT = "think<|sid_begin|>"
TARGET = "<s_a_0><s_b_0><s_c_1>"
MISS = "<s_a_1><s_b_2><s_c_3>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Three levels of 4 codes; "think" stands for the text of a thought."""
    tokenizer = bare_tokenizer()
    add_semantic_ids(tokenizer, (4, 4, 4))
    tokenizer.add_tokens(["think"])
    return tokenizer


@pytest.fixture(scope="module")
def reader(tokenizer: Any) -> AnswerReader:
    return AnswerReader(tokenizer)


def ids(reader: AnswerReader, text: str) -> list[int]:
    text = text.replace("EOS", reader.tokenizer.eos_token)
    return reader.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("response", "anchor"),
    [
        (MISS, TARGET),
        (f"{MISS}EOS", f"{TARGET}EOS"),
        (f"{THOUGHT}{MISS}<|sid_end|>EOS", f"{THOUGHT}{TARGET}<|sid_end|>EOS"),
        # the last of two is the answer
        (f"{MISS}think<s_a_2><s_b_2><s_c_2>EOS", f"{MISS}think{TARGET}EOS"),
        # none: broken off, in another order, no code at all
        ("<s_a_1><s_b_2>EOS", f"{TARGET}EOS"),
        ("<s_b_2><s_a_1><s_c_3>EOS", f"{TARGET}EOS"),
        ("thinkthink", TARGET),
    ],
)
def test_an_anchor_keeps_what_stands_round_the_semantic_id(
    reader: AnswerReader, response: str, anchor: str
) -> None:
    assert reader.anchor(ids(reader, response), (0, 0, 1)) == ids(reader, anchor)


def test_a_target_whose_codes_are_no_tokens_is_refused(reader: AnswerReader) -> None:
    assert reader.target((0, 3, 1)) == ids(reader, "<s_a_0><s_b_3><s_c_1>")
    with pytest.raises(
        ValueError, match=r"target \(0, 7, 1\): .* no token for its code 7 of level b, needed <s_b_7>"
    ):
        reader.target((0, 7, 1))  # levels have 4 codes


def test_the_answer_is_the_one_that_the_reward_reads_from_text(reader: AnswerReader) -> None:
    rng = np.random.default_rng(0)
    words = ["think", "<|sid_begin|>", *(f"<s_{level}_{code}>" for level in "abc" for code in (0, 3))]
    held = 0
    for _ in range(500):
        text = "".join(rng.choice(words, rng.integers(0, 9)))
        expected = [codes for codes in find_all(text) if len(codes) == 3]
        found = reader.read([ids(reader, text)], 3).codes_NL[0].tolist()
        assert found == list(expected[-1] if expected else (-1, -1, -1)), text
        held += bool(expected)
    assert 20 < held < 480


def test_a_longer_run_of_codes_is_no_answer_and_a_padded_id_no_code(reader: AnswerReader) -> None:
    assert reader.find(ids(reader, MISS), 2) == -1
    beyond = len(reader.tokenizer) + 7
    assert reader.find([beyond, *ids(reader, MISS)], 3) == 1
    assert reader.find([], 3) == -1


def test_a_semantic_id_outside_the_catalogue_is_not_valid(reader: AnswerReader) -> None:
    responses = [ids(reader, text) for text in (MISS, TARGET, "<s_a_1><s_b_2>")]
    assert reader.read(responses, 3).valid_N.tolist() == [True, True, False]
    known = reader.read(responses, 3, frozenset({(0, 0, 1)}))
    assert known.valid_N.tolist() == [False, True, False]
    assert known.codes_NL.tolist() == [[1, 2, 3], [0, 0, 1], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("responses", "lends"),
    [
        # bare codes: a broken one needs nothing round it
        ([MISS, "<s_a_1><s_b_2>EOS", "<s_a_1>"], [True, True, True]),
        # with a thought, one that broke off has nothing to lend
        ([f"{THOUGHT}{MISS}EOS", "think", MISS], [True, False, True]),
        # nobody found an answer: what is longer than a bare one is a thought
        (["thinkthinkthinkthinkthinkthink", "<s_a_1>EOS"], [False, True]),
    ],
)
def test_who_can_lend_an_anchor_its_place(
    reader: AnswerReader, responses: list[str], lends: list[bool]
) -> None:
    assert reader.read([ids(reader, text) for text in responses], 3).lends_N.tolist() == lends


def test_a_vocabulary_of_minionerecs_spelling_gets_anchors_of_its_own() -> None:
    tokenizer = text_tokenizer(["<a_10>", "<a_2>", "<b_1>", "<b_3>", "<c_0>", "<c_7>"])
    reader = AnswerReader(tokenizer)
    response = ids(reader, "answer<a_2><b_3><c_7>EOS")
    assert reader.read([response], 3).codes_NL.tolist() == [[2, 3, 7]]
    anchor = reader.anchor(response, (10, 1, 0))
    assert anchor == ids(reader, "answer<a_10><b_1><c_0>EOS") and len(anchor) == 5
