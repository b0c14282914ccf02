"""Trainer mode `recast`: verl's synchronous trainer with repair, contrast and the physical drop.

The hook sits between reward and old log-probs (`_balance_batch`), so that old log-probs, reference
log-probs and the actor update see two rows per group instead of G.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np
import transfer_queue as tq
from omegaconf import open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer
from verl.utils.debug.metrics import calculate_debug_metrics
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict

from recast_cli.core.contrast import Selection, select_pairs
from recast_cli.core.seeding import hash64, tie_keys
from recast_cli.core.signal import group_statistics
from verl_recast.answers import AnswerReader
from verl_recast.catalogue import Catalogue
from verl_recast.check_config import KEPT_PER_GROUP, check_config
from verl_recast.groups import Groups, anchor_fields, gather_groups, minibatch_order, share_without_hit
from verl_recast.settings import RecastSettings

logger = logging.getLogger(__name__)


@register_trainer("recast")
class PPOTrainerRecast(PPOTrainerSync):
    """PPOTrainerSync whose actor sees the strongest positive and the hardest negative of each group."""

    def __init__(self, config: Any) -> None:
        check_config(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # any other name takes verl's async buffer paths
        super().__init__(config)
        self.settings = RecastSettings.from_algorithm(config.algorithm)
        tokenizer = (config.actor_rollout_ref.rollout.get("custom") or {}).get("tokenizer")
        self.members = Catalogue.load(tokenizer).members if tokenizer else None
        self.no_signal = False

    @cached_property
    def reader(self) -> AnswerReader:
        return AnswerReader(self.tokenizer)

    def _dp_size(self) -> int:
        worker_group = self.actor_rollout_wg
        if "actor" not in worker_group._dispatch_info:
            worker_group._dispatch_info["actor"] = worker_group._query_dispatch_info("actor")
        return max(worker_group._dispatch_info["actor"]) + 1

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict, *_: Any, **__: Any) -> KVBatchMeta:
        with marked_timer("recast_hook", self.timing_raw):
            return self._select(batch, metrics)

    def _select(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Repair, contrast and drop; returns the kept rows laid out in PPO mini-batches."""
        groups = gather_groups(batch, self.reader, self.members)
        missing = self.config.data.train_batch_size - len(groups.index_B)
        if missing:  # verl goes on without the prompts whose rollouts failed, and so do we
            logger.warning("step %d: %d prompts came back without a rollout", self.global_steps, missing)
        keys_BG = tie_keys(self.settings.seed, self.global_steps, groups.index_B, groups.present_BG.shape[1])
        selection = select_pairs(
            groups.rewards_BG,
            groups.scores_BG,
            keys_BG,
            present_BG=groups.present_BG,
            valid_BG=groups.valid_BG,
            lends_BG=groups.lends_BG,
        )
        metrics.update(_signal_metrics(groups, selection, batch, catalogue_known=self.members is not None))
        self._put_anchors(batch, groups, selection)
        metrics["signal/all_zero_after_repair"] = self._all_zero_after_repair(batch, groups, selection)

        trainable = np.flatnonzero(selection.trainable_B)
        self.no_signal = len(trainable) == 0
        if self.no_signal:
            # verl's bookkeeping needs rows: forward one pair, which `_update_actor` then leaves alone.
            logger.warning("step %d: no group has both a positive and a negative", self.global_steps)
            b = int(groups.present_BG.sum(axis=1).argmax())
            rows_B2 = {b: groups.rows_BG[b][groups.present_BG[b]][:KEPT_PER_GROUP].tolist()}
        else:
            rows_B2 = {
                int(b): [
                    groups.rows_BG[b, selection.positive_B[b]],
                    groups.rows_BG[b, selection.negative_B[b]],
                ]
                for b in trainable
            }
        return self._keep(batch, rows_B2, len(groups.index_B), metrics)

    def _put_anchors(self, batch: KVBatchMeta, groups: Groups, selection: Selection) -> None:
        """Overwrite the rollout that each anchor replaces, in place: same key, same group size."""
        repaired = np.flatnonzero(selection.anchor_B >= 0)
        if len(repaired) == 0:
            return
        rows = [int(groups.rows_BG[b, selection.anchor_B[b]]) for b in repaired]
        draws = hash64(self.settings.seed, self.global_steps, groups.index_B[repaired])
        targets = [
            groups.targets[b][int(draw) % len(groups.targets[b])]
            for b, draw in zip(repaired, draws, strict=True)
        ]
        fields, tags = anchor_fields(batch, rows, targets, self.reader)
        if self.config.actor_rollout_ref.rollout.calculate_log_probs:
            # Of the anchor's own length; `_compute_old_log_prob` fills in the actor's.
            fields["rollout_log_probs"] = fields["rm_scores"] * 0
        tq.kv_batch_put(
            keys=[batch.keys[row] for row in rows], partition_id=batch.partition_id, fields=fields, tags=tags
        )
        for row, tag in zip(rows, tags, strict=True):
            batch.tags[row] = tag

    def _all_zero_after_repair(self, batch: KVBatchMeta, groups: Groups, selection: Selection) -> float:
        """Share of the groups without a positive reward; the empty ones are read again after repair."""
        empty = [rows_G[rows_G >= 0].tolist() for rows_G in groups.rows_BG[selection.all_zero_B]]
        if not empty:
            return 0.0
        rows = [row for members in empty for row in members]
        keys = [batch.keys[row] for row in rows]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
        scores = zip(rows, data["rm_scores"].unbind(), strict=True)
        hits = {row for row, score in scores if float(score.sum()) > 0}
        return share_without_hit(empty, hits) * len(empty) / len(groups.index_B)

    def _keep(
        self, batch: KVBatchMeta, rows_B2: dict[int, list[int]], num_groups: int, metrics: dict
    ) -> KVBatchMeta:
        """Clear everything that is not kept from the TransferQueue and lay out the rest."""
        rows = [int(row) for pair in rows_B2.values() for row in pair]
        kept = set(rows)
        dropped = [key for i, key in enumerate(batch.keys) if i not in kept]
        if dropped:
            tq.kv_clear(
                keys=dropped, partition_id=batch.partition_id
            )  # what stays would leak for the whole run
        small = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[batch.keys[row] for row in rows],
            tags=[batch.tags[row] for row in rows],
            extra_info=batch.extra_info,
        )
        minibatch_prompts = self.config.actor_rollout_ref.actor.ppo_mini_batch_size
        order, num_padding = minibatch_order(
            list(rows_B2), num_groups, minibatch_prompts, KEPT_PER_GROUP, self._dp_size()
        )
        if num_padding:
            small = upsample_batch_to_divisible_size(
                small, len(rows) + num_padding, self.tokenizer.eos_token_id
            )
        small.reorder(order)
        metrics["signal/kept_samples"] = 0 if self.no_signal else len(rows)
        metrics["signal/padding_samples"] = num_padding
        kept_tokens = 0 if self.no_signal else sum(batch.tags[row]["seq_len"] for row in rows)
        metrics["signal/kept_tokens"] = int(kept_tokens)
        return small

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As verl does, but anchors leave its comparison of rollout with actor: nobody sampled them.

        An anchor was stored with zeros for sampling log-probs (`_put_anchors`); the actor's own take their
        place, so that the ratio is 1 wherever verl forms one.
        """
        anchors = [
            key for key, tag in zip(batch.keys, batch.tags, strict=True) if tag.get("producer") == "anchor"
        ]
        batch = super()._compute_old_log_prob(batch, metrics)
        if not anchors or not self.config.actor_rollout_ref.rollout.calculate_log_probs:
            return batch
        own = tq.kv_batch_get(keys=anchors, partition_id=batch.partition_id, select_fields=["old_log_probs"])
        fields = TensorDict({"rollout_log_probs": own["old_log_probs"]}, batch_size=len(anchors))
        tq.kv_batch_put(keys=anchors, partition_id=batch.partition_id, fields=fields)
        names = ["responses", "response_mask", "rollout_log_probs", "old_log_probs"]
        sampled = [key for key in batch.keys if key not in set(anchors)]
        data = tq.kv_batch_get(keys=sampled, partition_id=batch.partition_id, select_fields=names)
        metrics.update(calculate_debug_metrics(DataProto(batch=data.to_padded_tensor())))
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """One call with one size: the kept rows of a mini-batch of prompts.

        `global_batch_size` stays at the full group size, so that `seq-mean-*` losses of the reduced
        mini-batch equal those of the full one with zero advantages. A step without any signal is no update.
        """
        if self.no_signal:
            return batch
        actor = self.config.actor_rollout_ref.actor
        batch.extra_info.update(
            {
                "calculate_entropy": bool(actor.calculate_entropy or actor.entropy_coeff != 0.0),
                "distillation_use_topk": False,
                "distillation_only": False,
                "global_batch_size": actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n,
                "mini_batch_size": actor.ppo_mini_batch_size * KEPT_PER_GROUP,
                "epochs": actor.ppo_epochs,
                "seed": actor.data_loader_seed,
                "dataloader_kwargs": {"shuffle": False},
                "temperature": self.config.actor_rollout_ref.rollout.temperature,
            }
        )
        output = rename_dict(self.actor_rollout_wg.update_actor(batch)["metrics"], "actor/")
        output["perf/mfu/actor"] = output.pop("actor/mfu")
        metrics.update(reduce_metrics(output))
        return batch


def _signal_metrics(
    groups: Groups, selection: Selection, batch: KVBatchMeta, *, catalogue_known: bool
) -> dict[str, float]:
    """Statistics of the full groups, and what repair left of the empty ones."""
    statistics = group_statistics(
        groups.rewards_BG, groups.scores_BG, groups.codes_BGL, groups.valid_BG, groups.present_BG
    )
    if not catalogue_known:
        del statistics["invalid"]  # a well-formed semantic ID may still be no item
    repaired_B = selection.anchor_B >= 0
    return {f"signal/{name}": value for name, value in statistics.items()} | {
        "signal/repaired_groups": int(repaired_B.sum()),
        "signal/unrepairable_groups": int((selection.all_zero_B & ~repaired_B).sum()),
        "signal/skipped_groups": int((~selection.trainable_B).sum()),
        "signal/rollouts": len(batch),
        "signal/rollout_tokens": int(np.sum([tag["seq_len"] for tag in batch.tags])),
    }
