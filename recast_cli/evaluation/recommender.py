"""A trained model with its tokenizer artifact: prompts in, ranked item rows out.

Shapes: B prompts, W beams, L levels, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recast_cli.artifacts import load_manifest, require_parent
from recast_cli.core.beam_search import beam_searches
from recast_cli.core.trie import Trie
from recast_cli.errors import ArtifactError
from recast_cli.evaluation.loading import read_catalogue
from recast_cli.models import load_model, require_tokenizer
from recast_cli.vocabulary import Vocabulary, encode_prompts

Conversation = Sequence[dict[str, str]]
Closed = Sequence[NDArray[np.int64]]  # item rows, prompt by prompt


@dataclass(frozen=True)
class Ranked:
    """Answers of one beam search, best first.

    Attributes:
        rows_BW: Item rows that the answers' *text* names in semantic_ids.parquet; -1 where it names none.
        given_BW: True where there is an answer at all (few items may be left).
        scores_BW: Sums of full-vocabulary log-softmax.
    """

    rows_BW: NDArray[np.int64]
    given_BW: NDArray[Any]
    scores_BW: NDArray[np.float64]


@dataclass(frozen=True)
class Recommender:
    """Model, tokenizer, trie and catalogue that belong together; `load` checks that they do.

    Attributes:
        row_of_sid: Text of every semantic ID in semantic_ids.parquet -> item row.
        sid_begin, sid_end: Their text.
        level_tokens: Text of every code token, level by level.
        token_budget: Most tokens read at once; None: by device.
    """

    model: Any
    tokenizer: Any
    trie: Trie
    level_offsets: tuple[int, ...]
    pad: int
    row_of_sid: dict[str, int]
    sid_begin: str
    sid_end: str
    level_tokens: tuple[tuple[str, ...], ...]
    token_budget: int | None

    @classmethod
    def load(
        cls,
        model_dir: Path,
        tokenizer_dir: Path,
        data_dir: Path,
        *,
        token_budget: int | None = None,
        device: str | None = None,
    ) -> Recommender:
        """Load and check a model folder against its tokenizer and dataset artifacts.

        Args:
            model_dir: Hugging Face folder; its own tokenizer and generation_config are not read.
            tokenizer_dir: Tokenizer artifact.
            data_dir: Dataset artifact it was built from.
            token_budget: Most tokens read at once; default by device.
            device: Default: CUDA where there is one, else CPU.

        Raises:
            ArtifactError: something is missing or does not fit the rest.
        """
        from transformers import AutoTokenizer

        manifest = load_manifest(tokenizer_dir, "tokenizer")
        require_parent(manifest, load_manifest(data_dir, "dataset"), tokenizer_dir, data_dir)
        require_tokenizer(model_dir, tokenizer_dir)
        vocabulary = Vocabulary.load(tokenizer_dir / "vocabulary.json")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir / "model", local_files_only=True)
        row_of_sid = read_catalogue(tokenizer_dir, data_dir)
        try:
            trie = Trie.load(tokenizer_dir / "trie.npz")
        except (OSError, ValueError) as exc:
            raise ArtifactError(str(exc), "rerun `recast build-tokenizer`") from exc
        if trie.num_items != len(row_of_sid):
            raise ArtifactError(
                f"{tokenizer_dir}: trie of {trie.num_items} items, semantic_ids.parquet of {len(row_of_sid)}",
                "rerun `recast build-tokenizer`",
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(model_dir, vocabulary.vocab_size, device)
        texts = [
            tuple(tokenizer.convert_ids_to_tokens(list(range(offset, offset + size))))
            for offset, size in zip(vocabulary.level_offsets, vocabulary.codebook_sizes, strict=True)
        ]
        enclosing = list(tokenizer.convert_ids_to_tokens([vocabulary.sid_begin, vocabulary.sid_end]))
        return cls(
            model=model,
            tokenizer=tokenizer,
            trie=trie.to(device),
            level_offsets=vocabulary.level_offsets,
            pad=vocabulary.pad,
            row_of_sid=row_of_sid,
            sid_begin=enclosing[0],
            sid_end=enclosing[1],
            level_tokens=tuple(texts),
            token_budget=token_budget,
        )

    def encode(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of each history with the generation prompt, by the tokenizer's own chat template.

        Raises:
            ArtifactError: the model has fewer positions than prompt and answer take.
        """
        prompts = encode_prompts(self.tokenizer, conversations)
        needed = max(map(len, prompts), default=0) + len(self.level_offsets)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and needed > positions:
            raise ArtifactError(
                f"the model reads at most {positions} tokens, a prompt and its answer take {needed}",
                "rerun `recast prepare-data` with a shorter --history, or name another model",
            )
        return prompts

    def rank(self, prompts: Sequence[Sequence[int]], width: int, closed: Closed | None = None) -> Ranked:
        """Constrained beam search over the catalogue: `answer` with one list and no target."""
        (ranked,), _ = self.answer(prompts, width, [closed])
        return ranked

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        width: int,
        closed: Sequence[Closed | None],
        targets_BL: NDArray[np.int64] | None = None,
    ) -> tuple[list[Ranked], NDArray[np.float64]]:
        """Ranked lists over the catalogue and the targets' log-probs, from one reading of the prompts.

        Args:
            prompts: B lists of token ids.
            width: W.
            closed: Per list, the item rows that may not be answered, prompt by prompt, or None. A prompt
                whose closed items are the whole catalogue gets an empty list.
            targets_BL: Codes of each prompt's true answer.

        Returns:
            A `Ranked` for each of `closed`, and the full-vocabulary log-softmax of each target code, (B, L),
            empty without targets.
        """
        emptied = [self._nothing_left(closed_B) for closed_B in closed]
        exclusions = [
            None
            if closed_B is None
            else self.trie.exclusion([[] if b in empty else rows for b, rows in enumerate(closed_B)])
            for closed_B, empty in zip(closed, emptied, strict=True)
        ]
        found, log_probs_BL = beam_searches(
            self.model,
            self.trie,
            self.level_offsets,
            prompts,
            width,
            pad_token_id=self.pad,
            exclusions=exclusions,
            given_BL=targets_BL,
            token_budget=self.token_budget,
        )
        lists = []
        for beams, empty in zip(found, emptied, strict=True):
            codes_BWL, scores_BW = beams.codes_BWL.numpy(), beams.scores_BW.numpy().astype(np.float64)
            codes_BWL[list(empty)], scores_BW[list(empty)] = -1, -np.inf
            lists.append(Ranked(self.rows_of(codes_BWL), np.asarray((codes_BWL >= 0).all(axis=2)), scores_BW))
        return lists, log_probs_BL.double().numpy()

    def _nothing_left(self, closed_B: Closed | None) -> set[int]:
        """Prompts whose closed items are the whole catalogue: a search has no answer to those."""
        return {b for b, rows in enumerate(closed_B or ()) if len(np.unique(rows)) == self.trie.num_items}

    def rows_of(self, codes_BWL: NDArray[np.int64]) -> NDArray[np.int64]:
        """Item row that each answer's text names in the catalogue, -1 where it names none.

        The trie is not asked: a hole in it must show up here.
        """
        flat = codes_BWL.reshape(-1, codes_BWL.shape[-1])
        unique, back = np.unique(flat, axis=0, return_inverse=True)
        rows = [self.row_of_sid.get(self.text(codes), -1) if codes.min() >= 0 else -1 for codes in unique]
        return np.array(rows, dtype=np.int64)[back.reshape(codes_BWL.shape[:-1])]

    def text(self, codes_L: Sequence[int] | NDArray[np.int64]) -> str:
        """Spelling of one answer: begin, code tokens, end."""
        tokens = (self.level_tokens[level][int(code)] for level, code in enumerate(codes_L))
        return f"{self.sid_begin}{''.join(tokens)}{self.sid_end}"
