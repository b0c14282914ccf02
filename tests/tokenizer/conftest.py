"""A small dataset, and one tokenizer built from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizer_dataset import SIZES, TEMPLATE, write_dataset

from recast_cli.tokenizer.build import TokenizerParams, build


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset")


@pytest.fixture(scope="session")
def _built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("built")
    data = write_dataset(folder / "dataset")
    params = TokenizerParams(
        SIZES, embeddings="cooccurrence", num_dimensions=16, hidden_size=64, num_layers=1
    )
    build(data, folder / "tokenizer", params, chat_template=TEMPLATE)
    return data, folder / "tokenizer"


@pytest.fixture
def built(_built: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """(dataset, tokenizer), the test's own copies."""
    for source in _built:
        shutil.copytree(source, tmp_path / source.name)
    return tmp_path / "dataset", tmp_path / "tokenizer"


@pytest.fixture
def small_params() -> TokenizerParams:
    """Those of `built`."""
    return TokenizerParams(SIZES, embeddings="cooccurrence", num_dimensions=16, hidden_size=64, num_layers=1)
