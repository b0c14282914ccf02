"""Semantic IDs in text, and the reward that verl's own reward managers call."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from recast_cli.core.spelling import find_all
from verl_recast.catalogue import Catalogue
from verl_recast.reward import compute_score, require_targets

TARGET = "<s_a_1><s_b_7><s_c_0>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no code at all <s_a_>, <s_1_a>, <S_A_1>", []),
        (TARGET, [(1, 7, 0)]),
        (f"<|sid_begin|>{TARGET}<|sid_end|>", [(1, 7, 0)]),
        (f"because of {TARGET}, of course", [(1, 7, 0)]),
        ("<s_a_12><s_b_345><s_c_6>", [(12, 345, 6)]),
        # two in one text, apart and side by side
        (f"{TARGET} then <s_a_2><s_b_3><s_c_4>", [(1, 7, 0), (2, 3, 4)]),
        (f"{TARGET}<s_a_2><s_b_3><s_c_4>", [(1, 7, 0), (2, 3, 4)]),
        (f"{TARGET}{TARGET}", [(1, 7, 0), (1, 7, 0)]),
        # runs that break off
        ("<s_a_1><s_b_7>", [(1, 7)]),
        ("<s_a_1>", [(1,)]),
        ("<s_a_1> <s_b_7><s_c_0>", [(1,)]),  # something between: b and c follow nothing
        ("<s_a_1><s_c_0>", [(1,)]),
        ("<s_a_1><s_a_2><s_b_3>", [(1,), (2, 3)]),
        ("<s_b_7><s_c_0>", []),  # starts elsewhere
        (f"<s_b_9>{TARGET}", [(1, 7, 0)]),
        ("<a_1><b_7><c_0>", [(1, 7, 0)]),  # as MiniOneRec spells it
        ("<a_1>, <a_2><b_3>\n", [(1,), (2, 3)]),
        ("<s_a_1><s_b_2><s_c_3><s_d_4>", [(1, 2, 3, 4)]),  # its length tells that it is no item of 3 levels
    ],
)
def test_find_all(text: str, expected: list[tuple[int, ...]]) -> None:
    assert find_all(text) == expected


@pytest.mark.parametrize(
    ("response", "ground_truth", "score", "structural"),
    [
        (TARGET, TARGET, 1, 1),
        (f"<|sid_begin|>{TARGET}<|sid_end|>", TARGET, 1, 1),
        ("<s_a_1><s_b_7><s_c_5>", TARGET, 0, 0.1),
        ("<s_a_1><s_b_6><s_c_0>", TARGET, 0, 0.01),
        ("<s_a_0><s_b_7><s_c_0>", TARGET, 0, 0),
        ("<a_1><b_7><c_5>\n", "<a_1><b_7><c_0>\n", 0, 0.1),
        # several targets: the best one counts
        ("<s_a_1><s_b_7><s_c_5>", ["<s_a_4><s_b_4><s_c_4>", TARGET], 0, 0.1),
        (TARGET, ["<s_a_4><s_b_4><s_c_4>", TARGET], 1, 1),
        # several predictions: any may hit; u is the mean over the distinct ones
        (f"{TARGET}<s_a_1><s_b_0><s_c_0>", TARGET, 1, (1 + 0.01) / 2),
        (f"{TARGET}{TARGET}<s_a_1><s_b_0><s_c_0>", TARGET, 1, (1 + 0.01) / 2),
        # OpenOneRec: a thought before the answer, all targets in one text
        (
            "<think>\n\n</think>\n<|sid_begin|><s_a_4><s_b_4><s_c_5><|sid_end|>",
            f"<|sid_begin|>{TARGET}<|sid_end|><|sid_begin|><s_a_4><s_b_4><s_c_4><|sid_end|>",
            0,
            0.1,
        ),
    ],
)
def test_score_by_hand(response: str, ground_truth: str | list[str], score: float, structural: float) -> None:
    found = compute_score("movies", response, ground_truth, {"index": 3})
    assert found["score"] == found["hit"] == score
    assert found["structural_score"] == pytest.approx(structural, rel=1e-12)


@pytest.mark.parametrize("response", ["", "I do not know", "<s_a_1><s_b_7>", f"{TARGET}<s_d_1>"])
def test_a_response_without_a_semantic_id_of_the_targets_length_scores_nothing(response: str) -> None:
    found = compute_score("movies", response, TARGET)
    assert found == {"score": 0, "hit": 0, "structural_score": 0}


@pytest.mark.parametrize(
    "ground_truth",
    [[TARGET, "<s_a_2><s_b_3><s_c_4>"], f"<|sid_begin|>{TARGET}<|sid_end|><s_a_2><s_b_3><s_c_4>"],
)
def test_several_targets_may_stand_in_one_text_or_in_several(ground_truth: str | list[str]) -> None:
    assert require_targets(ground_truth) == [(1, 7, 0), (2, 3, 4)]


def test_a_row_without_a_target_is_named() -> None:
    with pytest.raises(ValueError, match="ground_truth holds no semantic ID: 'item 7'"):
        require_targets("item 7")


def test_without_a_target_nothing_hits() -> None:
    assert compute_score("movies", TARGET, [])["score"] == 0


def test_code_tokens_survive_the_decoding_of_verls_reward_managers(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    catalogue = Catalogue.load(tokenizer_folder)
    for codes in sorted(catalogue.members)[:5]:
        ids = [catalogue.level_offsets[level] + code for level, code in enumerate(codes)]
        text = tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True)
        ground_truth = "".join(f"<s_{'abc'[level]}_{code}>" for level, code in enumerate(codes))
        assert compute_score("synthetic", text, ground_truth)["score"] == 1


def test_catalogue_members_are_the_parquets_and_agree_with_the_trie(tokenizer_folder: Path) -> None:
    catalogue = Catalogue.load(tokenizer_folder)
    assert len(catalogue.members) == 40
    assert catalogue.num_levels == 3
    assert all(len(codes) == 3 for codes in catalogue.members)
    assert catalogue.trie.num_nodes[-1] == 40
    codes = sorted(catalogue.members)[0]
    expected = [offset + code for offset, code in zip(catalogue.level_offsets, codes, strict=True)]
    assert catalogue.token_ids(list(codes)).tolist() == expected
