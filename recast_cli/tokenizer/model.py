"""The language model of a tokenizer artifact: small and from scratch, or a named one with more vocabulary.

V vocabulary rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast_cli.errors import ArtifactError
from recast_cli.tokenizer.vocabulary import add_semantic_ids
from recast_cli.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD, END_OF_TEXT, UNKNOWN = "<|pad|>", "<|endoftext|>", "<|unk|>"
HEAD_DIM = 32
MAX_POSITIONS = 4096
# Of the old rows' spread: far enough apart to be told from each other, near enough to start sane.
NEW_ROW_NOISE = 0.1


@dataclass(frozen=True)
class ModelFacts:
    """What `write_scratch_model` and `write_expanded_model` made.

    Attributes:
        vocabulary: ids of the semantic-ID tokens.
        architecture: e.g. `Qwen3ForCausalLM`.
        num_parameters: tied weights counted once.
        dtype: of the weights, e.g. `float32`.
        max_positions: longest text the model reads; None if its config sets no limit.
    """

    vocabulary: Vocabulary
    architecture: str
    num_parameters: int
    dtype: str
    max_positions: int | None


def write_scratch_model(
    folder: Path,
    codebook_sizes: Sequence[int],
    *,
    chat_template: str,
    seed: int,
    hidden_size: int = 128,
    num_layers: int = 4,
) -> ModelFacts:
    """Write a randomly initialised Qwen3 and a tokenizer that knows semantic IDs and nothing else.

    Args:
        hidden_size: A multiple of 64 (heads of 32, two of them for each key-value head).
        seed: Of the initial weights; the global generator is left as it was.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = bare_tokenizer()
    vocabulary = add_semantic_ids(tokenizer, codebook_sizes)
    config = Qwen3Config(
        vocab_size=vocabulary.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    return _save(folder, model, tokenizer, vocabulary, chat_template)


def write_expanded_model(
    folder: Path, base: Path, codebook_sizes: Sequence[int], *, chat_template: str, seed: int
) -> ModelFacts:
    """Write a named causal LM with the semantic IDs added to its vocabulary.

    New rows of both embeddings are the mean of the old ones plus small noise; old rows, dtype and rows that
    pad the base model's vocabulary stay. The chat template is replaced by ours and the generation settings by
    none: stored sampling settings would leak into constrained search.

    Args:
        base: Folder with a Hugging Face causal LM and its tokenizer.

    Raises:
        ArtifactError: `base` is no such folder.
    """
    import torch

    model, tokenizer = _load_base(base)
    old_size = len(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    rows = _input_table(model).shape[0]
    vocabulary = add_semantic_ids(tokenizer, codebook_sizes, embedding_rows=rows)
    with torch.random.fork_rng(devices=[]):  # resizing draws from the global generator
        torch.manual_seed(seed)
        if vocabulary.embedding_rows > rows:
            model.resize_token_embeddings(vocabulary.embedding_rows, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    input_VD = _input_table(model)
    output: Any = model.get_output_embeddings()
    _fill_new_rows(input_VD, old_size, vocabulary.vocab_size, generator)
    if output is not None and output.weight.data_ptr() != input_VD.data_ptr():  # not tied
        _fill_new_rows(output.weight, old_size, vocabulary.vocab_size, generator)
    model.config.pad_token_id = tokenizer.pad_token_id
    return _save(folder, model, tokenizer, vocabulary, chat_template)


def bare_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of three special tokens; any text but semantic IDs becomes the unknown token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({PAD: 0, END_OF_TEXT: 1, UNKNOWN: 2}, unk_token=UNKNOWN))
    words.decoder = decoders.Fuse()  # no blanks between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        eos_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
    )


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _load_base(base: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from recast_cli.models import load_causal_lm, quiet_loading

    hint = "--base-model takes a local folder with config.json, weights and tokenizer files"
    found = any((base / name).is_file() for name in TOKENIZER_FILES)
    if (base / "config.json").is_file() and not found:  # transformers would invent one
        raise ArtifactError(f"no tokenizer in {base}, needed one of {', '.join(TOKENIZER_FILES)}", hint)
    model = load_causal_lm(base, "auto", hint=hint)
    try:
        with quiet_loading():
            return model, AutoTokenizer.from_pretrained(base, local_files_only=True)
    except Exception as exc:  # a file can make transformers raise anything
        raise ArtifactError(
            f"the tokenizer in {base} cannot be loaded: {' '.join(str(exc).split())[:300]}", hint
        ) from exc


def _input_table(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight


def _fill_new_rows(table_VD: torch.Tensor, old_size: int, new_size: int, generator: torch.Generator) -> None:
    import torch

    with torch.no_grad():
        old_VD = table_VD[:old_size].float()
        noise = torch.randn(new_size - old_size, old_VD.shape[1], generator=generator)
        table_VD[old_size:new_size] = (old_VD.mean(0) + NEW_ROW_NOISE * old_VD.std(0) * noise).to(
            table_VD.dtype
        )


def _save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    chat_template: str,
) -> ModelFacts:
    from transformers import GenerationConfig

    from recast_cli.models import quiet_loading

    tokenizer.chat_template = chat_template
    # No sampling settings: a checkpoint's own would leak into constrained search.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet_loading():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes its files private
    return ModelFacts(
        vocabulary=vocabulary,
        architecture=type(model).__name__,
        num_parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        max_positions=getattr(model.config, "max_position_embeddings", None),
    )
