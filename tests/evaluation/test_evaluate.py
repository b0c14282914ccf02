"""The whole evaluation against numbers worked out by hand, and against chance."""

from __future__ import annotations

import json
import shutil
from math import log, log2
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from artifacts_by_hand import Folders, Write, bigram_model
from safetensors.torch import load_file, save_file
from scipy.stats import binom
from sealing import reseal

from recast_cli.commands.evaluate import print_evaluation
from recast_cli.core.ranking import Interval
from recast_cli.core.trie import Trie
from recast_cli.errors import ArtifactError, RecipeError
from recast_cli.evaluation.evaluate import evaluate_model
from recast_cli.evaluation.recommender import Recommender
from recast_cli.evaluation.results import MODES, Evaluation

# Item rows 0..5 by code: (0,0) (0,1) (0,2) (1,0) (1,1) (1,2).
CODES = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
FIRST, THEN = (0.6, 0.4), {0: (0.5, 0.3, 0.2), 1: (0.25, 0.65, 0.1)}
# So P = .30 .18 .12 .10 .26 .04, and every user's ranking is 0, 4, 1, 2, 3, 5.
SEQUENCES = {
    "u1": [1, 4, 5, 0],
    "u2": [0, 4, 1],
    "u3": [0, 1, 4, 5],
    "u4": [2, 3, 4],
    "u5": [5, 0, 3],
}


@pytest.fixture
def by_hand(write: Write) -> Folders:
    folders = write(SEQUENCES, CODES, (2, 3))
    bigram_model(folders, FIRST, THEN)
    return folders


def run(folders: Folders, split: str = "test", **options: object) -> Evaluation:
    return evaluate_model(folders.model, folders.tokenizer, folders.data, split, **options)  # type: ignore[arg-type]


def random_sequences(num_users: int, num_items: int, length: int, seed: int) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    return {f"u{user:04}": rng.permutation(num_items)[:length].tolist() for user in range(num_users)}


def random_codes(num_items: int, sizes: tuple[int, ...], seed: int) -> np.ndarray:
    cells = np.random.default_rng(seed).permutation(int(np.prod(sizes)))[:num_items]
    return np.stack(np.unravel_index(cells, sizes), axis=1)


def test_five_users_by_hand(by_hand: Folders) -> None:
    evaluation = run(by_hand, beam_width=6, baselines=True)
    assert evaluation.facts["cutoffs"] == [1, 5]
    kept = evaluation.means(mode="history_kept")
    # Ranks of the targets 0, 1, 5, 4, 3 in 0, 4, 1, 2, 3, 5.
    assert evaluation.users["rank_kept"].to_list() == [1, 3, 6, 2, 5]
    assert kept["hr@1"] == pytest.approx(1 / 5)
    assert kept["hr@5"] == kept["recall@5"] == kept["pass@5"] == pytest.approx(4 / 5)
    assert kept["ndcg@5"] == pytest.approx((1 + 1 / log2(4) + 0 + 1 / log2(3) + 1 / log2(6)) / 5)
    assert kept["mrr@5"] == pytest.approx((1 + 1 / 3 + 0 + 1 / 2 + 1 / 5) / 5)
    assert kept["coverage@1"] == pytest.approx(1 / 6)  # item 0 for everybody
    assert kept["gini@1"] == pytest.approx(5 / 6)
    # 12 events before the test targets (3 2 1 1 3 2, see below), one added for each of 6 items.
    assert kept["novelty@1"] == pytest.approx(log2(18 / 4))
    # History removed: lists 0 2 3 | 1 2 3 5 | 2 3 5 | 0 4 1 5 | 4 1 2 3.
    removed = evaluation.means()
    assert evaluation.users["rank_removed"].to_list() == [1, 1, 3, 2, 4]
    assert evaluation.users["top_removed"].to_list()[2] == ["i2", "i3", "i5"]
    assert removed["hr@1"] == pytest.approx(2 / 5)
    assert removed["hr@5"] == 1
    assert removed["ndcg@5"] == pytest.approx((1 + 1 + 1 / log2(4) + 1 / log2(3) + 1 / log2(5)) / 5)
    assert removed["mrr@5"] == pytest.approx((1 + 1 + 1 / 3 + 1 / 2 + 1 / 4) / 5)
    assert removed["coverage@1"] == pytest.approx(4 / 6)  # items 0, 1, 2, 0, 4
    assert removed["gini@1"] == pytest.approx((-1 + 1 + 3 + 5 * 2) / (6 * 5))  # shown 0 0 1 1 1 2 times
    assert removed["novelty@1"] == pytest.approx((3 * log2(18 / 4) + log2(18 / 3) + log2(18 / 2)) / 5)
    for values in (kept, removed):
        probabilities = [0.30, 0.18, 0.04, 0.26, 0.10]
        assert values["target_probability"] == pytest.approx(sum(probabilities) / 5, rel=1e-4)
        assert values["target_log_prob"] == pytest.approx(sum(map(log, probabilities)) / 5, rel=1e-4)
        assert values["invalid_items"] == values["invalid_share"] == values["duplicate_share"] == 0
    # Popularity over the events before the test targets: 3 2 1 1 3 2, ranking 0, 4, 1, 5, 2, 3.
    assert evaluation.users["popularity_rank_kept"].to_list() == [1, 3, 4, 2, 6]
    assert evaluation.users["popularity_rank_removed"].to_list() == [1, 1, 1, 2, 4]
    assert evaluation.metric("hr@1", arm="popularity") == pytest.approx(3 / 5)


