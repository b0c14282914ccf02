"""vLLM answers with items of the catalogue only: a logits processor of vLLM's V1 engine.

Name it, and the catalogue (a folder of `recast build-tokenizer`, or as `recast_catalogue` a file made
elsewhere), as engine arguments:

    LLM(..., logits_processors=["verl_recast.rollout.vllm_trie:TrieLogitsProcessor"],
        additional_config={"recast_tokenizer": FOLDER})

and under verl as `+actor_rollout_ref.rollout.engine_kwargs.vllm.{logits_processors,additional_config}`. It is
no entry point of vLLM: those run in every engine of the environment, and vLLM 0.28 then does without its
newer model runner.

Constrained are prompts that end with `<|sid_begin|>`, or with that and some codes of an item, and requests
with `extra_args={"recast_given": 0}`; any other is left alone. Ask for as many tokens as a semantic ID has
levels (see `TrieRows`). vLLM's `raw_logprobs` (its default) are full-vocabulary and taken before mask and
temperature; its `processed_logprobs` are those of the renormalised, tempered policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from verl_recast.band import require_tested
from verl_recast.catalogue import Catalogue, require_catalogue
from verl_recast.rollout.trie_rows import TrieRows
from verl_recast.rollout.vllm_groups import CATALOGUE_KEYS, GIVEN

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TrieLogitsProcessor(LogitsProcessor):
    """Masks to -inf everything but the trie's children, in every row that is writing a semantic ID.

    Raises:
        RuntimeError: vLLM is of a version that this was not tested with.
        ValueError: no catalogue is named, or it does not fit the model.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        require_tested("vllm")  # the interface is vLLM's own to change, and could lift the constraint unseen
        catalogue = _named_catalogue(vllm_config)
        found = vllm_config.model_config.get_vocab_size()
        sizes = zip(catalogue.level_offsets, catalogue.trie.codebook_sizes, strict=True)
        needed = max(offset + size for offset, size in sizes)
        if found < needed:
            raise ValueError(
                f"the model has {found} tokens, codes use ids up to {needed - 1}: serve a model that was "
                "trained with this catalogue"
            )
        self.rows = TrieRows(catalogue, device)

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
            given = (params.extra_args or {}).get(GIVEN)
            self.rows.add(row, prompt, output, params.eos_token_id, num_given=given)
        for source, target, direction in batch_update.moved:
            self.rows.move(source, target, swap=direction == MoveDirectionality.SWAP)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask logits (R, V) in place."""
        return self.rows.mask_(logits)


def _named_catalogue(vllm_config: VllmConfig) -> Catalogue:
    """The catalogue that the engine argument `additional_config` names."""
    found = vllm_config.additional_config
    options = found if isinstance(found, dict) else {}
    custom = {key: options.get(f"recast_{key}") for key in CATALOGUE_KEYS}
    if not any(custom.values()):
        raise ValueError(
            "set the engine argument additional_config={'recast_tokenizer': DIR} (a folder of recast "
            f"build-tokenizer) or {{'recast_catalogue': FILE}} (made elsewhere), found {found}"
        )
    tokenizer = None
    if custom["catalogue"]:
        model = vllm_config.model_config
        tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, trust_remote_code=model.trust_remote_code)
    return require_catalogue(custom, tokenizer)
