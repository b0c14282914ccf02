"""Model, tokenizer and dataset in, ranking metrics out: both history modes, per user and in the mean.

Shapes: U evaluated rows, K list length (the beam width), L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from recast_cli.artifacts import identity, load_manifest
from recast_cli.core import ranking
from recast_cli.core.ranking import Interval, Targets
from recast_cli.errors import ArtifactError, RecipeError
from recast_cli.evaluation.baselines import BASELINES, ranked_lists
from recast_cli.evaluation.recommender import Recommender
from recast_cli.evaluation.results import MODES, Evaluation
from recast_cli.evaluation.split import Split, load_split
from recast_cli.models import model_facts
from recast_cli.provenance import versions

CUTOFFS = (1, 5, 10, 20, 50)
TOP_ITEMS = 10  # of each list in the per-user table; the ranks serve every cutoff
CHUNK = 256  # rows between two signs of progress

Progress = Callable[[int], None]
Lists = dict[str, NDArray[np.int64]]  # mode -> (U, K)


def evaluate_model(
    model_dir: Path,
    tokenizer_dir: Path,
    data_dir: Path,
    split: str = "test",
    *,
    beam_width: int = 50,
    modes: Sequence[str] = MODES,
    baselines: bool = False,
    max_users: int | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Rank the whole catalogue for every row of a split and measure it.

    Args:
        model_dir: Hugging Face folder.
        tokenizer_dir: Tokenizer artifact; its rendered prompts are used as they are.
        data_dir: Dataset artifact.
        split: `validation` (choose checkpoints and settings on it) or `test` (once).
        beam_width: W, at most the number of items; cutoffs above it are left out.
        modes: `history_removed`, `history_kept` or both; one alone costs less (choosing a checkpoint).
        baselines: Add popularity and item-kNN.
        max_users: Rows to draw by `seed`; None takes all.
        batch_tokens: Most tokens read at once; default by device.
        seed: Of the bootstrap and of `max_users`.
        device: Default: CUDA where there is one, else CPU.
        progress: Called with the number of rows done since the last call.

    Raises:
        RecipeError: an option out of bounds.
        ArtifactError: the folders do not belong together.
    """
    _check_options(beam_width, max_users, batch_tokens, modes)
    rows = load_split(data_dir, split, max_users=max_users, seed=seed)
    beam_width = min(beam_width, rows.num_items)  # which is the whole catalogue, ranked
    recommender = Recommender.load(
        model_dir, tokenizer_dir, data_dir, token_budget=batch_tokens, device=device
    )
    prompts, answers_UL = _load_prompts(recommender, tokenizer_dir, rows)
    lists, given, log_probs_U = _model_lists(
        recommender, rows, prompts, answers_UL, beam_width, modes, progress
    )
    cutoffs = [k for k in CUTOFFS if k <= beam_width]
    arms = {
        "model": {
            mode: _measure(rows, lists[mode], cutoffs, seed, given[mode], log_probs_U) for mode in modes
        }
    }
    table = _user_table(rows, lists, log_probs_U)
    for name, fit in BASELINES.items() if baselines else ():
        scorer = fit(rows.train_user_E, rows.train_item_E, rows.num_items)
        blocks = list(ranked_lists(scorer, rows.histories, beam_width))
        listed = {mode: np.concatenate([block[i] for block in blocks]) for i, mode in enumerate(MODES)}
        arms[name] = {mode: _measure(rows, listed[mode], cutoffs, seed) for mode in modes}
        ranks = {f"{name}_{_rank_column(mode)}": _ranks(listed[mode], rows.target_U) for mode in modes}
        table = table.with_columns(**ranks)
    facts = _facts(recommender, rows, model_dir, tokenizer_dir, beam_width, cutoffs, seed)
    return Evaluation(facts=facts, arms=arms, users=table)


def _check_options(
    beam_width: int, max_users: int | None, batch_tokens: int | None, modes: Sequence[str]
) -> None:
    for name, value in (
        ("beam-width", beam_width),
        ("max-users", max_users),
        ("batch-tokens", batch_tokens),
    ):
        if value is not None and value < 1:
            raise RecipeError(f"{name} is {value}, needed at least 1", "leave it out")
    if not modes or not set(modes) <= set(MODES):
        raise RecipeError(f"modes are {list(modes)}, needed some of {list(MODES)}", "leave it out")


