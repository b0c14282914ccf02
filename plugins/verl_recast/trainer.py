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
from recast_cli.core.seeding import tie_keys
from recast_cli.core.signal import group_statistics
from verl_recast import on_policy
from verl_recast.actor_options import wanted
from verl_recast.anchors import anchor_fields, choose_targets, is_anchor
from verl_recast.answers import AnswerReader
from verl_recast.catalogue import find_catalogue
from verl_recast.check_config import KEPT_PER_GROUP, check_config
from verl_recast.groups import Groups, gather_groups
from verl_recast.layout import kept_rows, minibatch_order
from verl_recast.loss_scale import count_dropped_tokens, require_one_divisor
from verl_recast.rollout.columns import complete
from verl_recast.settings import RecastSettings
from verl_recast.validation import validation_metrics

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
        self.no_signal = False

    def _init_tokenizer(self) -> None:
        """verl's, and the catalogue, before any worker starts: what is wrong with it is said at once."""
        super()._init_tokenizer()
        catalogue = find_catalogue(self.config.actor_rollout_ref.rollout.get("custom"), self.tokenizer)
        self.members = None if catalogue is None else catalogue.members

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
        settings = self.settings
        confusable = settings.tie_rule == "most-probable"
        groups = gather_groups(batch, self.reader, self.members, log_probs=confusable)
        missing = self.config.data.train_batch_size - len(groups.index_B)
        if missing:  # verl goes on without the prompts whose rollouts failed, and so do we
            logger.warning("step %d: %d prompts came back without a rollout", self.global_steps, missing)
        selection = select_pairs(
            groups.rewards_BG,
            groups.scores_BG,
            tie_keys(settings.seed, self.global_steps, groups.index_B, groups.present_BG.shape[1]),
            present_BG=groups.present_BG,
            valid_BG=groups.valid_BG,
            lends_BG=groups.lends_BG,
            log_probs_BG=groups.log_probs_BG,
            repair=settings.repairs,
        )
        known = self.members is not None
        metrics.update(
            _signal_metrics(groups, selection, batch, catalogue_known=known, repairs=settings.repairs)
        )
        self._put_anchors(batch, groups, selection)
        metrics["signal/all_zero_after_repair"] = self._all_zero_after_repair(batch, groups, selection)

        kept = kept_rows(selection, groups.rows_BG, contrast=settings.contrasts)
        metrics["signal/skipped_groups"] = len(groups.index_B) - len(kept)
        self.no_signal = not kept
        if self.no_signal:
            # verl's bookkeeping needs rows: forward one pair, which `_update_actor` then leaves alone.
            logger.warning("step %d: no group has both a positive and a negative", self.global_steps)
            b = int(groups.present_BG.sum(axis=1).argmax())
            kept = {b: groups.rows_BG[b][groups.present_BG[b]][:KEPT_PER_GROUP].tolist()}
        complete(batch, {row: groups.prompts[b] for b, rows in kept.items() for row in rows})
        actor = self.config.actor_rollout_ref.actor
        require_one_divisor(
            actor, [batch.tags[row]["response_len"] for rows in kept.values() for row in rows]
        )
        if settings.loss_scale == "full-batch" and actor.loss_agg_mode == "token-mean":
            count_dropped_tokens(batch, groups, kept, actor.ppo_mini_batch_size)
        return self._keep(batch, kept, len(groups.index_B), metrics)

    @property
    def _width(self) -> int:
        """Rows that a group keeps at most."""
        return KEPT_PER_GROUP if self.settings.contrasts else self.config.actor_rollout_ref.rollout.n

    def _put_anchors(self, batch: KVBatchMeta, groups: Groups, selection: Selection) -> None:
        """Overwrite the rollout that each anchor replaces, in place: same key, same group size."""
        repaired = np.flatnonzero(selection.anchor_B >= 0)
        if len(repaired) == 0:
            return
        places = selection.anchor_B[repaired]
        rows = groups.rows_BG[repaired, places].tolist()
        targets = choose_targets(
            [groups.targets[b] for b in repaired],
            groups.index_B[repaired],
            seed=self.settings.seed,
            step=self.global_steps,
            rule=self.settings.anchor_rule,
        )
        prompts = [groups.prompts[b] for b in repaired]
        fields, tags = anchor_fields(batch, rows, prompts, targets, self.reader)
        if self.config.actor_rollout_ref.rollout.calculate_log_probs:
            # Of the anchor's own length; `_compute_old_log_prob` fills in the actor's.
            fields["rollout_log_probs"] = fields["rm_scores"] * 0
        tq.kv_batch_put(
            keys=[batch.keys[row] for row in rows], partition_id=batch.partition_id, fields=fields, tags=tags
        )
        for row, tag in zip(rows, tags, strict=True):
            batch.tags[row] = tag
        groups.tokens_BG[repaired, places] = [tag["response_len"] for tag in tags]

    def _all_zero_after_repair(self, batch: KVBatchMeta, groups: Groups, selection: Selection) -> float:
        """Share of the groups without a positive reward; the anchors, and nothing else, are read again."""
        repaired = np.flatnonzero(selection.anchor_B >= 0)
        keys = [batch.keys[row] for row in groups.rows_BG[repaired, selection.anchor_B[repaired]]]
        hits = 0
        if keys:
            data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
            hits = sum(float(score.sum()) > 0 for score in data["rm_scores"].unbind())
        return (int(selection.all_zero_B.sum()) - hits) / len(groups.index_B)

    def _keep(
        self, batch: KVBatchMeta, kept_of_group: dict[int, list[int]], num_groups: int, metrics: dict
    ) -> KVBatchMeta:
        """Clear everything that is not kept from the TransferQueue and lay out the rest."""
        rows = [row for members in kept_of_group.values() for row in members]
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
        counts = {b: len(members) for b, members in kept_of_group.items()}
        order, num_padding = minibatch_order(
            counts, num_groups, minibatch_prompts, self._width, self._dp_size()
        )
        if num_padding:
            small = upsample_batch_to_divisible_size(
                small, len(rows) + num_padding, self.tokenizer.eos_token_id
            )
        small.reorder(order)
        metrics["signal/kept_samples"] = 0 if self.no_signal else len(rows)
        metrics["signal/padding_samples"] = num_padding
        anchors = sum(is_anchor(batch.tags[row]) for row in rows)
        metrics["signal/anchor_share"] = 0.0 if self.no_signal else anchors / len(rows)
        kept_tokens = 0 if self.no_signal else sum(batch.tags[row]["seq_len"] for row in rows)
        metrics["signal/kept_tokens"] = int(kept_tokens)
        return small

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As verl does, but anchors leave its comparison of rollout with actor: nobody sampled them.

        An anchor was stored with zeros for sampling log-probs (`_put_anchors`); the actor's own take their
        place, so that the ratio is 1 wherever verl forms one. With `on_policy` the update finds its own.
        """
        if wanted(self.config.actor_rollout_ref, on_policy.OPTION):
            return batch
        anchors = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if is_anchor(tag)]
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

        `seq-mean-*` losses divide by `global_batch_size`: the rows that a mini-batch has room for, or with
        `loss_scale=full-batch` the rollouts of its prompts, so that the reduced mini-batch has the gradient
        of the full one with zero advantages. A step without any signal is no update.
        """
        if self.no_signal:
            return batch
        actor, num_rollouts = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout.n
        counted = num_rollouts if self.settings.loss_scale == "full-batch" else self._width
        batch.extra_info.update(
            {
                "calculate_entropy": bool(actor.calculate_entropy or actor.entropy_coeff != 0.0),
                "distillation_use_topk": False,
                "distillation_only": False,
                "global_batch_size": actor.ppo_mini_batch_size * counted,
                "mini_batch_size": actor.ppo_mini_batch_size * self._width,
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

    def _val_metrics_update(
        self,
        data_sources: Any,
        sample_uids: Any,
        reward_extra_infos_dict: Any,
        sample_turns: Any,
        expected_acc_counts: Any = None,
    ) -> dict[str, float]:
        """Exact metrics in the place of verl's bootstrap, which draws answers with replacement."""
        return validation_metrics(data_sources, sample_uids, reward_extra_infos_dict, expected_acc_counts)


def _signal_metrics(
    groups: Groups, selection: Selection, batch: KVBatchMeta, *, catalogue_known: bool, repairs: bool
) -> dict[str, float]:
    """Statistics of the full groups, and what repair left of the empty ones."""
    statistics = group_statistics(
        groups.rewards_BG, groups.scores_BG, groups.codes_BGL, groups.valid_BG, groups.present_BG
    )
    if not catalogue_known:
        del statistics["invalid"]  # a well-formed semantic ID may still be no item
    repaired_B = selection.anchor_B >= 0
    if catalogue_known:
        statistics["foreign_targets"] = int(groups.foreign_B.sum())
    if repairs:
        statistics["unrepairable_groups"] = int((selection.all_zero_B & ~repaired_B).sum())
    return {f"signal/{name}": value for name, value in (statistics | groups.catalogue_mass).items()} | {
        "signal/repaired_groups": int(repaired_B.sum()),
        "signal/rollouts": len(batch),
        "signal/rollout_tokens": int(np.sum([tag["seq_len"] for tag in batch.tags])),
    }
