"""Titles for one history: the same prompt, trie and beam search as in the evaluation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from recast_cli.artifacts import load_manifest
from recast_cli.errors import DataError, RecipeError
from recast_cli.evaluation.recommender import Recommender
from recast_cli.evaluation.split import Log, load_log

MIN_BEAM = 50
MAX_NAMED = 5  # unknown ids named in an error
MAX_MATCHES = 3

BuildMessages = Callable[[Sequence[str]], list[dict[str, str]]]


@dataclass(frozen=True)
class Recommendation:
    """One answer.

    Attributes:
        rank: From 1.
        item_id, title: Of the catalogue.
        log_prob: Sum of full-vocabulary log-softmax of its codes.
        in_history: It was in the history already (only if asked to keep those).
    """

    rank: int
    item_id: str
    title: str
    log_prob: float
    in_history: bool


def recommend(
    model_dir: Path,
    tokenizer_dir: Path,
    data_dir: Path,
    *,
    build_messages: BuildMessages,
    items: Sequence[str] = (),
    user: str | None = None,
    num_items: int = 10,
    keep_history: bool = False,
    device: str | None = None,
) -> list[Recommendation]:
    """The best next items after a history.

    Args:
        model_dir: Hugging Face folder.
        tokenizer_dir: Tokenizer artifact.
        data_dir: Dataset artifact.
        build_messages: The prompt builder: semantic IDs, oldest first -> chat messages.
        items: History as item ids, oldest first; or
        user: A user of the dataset, with all their events. Exactly one of the two.
        num_items: Length of the list; shorter only if fewer items are left.
        keep_history: Also list what is in the history.
        device: Default: CUDA where there is one, else CPU.

    Raises:
        RecipeError: `num_items` below 1, or not exactly one of `items` and `user`.
        DataError: an unknown item or user.
        ArtifactError: the folders do not belong together.
    """
    if num_items < 1:
        raise RecipeError(f"number of items is {num_items}, needed at least 1", "for example -k 10")
    if bool(items) == (user is not None):
        raise RecipeError("needed a history: item ids, or --user, not both", "recast recommend --user 7")
    manifest = load_manifest(data_dir, "dataset")
    log = load_log(data_dir)
    titles = pl.read_parquet(data_dir / "items.parquet", columns=["title"])["title"].to_list()
    history = _rows_of(items, log, titles) if user is None else _events_of(user, log)
    recommender = Recommender.load(model_dir, tokenizer_dir, data_dir, device=device)
    sid_of_row = list(recommender.row_of_sid)  # in row order
    shown = history[-int(manifest.get("params", {}).get("history", len(history))) :]
    prompts = recommender.encode([build_messages([sid_of_row[row] for row in shown])])
    width = min(max(num_items, MIN_BEAM), len(log.item_ids))
    ranked = recommender.rank(prompts, width, None if keep_history else [history])
    best = [
        (row, score) for row, score in zip(ranked.rows_BW[0], ranked.scores_BW[0], strict=True) if row >= 0
    ]
    seen = set(history.tolist())
    return [
        Recommendation(place, log.item_ids[row], titles[row], float(score), int(row) in seen)
        for place, (row, score) in enumerate(best[:num_items], start=1)
    ]


def _events_of(user: str, log: Log) -> np.ndarray:
    if user not in log.users:
        close = difflib.get_close_matches(user, log.users, n=MAX_MATCHES)
        raise DataError(
            f"user {user!r} is not in the dataset ({len(log.users)} users)",
            f"did you mean {' or '.join(close)}?" if close else "see user_id in interactions.parquet",
        )
    return log.before(user)


def _rows_of(items: Sequence[str], log: Log, titles: Sequence[str]) -> np.ndarray:
    row_of = {item: row for row, item in enumerate(log.item_ids)}
    unknown = [item for item in items if item not in row_of]
    if unknown:
        named = ", ".join(repr(item) for item in unknown[:MAX_NAMED])
        more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
        raise DataError(
            f"{named}{more}: no such item in the dataset ({len(row_of)} items)",
            _hint(unknown[0], log.item_ids, titles),
        )
    return np.array([row_of[item] for item in items], dtype=np.int64)


def _hint(unknown: str, item_ids: Sequence[str], titles: Sequence[str]) -> str:
    """Items whose title holds the text, else items with a similar id, else with a similar title."""
    wanted, names = unknown.casefold().strip(), [(title or "").casefold() for title in titles]
    rows = [row for row, title in enumerate(names) if len(wanted) > 2 and wanted in title]
    for text, texts in ((unknown, item_ids), (wanted, names)):
        if not rows:
            close = difflib.get_close_matches(text, texts, n=MAX_MATCHES, cutoff=0.5)
            rows = [texts.index(match) for match in close]
    if not rows:
        return "item ids are in the column item_id of items.parquet"
    named = [f"{item_ids[row]} ({titles[row]})" if titles[row] else item_ids[row] for row in rows]
    return f"did you mean {' or '.join(named[:MAX_MATCHES])}?"