def _load_prompts(
    recommender: Recommender, tokenizer_dir: Path, rows: Split
) -> tuple[list[list[int]], NDArray[np.int64]]:
    """Token ids of every row's prompt, and its target's codes (U, L), from the rendered parquet.

    Rows are found by their index, never by their prompt: equal histories keep their own targets.
    """
    path = tokenizer_dir / "verl" / f"{rows.name}.parquet"
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist", "rerun `recast build-tokenizer`")
    table = pl.read_parquet(path, columns=["prompt", "reward_model", "extra_info"]).select(
        index=pl.col("extra_info").struct.field("index"),
        target=pl.col("extra_info").struct.field("target_item_id"),
        answer=pl.col("reward_model").struct.field("ground_truth"),
        prompt="prompt",
    )
    wanted = pl.DataFrame({"index": rows.index_U, "expected": [rows.item_ids[row] for row in rows.target_U]})
    joined = wanted.join(table, on="index", how="left", maintain_order="left")
    if len(joined) != len(wanted) or not joined["target"].eq_missing(joined["expected"]).all():
        raise ArtifactError(
            f"{path} was rendered from other rows than those of the dataset", "rerun build-tokenizer"
        )
    prompts = recommender.encode(joined["prompt"].to_list())
    return prompts, _answer_codes(recommender, joined["answer"].to_list(), rows, path)


def _answer_codes(
    recommender: Recommender, answers: Sequence[str], rows: Split, path: Path
) -> NDArray[np.int64]:
    """Codes (U, L) of the targets, after checking that each names its target in the catalogue."""
    for answer, target in zip(answers, rows.target_U, strict=True):
        if recommender.row_of_sid.get(f"{recommender.sid_begin}{answer}{recommender.sid_end}") != target:
            raise ArtifactError(
                f"{path}: {answer} is not the semantic ID of item {rows.item_ids[target]}",
                "rerun build-tokenizer",
            )
    ids = recommender.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    num_levels = len(recommender.level_offsets)
    if any(len(row) != num_levels for row in ids):
        raise ArtifactError(
            f"{path}: an answer is not {num_levels} tokens long", "rerun `recast build-tokenizer`"
        )
    return np.array(ids, dtype=np.int64) - np.array(recommender.level_offsets)


def _model_lists(
    recommender: Recommender,
    rows: Split,
    prompts: Sequence[Sequence[int]],
    answers_UL: NDArray[np.int64],
    width: int,
    modes: Sequence[str],
    progress: Progress | None,
) -> tuple[Lists, dict[str, NDArray[np.bool_]], NDArray[np.float64]]:
    """Per mode the ranked item rows and whether an answer was given at all; the targets' log-probs."""
    num_rows = len(prompts)
    log_probs_U = np.empty(num_rows)
    lists: Lists = {mode: np.full((num_rows, width), -1, dtype=np.int64) for mode in modes}
    given = {mode: np.zeros((num_rows, width), dtype=bool) for mode in modes}
    for chunk in _chunks(prompts):
        histories = [rows.histories[u] for u in chunk]
        closed = [histories if mode == "history_removed" else None for mode in modes]
        found, log_probs_BL = recommender.answer(
            [prompts[u] for u in chunk], width, closed, answers_UL[chunk]
        )
        for mode, ranked in zip(modes, found, strict=True):
            lists[mode][chunk], given[mode][chunk] = ranked.rows_BW, ranked.given_BW
        log_probs_U[chunk] = log_probs_BL.sum(axis=1)
        if progress is not None:
            progress(len(chunk))
    return lists, given, log_probs_U


