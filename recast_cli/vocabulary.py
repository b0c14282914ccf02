"""Token ids: of each code of a semantic ID (from vocabulary.json of a tokenizer artifact, or from a tokenizer
made elsewhere), and of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recast_cli.core.spelling import read_code
from recast_cli.errors import ArtifactError


@dataclass(frozen=True)
class Vocabulary:
    """Token ids. Code k of level l is token `level_offsets[l] + k`.

    Attributes:
        sid_begin, sid_end, pad: ids.
        level_offsets: id of code 0 of each level.
        codebook_sizes: K of each level.
        num_levels: L.
        vocab_size: number of real ids (`len(tokenizer)`).
        embedding_rows: rows of the model's embedding; more than `vocab_size` where the base model pads its
            vocabulary. Ids from `vocab_size` on are no tokens and must never be sampled.
    """

    sid_begin: int
    sid_end: int
    pad: int
    level_offsets: tuple[int, ...]
    codebook_sizes: tuple[int, ...]
    num_levels: int
    vocab_size: int
    embedding_rows: int

    def to_json(self) -> str:
        """Text of vocabulary.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read vocabulary.json.

        Raises:
            ArtifactError: missing, or not what this version writes.
        """
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found["level_offsets"] = tuple(found["level_offsets"])
            found["codebook_sizes"] = tuple(found["codebook_sizes"])
            return cls(**found)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ArtifactError(
                f"{path} is not a vocabulary: {exc}", "rerun `recast build-tokenizer`"
            ) from exc


def code_ids(tokenizer: Any) -> dict[tuple[int, int], int]:
    """Token id of every code that a tokenizer has a token for, by level and code.

    Raises:
        ArtifactError: one code has two tokens (`<s_a_1>` and `<a_1>`), and nobody says which one to write.
    """
    token_of: dict[tuple[int, int], str] = {}
    vocabulary = tokenizer.get_vocab()
    for token in vocabulary:
        place = read_code(token)
        if place[0] >= 0 and token_of.setdefault(place, token) != token:
            raise ArtifactError(
                f"the model's tokenizer has two tokens for one code, {token_of[place]} and {token}",
                "train a model with the code tokens of one spelling",
            )
    return {place: vocabulary[token] for place, token in token_of.items()}


def encode_prompts(
    tokenizer: Any,
    conversations: Sequence[Sequence[dict[str, str]]],
    *,
    answer_prefix: str = "",
    template_options: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of each history with the generation prompt, by the tokenizer's own chat template.

    Rollouts, evaluation, recommendation and the profile's recording ask here, so that all see one prompt.

    Args:
        answer_prefix: What a model that was trained elsewhere writes between the generation prompt and the
            first code. Our own chat template has it in the generation prompt.
        template_options: What the chat template knows by other names, such as `enable_thinking`.
    """
    if not conversations:
        return []
    texts = [
        tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **(template_options or {})
        )
        for messages in conversations
    ]
    return tokenizer([text + answer_prefix for text in texts], add_special_tokens=False)["input_ids"]
