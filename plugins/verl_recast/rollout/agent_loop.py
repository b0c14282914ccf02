"""Agent loop that rolls out whole groups: a request is what a server reads at once, scored from ids, and
stored while the next one is answered.

Name it with
`+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_recast.rollout.agent_loop.GroupLoopManager`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.experimental.agent_loop import AgentLoopWorker
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

from recast_cli.core.spelling import SID_BEGIN
from recast_cli.core.walk import budget_of, micro_batches
from recast_cli.vocabulary import encode_prompts
from verl_recast.catalogue import require_catalogue
from verl_recast.garbage import keep_what_is_there
from verl_recast.groups import require_own_index
from verl_recast.reward import require_targets
from verl_recast.rollout.columns import Columns, answer_columns, rollout_tag, store
from verl_recast.rollout.rollout_log import Part, append
from verl_recast.rollout.sampled import (
    require_histories,
    sampled_fields,
    take_histories,
)
from verl_recast.rollout.scored import Targets, reward_infos, score_groups, with_ranks
from verl_recast.settings import ESTIMATOR, RecastSettings, RolloutSettings

logger = logging.getLogger(__name__)

# What is kept of a dataset row; the messages of the prompt are not among it.
DATASET_FIELDS = ("uid", "index", "data_source", "reward_model", "extra_info")
# Columns that only validation and the rollout log read. A worker fetches all that is stored, in every phase.
UNREAD_IN_TRAINING = ("index", "data_source", "extra_info", "session_id")


class GroupLoopWorker(AgentLoopWorker):
    """Rolls out and scores the groups of a chunk of prompts.

    Options stand in `rollout.custom` (`settings.RolloutSettings`). For validation neither `sampling` nor
    `exclude_history` holds.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tq.init()
        self.options = RolloutSettings.from_custom(self.rollout_config.custom)
        self.catalogue = require_catalogue(self.rollout_config.custom, self.tokenizer)
        settings = RecastSettings.from_algorithm(self.config.algorithm)
        self.seed = settings.seed
        self.pairs_only = self.config.algorithm.adv_estimator == ESTIMATOR and settings.contrasts
        self.background_tasks: set[asyncio.Task] = set()

    async def generate_sequences(self, batch: TensorDict) -> None:  # type: ignore[override]
        """Start the rollouts of a batch and return; results arrive in the TransferQueue."""
        keep_what_is_there()
        task = asyncio.create_task(self._run_batch(_rows(batch)))
        self.background_tasks.add(task)
        task.add_done_callback(self.background_tasks.discard)

    async def _run_batch(self, rows: list[dict[str, Any]]) -> None:
        validate = bool(rows[0].pop("validate", False))
        partition = "val" if validate else "train"
        uids = [row["uid"] for row in rows]
        step = int(rows[0]["global_steps"])
        tags = [{"is_prompt": True, "status": "finished", "global_steps": step} for _ in rows]
        try:
            failures = await self._roll_out(rows, validate=validate, partition=partition)
        except Exception as exc:
            failures = [(list(range(len(rows))), exc)]
        for places, failure in failures:
            logger.error("rollout of %d prompts failed", len(places), exc_info=failure)
            cause = getattr(failure, "cause", None) or failure  # Ray wraps what the server raised
            # One line: of a server that died Ray says in several which it was.
            error = " ".join(f"{type(cause).__name__}: {cause}".split())
            for place in places:
                tags[place] |= {"status": "failure", "error": error}
        await tq.async_kv_batch_put(keys=uids, partition_id=partition, tags=tags)

    async def _roll_out(
        self, rows: list[dict[str, Any]], *, validate: bool, partition: str
    ) -> list[tuple[list[int], BaseException]]:
        """Roll out, score and store; places of the prompts whose request failed, and why.

        All requests have ended by then: one that still stored would leave rows behind that verl has cleared.
        """
        prompts = self._encode([list(row["raw_prompt"]) for row in rows])
        targets = [require_targets(row["reward_model"]["ground_truth"]) for row in rows]
        ranked = validate and self.rollout_config.val_kwargs.temperature == 0
        if not ranked:  # beams draw nothing by it, and validation files may each count from 0
            found = zip(rows, prompts, targets, strict=True)
            require_own_index([(int(row["index"]), (prompt, target)) for row, prompt, target in found])
        take_histories(rows)

        async def part(places: list[int]) -> Part:
            chosen = [rows[b] for b in places]
            asked = [prompts[b] for b in places], [targets[b] for b in places]
            return await self._roll_out_part(chosen, *asked, partition, validate=validate, ranked=ranked)

        asked = self._parts(prompts, self._num_answers(validate=validate))
        outcomes = await asyncio.gather(*map(part, asked), return_exceptions=True)
        parts = [outcome for outcome in outcomes if isinstance(outcome, Part)]
        if self.options.log and parts:
            append(self.options.log, int(rows[0]["global_steps"]), partition, parts)
        ended = zip(asked, outcomes, strict=True)
        return [(places, outcome) for places, outcome in ended if isinstance(outcome, BaseException)]

    def _num_answers(self, *, validate: bool) -> int:
        return self.rollout_config.val_kwargs.n if validate else self.rollout_config.n

    def _parts(self, prompts: list[list[int]], num_answers: int) -> list[list[int]]:
        """Prompts of each request: what a server reads at once, so that the answers of one request are stored
        while the next is computed; as many for every server, as far as the prompts go."""
        budget = budget_of(str(self.config.trainer.device), self.options.token_budget)
        fed = num_answers * (self.catalogue.num_levels - 1)
        parts = [part.tolist() for part in micro_batches(prompts, fed, budget)]
        servers = min(self._num_replicas(), len(prompts))
        while len(parts) % servers and len(largest := max(parts, key=len)) > 1:
            parts.remove(largest)
            middle = len(largest) // 2
            parts += [largest[:middle], largest[middle:]]
        return parts

    async def _roll_out_part(
        self,
        rows: list[dict[str, Any]],
        prompts: list[list[int]],
        targets: Targets,
        partition: str,
        *,
        validate: bool,
        ranked: bool,
    ) -> Part:
        out = await self._answers(rows, prompts, validate=validate)
        codes_BGL = self.catalogue.spelled(out["codes_BGL"])
        hits_BG, scores_BG, valid_BG = score_groups(self.catalogue, targets, codes_BGL)
        infos = reward_infos(hits_BG, scores_BG)
        if ranked:
            infos = with_ranks(infos, targets, codes_BGL, valid_BG)
        keys, columns, tags, b_N = self._records(rows, prompts, out, infos)
        whole = validate or not self.pairs_only
        stored = columns if validate else columns.without(UNREAD_IN_TRAINING)
        await store(partition, keys, stored, tags, prompts, b_N, whole=whole)
        return Part((hits_BG, scores_BG, codes_BGL, valid_BG), columns, prompts, b_N)

    def _num_replicas(self) -> int:
        """Rollout servers of the job: a chunk of prompts is shared out among them."""
        config, trainer = self.rollout_config, self.config.trainer
        size = (
            config.tensor_model_parallel_size
            * config.data_parallel_size
            * config.pipeline_model_parallel_size
        )
        return max(1, trainer.n_gpus_per_node * trainer.nnodes // size)

    async def _answers(
        self, rows: list[dict[str, Any]], prompts: list[list[int]], *, validate: bool
    ) -> dict[str, Any]:
        """The answers of one server: verl's balancer names the one with the fewest requests."""
        config, options = self.rollout_config, self.options
        server_id, server = await self.llm_client._acquire_server(str(rows[0]["uid"]))
        try:
            return await server.generate_groups.remote(
                prompts,
                [int(row["index"]) for row in rows],
                self._num_answers(validate=validate),
                step=int(rows[0]["global_steps"]),
                seed=self.seed,
                temperature=float(config.val_kwargs.temperature if validate else config.temperature),
                sampling="iid" if validate else options.sampling,
                top_p=1.0 if validate else float(config.top_p),
                history=require_histories(rows) if options.exclude_history and not validate else None,
            )
        finally:
            self.llm_client._release_server(server_id, str(rows[0]["uid"]))

    def _encode(self, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
        """Prompt token ids; never silently truncated, since a cut prompt no longer starts with an item."""
        prompts = encode_prompts(
            self.tokenizer,
            conversations,
            answer_prefix=self.options.answer_prefix,
            template_options=self.config.data.get("apply_chat_template_kwargs"),
        )
        require_answer_next(self.tokenizer, prompts)
        longest, allowed = max(map(len, prompts)), self.rollout_config.prompt_length
        if longest > allowed:
            raise ValueError(
                f"prompt has {longest} tokens, actor_rollout_ref.rollout.prompt_length is {allowed}"
            )
        return prompts

    def _records(
        self,
        rows: list[dict[str, Any]],
        prompts: list[list[int]],
        out: dict[str, Any],
        infos: list[list[dict[str, float]]],
    ) -> tuple[list[str], Columns, list[dict[str, Any]], np.ndarray]:
        """TransferQueue keys, columns, tags and prompt of every rollout; a missing answer leaves no row."""
        codes_BGL = out["codes_BGL"]
        b_N, g_N = np.nonzero((codes_BGL >= 0).all(axis=-1))
        places = list(zip(b_N.tolist(), g_N.tolist(), strict=True))
        log_probs_NL = out["log_probs_BGL"][b_N, g_N]
        sampled: list[dict[str, Any]] = [{}] * len(places)
        actors_NL = log_probs_NL
        if "trie_log_probs_BGL" in out:  # a replay has none
            trie_NL = out["trie_log_probs_BGL"][b_N, g_N]
            sampled = sampled_fields(log_probs_NL, trie_NL)
            actors_NL = trie_NL if self.options.masked_actor else log_probs_NL
        steps = dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), out["global_steps"])
        common = {"producer": "rollout", **steps}
        hits_N = np.array([infos[b][g]["hit"] for b, g in places])
        tokens_NL = torch.from_numpy(self.catalogue.token_ids(codes_BGL[b_N, g_N]))
        columns = Columns(
            len(places),
            {
                **{name: [rows[b][name] for b, _ in places] for name in DATASET_FIELDS if name in rows[0]},
                **answer_columns(tokens_NL, hits_N),
                "num_turns": [2] * len(places),
                "extra_fields": [
                    {"reward_extra_info": infos[b][g], **common, **more}
                    for (b, g), more in zip(places, sampled, strict=True)
                ],
                "session_id": g_N.tolist(),
            },
        )
        if self.rollout_config.calculate_log_probs:
            columns["rollout_log_probs"] = torch.from_numpy(actors_NL).float()
        tags = [
            rollout_tag(rows[b], len(prompts[b]), answer, infos[b][g], out["global_steps"], more)
            for (b, g), answer, more in zip(places, tokens_NL.tolist(), sampled, strict=True)
        ]
        return [f"{rows[b]['uid']}_{g}_0" for b, g in places], columns, tags, b_N


