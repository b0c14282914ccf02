"""Hugging Face model folders: load one for reading, and say which it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from recast_cli.artifacts import identity, is_artifact, load_manifest, weight_files, weights_sha256
from recast_cli.errors import ArtifactError
from recast_cli.vocabulary import Vocabulary


def require_vocabulary(model_dir: Path, vocab_size: int) -> None:
    """Refuse a model folder whose embedding is smaller than the tokenizer, from its config alone.

    Raises:
        ArtifactError: no config.json, or fewer rows.
    """
    path = model_dir / "config.json"
    if not path.is_file():
        raise ArtifactError(f"model {model_dir} has no config.json", "name a Hugging Face folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rows = int(config.get("vocab_size") or config["text_config"]["vocab_size"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise ArtifactError(f"{path} names no vocab_size: {exc}", "name a Hugging Face folder") from exc
    _require_rows(model_dir, rows, vocab_size)


def _require_rows(model_dir: Path, rows: int, vocab_size: int) -> None:
    if rows < vocab_size:
        raise ArtifactError(
            f"model {model_dir} has {rows} embedding rows, the tokenizer has {vocab_size} tokens",
            "name a model trained with this tokenizer",
        )


def require_tokenizer(model_dir: Path, tokenizer_dir: Path) -> None:
    """Refuse a model that was trained with another tokenizer, where the folder it lies in says so.

    The vocabulary's size proves little: two tokenizers of one dataset have equal sizes and other codes.

    Raises:
        ArtifactError: naming both folders.
    """
    needed, folder = identity(load_manifest(tokenizer_dir, "tokenizer")), model_dir.resolve().parent
    kind = next((kind for kind in ("run", "warm-start", "tokenizer") if is_artifact(folder, kind)), None)
    if kind is None:
        return
    manifest = load_manifest(folder, kind)
    found = identity(manifest) if kind == "tokenizer" else manifest["parents"].get("tokenizer")
    if found != needed:
        raise ArtifactError(
            f"model {model_dir} was trained with another tokenizer than {tokenizer_dir}",
            "name the tokenizer of that model",
        )


def require_start(model_dir: Path, tokenizer_dir: Path) -> None:
    """Refuse a model that RL cannot start from. verl reads prompts with the tokenizer in the model's folder.

    Raises:
        ArtifactError: another vocabulary size, tokenizer or chat template, or none; no weights.
    """
    from transformers import AutoTokenizer

    require_vocabulary(model_dir, Vocabulary.load(tokenizer_dir / "vocabulary.json").vocab_size)
    if not weight_files(model_dir):
        raise ArtifactError(
            f"model {model_dir} has no weights (*.safetensors or pytorch_model*.bin)",
            "name a Hugging Face folder",
        )
    _require_all_weights(model_dir)
    require_tokenizer(model_dir, tokenizer_dir)
    ours = tokenizer_dir / "model"
    needed = AutoTokenizer.from_pretrained(ours, local_files_only=True)
    try:
        found: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    for name, same in (
        ("tokenizer", found is not None and found.get_vocab() == needed.get_vocab()),
        ("chat template", found is not None and found.chat_template == needed.chat_template),
    ):
        if not same:
            raise ArtifactError(
                f"model {model_dir} has another {name} than {ours}, or none",
                f"copy tokenizer*.json and chat_template.jinja of {ours} into it",
            )


def _require_all_weights(model_dir: Path) -> None:
    """Look through the names of the stored weights, without reading one: verl would draw what lacks.

    Raises:
        ArtifactError: weights that lack, or files that cannot be read.
    """
    _load(model_dir, hint="name a whole Hugging Face folder", device_map="meta")


def load_model(model_dir: Path, vocab_size: int, device: str) -> Any:
    """Load a causal LM for reading.

    Raises:
        ArtifactError: no model there, fewer embedding rows than the tokenizer has tokens, or weights
            that are not finite.
    """
    require_vocabulary(model_dir, vocab_size)
    # float32 on the CPU, where half precision is slow; the stored type elsewhere.
    model = load_causal_lm(
        model_dir,
        torch.float32 if device == "cpu" else "auto",
        hint="name a Hugging Face folder with config.json and safetensors",
    )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ArtifactError(
                f"{model_dir} has NaN or infinite values in {name}, needed finite weights",
                "name an earlier checkpoint, or train again with a lower learning rate",
            )
    return model.to(device).eval()


def load_causal_lm(folder: Path, dtype: torch.dtype | str, *, hint: str) -> Any:
    """A causal LM of transformers, with all its weights.

    Args:
        dtype: Of the weights; `auto` is the stored one.
        hint: Of the errors.

    Raises:
        ArtifactError: no model there, one that does not load, that lacks weights or a key-value cache.
    """
    model = _load(folder, hint=hint, dtype=dtype)
    with torch.no_grad():
        output = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=True)
    if getattr(output, "past_key_values", None) is None:  # an encoder, or a state-space model
        raise ArtifactError(
            f"{folder} is a {type(model).__name__}, needed a decoder with a key-value cache", hint
        )
    return model


def _load(folder: Path, *, hint: str, **options: Any) -> Any:
    """`from_pretrained` that says what is wrong in one line, and leaves no weight to chance."""
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        raise ArtifactError(f"no model in {folder} (config.json not found)", hint)
    try:
        with quiet_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **options
            )
    except MemoryError:
        raise
    except Exception as exc:  # a config can make transformers raise anything
        raise ArtifactError(f"{folder} cannot be loaded: {' '.join(str(exc).split())[:300]}", hint) from exc
    model, info = loaded
    if missing := sorted(info["missing_keys"]):  # transformers draws them at random
        raise ArtifactError(f"{folder} lacks weights: {', '.join(missing[:3])}", hint)
    return model


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep Hugging Face's progress bars and warnings off stderr: commands show their own."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def model_facts(model_dir: Path, model: Any) -> dict[str, Any]:
    """What identifies a model: parameters and the hash of its weight files."""
    return {
        "architecture": type(model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "sha256": weights_sha256(model_dir),
    }
