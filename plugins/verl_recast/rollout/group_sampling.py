"""How the G answers of a group are chosen: `rollout.custom.sampling`, the temperature and top_p of verl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recast_cli.core.beam_group import beam_group
from recast_cli.core.sampling import Rollouts, sample
from recast_cli.core.seeding import hash64, uniforms
from recast_cli.core.without_replacement import sample_distinct
from verl_recast.catalogue import Catalogue
from verl_recast.settings import RolloutSettings


def draw_groups(
    model: Any,
    catalogue: Catalogue,
    prompts: list[list[int]],
    index_B: Sequence[int],
    num_rollouts: int,
    *,
    sampling: str,
    step: int,
    seed: int,
    temperature: float,
    top_p: float,
    history: Sequence[Sequence[int]] | None,
    full_vocabulary: bool,
    token_budget: int | None,
) -> Rollouts:
    """Groups of G answers; what is drawn depends on (seed, step, index) and not on the batch.

    Args:
        prompts: Token ids of B prompts, after which the first code comes next.
        index_B: `extra_info.index` of each.
        num_rollouts: G.
        sampling: One of `settings.SAMPLINGS`.
        history: Item rows that must not be answered, for each prompt; None closes nothing.
        full_vocabulary, token_budget: As in `sampling.sample`; beams ask for the full vocabulary anyway.

    Raises:
        ValueError: a history that is no item's row, or that holds the whole catalogue.
    """
    common: dict[str, Any] = {
        "pad_token_id": catalogue.pad_token_id,
        "token_budget": token_budget,
        "exclusion": None if history is None else catalogue.trie.exclusion(history),
    }
    args = model, catalogue.trie, catalogue.level_offsets, prompts
    rows_B = np.asarray(index_B, dtype=np.int64)
    if sampling == "beam":
        return beam_group(*args, num_rollouts, **common)
    common |= {"temperature": temperature, "full_vocabulary": full_vocabulary}
    if sampling == "without-replacement":
        return sample_distinct(*args, hash64(seed, step, rows_B), num_rollouts, **common)
    draws_BGL = uniforms(seed, step, rows_B, num_rollouts, catalogue.num_levels)
    return sample(*args, torch.from_numpy(draws_BGL), top_p=top_p, **common)


def require_sampling(config: Any) -> None:
    """What the engine does not do must not be asked of it in vain.

    Args:
        config: verl's rollout config.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    prefix = "actor_rollout_ref.rollout"
    sampling = RolloutSettings.from_custom(config.custom).sampling
    if not config.temperature > 0:
        raise ValueError(
            f"{prefix}.temperature is {config.temperature}, needed above 0 (beams: custom.sampling=beam)"
        )
    if sampling == "beam" and config.temperature != 1:
        raise ValueError(
            f"{prefix}.temperature is {config.temperature}, custom.sampling=beam needs 1: beams are ranked "
            "by the model's own probabilities"
        )
    if not 0 < config.top_p <= 1:
        raise ValueError(f"{prefix}.top_p is {config.top_p}, needed above 0 and at most 1")
    if sampling != "iid" and config.top_p != 1:
        raise ValueError(
            f"{prefix}.top_p is {config.top_p}, custom.sampling={sampling} needs 1: a nucleus may hold fewer "
            "items than a group of distinct ones asks for"
        )
    neutral = {"top_k": (-1, 0), "repetition_penalty": (1,)}
    for part, section in (("", config), ("val_kwargs.", config.val_kwargs)):
        for name, values in (neutral | ({"top_p": (1,)} if part else {})).items():
            found = getattr(section, name, values[0])
            if found not in values:
                raise ValueError(
                    f"rollout engine {config.name} samples by temperature and top_p, found "
                    f"{part}{name}={found}: set {prefix}.{part}{name}={values[0]}"
                )
