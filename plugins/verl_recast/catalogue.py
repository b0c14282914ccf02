"""The catalogue as the plugin needs it: trie, token ids of codes, and the set of valid semantic IDs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from recast_cli.artifacts import load_manifest
from recast_cli.core.spelling import LEVELS, SID_BEGIN, SID_END, parse
from recast_cli.core.trie import Trie
from recast_cli.errors import DataError
from recast_cli.vocabulary import Vocabulary, code_ids
from verl_recast.catalogue_file import read_catalogue_file

NEEDED = (
    "set +actor_rollout_ref.rollout.custom={tokenizer: DIR} (a folder of recast build-tokenizer) or "
    "{catalogue: FILE} (item_id and sid, or an index file of MiniOneRec)"
)


@dataclass(frozen=True)
class Catalogue:
    """Items of one tokenizer artifact, or of a catalogue made elsewhere.

    The engine counts the codes of a level from its first token, so that a level is one slice of the logits.
    In a tokenizer artifact that count is the number in the token's text. A vocabulary made elsewhere may have
    its tokens in another order (MiniOneRec adds `<a_1>, <a_10>, <a_2>`): there `spelled` leads from one to
    the other.

    Attributes:
        trie: The constraint, in the engine's count.
        level_offsets: Token id of code 0 of each level; code k of level l is token `level_offsets[l] + k`.
        pad_token_id: Token for left padding.
        members: Every semantic ID as a tuple of spelled codes, read from the catalogue and not from the
            trie, so that counting invalid rollouts does not depend on the thing it checks.
        sid_begin, sid_end: Tokens round a semantic ID, None where the vocabulary has none.
        spelled_codes: Per level, the spelled code of each counted one, -1 where the token is no code of the
            level; None where both are the same.
    """

    trie: Trie
    level_offsets: tuple[int, ...]
    pad_token_id: int
    members: frozenset[tuple[int, ...]]
    sid_begin: int | None = None
    sid_end: int | None = None
    spelled_codes: tuple[np.ndarray, ...] | None = None

    @property
    def num_levels(self) -> int:
        return len(self.level_offsets)

    @classmethod
    def load(cls, folder: str | Path) -> Catalogue:
        """Read a tokenizer artifact (`recast build-tokenizer`)."""
        folder = Path(folder)
        load_manifest(folder, "tokenizer")
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        sids = pl.read_parquet(folder / "semantic_ids.parquet", columns=["sid"])["sid"].to_list()
        return cls(
            trie=Trie.load(folder / "trie.npz"),
            level_offsets=vocabulary.level_offsets,
            pad_token_id=vocabulary.pad,
            members=frozenset(parse(sid) for sid in sids),
            sid_begin=vocabulary.sid_begin,
            sid_end=vocabulary.sid_end,
        )

    @classmethod
    def read(cls, path: str | Path, tokenizer: Any) -> Catalogue:
        """Read a catalogue made elsewhere (see `catalogue_file`), for a model with its code tokens.

        Raises:
            DataError: as `read_catalogue_file`, or the tokenizer has no token for a code.
        """
        path = Path(path)
        item_of = read_catalogue_file(path)
        ids = code_ids(tokenizer)
        _require_tokens(path, item_of, ids)
        ids_NL = np.array([[ids[place] for place in enumerate(codes)] for codes in item_of])
        offsets_L, sizes_L = ids_NL.min(axis=0), np.ptp(ids_NL, axis=0) + 1
        spelled = [np.full(size, -1, dtype=np.int64) for size in sizes_L]
        for (level, code), token in ids.items():
            if level < len(sizes_L) and 0 <= token - offsets_L[level] < sizes_L[level]:
                spelled[level][token - offsets_L[level]] = code
        return cls(
            trie=Trie.from_codes(ids_NL - offsets_L, sizes_L.tolist()),
            level_offsets=tuple(offsets_L.tolist()),
            pad_token_id=tokenizer.pad_token_id,
            members=frozenset(item_of),
            sid_begin=tokenizer.get_vocab().get(SID_BEGIN),
            sid_end=tokenizer.get_vocab().get(SID_END),
            spelled_codes=tuple(spelled),
        )

    def token_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes of the engine (..., L) to token ids (..., L)."""
        return codes + np.asarray(self.level_offsets)

    def spelled(self, codes: np.ndarray) -> np.ndarray:
        """Codes of the engine (..., L) as text spells them; -1 (a missing beam) stays -1."""
        if self.spelled_codes is None:
            return codes
        levels = [np.append(table, -1)[codes[..., level]] for level, table in enumerate(self.spelled_codes)]
        return np.stack(levels, axis=-1)


def find_catalogue(custom: Mapping[str, Any] | None, tokenizer: Any) -> Catalogue | None:
    """The catalogue that `rollout.custom` names, None if it names none.

    Args:
        custom: `tokenizer`, a folder of `recast build-tokenizer`, or `catalogue`, a file made elsewhere.
        tokenizer: The model's, for the latter.

    Raises:
        ValueError: it names both.
    """
    folder, path = (custom or {}).get("tokenizer"), (custom or {}).get("catalogue")
    if folder and path:
        raise ValueError(f"rollout.custom names both tokenizer={folder} and catalogue={path}: keep one")
    if folder:
        return Catalogue.load(folder)
    return Catalogue.read(path, tokenizer) if path else None


def require_catalogue(custom: Mapping[str, Any] | None, tokenizer: Any) -> Catalogue:
    """As `find_catalogue`, for who cannot do without.

    Raises:
        ValueError: it names none, or both.
    """
    catalogue = find_catalogue(custom, tokenizer)
    if catalogue is None:
        raise ValueError(f"rollout.custom names no catalogue: {NEEDED}")
    return catalogue


def _require_tokens(
    path: Path, item_of: Mapping[tuple[int, ...], str], ids: Mapping[tuple[int, int], int]
) -> None:
    lacking = {
        place: item for codes, item in item_of.items() for place in enumerate(codes) if place not in ids
    }
    if lacking:
        (level, code), item = next(iter(lacking.items()))
        letter = LEVELS[level]
        raise DataError(
            f"{path}: the model's tokenizer has no token for {len(lacking)} codes, the first is code {code} "
            f"of level {letter} (<s_{letter}_{code}> or <{letter}_{code}>) of item {item!r}",
            "add the code tokens to the model's vocabulary before SFT, or name the catalogue of that SFT",
        )
