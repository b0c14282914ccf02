"""Catalogues made elsewhere: tables, MiniOneRec's index file, vocabularies in any order, what is refused."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from foreign import ITEMS, minionerec, openonerec, text_tokenizer

from recast_cli.errors import ArtifactError, DataError
from verl_recast.catalogue import Catalogue, find_catalogue, require_catalogue
from verl_recast.catalogue_file import read_catalogue_file


def write_index(path: Path, sids: dict[str, Any]) -> Path:
    path.write_text(json.dumps(sids), encoding="utf-8")
    return path


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return write_index(
        tmp_path / "shop.index.json", {item: minionerec(codes) for item, codes in ITEMS.items()}
    )


@pytest.mark.parametrize("form", ["csv", "tsv.gz", "jsonl", "parquet", "tokens.parquet", "json"])
def test_every_form_gives_the_same_semantic_ids(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"shop.{form}"
    texts = {item: "".join(openonerec(codes)) for item, codes in ITEMS.items()}
    table = pl.DataFrame({"title": ["a", "b", "c"], "item_id": list(texts), "sid": list(texts.values())})
    enclosed = table.with_columns(sid="<|sid_begin|>" + pl.col("sid") + "<|sid_end|>")
    if form == "csv":
        table.write_csv(path)
    elif form == "tsv.gz":
        path.write_bytes(gzip.compress(enclosed.write_csv(separator="\t").encode()))
    elif form == "jsonl":
        enclosed.write_ndjson(path)
    elif form == "parquet":
        enclosed.write_parquet(path)
    elif form == "tokens.parquet":
        table.with_columns(sid=pl.Series([openonerec(codes) for codes in ITEMS.values()])).write_parquet(path)
    else:
        write_index(path, {item: minionerec(codes) for item, codes in ITEMS.items()})
    assert read_catalogue_file(path) == {codes: item for item, codes in ITEMS.items()}


def test_items_that_share_a_semantic_id_are_one_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sids = {"1": ["<a_1>", "<b_1>"], "2": ["<a_1>", "<b_2>"], "3": ["<a_1>", "<b_1>"]}
    with caplog.at_level(logging.WARNING):
        assert read_catalogue_file(write_index(tmp_path / "x.json", sids)) == {(1, 1): "1", (1, 2): "2"}
    assert "2 of 3 items share 1 semantic IDs" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item_id,sid\n", "has 0 rows"),
        ("", "is empty"),
        ("id,sid\n1,<a_1>\n", r"has columns id, sid, needed item_id and sid"),
        ("item_id,sid\n1,<a_1><b_2>\n2,\n", r"row 2 has item_id '2' and sid None, needed both"),
        ("item_id,sid\n1,<a_1><b_2>\n2,<a_1>\n", r"item '2' has 1 codes, item '1' has 2"),
        (
            "item_id,sid\n1,<a_1><b_2>\n1,<a_1><b_3>\n",
            r"row 2: item '1' has a second semantic ID, <a_1><b_3>",
        ),
        ("item_id,sid\n1,12-3-7\n", r"item '1' has the semantic ID '12-3-7', needed code tokens of levels a"),
        ("item_id,sid\n1,<a_1><c_2>\n", r"item '1' has the semantic ID '<a_1><c_2>'"),
        ("item_id,sid\n1,<a_1> <b_2>\n", r"item '1' has the semantic ID '<a_1> <b_2>'"),
    ],
)
def test_a_table_that_is_no_catalogue_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "shop.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_catalogue_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"is not readable JSON"),
        ("[" * 100_000, r"is not readable JSON"),
        ('{" ": ["<a_1>"]}', r"row 1 has item_id ' ' and sid"),
        ('{"": ["<a_1>"]}', r"row 1 has item_id '' and sid"),
        ("{}", r"holds nothing, needed one object"),
        ("[1, 2]", r"holds something else, needed one object"),
        ('{"1": ["<a_1>"], "1": ["<a_2>"]}', r"row 2: item '1' has a second semantic ID, <a_2>"),
        ('{"1": []}', r"row 1 has item_id '1' and sid \[\], needed both"),
        ('{"1": [12, 3, 7]}', r"item '1' has the semantic ID '1237'"),
    ],
)
def test_an_index_file_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "shop.index.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_catalogue_file(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^\S*nowhere\.json does not exist"):
        read_catalogue_file(tmp_path / "nowhere.json")


@pytest.mark.parametrize("order", ["as MiniOneRec adds them", "shuffled", "level by level"])
def test_the_order_of_the_tokens_does_not_matter(index: Path, order: str) -> None:
    tokens = sorted({token for codes in ITEMS.values() for token in minionerec(codes)})
    assert tokens[:2] == ["<a_12>", "<a_2>"], "as texts, and only those that occur"
    if order == "shuffled":
        tokens = [tokens[place] for place in np.random.default_rng(0).permutation(len(tokens))]
    elif order == "level by level":
        tokens = [f"<{level}_{code}>" for level in "abc" for code in range(40)]
    tokenizer = text_tokenizer(tokens)
    catalogue = Catalogue.read(index, tokenizer)
    assert catalogue.num_levels == 3 and catalogue.trie.num_items == 3
    assert catalogue.members == set(ITEMS.values())
    # Every path of the trie spells an item, and every item is one: by the texts of the token ids alone.
    texts = set()
    for first in range(catalogue.trie.num_nodes[1]):
        for second in range(int(catalogue.trie.ptr[1][first]), int(catalogue.trie.ptr[1][first + 1])):
            for leaf in range(int(catalogue.trie.ptr[2][second]), int(catalogue.trie.ptr[2][second + 1])):
                path = zip(catalogue.trie.codes, (first, second, leaf), strict=True)
                counted = np.array([int(codes[node]) for codes, node in path])
                tokens_of_path = tokenizer.convert_ids_to_tokens(catalogue.token_ids(counted).tolist())
                texts.add("".join(tokens_of_path))
                assert minionerec(catalogue.spelled(counted)) == tokens_of_path
    assert texts == {"".join(minionerec(codes)) for codes in ITEMS.values()}


def test_a_missing_beam_stays_missing(index: Path) -> None:
    tokens = sorted({token for codes in ITEMS.values() for token in minionerec(codes)})
    catalogue = Catalogue.read(index, text_tokenizer(tokens))
    # as texts <a_12> stands before <a_2>, <b_30> before <b_3>, <c_10> before <c_7>
    found = catalogue.spelled(np.array([[[0, 1, 1], [-1, -1, -1]]]))
    assert found.tolist() == [[[12, 3, 7], [-1, -1, -1]]]


def test_a_vocabulary_without_the_tokens_is_refused(index: Path) -> None:
    tokenizer = text_tokenizer(["<a_12>", "<a_2>", "<b_3>", "<c_7>", "<c_10>"])
    message = r"no token for 1 codes, the first is code 30 of level b \(<s_b_30> or <b_30>\) of item '100'"
    with pytest.raises(DataError, match=message):
        Catalogue.read(index, tokenizer)


def test_the_traceback_of_a_verl_job_says_what_to_do(index: Path) -> None:
    with pytest.raises(DataError) as caught:
        Catalogue.read(index, text_tokenizer([]))
    arrived = pickle.loads(pickle.dumps(caught.value))  # as Ray carries it
    text = "".join(traceback.format_exception(arrived))
    assert "no token for 6 codes" in text and "hint: add the code tokens to the model's vocabulary" in text


def test_one_code_with_two_tokens_is_refused(index: Path) -> None:
    tokens = [token for codes in ITEMS.values() for token in (*minionerec(codes), *openonerec(codes))]
    with pytest.raises(ArtifactError, match=r"two tokens for one code, <(s_)?([abc]_\d+)> and <(s_)?\2>"):
        Catalogue.read(index, text_tokenizer(tokens))


def test_rollout_custom_names_one_catalogue(index: Path, tokenizer_folder: Path) -> None:
    tokenizer = text_tokenizer([token for codes in ITEMS.values() for token in minionerec(codes)])
    assert find_catalogue(None, tokenizer) is None and find_catalogue({"log": "x"}, tokenizer) is None
    assert require_catalogue({"catalogue": str(index)}, tokenizer).members == set(ITEMS.values())
    assert len(require_catalogue({"tokenizer": str(tokenizer_folder)}, tokenizer).members) == 40
    with pytest.raises(ValueError, match=r"names no catalogue: set \+actor_rollout_ref\.rollout\.custom="):
        require_catalogue({}, tokenizer)
    with pytest.raises(ValueError, match=r"names both tokenizer=.* and catalogue=.*: keep one"):
        find_catalogue({"catalogue": str(index), "tokenizer": str(tokenizer_folder)}, tokenizer)
