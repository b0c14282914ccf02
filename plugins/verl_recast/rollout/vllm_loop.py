"""Agent loop that asks vLLM for the rollouts of a group, under the trie logits processor.

Name it with
`+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_recast.rollout.vllm_loop.VLLMLoopManager`.
Everything behind the answer (scoring, validity, the TransferQueue records, the log) is that of `agent_loop`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from recast_cli.core.seeding import hash64
from verl_recast.rollout.agent_loop import GroupLoopManager, GroupLoopWorker
from verl_recast.rollout.trie_rows import TOKENIZER_KEY

PROCESSOR = "verl_recast.rollout.vllm_trie:TrieLogitsProcessor"


class VLLMLoopWorker(GroupLoopWorker):
    """GroupLoopWorker whose answers are vLLM requests, one for each rollout."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require_trie(self.rollout_config)

    async def _answers(
        self, rows: list[dict[str, Any]], prompts: list[list[int]], *, validate: bool
    ) -> dict[str, Any]:
        config, step = self.rollout_config, int(rows[0]["global_steps"])
        num_rollouts = config.val_kwargs.n if validate else config.n
        temperature = float(config.val_kwargs.temperature if validate else config.temperature)
        if temperature == 0 and num_rollouts > 1:
            raise ValueError(
                f"temperature=0 asks for {num_rollouts} beams of a prompt, vLLM gives samples: set n=1, or "
                "answer with rollout.name=recast_sid"
            )
        # The draw of a rollout depends on these alone, not on the batch that vLLM puts it into.
        index_B1 = np.array([[int(row["index"])] for row in rows])
        seeds_BG = hash64(self.seed, step, index_B1, np.arange(num_rollouts)) >> np.uint64(1)
        requests = [
            self._ask(str(row["uid"]), prompt, int(seed), temperature)
            for row, prompt, seeds_G in zip(rows, prompts, seeds_BG, strict=True)
            for seed in seeds_G
        ]
        outputs = await asyncio.gather(*requests)
        shape = len(rows), num_rollouts, self.catalogue.num_levels
        tokens_BGL = np.array([output.token_ids for output in outputs]).reshape(shape)
        log_probs = [output.log_probs or [np.nan] * self.catalogue.num_levels for output in outputs]
        return {
            "codes_BGL": tokens_BGL - np.asarray(self.catalogue.level_offsets),
            "log_probs_BGL": np.array(log_probs, dtype=np.float32).reshape(shape),
            "global_steps": outputs[0].extra_fields["global_steps"],
        }

    async def _ask(self, uid: str, prompt: list[int], seed: int, temperature: float) -> Any:
        num_levels = self.catalogue.num_levels
        output = await self.llm_client.generate(
            request_id=uid,  # a group stays on one server, which reads its prompt once
            prompt_ids=list(prompt),
            sampling_params={
                "max_tokens": num_levels,
                "temperature": temperature,
                "top_p": 1.0,
                "top_k": -1,
                "seed": seed,
                "logprobs": self.rollout_config.calculate_log_probs,
            },
        )
        if len(output.token_ids) != num_levels:
            raise RuntimeError(
                f"vLLM answered with {len(output.token_ids)} tokens ({output.stop_reason}), "
                f"needed {num_levels}"
            )
        return output


class VLLMLoopManager(GroupLoopManager):
    """GroupLoopManager with the worker that asks vLLM."""

    worker_class = VLLMLoopWorker


def require_trie(config: Any) -> None:
    """Refuse a rollout config under which vLLM would answer without the trie, or report other log-probs.

    Raises:
        ValueError: naming the option, the value found and the value needed.
    """
    prefix, options = "actor_rollout_ref.rollout", (config.engine_kwargs or {}).get("vllm") or {}
    if not config.custom.get("tokenizer"):
        raise ValueError(
            f"{prefix}.custom.catalogue is {config.custom.get('catalogue')}: the trie of vLLM needs "
            f"{prefix}.custom.tokenizer (a folder of recast build-tokenizer), or answer with "
            "rollout.name=recast_sid"
        )
    processors, additional = options.get("logits_processors") or [], options.get("additional_config") or {}
    if PROCESSOR not in processors:
        raise ValueError(
            f"set +{prefix}.engine_kwargs.vllm.logits_processors=['{PROCESSOR}'], found {processors}: "
            "without it nothing keeps the answers inside the catalogue"
        )
    found, needed = dict(additional).get(TOKENIZER_KEY), config.custom["tokenizer"]
    if found != needed:
        raise ValueError(
            f"{prefix}.engine_kwargs.vllm.additional_config.{TOKENIZER_KEY} is {found}, needs {needed} "
            f"({prefix}.custom.tokenizer)"
        )
    if config.calculate_log_probs and (config.logprobs_mode, config.temperature) != ("raw_logprobs", 1):
        raise ValueError(
            f"{prefix}.calculate_log_probs with logprobs_mode={config.logprobs_mode} and temperature="
            f"{config.temperature}: vLLM reports the actor's log-probs at logprobs_mode=raw_logprobs and "
            "temperature=1 only"
        )
