"""An actor masked to the trie: old log-probs, reference log-probs, entropy and update of the policy that
rollouts are drawn from. `+actor_rollout_ref.rollout.custom.masked_actor=true`, beside `custom.tokenizer`
or `custom.catalogue`.

verl's FSDP engine turns logits into log-probs in `prepare_model_outputs`, padded or packed, for every phase:
the logits of the answers are masked right before it, so that all it derives is of the masked policy.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu

from recast_cli.core.masked_policy import mask_answers
from verl_recast import ROLLOUT_NAME
from verl_recast.actor_options import extend_workers, require_plain_engine
from verl_recast.catalogue import Catalogue, require_catalogue

OPTION = "masked_actor"


def require_maskable(worker: Any) -> None:
    """Refuse settings under which the logits of whole answers never reach the mask.

    Args:
        worker: verl's `actor_rollout_ref` config.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    rollout = worker.rollout
    named = rollout.custom.get("tokenizer") or rollout.custom.get("catalogue")
    # Another engine does not know the log-probs over the trie, which the actor's would be compared with.
    compared = rollout.get("name") != ROLLOUT_NAME and bool(rollout.get("calculate_log_probs", False))
    require_plain_engine(
        worker,
        OPTION,
        [
            (named, "rollout.custom.tokenizer", named, "a folder of recast build-tokenizer"),
            (not compared, "rollout.calculate_log_probs", compared, f"False (engine {rollout.get('name')})"),
        ],
    )


def mask_engine(engine: Any, catalogue: Catalogue) -> None:
    """Make one of verl's FSDP engines compute log-probs over the catalogue's codes, from now on."""
    stock = engine.prepare_model_outputs
    there = catalogue

    @functools.wraps(stock)
    def prepare_model_outputs(
        output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        nonlocal there
        device = output.logits.device
        if there.trie.device != device:  # once: the engine stays where it is
            there = replace(catalogue, trie=catalogue.trie.to(device))
        mask_micro_batch(output.logits, micro_batch, there)
        return stock(output, output_args, micro_batch, logits_processor_func)

    engine.prepare_model_outputs = prepare_model_outputs


def mask_micro_batch(logits: torch.Tensor, micro_batch: TensorDict, catalogue: Catalogue) -> None:
    """Mask, in place, the logits of every answer of a micro-batch; rows that only fill it up are left alone.

    Args:
        logits: (1, T, V) of packed rows, (B, P, V) of rows padded on the right.
        micro_batch: As verl's engine gets it: jagged `input_ids`, `responses`, `loss_mask`.
        catalogue: Its trie on the device of the logits.

    Raises:
        ValueError: an answer that is not exactly the codes of an item.
    """
    tokens, num_levels = micro_batch["input_ids"], catalogue.num_levels
    lengths_B, stops_B = tokens.offsets().diff(), tokens.offsets()[1:]
    response_lengths_B = micro_batch["responses"].offsets().diff()
    answers_B = torch.stack([mask.any() for mask in micro_batch["loss_mask"].unbind()])
    wrong_B = answers_B & (response_lengths_B != num_levels)
    if bool(wrong_B.any()):
        raise ValueError(
            f"a response has {int(response_lengths_B[wrong_B][0])} tokens, a masked actor needs exactly the "
            f"{num_levels} codes of an item"
        )
    stops_R = stops_B[answers_B]
    places_RL = stops_R[:, None] - num_levels + torch.arange(num_levels, device=stops_R.device)
    offsets_L = torch.tensor(catalogue.level_offsets, device=stops_R.device)
    codes_RL = tokens.values()[places_RL] - offsets_L
    ends_B = stops_B
    if not tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
        ends_B = torch.arange(len(lengths_B), device=stops_B.device) * logits.shape[1] + lengths_B
    # The logits at a token give the next one: those of code 0 stand one token before it.
    first_R = ends_B[answers_B] - num_levels - 1
    flat_TV = logits.view(-1, logits.shape[-1])
    mask_answers(flat_TV, catalogue.trie, catalogue.level_offsets, first_R, codes_RL)


def mask_workers(worker_class: Any) -> None:
    """Make verl's actor and reference workers mask their engines where the rollout config asks for it."""
    extend_workers(worker_class, OPTION, require_maskable, _mask)


def _mask(config: Any, worker: Any) -> None:
    mask_engine(worker.engine, require_catalogue(config.rollout.custom, worker.model_config.tokenizer))