def require_answer_next(tokenizer: Any, prompts: list[list[int]]) -> None:
    """Refuse prompts after which a model with a token `<|sid_begin|>` would not write a code.

    Raises:
        ValueError: a prompt that does not end with it, and what it ends with.
    """
    begin = tokenizer.get_vocab().get(SID_BEGIN)
    for prompt in prompts:
        if begin is not None and prompt[-1:] != [begin]:
            raise ValueError(
                f"a prompt ends with {tokenizer.decode(prompt[-8:])!r}, the engine answers with codes, which "
                f"follow {SID_BEGIN}: set rollout.custom.answer_prefix to what the model writes before the "
                f"first code, for example '{SID_BEGIN}'"
            )


class GroupLoopManager(AgentLoopManagerTQ):
    """verl's manager with our worker."""

    worker_class: type[GroupLoopWorker] = GroupLoopWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(self.worker_class)


def _rows(batch: TensorDict) -> list[dict[str, Any]]:
    """One plain dict per prompt of a batch as verl's trainer sends it."""

    def value(stored: Any, i: int) -> Any:
        if isinstance(stored, NonTensorStack):
            return stored[i].data
        return stored.data if isinstance(stored, NonTensorData) else stored[i]

    return [{name: value(batch.get(name), i) for name in batch.keys()} for i in range(len(batch))]  # noqa: SIM118
