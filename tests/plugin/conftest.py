"""Shared by this folder: a small dataset and tokenizer, which nobody may write into, and a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import RECIPE, Job, succeed, train
from plugin_artifacts import write_artifacts


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dataset, tokenizer) folders."""
    return write_artifacts(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="session")
def tokenizer_folder(artifacts: tuple[Path, Path]) -> Path:
    return artifacts[1]


@pytest.fixture(scope="session")
def workspace(artifacts: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose paths are relative to the working directory, as a user's are."""
    folder = tmp_path_factory.mktemp("jobs")
    text = RECIPE.format(data=artifacts[0], tokenizer=artifacts[1])
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def recast_job(workspace: Path) -> Job:
    return succeed(train(workspace, "recast"))
