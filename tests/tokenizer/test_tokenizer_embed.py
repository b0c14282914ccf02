"""Embeddings: pooling against an independent library, co-occurrence against dense algebra, and no leak."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tokenizer_dataset import NUM_ITEMS, write_dataset

from recast_cli.errors import ArtifactError, DataError, EnvironmentFault
from recast_cli.tokenizer import embed
from recast_cli.tokenizer.inputs import read_interactions, training_events


def test_text_embeddings_match_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(embed.MINILM_PACKAGE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reference = pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(embed.minilm_folder()), device="cpu"
    )
    texts = ["Toy Story (1995) | Animation", "Heat", "a much longer line of words " * 80, "Heat"]
    steps: list[int] = []
    found_ND = embed.embed_texts(texts, embed.minilm_folder(), batch_size=3, progress=steps.append)
    assert found_ND.shape == (4, 384) and sum(steps) == 4
    np.testing.assert_allclose(found_ND, reference.encode(texts, normalize_embeddings=True), atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(found_ND, axis=1), 1, atol=1e-5)


def test_items_without_text_are_refused() -> None:
    with pytest.raises(DataError, match="2 items have no text, first item row 1"):
        embed.embed_texts(["a", " ", ""], Path("unused"))
    with pytest.raises(DataError, match="no items"):
        embed.embed_texts([], Path("unused"))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "MINILM_PACKAGE", "a_package_nobody_has")
    with pytest.raises(EnvironmentFault, match="a_package_nobody_has") as caught:
        embed.minilm_folder()
    assert "pip install '.[embed]'" in caught.value.hint


def test_training_events_leave_out_the_last_two() -> None:
    rows = [("a", "x", 0), ("a", "y", 1), ("a", "z", 2), ("a", "x", 3), ("b", "z", 0), ("b", "x", 1)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "position"], orient="row")
    user_E, item_E = training_events(frame, pl.Series(["x", "y", "z"]))
    assert list(zip(user_E.tolist(), item_E.tolist(), strict=True)) == [(0, 0), (0, 1)]
    with pytest.raises(ArtifactError, match="name item 'y', which"):
        training_events(frame, pl.Series(["x", "z"]))


def test_factors_ignore_the_last_two_events(tmp_path: Path) -> None:
    def factors(folder: Path) -> np.ndarray:
        ids = pl.read_parquet(folder / "items.parquet")["item_id"]
        return embed.cooccurrence_factors(*training_events(read_interactions(folder), ids), NUM_ITEMS)

    one, two = write_dataset(tmp_path / "one"), write_dataset(tmp_path / "two", last_two=7)
    assert not read_interactions(one).equals(read_interactions(two))
    np.testing.assert_array_equal(factors(one), factors(two))


def test_factors_are_those_of_the_weighted_cooccurrence() -> None:
    # Users {0,1}, {0,1,2}, {2}, one of them twice; item 3 is never seen.
    user_E, item_E = np.array([0, 0, 0, 1, 1, 1, 2]), np.array([0, 1, 1, 0, 1, 2, 2])
    found = embed.cooccurrence_factors(user_E, item_E, 4, num_factors=3)
    n = [2, 2, 2]
    gram = np.zeros((4, 4))
    for items in ({0, 1}, {0, 1, 2}, {2}):
        for i in items:
            for j in items:
                gram[i, j] += 1 / len(items) / np.sqrt(n[i] * n[j])
    np.testing.assert_allclose(found @ found.T, gram, atol=1e-5)
    assert (found[3] == 0).all()


def test_factors_do_not_touch_or_need_the_global_generator() -> None:
    import torch

    rng = np.random.default_rng(0)
    user_E, item_E = rng.integers(0, 50, 600), rng.integers(0, 80, 600)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = embed.cooccurrence_factors(user_E, item_E, 80, num_factors=8, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    np.testing.assert_array_equal(
        first, embed.cooccurrence_factors(user_E, item_E, 80, num_factors=8, seed=3)
    )


def test_no_training_event_is_an_error() -> None:
    with pytest.raises(DataError, match="no training event"):
        embed.cooccurrence_factors(np.array([], dtype=np.int64), np.array([], dtype=np.int64), 4)


def test_weights_are_shares_of_the_variance() -> None:
    rng = np.random.default_rng(0)
    wide, narrow = rng.standard_normal((30, 5)) * 100 + 7, rng.standard_normal((30, 3)) * 0.01
    joined = embed.join_blocks([(wide, 0.3), (narrow, 0.9)])
    assert joined.shape == (30, 8)
    spread = np.square(joined - joined.mean(0)).sum(1).mean(), np.square(joined[:, :5]).sum(1).mean()
    assert spread[0] == pytest.approx(1, abs=1e-5)
    assert spread[1] == pytest.approx(0.3 / 1.2, abs=1e-5)


def test_unknown_rows_sit_at_the_mean_of_their_block() -> None:
    block = np.array([[1, 0], [0, 2], [0, 0], [3, 0]], dtype=np.float32)
    joined = embed.join_blocks([(block, 1.0)])
    # Normalised: (1,0), (0,1), (1,0); mean (2/3, 1/3). The zero row stays at zero.
    centred = np.array([[1 / 3, -1 / 3], [-2 / 3, 2 / 3], [0, 0], [1 / 3, -1 / 3]])
    scale = np.sqrt(np.square(centred).sum() / 4)
    np.testing.assert_allclose(joined, centred / scale, atol=1e-6)


def test_principal_components_keep_the_leading_variance() -> None:
    rng = np.random.default_rng(0)
    block = rng.standard_normal((200, 6)) * [5, 4, 3, 0.1, 0.1, 0.1]
    every, three = embed.join_blocks([(block, 1.0)]), embed.join_blocks([(block, 1.0)], num_dimensions=3)
    assert three.shape == (200, 3)
    singular = np.linalg.svd(every - every.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.sqrt(np.square(three).sum(0)), singular[:3], rtol=1e-4)
    np.testing.assert_allclose(three.T @ three, np.diag(singular[:3] ** 2), atol=1e-3)


@pytest.mark.parametrize(
    ("block", "needle"),
    [
        (np.full((5, 2), np.nan), "NaN"),
        (np.ones((5, 2)), "are equal"),
        (np.outer(np.arange(1, 6), [1.0, 2.0]), "point the same way"),
    ],
)
def test_blocks_that_tell_nothing_apart(block: np.ndarray, needle: str) -> None:
    with pytest.raises(DataError, match=needle):
        embed.join_blocks([(block.astype(np.float32), 1.0)])
