"""Spelling and token ids."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recast_cli.core.spelling import code_token, parse, spell
from recast_cli.errors import ArtifactError
from recast_cli.tokenizer.model import bare_tokenizer
from recast_cli.tokenizer.vocabulary import add_semantic_ids
from recast_cli.vocabulary import Vocabulary


def test_spelling_is_openonerecs() -> None:
    assert spell((1, 7, 0)) == "<|sid_begin|><s_a_1><s_b_7><s_c_0><|sid_end|>"
    assert spell((1, 7, 0), enclose=False) == "<s_a_1><s_b_7><s_c_0>"


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=26), st.booleans())
def test_parse_inverts_spell(codes: list[int], enclose: bool) -> None:
    assert parse(spell(codes, enclose=enclose)) == tuple(codes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<|sid_begin|><|sid_end|>",
        "<s_b_1>",
        "<s_a_1><s_c_1>",
        "<s_a_1><s_a_2>",
        "<s_a_01>",
        "<s_a_-1>",
        "<s_a_1> <s_b_2>",
        "<|sid_begin|><s_a_1>",
        "<s_a_1><s_b_2>x",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="not a semantic ID"):
        parse(text)


def test_ids_are_contiguous_per_level() -> None:
    tokenizer = bare_tokenizer()
    vocabulary = add_semantic_ids(tokenizer, (3, 2, 4))
    # Three special tokens, begin, end, then 3 + 2 + 4 codes.
    assert (vocabulary.sid_begin, vocabulary.sid_end, vocabulary.pad) == (3, 4, 0)
    assert vocabulary.level_offsets == (5, 8, 10)
    assert vocabulary.vocab_size == len(tokenizer) == 14
    for level, (offset, size) in enumerate(
        zip(vocabulary.level_offsets, vocabulary.codebook_sizes, strict=True)
    ):
        for code in range(size):
            assert tokenizer.convert_tokens_to_ids(code_token(level, code)) == offset + code
    assert tokenizer.convert_tokens_to_ids(code_token(0, 3)) == tokenizer.unk_token_id


def test_a_history_takes_five_tokens_an_item_and_survives_decoding() -> None:
    tokenizer = bare_tokenizer()
    vocabulary = add_semantic_ids(tokenizer, (16, 16, 16))
    history = [(1, 15, 0), (11, 1, 10), (1, 1, 1)]  # codes whose spellings are prefixes of each other
    text = "".join(spell(codes) for codes in history)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 5 * len(history)
    assert ids[1:4] == [vocabulary.level_offsets[level] + code for level, code in enumerate(history[0])]
    # Special tokens would vanish here.
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    padded = [vocabulary.pad, *ids, tokenizer.eos_token_id]
    assert tokenizer.decode(padded, skip_special_tokens=True) == text


def test_vocabulary_round_trip(tmp_path: Path) -> None:
    vocabulary = add_semantic_ids(bare_tokenizer(), (3, 2))
    (tmp_path / "vocabulary.json").write_text(vocabulary.to_json())
    assert Vocabulary.load(tmp_path / "vocabulary.json") == vocabulary
    for damage in ("{", "[]", '{"sid_begin": 3}'):
        (tmp_path / "vocabulary.json").write_text(damage)
        with pytest.raises(ArtifactError, match="is not a vocabulary"):
            Vocabulary.load(tmp_path / "vocabulary.json")


def test_codes_already_there_must_be_contiguous() -> None:
    tokenizer = bare_tokenizer()
    tokenizer.add_tokens(["<s_a_1>"])
    with pytest.raises(ArtifactError, match="<s_a_0> to <s_a_2>"):
        add_semantic_ids(tokenizer, (3, 2))
