"""Shared by this folder: the guides' examples as modules, and a small tokenizer that nobody may change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from plugin_artifacts import write_artifacts

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "guides" / "examples"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 items, 3 levels of 8 codes, a Qwen3 of width 64 that has not learned anything."""
    return write_artifacts(tmp_path_factory.mktemp("integrations"))[1]