def _chunks(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Rows in order of prompt length: little padding."""
    order = sorted(range(len(prompts)), key=lambda u: len(prompts[u]))
    for start in range(0, len(order), CHUNK):
        yield order[start : start + CHUNK]


def _measure(
    rows: Split,
    ranked_UK: NDArray[np.int64],
    cutoffs: Sequence[int],
    seed: int,
    given_UK: NDArray[np.bool_] | None = None,
    log_probs_U: NDArray[np.float64] | None = None,
) -> dict[str, Interval | float]:
    """Every metric of one list of one arm; those that are means over users come with an interval."""
    targets = Targets.single(rows.target_U)
    users: dict[str, NDArray[np.float64]] = ranking.per_user(ranked_UK, targets, cutoffs)
    beam_hits_UK = ranked_UK == rows.target_U[:, None]  # beams, not distinct items
    for k in cutoffs:
        users[f"pass@{k}"] = ranking.pass_at_k(beam_hits_UK, targets.sizes_U, k)
    if log_probs_U is not None:
        users |= {"target_log_prob": log_probs_U, "target_probability": np.exp(log_probs_U)}
    metrics: dict[str, Interval | float] = dict(ranking.bootstrap_table(users, seed=seed))
    popularity_N = np.bincount(rows.train_item_E, minlength=rows.num_items)
    for k in cutoffs:
        metrics[f"coverage@{k}"] = ranking.coverage(ranked_UK, rows.num_items, k)
        metrics[f"gini@{k}"] = ranking.gini(ranked_UK, rows.num_items, k)
        metrics[f"novelty@{k}"] = ranking.novelty(ranked_UK, popularity_N, k)
    metrics["duplicate_share"] = ranking.duplicate_share(ranked_UK, ranked_UK.shape[1])
    if given_UK is not None:
        metrics["invalid_share"] = ranking.invalid_share(ranked_UK >= 0, given_UK)
        metrics["invalid_items"] = int((given_UK & (ranked_UK < 0)).sum())
    return metrics


def _ranks(ranked_UK: NDArray[np.int64], target_U: NDArray[np.int64]) -> pl.Series:
    """1-based rank of the target, null where it is not listed."""
    hits_UK = ranked_UK == target_U[:, None]
    rank_U = np.where(hits_UK.any(axis=1), hits_UK.argmax(axis=1) + 1, 0)
    return pl.Series(rank_U, dtype=pl.Int32).replace(0, None)


def _rank_column(mode: str) -> str:
    return f"rank_{mode.removeprefix('history_')}"


def _user_table(rows: Split, lists: Lists, log_probs_U: NDArray[np.float64]) -> pl.DataFrame:
    """One row per user, in the order of the split: what a paired comparison of two models needs."""
    columns: dict[str, Any] = {
        "index": rows.index_U,
        "user_id": rows.user_ids,
        "target": [rows.item_ids[row] for row in rows.target_U],
        "target_log_prob": log_probs_U,
    }
    for mode, ranked_UK in lists.items():
        columns[_rank_column(mode)] = _ranks(ranked_UK, rows.target_U)
        top = [[rows.item_ids[row] for row in ranked if row >= 0] for ranked in ranked_UK[:, :TOP_ITEMS]]
        columns[f"top_{mode.removeprefix('history_')}"] = pl.Series(top, dtype=pl.List(pl.String))
    return pl.DataFrame(columns)


def _facts(
    recommender: Recommender,
    rows: Split,
    model_dir: Path,
    tokenizer_dir: Path,
    beam_width: int,
    cutoffs: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """Everything that says what was measured."""
    tokenizer = load_manifest(tokenizer_dir, "tokenizer")
    params: Mapping[str, Any] = rows.manifest.get("params", {})
    repeats = sum(target in history for target, history in zip(rows.target_U, rows.histories, strict=True))
    return {
        "split": rows.name,
        "num_users": len(rows.target_U),
        "num_items": rows.num_items,
        "num_targets_in_history": int(repeats),
        "rl_rows": params.get("rl_rows"),
        "beam_width": beam_width,
        "cutoffs": list(cutoffs),
        "seed": seed,
        "baselines_learn_from": "training events" + (" and validation events" if rows.name == "test" else ""),
        "dataset": {"name": rows.manifest.get("source", {}).get("name"), "identity": identity(rows.manifest)},
        "tokenizer": {"identity": identity(tokenizer), "trie_sha256": tokenizer["files"].get("trie.npz")},
        "model": model_facts(model_dir, recommender.model),
        "versions": versions(),
        "device": recommender.model.device.type,
        "threads": torch.get_num_threads(),
    }
