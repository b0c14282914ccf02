from __future__ import annotations

from pathlib import Path

import pytest
from profiles import RECIPE, recast


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    sizes = ["--num-users", "60", "--num-items", "40", "--num-clusters", "4", "--sparsity", "0.7"]
    small = ["--embeddings", "cooccurrence", "--codebook-size", "8", "--hidden-size", "64", "--layers", "2"]
    for command in (
        ["prepare-data", "synthetic", "--out", "data", "--history", "5", *sizes],
        ["build-tokenizer", "--data", "data", "--out", "tokenizer", *small],
    ):
        done = recast(folder, *command)
        assert done.returncode == 0, done.stderr
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder
