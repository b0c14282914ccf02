"""Rollout server: holds the policy and the trie, answers with semantic IDs. Runs as one Ray actor per
replica."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.rollout.replica import TokenOutput

from recast_cli.core.seeding import hash64
from verl_recast import measure
from verl_recast.catalogue import require_catalogue
from verl_recast.garbage import keep_what_is_there
from verl_recast.rollout.group_sampling import draw_groups, require_sampling
from verl_recast.settings import RolloutSettings, num_threads


class SIDServer:
    """Generates groups of semantic IDs; the prompt is prefilled once and its KV shared by the group.

    Args:
        config: verl's rollout config; `custom.tokenizer` or `custom.catalogue` names the catalogue.
        model_config: verl's model config.
        device: "cuda" or "cpu".

    Raises:
        ValueError: the config asks for a distribution other than the temperature's over the catalogue.
    """

    def __init__(self, config: Any, model_config: Any, device: str) -> None:
        from transformers import AutoModelForCausalLM

        require_sampling(config)
        if threads := num_threads():
            torch.set_num_threads(threads)
        self.config = config
        self._waiting: dict[tuple[tuple[str, Any], ...], list[tuple[list[int], int, Any]]] = {}
        self.device = torch.device(device)
        catalogue = require_catalogue(config.custom, model_config.tokenizer)
        self.catalogue = replace(catalogue, trie=catalogue.trie.to(self.device))
        model = AutoModelForCausalLM.from_config(
            model_config.hf_config, dtype=PrecisionType.to_dtype(config.dtype), attn_implementation="sdpa"
        )
        self.model = model.to(self.device).eval()
        self.options = RolloutSettings.from_custom(config.custom)
        self.token_budget = self.options.token_budget or None
        self.global_steps: int | None = None  # None until the first weights arrive
        self._arrived: set[str] = set()  # parameters of the update that is under way

    # -- generation --------------------------------------------------------------------------------------

    async def generate_groups(
        self,
        prompts: list[list[int]],
        index_B: list[int],
        num_rollouts: int,
        *,
        step: int,
        seed: int,
        temperature: float,
        sampling: str = "iid",
        top_p: float = 1.0,
        history: list[list[int]] | None = None,
    ) -> dict[str, Any]:
        """A group of answers for every prompt; arguments not named here as in `draw_groups`.

        Args:
            temperature: 0 asks for the G best beams in descending order, whatever `sampling` says.

        Returns:
            `codes_BGL` (-1 where an answer is missing), `log_probs_BGL` (full vocabulary) and
            `trie_log_probs_BGL` (renormalised over the allowed codes), NaN where missing; `global_steps`.
            Of samples, `log_probs_BGL` are NaN unless the config has `calculate_log_probs`.
        """
        if self.global_steps is None:
            raise RuntimeError("the rollout server has no weights yet")
        with measure.phase("rollout", self.model):
            group = draw_groups(
                self.model,
                self.catalogue,
                prompts,
                index_B,
                num_rollouts,
                sampling="beam" if temperature == 0 else sampling,
                step=step,
                seed=seed,
                temperature=temperature,
                top_p=top_p,
                history=history,
                full_vocabulary=bool(self.config.calculate_log_probs),
                token_budget=self.token_budget,
            )
        return {
            "codes_BGL": _numpy(group.codes_BGL),
            "log_probs_BGL": _numpy(group.log_probs_BGL),
            "trie_log_probs_BGL": _numpy(group.trie_log_probs_BGL),
            "global_steps": self.global_steps,
        }

    async def _one_answer(self, prompt: list[int], index: int, **options: Any) -> dict[str, Any]:
        """`generate_groups` for a single answer, together with all requests that wait with like options.

        A batch takes the event loop until it is done, and meanwhile the next requests arrive.
        """
        loop = asyncio.get_running_loop()
        key, answer = tuple(sorted(options.items())), loop.create_future()
        waiting = self._waiting.setdefault(key, [])
        waiting.append((prompt, index, answer))
        if len(waiting) == 1:
            # Not now: requests that are here already take their places in the loop's next round first.
            loop.call_soon(lambda: loop.create_task(self._answer_waiting(key)))
        return await answer

    async def _answer_waiting(self, key: tuple[tuple[str, Any], ...]) -> None:
        prompts, index, answers = zip(*self._waiting.pop(key), strict=True)
        try:
            found = await self.generate_groups(list(prompts), list(index), 1, **dict(key))
        except Exception as exc:  # every one of them must hear of it
            for answer in answers:
                if not answer.done():  # its request was cancelled
                    answer.set_exception(exc)
            return
        step = found.pop("global_steps")
        for b, answer in enumerate(answers):
            if not answer.done():
                columns = {name: column[b] for name, column in found.items()}
                answer.set_result({**columns, "global_steps": step})

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        """verl's one-answer interface, for stock agent loops; seeded by the request id.

        Raises:
            ValueError: the config asks for groups that no stock agent loop can ask for.
        """
        for name, default in (("sampling", "iid"), ("exclude_history", False)):
            if (found := getattr(self.options, name)) != default:
                raise ValueError(
                    f"rollout.custom.{name} is {found}, which needs rollout.agent.agent_loop_manager_class="
                    "verl_recast.rollout.agent_loop.GroupLoopManager"
                )
        digest = int(hash64(*request_id.encode()).item()) >> 1
        seed = sampling_params.get("seed")
        out = await self._one_answer(
            list(prompt_ids),
            digest,
            step=self.global_steps or 0,
            seed=self.config.seed if seed is None else seed,
            temperature=float(sampling_params.get("temperature", 1.0)),
            top_p=float(sampling_params.get("top_p", 1.0)),
        )
        codes = out["codes_BGL"][0]
        actors = "trie_log_probs_BGL" if self.options.masked_actor else "log_probs_BGL"
        log_probs = out[actors][0].tolist()
        return TokenOutput(
            token_ids=self.catalogue.token_ids(codes).tolist(),
            log_probs=None if np.isnan(log_probs).any() else log_probs,
            stop_reason="completed",
            extra_fields={"global_steps": out["global_steps"]},
        )

    # -- weights -----------------------------------------------------------------------------------------

    def update_weights(self, weights: dict[str, torch.Tensor], global_steps: int | None, last: bool) -> None:
        """Load one bucket of named tensors; the step counts once the last one is in.

        Raises:
            KeyError: a tensor that the model does not have.
            ValueError: a tensor of another shape.
            RuntimeError: the last bucket is in and a parameter never came: answers would mix two policies.
        """
        keep_what_is_there()
        state = self.model.state_dict()
        for name, tensor in weights.items():
            if name not in state:
                self._arrived = set()
                raise KeyError(f"rollout model has no parameter {name!r}")
            if tensor.shape != state[name].shape:  # copy_ would broadcast it
                self._arrived = set()
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(tensor.shape)}, needed {tuple(state[name].shape)}"
                )
        with torch.no_grad():
            for name, tensor in weights.items():
                state[name].copy_(tensor)
        self._arrived |= weights.keys()
        if last:
            needed = {name for name, _ in self.model.named_parameters()}  # a tied head counts once
            missing, self._arrived = sorted(needed - self._arrived), set()
            if missing:
                raise RuntimeError(f"{len(missing)} parameters did not arrive, the first is {missing[0]!r}")
            self.global_steps = -1 if global_steps is None else global_steps

    # -- life cycle: verl calls these; there is no cache to free between calls ---------------------------

    async def wake_up(self, **_: Any) -> None:
        return None

    async def sleep(self, **_: Any) -> None:
        return None

    async def clear_kv_cache(self) -> None:
        return None

    async def release_kv_cache(self) -> None:
        return None

    async def resume_kv_cache(self) -> None:
        return None

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        return {"aborted_count": 0, "request_ids": []}

    async def resume_generation(self) -> None:
        return None

    async def start_profile(self, **_: Any) -> None:
        return None

    async def stop_profile(self) -> None:
        return None


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
