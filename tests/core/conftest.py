"""A tiny model and its catalogue for the tests of decoding."""

from __future__ import annotations

import pytest
from tiny_models import CODES, SIZES, tiny

from recast_cli.core.trie import Trie


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def trie() -> Trie:
    return Trie.from_codes(CODES, SIZES)
