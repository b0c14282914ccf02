"""vLLM answers with items of the catalogue only: a logits processor of vLLM's V1 engine.

Name it, and a tokenizer artifact (a folder of `recast build-tokenizer`), as engine arguments:

    LLM(..., logits_processors=["verl_recast.rollout.vllm_trie:TrieLogitsProcessor"],
        additional_config={"recast_tokenizer": FOLDER})

and under verl as `+actor_rollout_ref.rollout.engine_kwargs.vllm.{logits_processors,additional_config}`. It is
no entry point of vLLM: those run in every engine of the environment, and vLLM 0.28 then does without its
newer model runner.

A prompt that ends with `<|sid_begin|>` is constrained, any other is left alone; ask for as many tokens as a
semantic ID has levels (see `TrieRows`). vLLM's `raw_logprobs` (its default) are full-vocabulary and taken
before mask and temperature; its `processed_logprobs` are those of the renormalised, tempered policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from recast_cli.artifacts import load_manifest
from recast_cli.core.trie import Trie
from recast_cli.vocabulary import Vocabulary
from verl_recast.band import require_tested
from verl_recast.rollout.trie_rows import TOKENIZER_KEY, TrieRows

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TrieLogitsProcessor(LogitsProcessor):
    """Masks to -inf everything but the trie's children, in every row that is writing a semantic ID.

    Raises:
        RuntimeError: vLLM is of a version that this was not tested with.
        ValueError: no tokenizer artifact is named, or it does not fit the model.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        require_tested("vllm")  # the interface is vLLM's own to change, and could lift the constraint unseen
        folder = _tokenizer_folder(vllm_config.additional_config)
        load_manifest(folder, "tokenizer")
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        found, needed = vllm_config.model_config.get_vocab_size(), vocabulary.vocab_size
        if found < needed:
            raise ValueError(
                f"the model has {found} tokens, the vocabulary of {folder} has {needed}: serve a model that "
                "was trained with this tokenizer"
            )
        self.rows = TrieRows(Trie.load(folder / "trie.npz"), vocabulary, device)

    def is_argmax_invariant(self) -> bool:
        """False: the mask decides greedy answers too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests that vLLM adds to its batch, resumes, moves and removes; None: none did.

        Generated tokens are not read here: under asynchronous scheduling the newest are placeholders until
        just before `apply`.
        """
        if batch_update is None:
            return
        for row in batch_update.removed:  # vLLM's order: removed, added, moved
            self.rows.drop(row)
        for row, params, prompt, output in batch_update.added:
            if prompt is None:
                raise ValueError("a request of embeddings has no tokens that say whether it asks for an item")
            self.rows.add(row, prompt, output, params.eos_token_id)
        for source, target, direction in batch_update.moved:
            self.rows.move(source, target, swap=direction == MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask logits (R, V) in place."""
        return self.rows.mask_(logits)


def _tokenizer_folder(additional_config: Any) -> Path:
    folder = additional_config.get(TOKENIZER_KEY) if isinstance(additional_config, dict) else None
    if not folder:
        raise ValueError(
            f"set the engine argument additional_config={{{TOKENIZER_KEY!r}: DIR}} (a folder of recast "
            f"build-tokenizer), found {additional_config}"
        )
    return Path(folder)
