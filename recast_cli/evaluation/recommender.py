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
from recast_cli.core.decoding import beam_search
from recast_cli.core.trie import Trie
from recast_cli.errors import ArtifactError
from recast_cli.evaluation.loading import read_catalogue
from recast_cli.models import load_model, require_tokenizer
from recast_cli.vocabulary import Vocabulary, encode_prompts

Conversation = Sequence[dict[str, str]]

TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}  # a CPU is fastest while a batch stays in its caches


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
        token_budget: Most tokens read at once.
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
    token_budget: int

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
            token_budget=token_budget or TOKEN_BUDGET.get(device, 4096),
        )

    def encode(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        """Token ids of each history with the generation prompt, by the tokenizer's own chat template."""
        return encode_prompts(self.tokenizer, conversations)

    def rank(
        self, prompts: Sequence[Sequence[int]], width: int, closed: Sequence[NDArray[np.int64]] | None = None
    ) -> Ranked:
        """Constrained beam search over the catalogue.

        Args:
            prompts: B lists of token ids.
            width: W.
            closed: Item rows that may not be answered, per prompt. A prompt whose closed items are the whole
                catalogue gets an empty list.
        """
        num_levels = len(self.level_offsets)
        codes_BWL = np.full((len(prompts), width, num_levels), -1, dtype=np.int64)
        scores_BW = np.full((len(prompts), width), -np.inf)
        asked = list(range(len(prompts)))
        if closed is not None:
            asked = [b for b in asked if len(np.unique(closed[b])) < self.trie.num_items]
        if asked:
            beams = beam_search(
                self.model,
                self.trie,
                self.level_offsets,
                [prompts[b] for b in asked],
                width,
                pad_token_id=self.pad,
                exclusion=None if closed is None else self.trie.exclusion([closed[b] for b in asked]),
                token_budget=self.token_budget,
            )
            codes_BWL[asked], scores_BW[asked] = beams.codes_BWL.numpy(), beams.scores_BW.numpy()
        return Ranked(self.rows_of(codes_BWL), np.asarray((codes_BWL >= 0).all(axis=2)), scores_BW)

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

    def target_log_probs(
        self, prompts: Sequence[Sequence[int]], answers_BL: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Log-probability of each code of each prompt's true answer: full-vocabulary log-softmax. (B, L)

        Plain teacher forcing of prompt + answer, independent of trie and beam search.

        Args:
            prompts: B lists of token ids.
            answers_BL: Token ids of the L codes.
        """
        num_levels = answers_BL.shape[1]
        log_probs_BL = np.empty((len(prompts), num_levels))
        order = sorted(range(len(prompts)), key=lambda b: len(prompts[b]))
        start = 0
        self.model.eval()
        while start < len(order):
            end = start + 1  # ascending lengths: the last prompt of a batch is its longest
            while (
                end < len(order)
                and (end + 1 - start) * (len(prompts[order[end]]) + num_levels) <= self.token_budget
            ):
                end += 1
            rows, start = order[start:end], end
            log_probs_BL[rows] = self._forced([prompts[b] for b in rows], torch.from_numpy(answers_BL[rows]))
        return log_probs_BL

    @torch.inference_mode()
    def _forced(self, prompts: Sequence[Sequence[int]], answers_BL: torch.Tensor) -> NDArray[np.float64]:
        num_levels = answers_BL.shape[1]
        longest = max(len(prompt) for prompt in prompts)
        ids_BP = torch.tensor([[self.pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        ids_BT = torch.cat([ids_BP, answers_BL[:, :-1]], dim=1)
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts])
        positions_BT = torch.arange(ids_BT.shape[1]) - (longest - lengths_B1)
        logits_BTV = self.model(
            input_ids=ids_BT.to(self.model.device),
            attention_mask=(positions_BT >= 0).long().to(self.model.device),
            position_ids=positions_BT.clamp(min=0).to(self.model.device),
            use_cache=False,
            logits_to_keep=num_levels,  # the last prompt token predicts code 0
        ).logits[:, -num_levels:]
        logits_BLV, answers_BL = logits_BTV.float(), answers_BL.to(self.model.device)
        chosen_BL = logits_BLV.gather(2, answers_BL[..., None])[..., 0]
        log_probs_BL = chosen_BL - logits_BLV.logsumexp(dim=-1)
        return log_probs_BL.double().cpu().numpy()
