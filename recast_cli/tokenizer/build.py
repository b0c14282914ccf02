"""The stage: a dataset folder becomes a tokenizer folder.

N items, L levels.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recast_cli import __version__
from recast_cli.artifacts import find_existing, identity, load_manifest, write_manifest
from recast_cli.core.spelling import spell
from recast_cli.core.trie import Trie
from recast_cli.errors import DataError, RecipeError
from recast_cli.outputs import atomic_dir, atomic_text, refuse_inside
from recast_cli.tokenizer import embed, model, quantize, report
from recast_cli.tokenizer.collisions import Resolution, resolve_collisions
from recast_cli.tokenizer.inputs import read_interactions, read_items, training_events

EMBEDDINGS = ("text", "cooccurrence", "text+cooccurrence")
MAX_HIDDEN_SIZE, MAX_LAYERS = 8192, 128  # above it is a slip of the finger, and no memory holds it

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TokenizerParams:
    """What, with the dataset, decides the result.

    Attributes:
        codebook_sizes: K of each level.
        embeddings: One of `EMBEDDINGS`.
        cooccurrence_weight: Share of the variance given to co-occurrence in `text+cooccurrence`.
        num_dimensions: Principal components kept of the joined embeddings; 0 keeps all.
        base_model: Folder of a Hugging Face causal LM to expand; None makes a model from scratch.
        hidden_size, num_layers: Of the model from scratch.
        seed: Of everything drawn.
    """

    codebook_sizes: tuple[int, ...]
    embeddings: str = "text+cooccurrence"
    cooccurrence_weight: float = 0.5
    num_dimensions: int = 32
    base_model: str | None = None
    hidden_size: int = 128
    num_layers: int = 4
    seed: int = 0

    def check(self) -> None:
        """Refuse values out of bounds.

        Raises:
            RecipeError: naming the option, the value found and the values allowed.
        """
        if self.embeddings not in EMBEDDINGS:
            raise RecipeError(
                f"embeddings is {self.embeddings!r}, needed one of {', '.join(EMBEDDINGS)}",
                "leave it out for both",
            )
        if not 0 < self.cooccurrence_weight < 1:
            raise RecipeError(
                f"cooccurrence weight is {self.cooccurrence_weight}, needed between 0 and 1 (both excluded)",
                "for one source alone pass --embeddings text or --embeddings cooccurrence",
            )
        if self.num_dimensions < 0:
            raise RecipeError(
                f"dimensions is {self.num_dimensions}, needed 0 (keep all) or more", "for example 32"
            )
        if not 64 <= self.hidden_size <= MAX_HIDDEN_SIZE or self.hidden_size % 64:
            raise RecipeError(
                f"hidden size is {self.hidden_size}, needed a multiple of 64 up to {MAX_HIDDEN_SIZE}",
                "for example 128",
            )
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise RecipeError(f"layers is {self.num_layers}, needed 1 to {MAX_LAYERS}", "for example 4")
        if not 0 <= self.seed < 2**31 - quantize.MAX_LEVELS:  # faiss takes 32 bits; level l adds l
            raise RecipeError(
                f"seed is {self.seed}, needed 0 to {2**31 - quantize.MAX_LEVELS - 1}", "for example 0"
            )


def build(
    data: Path,
    out: Path,
    params: TokenizerParams,
    *,
    chat_template: str,
    overwrite: bool = False,
    finish: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], bool]:
    """Build a tokenizer folder, all or nothing, or reuse the one that is there.

    Args:
        data: Dataset folder.
        out: Tokenizer folder to make.
        chat_template: Stored in the model's tokenizer.
        overwrite: Build anew, and replace a tokenizer that is there.
        finish: Gets the scratch folder, complete but for its manifest; may add files (the rendered parquet).
        progress: Called with the number of item texts embedded since the last call.

    Returns:
        (manifest, whether it was reused).

    Raises:
        RecastError: any of the user's mistakes; nothing is left half-written.
    """
    params.check()
    dataset = load_manifest(data, "dataset")
    recorded = _recorded(params, chat_template)
    refuse_inside({"--out": out}, {"--data": data})
    base = Path(params.base_model) if params.base_model is not None else None
    refuse_inside({"--data": data, "--base-model": base}, {"--out": out})
    existing = find_existing(
        out, "tokenizer", lambda found: _difference(found, dataset, recorded), overwrite=overwrite
    )
    if existing is not None:
        return existing, True
    items = read_items(data, dataset)
    quantize.check_capacity(len(items), params.codebook_sizes)
    started = time.perf_counter()
    with atomic_dir(out, replace=overwrite) as scratch:
        made = _write_model(scratch, params, chat_template)
        atomic_text(scratch / "vocabulary.json", made.vocabulary.to_json())
        _check_length(dataset, params, made.max_positions)  # before texts are embedded for minutes
        facts = _write_semantics(scratch, data, items, params, progress)
        if finish is not None:
            finish(scratch)
        manifest = write_manifest(
            scratch,
            "tokenizer",
            parents={"dataset": identity(dataset)},
            seed=params.seed,
            num_items=len(items),
            num_levels=len(params.codebook_sizes),
            codebook_sizes=list(params.codebook_sizes),
            params=recorded,
            model={
                "architecture": made.architecture,
                "num_parameters": made.num_parameters,
                "dtype": made.dtype,
                "vocab_size": made.vocabulary.vocab_size,
                "embedding_rows": made.vocabulary.embedding_rows,
                "max_positions": made.max_positions,
            },
            quality=facts,
            seconds=round(time.perf_counter() - started, 2),
        )
    return manifest, False


def _write_semantics(
    scratch: Path, data: Path, items: pl.DataFrame, params: TokenizerParams, progress: Progress | None
) -> dict[str, Any]:
    """Embeddings, semantic IDs, trie and quality report; returns the report."""
    embeddings_ND = _embeddings(data, items, params, progress)
    nearest = quantize.residual_kmeans(embeddings_ND, params.codebook_sizes, seed=params.seed)
    resolved = resolve_collisions(embeddings_ND, nearest.codes_NL, nearest.codebooks)
    facts = report.quality(embeddings_ND, nearest, resolved)
    np.save(scratch / "embeddings.npy", embeddings_ND)
    _write_semantic_ids(scratch, items["item_id"], resolved, params)
    atomic_text(scratch / "quality.json", json.dumps(facts, indent=2) + "\n")
    report.draw(scratch / "quality.png", facts, resolved.codes_NL)
    return facts


def _check_length(dataset: dict[str, Any], params: TokenizerParams, max_positions: int | None) -> None:
    history, item_tokens = dataset["params"]["history"], len(params.codebook_sizes) + 2
    needed = (history + 1) * item_tokens
    if max_positions is not None and needed > max_positions:
        raise DataError(
            f"a history of {history} items and the next one are {needed} tokens, "
            f"the model reads at most {max_positions}",
            f"rerun `recast prepare-data` with --history {max_positions // item_tokens - 1} or less",
        )


def _recorded(params: TokenizerParams, chat_template: str) -> dict[str, Any]:
    """Parameters as the manifest keeps them; equal ones make equal tokenizers."""
    recorded = json.loads(json.dumps(asdict(params)))
    recorded["chat_template_sha256"] = hashlib.sha256(chat_template.encode()).hexdigest()
    if params.base_model is not None:
        files = sorted(path for path in Path(params.base_model).glob("*") if path.is_file())
        # Sizes and times, not hashes: the weights may be many gigabytes.
        stamp = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        recorded["base_model_stamp"] = hashlib.sha256(repr(stamp).encode()).hexdigest()
    return recorded


def _difference(manifest: dict[str, Any], dataset: dict[str, Any], recorded: dict[str, Any]) -> str:
    """What keeps a tokenizer from being reused, in words; empty if nothing."""
    if manifest["parents"] != {"dataset": identity(dataset)}:
        return f"of another dataset ({manifest['num_items']} items, this one has {dataset['num_items']})"
    if manifest["recast_version"] != __version__:
        return f"of recast {manifest['recast_version']}, this is {__version__}"
    for key, needed in recorded.items():
        found = manifest["params"].get(key)
        if found != needed:
            return f"with {key} {found}, needed {needed}"
    return ""


def _embeddings(
    data: Path, items: pl.DataFrame, params: TokenizerParams, progress: Progress | None
) -> NDArray[np.float32]:
    blocks = []
    weight = params.cooccurrence_weight
    if "text" in params.embeddings:
        text_ND = embed.embed_texts(items["text"].to_list(), embed.minilm_folder(), progress=progress)
        blocks.append((text_ND, 1 - weight))
    if "cooccurrence" in params.embeddings:
        user_E, item_E = training_events(read_interactions(data), items["item_id"])
        blocks.append((embed.cooccurrence_factors(user_E, item_E, len(items), seed=params.seed), weight))
    return embed.join_blocks(blocks, num_dimensions=params.num_dimensions or None)


def _write_semantic_ids(
    scratch: Path, item_ids: pl.Series, resolved: Resolution, params: TokenizerParams
) -> None:
    sids = [spell(codes) for codes in resolved.codes_NL.tolist()]
    # Plain `string` (polars would write its 64-bit kind, which some readers do not know).
    table = pa.table(
        {"item_id": pa.array(item_ids.to_list(), pa.string()), "sid": pa.array(sids, pa.string())}
    )
    pq.write_table(table, scratch / "semantic_ids.parquet", compression="zstd")
    Trie.from_codes(resolved.codes_NL, params.codebook_sizes).save(scratch / "trie.npz")


def _write_model(scratch: Path, params: TokenizerParams, chat_template: str) -> model.ModelFacts:
    folder = scratch / "model"
    if params.base_model is None:
        return model.write_scratch_model(
            folder,
            params.codebook_sizes,
            chat_template=chat_template,
            seed=params.seed,
            hidden_size=params.hidden_size,
            num_layers=params.num_layers,
        )
    return model.write_expanded_model(
        folder,
        Path(params.base_model),
        params.codebook_sizes,
        chat_template=chat_template,
        seed=params.seed,
    )
