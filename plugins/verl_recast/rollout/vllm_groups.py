"""Groups of sampled answers from vLLM: one request for each rollout, with a seed of its own.

Nothing of vLLM is imported here. Shapes: B prompts, G rollouts, L levels.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recast_cli.core.seeding import hash64
from verl_recast.catalogue import NEEDED
from verl_recast.rollout.group_sampling import require_sampling
from verl_recast.rollout.vllm_beams import MAX_LOGPROB_TOKENS
from verl_recast.settings import RolloutSettings

PROCESSOR = "verl_recast.rollout.vllm_trie:TrieLogitsProcessor"

CATALOGUE_KEYS = ("tokenizer", "catalogue")  # of `rollout.custom`; in vLLM's `additional_config` recast_...
# Entry of a request's `extra_args`: so many tokens at the end of its prompt are codes of the answer.
GIVEN = "recast_given"

# verl's server: (prompt_ids, sampling_params, request_id) to a TokenOutput.
Generate = Callable[[list[int], dict[str, Any], str], Awaitable[Any]]


async def sample_groups(
    generate: Generate,
    prompts: Sequence[Sequence[int]],
    index_B: Sequence[int],
    num_rollouts: int,
    *,
    num_levels: int,
    step: int,
    seed: int,
    temperature: float,
    top_p: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of every answer and the log-probs that vLLM reports of them, both (B, G, L).

    Args:
        generate: The engine.
        prompts: Token ids, after which the first code comes next.
        index_B: Row indices; a draw depends on `seed`, `step`, row and rollout alone, not on the batch that
            vLLM puts it into.
        num_rollouts: G.
        temperature: Of the policy renormalised over the trie.
        top_p: Mass of the nucleus of each code, of the same policy.

    Raises:
        RuntimeError: an answer of other than L tokens.
    """
    seeds_BG = hash64(seed, step, np.array(index_B)[:, None], np.arange(num_rollouts)) >> np.uint64(1)

    async def answer(prompt: Sequence[int], request_seed: int) -> Any:
        params = {
            "max_tokens": num_levels,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": -1,
            "seed": request_seed,
            "logprobs": True,
            "extra_args": {GIVEN: 0},
        }
        output = await generate(list(prompt), params, uuid.uuid4().hex)
        if len(output.token_ids) != num_levels:
            raise RuntimeError(
                f"vLLM answered with {len(output.token_ids)} tokens ({output.stop_reason}), "
                f"needed {num_levels}"
            )
        return output

    outputs = await asyncio.gather(
        *(
            answer(prompt, int(request_seed))
            for prompt, seeds_G in zip(prompts, seeds_BG, strict=True)
            for request_seed in seeds_G
        )
    )
    shape = len(prompts), num_rollouts, num_levels
    tokens_BGL = np.array([output.token_ids for output in outputs]).reshape(shape)
    log_probs_BGL = np.array([output.log_probs for output in outputs], dtype=np.float32).reshape(shape)
    return tokens_BGL, log_probs_BGL


def add_trie(options: dict[str, Any], custom: Mapping[str, Any]) -> None:
    """Put the trie logits processor among vLLM's engine arguments, beside what is there, in place.

    Args:
        options: `rollout.engine_kwargs.vllm`.
        custom: `rollout.custom`, which names the catalogue.
    """
    others = [name for name in options.get("logits_processors") or [] if name != PROCESSOR]
    options["logits_processors"] = [*others, PROCESSOR]
    additional = dict(options.get("additional_config") or {})
    named = {f"recast_{key}": str(custom[key]) for key in CATALOGUE_KEYS if custom.get(key)}
    options["additional_config"] = additional | named
    options.setdefault("max_logprobs", MAX_LOGPROB_TOKENS)  # beams ask for that many


def require_fitting(config: Any) -> None:
    """Refuse a rollout config under which vLLM would do something else than it says.

    Args:
        config: verl's rollout config.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    prefix = "actor_rollout_ref.rollout"
    options = RolloutSettings.from_custom(config.custom)
    if not (options.tokenizer or options.catalogue):
        raise ValueError(f"rollout.custom names no catalogue: {NEEDED}")
    require_sampling(config)
    if options.sampling == "without-replacement" or options.exclude_history:
        raise ValueError(
            f"{prefix}.custom.sampling is {options.sampling} with exclude_history={options.exclude_history}, "
            f"vLLM needs iid or beam and False: {prefix}.name=recast_sid does the others"
        )
    if config.pipeline_model_parallel_size > 1:
        raise ValueError(
            f"{prefix}.pipeline_model_parallel_size is {config.pipeline_model_parallel_size}, needs 1: verl "
            "loads new weights into one stage only"
        )
    if config.logprobs_mode != "raw_logprobs":
        raise ValueError(
            f"{prefix}.logprobs_mode is {config.logprobs_mode}, needs raw_logprobs: beams, and the "
            "comparison with the actor, are over the full vocabulary"
        )
    if config.calculate_log_probs and config.temperature != 1:
        raise ValueError(
            f"{prefix}.temperature is {config.temperature}, needs 1 with calculate_log_probs: vLLM's raw "
            "log-probs are those of temperature 1, the actor's are not"
        )