def test_validation_asks_about_the_event_before_and_learns_from_less(by_hand: Folders) -> None:
    evaluation = run(by_hand, "validation", beam_width=6, baselines=True)
    assert evaluation.users["target"].to_list() == ["i5", "i4", "i4", "i3", "i0"]
    # Histories 1 4 | 0 | 0 1 | 2 | 5, so removed lists 0 2 3 5 | 4 .. | 4 .. | 0 4 1 3 5 | 0 ..
    assert evaluation.users["rank_removed"].to_list() == [4, 1, 1, 4, 1]
    # Their events: counts 2 2 1 0 1 1, ranking 0, 1, 2, 4, 5, 3.
    assert evaluation.users["popularity_rank_kept"].to_list() == [5, 4, 4, 6, 1]
    assert evaluation.facts["baselines_learn_from"] == "training events"


def test_equal_histories_keep_their_own_targets(write: Write) -> None:
    folders = write({"a": [4, 1, 0], "b": [4, 1, 5], "c": [4, 1, 2]}, CODES, (2, 3))
    bigram_model(folders, FIRST, THEN)
    evaluation = run(folders, beam_width=6)
    # Items 1 and 4 removed: 0, 2, 3, 5.
    assert evaluation.users.select("user_id", "target", "rank_removed").rows() == [
        ("a", "i0", 1),
        ("b", "i5", 4),
        ("c", "i2", 2),
    ]


def test_a_target_the_user_had_before_counts_as_missed_when_history_is_removed(write: Write) -> None:
    folders = write({"a": [0, 4, 0]}, CODES, (2, 3))
    bigram_model(folders, FIRST, THEN)
    evaluation = run(folders, beam_width=6)
    assert evaluation.facts["num_targets_in_history"] == 1
    assert evaluation.users["rank_kept"].to_list() == [1]
    assert evaluation.users["rank_removed"].to_list() == [None]


def test_a_user_who_has_everything_gets_an_empty_list(write: Write) -> None:
    folders = write({"a": [0, 1, 2, 3, 4, 5, 2], "b": [4, 1, 0]}, CODES, (2, 3))
    bigram_model(folders, FIRST, THEN)
    evaluation = run(folders, beam_width=6)
    assert evaluation.users["top_removed"].to_list() == [[], ["i0", "i2", "i3", "i5"]]
    assert evaluation.metric("hr@5") == 1 / 2
    assert evaluation.metric("invalid_items") == 0


def test_history_beyond_the_prompt_is_removed_too(write: Write) -> None:
    folders = write({"a": [0, 4, 1, 2, 3]}, CODES, (2, 3), history=1)
    bigram_model(folders, FIRST, THEN)
    assert len(pl.read_parquet(folders.tokenizer / "verl" / "test.parquet")["prompt"][0]) == 1
    evaluation = run(folders, beam_width=6)
    assert evaluation.users["top_removed"].to_list() == [["i3", "i5"]]


# --- chance ---


