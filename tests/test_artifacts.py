"""Artifacts refuse the wrong kind, format or parent; errors survive a process boundary."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from sealing import whole

from recast_cli import artifacts, outputs
from recast_cli.errors import ArtifactError, DataError, EnvironmentFault, RecastError, RecipeError

# --- manifests


def dataset(folder: Path, text: str = "hello", **facts: Any) -> dict[str, Any]:
    with outputs.atomic_dir(folder, replace=True) as scratch:
        (scratch / "sub").mkdir()
        (scratch / "sub" / "items.txt").write_text(text)
        return artifacts.write_manifest(scratch, "dataset", seed=1, **whole("dataset", **facts))


def test_a_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    written = dataset(tmp_path / "data", num_items=3)
    assert written["files"] == {"sub/items.txt": hashlib.sha256(b"hello").hexdigest()}
    assert written["num_items"] == 3
    assert artifacts.load_manifest(tmp_path / "data", "dataset") == written


def test_the_identity_is_the_content(tmp_path: Path) -> None:
    first = dataset(tmp_path / "one", num_items=3)
    time.sleep(0.01)  # another time, place and fact, same content
    assert artifacts.identity(dataset(tmp_path / "two", num_items=4)) == artifacts.identity(first)
    assert artifacts.identity(dataset(tmp_path / "three", text="other")) != artifacts.identity(first)
    assert artifacts.identity({**first, "kind": "tokenizer"}) != artifacts.identity(first)
    assert artifacts.identity({**first, "parents": {"dataset": "x"}}) != artifacts.identity(first)


def test_a_folder_without_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no tokenizer in") as caught:
        artifacts.load_manifest(tmp_path, "tokenizer")
    assert caught.value.hint == "make one with `recast build-tokenizer`"


@pytest.mark.parametrize("text", ["{", "", "\udcff", "[]", "3"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / artifacts.MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError):
        artifacts.load_manifest(tmp_path, "dataset")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    dataset(tmp_path / "data")
    with pytest.raises(ArtifactError, match="holds a 'dataset' artifact, needed 'tokenizer'"):
        artifacts.load_manifest(tmp_path / "data", "tokenizer")


def test_another_format_is_refused(tmp_path: Path) -> None:
    manifest = dataset(tmp_path / "data")
    path = tmp_path / "data" / artifacts.MANIFEST
    path.write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ArtifactError, match="format version 99, this recast reads 1"):
        artifacts.load_manifest(tmp_path / "data", "dataset")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    dataset(tmp_path / "data")
    (tmp_path / "data" / "sub" / "items.txt").unlink()
    with pytest.raises(ArtifactError, match=r"lacks sub/items\.txt"):
        artifacts.load_manifest(tmp_path / "data", "dataset")


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    dataset(tmp_path / "data")
    artifacts.load_manifest(tmp_path / "data", "dataset")
    (tmp_path / "data" / "sub" / "items.txt").write_text("hellu")
    with pytest.raises(ArtifactError, match=r"sub/items\.txt differs from its manifest") as caught:
        artifacts.load_manifest(tmp_path / "data", "dataset")
    assert caught.value.hint == "rerun `recast prepare-data` with --overwrite"


def test_a_missing_fact_is_named(tmp_path: Path) -> None:
    written = dataset(tmp_path / "data")
    del written["num_users"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match="has no num_users, needed int"):
        artifacts.load_manifest(tmp_path / "data", "dataset")


@pytest.mark.parametrize(("fact", "found"), [("files", None), ("num_items", "three"), ("source", [])])
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, fact: str, found: object) -> None:
    written = dataset(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({**written, fact: found}))
    needed = {"files": "dict", "num_items": "int", "source": "dict"}[fact]
    with pytest.raises(ArtifactError, match=f"{fact} is {type(found).__name__}, needed {needed}"):
        artifacts.load_manifest(tmp_path / "data", "dataset")


def test_a_child_knows_its_parent(tmp_path: Path) -> None:
    parent = dataset(tmp_path / "data", num_items=11924)
    other = dataset(tmp_path / "other", text="other", num_items=12101)
    child = {"kind": "tokenizer", "parents": {"dataset": artifacts.identity(other)}, "num_items": 12101}
    artifacts.require_parent(child, other, tmp_path / "tok", tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"built for another dataset .* \(12101 items against 11924\)"):
        artifacts.require_parent(child, parent, tmp_path / "tok", tmp_path / "data")
    with pytest.raises(ArtifactError, match="built for another dataset"):
        artifacts.require_parent({**child, "parents": {}}, other, tmp_path / "tok", tmp_path / "other")


# --- errors


@pytest.mark.parametrize("kind", [RecastError, DataError, ArtifactError, RecipeError, EnvironmentFault])
def test_errors_survive_a_process_boundary(kind: type[RecastError]) -> None:
    back = pickle.loads(pickle.dumps(kind("what", "do this")))
    assert (type(back), back.message, back.hint, str(back)) == (kind, "what", "do this", "what")


def test_errors_are_also_the_standard_ones() -> None:
    for kind in (DataError, ArtifactError, RecipeError):
        with contextlib.suppress(ValueError):
            raise kind("what", "what to do")
    assert issubclass(EnvironmentFault, RuntimeError)


def test_overwrite_takes_no_file_that_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    dataset(tmp_path / "data")

    def find(overwrite: bool) -> dict[str, Any] | None:
        return artifacts.find_existing(tmp_path / "data", "dataset", lambda _: "", overwrite=overwrite)

    assert find(False) is not None and find(True) is None
    (tmp_path / "data" / "runs").mkdir()
    (tmp_path / "data" / "runs" / "notes.txt").write_text("mine")
    assert find(False) is not None
    with pytest.raises(ArtifactError, match=r"holds runs/notes\.txt, which is no part of the dataset"):
        find(True)
