"""`recast recommend` and `recast evaluate`: the same answers as the evaluation, and words for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from artifacts_by_hand import Folders, Write, bigram_model
from typer.testing import CliRunner

from recast_cli.commands import evaluate as evaluate_command
from recast_cli.commands import recommend as recommend_command
from recast_cli.data.prompts import build_messages
from recast_cli.errors import DataError, RecipeError
from recast_cli.evaluation.evaluate import evaluate_model
from recast_cli.evaluation.recommend import Recommendation, recommend

CODES = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@pytest.fixture
def folders(write: Write) -> Folders:
    folders = write({"ann": [4, 1, 5, 0], "bob": [0, 4, 1]}, CODES, (2, 3))
    bigram_model(folders, (0.6, 0.4), {0: (0.5, 0.3, 0.2), 1: (0.25, 0.65, 0.1)})  # ranking 0, 4, 1, 2, 3, 5
    return folders


def ask(folders: Folders, **options: object) -> list[Recommendation]:
    return recommend(
        folders.model,
        folders.tokenizer,
        folders.data,
        build_messages=build_messages,
        **options,  # type: ignore[arg-type]
    )


def test_items_of_the_history_are_left_out(folders: Folders) -> None:
    found = ask(folders, items=["i4", "i0"], num_items=3)
    assert [(answer.rank, answer.item_id, answer.title) for answer in found] == [
        (1, "i1", "Title 1"),
        (2, "i2", "Title 2"),
        (3, "i3", "Title 3"),
    ]
    assert [answer.log_prob for answer in found] == pytest.approx(np.log([0.18, 0.12, 0.10]), rel=1e-4)
    kept = ask(folders, items=["i4", "i0"], num_items=3, keep_history=True)
    assert [(answer.item_id, answer.in_history) for answer in kept] == [
        ("i0", True),
        ("i4", True),
        ("i1", False),
    ]


def test_a_user_means_all_their_events(folders: Folders) -> None:
    assert [answer.item_id for answer in ask(folders, user="ann")] == ["i2", "i3"]
    assert [answer.item_id for answer in ask(folders, user="bob")] == ["i2", "i3", "i5"]


def test_recommendations_are_those_of_the_evaluation(write: Write) -> None:
    rng = np.random.default_rng(0)
    sequences = {f"u{user}": rng.permutation(30)[: 4 + user].tolist() for user in range(6)}
    codes = np.stack(np.unravel_index(rng.permutation(125)[:30], (5, 5, 5)), axis=1)
    folders = write(sequences, codes, (5, 5, 5), history=3)
    evaluation = evaluate_model(folders.model, folders.tokenizer, folders.data, "test", beam_width=30)
    for user, top in evaluation.users.select("user_id", "top_removed").iter_rows():
        before = [f"i{row}" for row in sequences[user][:-1]]
        assert [answer.item_id for answer in ask(folders, items=before)] == top


@pytest.mark.parametrize(
    ("items", "message", "hint"),
    [
        (["i0", "i9"], "'i9': no such item in the dataset (6 items)", "did you mean i5 (Title 5) or i4"),
        (["Title 4"], "'Title 4': no such item", "did you mean i4 (Title 4)?"),
        (["titel 4"], "'titel 4': no such item", "(Title 4)"),
        (["#"], "'#': no such item", "column item_id"),
        ([f"x{i}" for i in range(7)], "'x4' and 2 more: no such item", "did you mean"),
    ],
)
def test_unknown_items_are_named(folders: Folders, items: list[str], message: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        ask(folders, items=items)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_other_mistakes(folders: Folders) -> None:
    with pytest.raises(DataError, match="user 'anne' is not in the dataset") as caught:
        ask(folders, user="anne")
    assert caught.value.hint == "did you mean ann?"
    for options in ({}, {"items": ["i0"], "user": "ann"}):
        with pytest.raises(RecipeError, match="not both"):
            ask(folders, **options)
    with pytest.raises(RecipeError, match="number of items is 0"):
        ask(folders, items=["i0"], num_items=0)


# --- the commands ---


def call(folders: Folders, *arguments: str) -> str:
    app = typer.Typer()
    app.command("evaluate")(evaluate_command.evaluate)
    app.command("recommend")(recommend_command.recommend)
    folder_options = ["--data", str(folders.data), "--tokenizer", str(folders.tokenizer)]
    result = CliRunner().invoke(app, [*arguments, *folder_options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_evaluate_prints_both_modes_by_name(folders: Folders, tmp_path: Path) -> None:
    output = call(folders, "evaluate", "--split", "test", "--beam-width", "6", "--out", str(tmp_path / "out"))
    assert output.index("history removed (headline)") < output.index("history kept")
    for arm in ("model", "popularity", "item-kNN"):
        assert output.count(arm) >= 2
    assert "hr@1" in output
    assert "hr@10" not in output  # the beam holds 6
    assert "RL rows: sft" in output
    assert (tmp_path / "out" / "evaluation.json").is_file()


def test_evaluate_json_is_one_document(folders: Folders) -> None:
    document = json.loads(call(folders, "evaluate", "--split", "test", "--no-baselines", "--json"))
    assert list(document["metrics"]["history_removed"]) == ["model"]
    assert document["num_users"] == 2


def test_recommend_command(folders: Folders) -> None:
    output = call(folders, "recommend", "i4", "i0", "-k", "2")
    assert output.index("Title 1") < output.index("Title 2")
    assert "Title 3" not in output
    found = json.loads(call(folders, "recommend", "--user", "bob", "--json"))
    assert [answer["item_id"] for answer in found] == ["i2", "i3", "i5"]
