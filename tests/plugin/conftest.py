"""One small dataset and tokenizer for every test of this folder; nothing may write into them."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_artifacts import write_artifacts


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(dataset, tokenizer) folders."""
    return write_artifacts(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="session")
def tokenizer_folder(artifacts: tuple[Path, Path]) -> Path:
    return artifacts[1]
