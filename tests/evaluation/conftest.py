"""The fixture that writes small artifacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from artifacts_by_hand import Folders, Sequences, Write, write_dataset, write_tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write both artifacts under the test's folder."""

    def _write(
        sequences: Sequences,
        codes_NL: Sequence[Sequence[int]] | np.ndarray,
        sizes: Sequence[int],
        *,
        history: int = 20,
        seed: int = 0,
        name: str = "a",
    ) -> Folders:
        folders = Folders(tmp_path / name / "data", tmp_path / name / "tokenizer")
        codes_NL = np.asarray(codes_NL)
        write_dataset(folders.data, sequences, len(codes_NL), history)
        write_tokenizer(folders.tokenizer, folders.data, codes_NL, sizes, seed)
        return folders

    return _write