def test_an_untrained_model_scores_like_chance(write: Write) -> None:
    num_users, num_items, length = 400, 60, 7
    sequences = random_sequences(num_users, num_items, length, seed=1)
    folders = write(sequences, random_codes(num_items, (8, 8, 8), seed=2), (8, 8, 8))
    evaluation = run(folders)
    for k in (1, 5, 10, 20, 50):
        # The target is uniform over the 54 items outside the history and knows nothing of the model:
        # hits are exactly binomial with p = k / 54.
        low, high = binom.ppf([0.0005, 0.9995], num_users, k / (num_items - length + 1))
        assert low <= round(evaluation.metric(f"hr@{k}") * num_users) <= high


# --- validity ---


@pytest.fixture
def with_holes(write: Write) -> Folders:
    """30 items in 512 cells: a random answer is hardly ever an item."""
    return write(random_sequences(20, 30, 6, seed=3), random_codes(30, (8, 8, 8), seed=4), (8, 8, 8))


def test_no_answer_is_invalid(with_holes: Folders) -> None:
    evaluation = run(with_holes, beam_width=20)
    for mode in MODES:
        assert evaluation.metric("invalid_items", mode=mode) == 0
        assert evaluation.metric("invalid_share", mode=mode) == 0


def test_a_broken_mask_shows(with_holes: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(
        self: Trie, level: int, nodes_R: torch.Tensor, *_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes_RK = torch.arange(self.codebook_sizes[level]).expand(len(nodes_R), -1)
        return codes_RK, torch.ones_like(codes_RK, dtype=torch.bool)

    monkeypatch.setattr(Trie, "choices", everything)
    evaluation = run(with_holes, beam_width=20)
    sids = set(pl.read_parquet(with_holes.tokenizer / "semantic_ids.parquet")["sid"])
    assert len(sids) == 30
    # At random, 30 of 512 answers are items.
    assert 0.8 < evaluation.metric("invalid_share", mode="history_kept") < 1
    assert evaluation.metric("invalid_items", mode="history_kept") == round(
        evaluation.metric("invalid_share", mode="history_kept") * 20 * 20
    )


def test_validity_is_read_from_the_catalogue_not_from_the_trie(with_holes: Folders) -> None:
    # A trie that leads to cells which are no items: its own mask is content.
    wrong = random_codes(30, (8, 8, 8), seed=5)
    Trie.from_codes(wrong, (8, 8, 8)).save(with_holes.tokenizer / "trie.npz")
    reseal(with_holes.tokenizer)
    sids = pl.read_parquet(with_holes.tokenizer / "semantic_ids.parquet")["sid"].to_list()
    right = {tuple(map(int, sid.replace(">", "_").split("_")[4::3][:3])) for sid in sids}
    num_right = sum(tuple(codes) in right for codes in wrong.tolist())
    evaluation = run(with_holes, beam_width=30)  # every leaf is answered
    assert evaluation.metric("invalid_share", mode="history_kept") == pytest.approx(1 - num_right / 30)


# --- the two modes ---


def test_removed_is_kept_without_the_history(write: Write) -> None:
    sequences = random_sequences(25, 40, 9, seed=6)
    folders = write(sequences, random_codes(40, (6, 6, 6), seed=7), (6, 6, 6), history=3)
    evaluation = run(folders, beam_width=40)  # as wide as the catalogue: exact
    for user, removed, kept in evaluation.users.select("user_id", "top_removed", "top_kept").iter_rows():
        history = {f"i{row}" for row in sequences[user][:-1]}
        assert not history & set(removed)
        left = [item for item in kept if item not in history]
        assert removed[: len(left)] == left
    ranks = evaluation.users["rank_removed"].to_numpy() <= evaluation.users["rank_kept"].to_numpy()
    assert ranks.all()  # removing others never pushes the target down


def test_a_wider_beam_than_the_catalogue_is_the_catalogue(by_hand: Folders) -> None:
    wide, exact = run(by_hand, beam_width=10**12), run(by_hand, beam_width=6)  # of six items
    assert wide.to_json()["beam_width"] == 6
    assert wide.means() == exact.means()


def test_one_mode_alone_gives_the_same_numbers(by_hand: Folders) -> None:
    both = run(by_hand, beam_width=6)
    one = run(by_hand, beam_width=6, modes=("history_removed",), baselines=True)
    assert list(one.arms["model"]) == ["history_removed"]
    assert one.means() == both.means()
    assert "rank_kept" not in one.users.columns
    assert one.to_json()["metrics"].keys() == {"history_removed"}


# --- the target's probability ---


def test_teacher_forcing_equals_the_beam_score(write: Write) -> None:
    sequences = random_sequences(12, 30, 8, seed=8)
    for place, user in enumerate(sequences):
        sequences[user] = sequences[user][: 3 + place % 6]  # prompts of many lengths
    folders = write(sequences, random_codes(30, (5, 5, 5), seed=9), (5, 5, 5))
    evaluation = run(folders, beam_width=30)
    recommender = Recommender.load(folders.model, folders.tokenizer, folders.data)
    prompts = recommender.encode(
        pl.read_parquet(folders.tokenizer / "verl" / "test.parquet")["prompt"].to_list()
    )
    ranked = recommender.rank(prompts, 30)
    for place, (target, log_prob) in enumerate(
        evaluation.users.select("target", "target_log_prob").iter_rows()
    ):
        beam = ranked.rows_BW[place].tolist().index(int(target[1:]))
        assert log_prob == pytest.approx(ranked.scores_BW[place, beam], abs=1e-4)
    alone = run(folders, beam_width=30, batch_tokens=1)  # no padding anywhere
    np.testing.assert_allclose(alone.users["target_log_prob"], evaluation.users["target_log_prob"], atol=1e-4)
    assert alone.users["rank_kept"].to_list() == evaluation.users["rank_kept"].to_list()


# --- what is left behind ---


def test_saved_files(by_hand: Folders, tmp_path: Path) -> None:
    evaluation = run(by_hand, beam_width=6, baselines=True)
    paths = evaluation.save(tmp_path / "out")
    assert [path.name for path in paths] == ["evaluation.json", "users.parquet"]
    document = json.loads(paths[0].read_text())
    assert document["split"] == "test"
    assert document["num_users"] == 5
    assert document["rl_rows"] == "sft"
    manifest = json.loads((by_hand.tokenizer / "manifest.json").read_text())
    assert document["tokenizer"]["trie_sha256"] == manifest["files"]["trie.npz"]
    assert document["dataset"]["identity"] == manifest["parents"]["dataset"]
    assert document["versions"]["torch"] == torch.__version__ and "verl-recast" in document["versions"]
    low, high = document["intervals"]["history_removed"]["model"]["hr@1"]
    assert low <= document["metrics"]["history_removed"]["model"]["hr@1"] <= high
    assert pl.read_parquet(paths[1]).equals(evaluation.users)
    named = evaluation.save(tmp_path / "x" / "arm.json")
    assert [path.name for path in named] == ["arm.json", "arm.users.parquet"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["arm.json", "arm.users.parquet"]
    interval = evaluation.arms["model"]["history_removed"]["hr@1"]
    assert isinstance(interval, Interval)


def test_a_save_that_fails_leaves_no_json_of_other_users(by_hand: Folders, tmp_path: Path) -> None:
    evaluation = run(by_hand, beam_width=6)
    document, users = evaluation.save(tmp_path / "out")
    users.unlink()
    users.mkdir()  # nothing can take this name
    with pytest.raises(OSError):
        evaluation.save(tmp_path / "out")
    assert not document.exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["users.parquet"], (
        "no scratch file either"
    )


def test_runs_repeat(by_hand: Folders) -> None:
    first, second = (run(by_hand, beam_width=6, baselines=True, seed=5) for _ in range(2))
    assert first.to_json() == second.to_json()
    assert first.users.equals(second.users)


def test_max_users(by_hand: Folders) -> None:
    whole, part = (
        run(by_hand, baselines=True, beam_width=6),
        run(by_hand, baselines=True, beam_width=6, max_users=3),
    )
    assert part.facts["num_users"] == 3
    # The same rows of the whole table: baselines learn from everybody either way.
    assert part.users.equals(whole.users.filter(pl.col("index").is_in(part.users["index"].to_list())))


def test_progress_counts_every_user(by_hand: Folders) -> None:
    steps: list[int] = []
    run(by_hand, beam_width=6, progress=steps.append)
    assert sum(steps) == 5


# --- mistakes ---


def test_a_tokenizer_of_other_items_is_refused(by_hand: Folders, write: Write) -> None:
    other = write({"u": [0, 1, 2]}, CODES, (2, 3), name="other")
    with pytest.raises(ArtifactError, match="built for another dataset"):
        evaluate_model(by_hand.model, by_hand.tokenizer, other.data, "test")


def test_a_model_of_another_tokenizer_is_refused(write: Write, tmp_path: Path) -> None:
    small = write(SEQUENCES, [(0, row) for row in range(6)], (1, 6), name="small")
    large = write(SEQUENCES, [(3, row) for row in range(6)], (4, 9), name="large")
    with pytest.raises(ArtifactError, match="was trained with another tokenizer than"):
        evaluate_model(small.model, large.tokenizer, large.data, "test")
    alone = tmp_path / "alone"  # a folder that does not say where it comes from
    shutil.copytree(small.model, alone)
    with pytest.raises(ArtifactError, match=r"has 12 embedding rows, the tokenizer has 18 tokens"):
        evaluate_model(alone, large.tokenizer, large.data, "test")


def test_missing_pieces(by_hand: Folders, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nothing has no config\.json"):
        evaluate_model(tmp_path / "nothing", by_hand.tokenizer, by_hand.data, "test")
    with pytest.raises(ArtifactError, match="split is 'train'"):
        run(by_hand, "train")
    with pytest.raises(ArtifactError, match="no dataset"):
        evaluate_model(by_hand.model, by_hand.tokenizer, tmp_path, "test")
    with pytest.raises(RecipeError, match="beam-width is 0"):
        run(by_hand, beam_width=0)


def test_damaged_weights_are_refused(by_hand: Folders) -> None:
    path = by_hand.model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]  # transformers would fill it in, without an error
    save_file(tensors, path, metadata={"format": "pt"})
    reseal(by_hand.tokenizer)
    with pytest.raises(ArtifactError, match=r"lacks weights: model\.norm\.weight"):
        run(by_hand)
    path.write_bytes(b"not weights")
    reseal(by_hand.tokenizer)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        run(by_hand)


def test_weights_that_are_not_finite_are_refused(by_hand: Folders) -> None:
    path = by_hand.model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    reseal(by_hand.tokenizer)
    with pytest.raises(ArtifactError, match=r"NaN or infinite values in model\.norm\.weight"):
        run(by_hand)


def test_prompts_of_other_rows_are_refused(by_hand: Folders) -> None:
    path = by_hand.tokenizer / "verl" / "test.parquet"
    table = pl.read_parquet(path)
    table[:-1].write_parquet(path)
    reseal(by_hand.tokenizer)
    with pytest.raises(ArtifactError, match="rendered from other rows"):
        run(by_hand)
    pl.concat([table, table[:1]]).write_parquet(path)
    reseal(by_hand.tokenizer)
    with pytest.raises(ArtifactError, match="rendered from other rows"):
        run(by_hand)
    swapped = table.with_columns(reward_model=pl.col("reward_model").reverse())
    swapped.write_parquet(path)
    reseal(by_hand.tokenizer)
    with pytest.raises(ArtifactError, match="is not the semantic ID of item"):
        run(by_hand)


def test_targets_out_of_reach_are_counted_below_the_tables(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    repeats = {"u1": [0, 1, 2, 0, 1], "u2": [1, 2, 0, 1, 2], "u3": [0, 1, 2, 1, 3]}
    folders = write(repeats, [(0, 0), (0, 1), (1, 0), (1, 1)], (2, 2))
    found = evaluate_model(folders.model, folders.tokenizer, folders.data, "test", beam_width=4)
    print_evaluation(found)
    assert "2 targets stand in their user's history" in capsys.readouterr().out


def test_an_evaluation_replaces_nothing_but_an_evaluation(write: Write, tmp_path: Path) -> None:
    folders = write({"u1": [0, 1, 2, 0, 1], "u2": [1, 2, 0, 1, 2]}, [(0, 0), (0, 1), (1, 0)], (2, 2))
    found = evaluate_model(folders.model, folders.tokenizer, folders.data, "test", beam_width=3)
    found.save(tmp_path / "there")
    found.save(tmp_path / "there")
    found.save(tmp_path / "single.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "users.parquet").write_text("mine")
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for out, message in (
        ("mine", "users.parquet is there already and no evaluation"),
        ("package.json", "package.json is there already and no evaluation"),
        ("file/out", "cannot be written"),
    ):
        with pytest.raises(ArtifactError, match=message):
            found.save(tmp_path / out)
    assert (tmp_path / "mine" / "users.parquet").read_text() == "mine"
    assert (tmp_path / "package.json").read_text() == "{}"
