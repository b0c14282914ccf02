"""Draw the rollouts of a profile once, so that every arm and repeat replays the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from recast_cli.core.sampling import sample
from recast_cli.core.seeding import uniforms
from recast_cli.core.trie import Trie
from recast_cli.models import load_model
from recast_cli.vocabulary import Vocabulary, encode_prompts


@dataclass(frozen=True)
class Recording:
    """What was recorded.

    Attributes:
        path: npz with index_B, codes_BGL and log_probs_BGL.
        prompt_tokens: Tokens of each prompt.
        parameters: Number of the model's parameters, a tied head counted once.
    """

    path: Path
    prompt_tokens: list[int]
    parameters: int


def record(
    model_dir: Path,
    tokenizer_dir: Path,
    rows: pa.Table,
    group_size: int,
    path: Path,
    *,
    seed: int,
    temperature: float,
    device: str,
) -> Recording:
    """Draw `group_size` answers for every row with the engine that a run's rollout server uses.

    Args:
        model_dir: Hugging Face folder.
        tokenizer_dir: Folder of `recast build-tokenizer`: tokenizer, trie and vocabulary.
        rows: RL rows as verl reads them (`prompt`, `extra_info.index`).
        path: The file to write.
    """
    from transformers import AutoTokenizer

    vocabulary = Vocabulary.load(tokenizer_dir / "vocabulary.json")
    model = load_model(model_dir, vocabulary.vocab_size, device)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir / "model", local_files_only=True)
    table = rows.select(["prompt", "extra_info"]).to_pylist()
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in table])
    index_B = np.array([row["extra_info"]["index"] for row in table])
    draws_BGL = uniforms(seed, 0, index_B, group_size, vocabulary.num_levels)
    samples = sample(
        model,
        Trie.load(tokenizer_dir / "trie.npz"),
        vocabulary.level_offsets,
        prompts,
        torch.from_numpy(draws_BGL),
        temperature=temperature,
        pad_token_id=vocabulary.pad,
    )
    np.savez(
        path,
        index_B=index_B,
        codes_BGL=samples.codes_BGL.numpy(),
        log_probs_BGL=samples.log_probs_BGL.numpy(),
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Recording(path, [len(prompt) for prompt in prompts], parameters)
