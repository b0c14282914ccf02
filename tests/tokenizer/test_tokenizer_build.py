"""The stage on a hand-made dataset: what it writes, reuses and refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sealing import reseal
from tokenizer_dataset import NUM_ITEMS, SIZES, TEMPLATE, write_dataset
from typer.testing import CliRunner

from recast_cli.artifacts import identity, load_manifest, write_manifest
from recast_cli.core.spelling import parse
from recast_cli.core.trie import Trie
from recast_cli.errors import ArtifactError, DataError, RecastError, RecipeError
from recast_cli.tokenizer.build import TokenizerParams, build
from recast_cli.vocabulary import Vocabulary


def test_every_item_has_its_own_semantic_id_in_item_order(built: tuple[Path, Path]) -> None:
    data, out = built
    table = pl.read_parquet(out / "semantic_ids.parquet")
    assert table.columns == ["item_id", "sid"]
    assert table["item_id"].to_list() == pl.read_parquet(data / "items.parquet")["item_id"].to_list()
    assert table["sid"].n_unique() == NUM_ITEMS
    trie = Trie.load(out / "trie.npz")
    codes_NL = np.array([parse(sid) for sid in table["sid"]])
    again = Trie.from_codes(codes_NL, SIZES)
    assert trie.codebook_sizes == SIZES and (trie.leaf_item == again.leaf_item).all()


def test_manifest_and_files(built: tuple[Path, Path]) -> None:
    data, out = built
    manifest = load_manifest(out, "tokenizer")
    assert manifest["parents"] == {"dataset": identity(load_manifest(data, "dataset"))}
    assert (manifest["num_items"], manifest["num_levels"], manifest["codebook_sizes"]) == (
        NUM_ITEMS,
        3,
        list(SIZES),
    )
    assert json.loads((out / "quality.json").read_text())["after"]["colliding_items"] == 0
    assert np.load(out / "embeddings.npy").shape == (NUM_ITEMS, 16)
    vocabulary = Vocabulary.load(out / "vocabulary.json")
    assert vocabulary.level_offsets == (5, 13, 21) and vocabulary.vocab_size == 29
    assert str(data) not in (out / "manifest.json").read_text()


def test_same_input_same_bytes(
    built: tuple[Path, Path], tmp_path: Path, small_params: TokenizerParams
) -> None:
    data, out = built
    again, reused = build(data, tmp_path / "again", small_params, chat_template=TEMPLATE)
    assert not reused
    assert again["files"] == load_manifest(out, "tokenizer")["files"]
    other, _ = build(data, tmp_path / "other", replace(small_params, seed=1), chat_template=TEMPLATE)
    assert other["files"]["semantic_ids.parquet"] != again["files"]["semantic_ids.parquet"]


def test_held_out_events_do_not_reach_the_semantic_ids(tmp_path: Path, small_params: TokenizerParams) -> None:
    files = []
    for shift in (0, 7):
        data = write_dataset(tmp_path / f"data{shift}", last_two=shift)
        files.append(build(data, tmp_path / f"out{shift}", small_params, chat_template=TEMPLATE)[0]["files"])
    assert files[0]["semantic_ids.parquet"] == files[1]["semantic_ids.parquet"]


def test_reuse_and_overwrite(built: tuple[Path, Path], small_params: TokenizerParams) -> None:
    data, out = built
    before = load_manifest(out, "tokenizer")
    manifest, reused = build(data, out, small_params, chat_template=TEMPLATE)
    assert reused and manifest == before
    changed = replace(small_params, seed=4)
    with pytest.raises(ArtifactError, match="seed 0, needed 4") as caught:
        build(data, out, changed, chat_template=TEMPLATE)
    assert "--overwrite" in caught.value.hint
    with pytest.raises(ArtifactError, match="chat_template_sha256"):
        build(data, out, small_params, chat_template=TEMPLATE + " ")
    assert load_manifest(out, "tokenizer") == before
    manifest, reused = build(data, out, changed, chat_template=TEMPLATE, overwrite=True)
    assert not reused and manifest["seed"] == 4 == load_manifest(out, "tokenizer")["seed"]


def test_another_dataset_is_not_reused(
    built: tuple[Path, Path], tmp_path: Path, small_params: TokenizerParams
) -> None:
    other = write_dataset(tmp_path / "other", num_items=100)
    with pytest.raises(ArtifactError, match=r"of another dataset \(120 items, this one has 100\)"):
        build(other, built[1], small_params, chat_template=TEMPLATE)


def test_damage_is_seen_and_mended(built: tuple[Path, Path], small_params: TokenizerParams) -> None:
    data, out = built
    (out / "trie.npz").write_bytes(b"damage")
    with pytest.raises(ArtifactError, match=r"trie\.npz differs from its manifest"):
        build(data, out, small_params, chat_template=TEMPLATE)
    (out / "vocabulary.json").unlink()
    with pytest.raises(ArtifactError, match=r"lacks vocabulary\.json"):
        build(data, out, small_params, chat_template=TEMPLATE)
    build(data, out, small_params, chat_template=TEMPLATE, overwrite=True)
    Trie.load(out / "trie.npz")


def test_only_a_tokenizer_is_ever_replaced(
    dataset: Path, tmp_path: Path, small_params: TokenizerParams
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    other = write_dataset(tmp_path / "other")
    for out, needle in (
        (mine, "holds no tokenizer"),
        (other, "holds no tokenizer"),
        (dataset, "lies inside --data"),
        (dataset / "tokenizer", "lies inside --data"),
    ):
        with pytest.raises(ArtifactError, match=needle):
            build(dataset, out, small_params, chat_template=TEMPLATE, overwrite=True)
    assert (mine / "thesis.txt").exists() and (other / "items.parquet").exists()


def test_failure_leaves_nothing(dataset: Path, tmp_path: Path, small_params: TokenizerParams) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "model" / "config.json").is_file() and not (folder / "manifest.json").exists()
        raise ValueError("late")

    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="late"):
        build(dataset, tmp_path / "out", small_params, chat_template=TEMPLATE, finish=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_files_of_the_hook_are_in_the_manifest(
    dataset: Path, tmp_path: Path, small_params: TokenizerParams
) -> None:
    manifest, _ = build(
        dataset,
        tmp_path / "out",
        small_params,
        chat_template=TEMPLATE,
        finish=lambda folder: (folder / "extra.txt").write_text("here") and None,
    )
    assert "extra.txt" in manifest["files"]


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"codebook_sizes": (4, 4, 4)}, "64 semantic IDs for 120 items"),
        ({"codebook_sizes": (128, 4, 4)}, "128 codes, but there are 120 items"),
        ({"embeddings": "audio"}, "'audio'"),
        ({"cooccurrence_weight": 1.0}, "weight is 1.0"),
        ({"cooccurrence_weight": float("nan")}, "weight is nan"),
        ({"num_dimensions": -1}, "dimensions is -1"),
        ({"hidden_size": 96}, "hidden size is 96"),
        ({"hidden_size": 64_000}, "hidden size is 64000, needed a multiple of 64 up to 8192"),
        ({"num_layers": 1000}, "layers is 1000, needed 1 to 128"),
        ({"num_layers": 0}, "layers is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options(
    dataset: Path, tmp_path: Path, small_params: TokenizerParams, change: dict, needle: str
) -> None:
    with pytest.raises(RecipeError, match=needle):
        build(dataset, tmp_path / "out", replace(small_params, **change), chat_template=TEMPLATE)
    assert not (tmp_path / "out").exists()


def test_a_history_longer_than_the_model_reads(tmp_path: Path, small_params: TokenizerParams) -> None:
    # 5 tokens an item: 819 items are 4,095 of the model's 4,096.
    fits = write_dataset(tmp_path / "fits", history=818)
    build(fits, tmp_path / "out", small_params, chat_template=TEMPLATE)
    longer = write_dataset(tmp_path / "longer", history=819)
    with pytest.raises(DataError, match="are 4100 tokens, the model reads at most 4096") as caught:
        build(longer, tmp_path / "too-long", small_params, chat_template=TEMPLATE)
    assert caught.value.hint and "--history 818 or less" in caught.value.hint
    assert not (tmp_path / "too-long").exists()


def test_bad_datasets(dataset: Path, tmp_path: Path, small_params: TokenizerParams) -> None:
    def attempt(data: Path) -> RecastError:
        with pytest.raises(ArtifactError) as caught:
            build(data, tmp_path / "out", small_params, chat_template=TEMPLATE)
        assert caught.value.hint and not (tmp_path / "out").exists()
        return caught.value

    assert "no dataset in" in attempt(tmp_path / "absent").message
    (tmp_path / "wrong").mkdir()
    write_manifest(tmp_path / "wrong", "tokenizer")
    assert "needed 'dataset'" in attempt(tmp_path / "wrong").message
    items = pl.read_parquet(dataset / "items.parquet")
    items.drop("text").write_parquet(dataset / "items.parquet")
    reseal(dataset)
    assert "lacks item_id, text" in attempt(dataset).message
    items.head(100).write_parquet(dataset / "items.parquet")
    reseal(dataset)
    assert "holds 100 items in 100 rows, its manifest says 120" in attempt(dataset).message
    (dataset / "items.parquet").write_bytes(b"damage")
    assert "items.parquet" in attempt(dataset).message
    (dataset / "items.parquet").unlink()
    assert "lacks items.parquet" in attempt(dataset).message


def test_command_from_logs_to_tokenizer(tmp_path: Path) -> None:
    from recast_cli.main import app

    data, out = tmp_path / "data", tmp_path / "tokenizer"
    made = CliRunner().invoke(app, ["prepare-data", "synthetic", "--out", str(data)])
    assert made.exit_code == 0, made.output
    arguments = ["build-tokenizer", "--data", str(data), "--out", str(out), "--embeddings", "cooccurrence"]
    arguments += ["--codebook-size", "16", "--hidden-size", "64", "--layers", "1", "--json"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert told["reused"] is False and told["quality"]["after"]["colliding_items"] == 0
    assert {"verl/sft.parquet", "verl/rl.parquet"} < set(load_manifest(out, "tokenizer")["files"])
    again = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert again["reused"] is True and again["quality"] == told["quality"]
