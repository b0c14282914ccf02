"""The hook on groups written by hand, in a real TransferQueue: what it overwrites, keeps and clears."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from recast_cli.core.seeding import hash64
from recast_cli.core.spelling import parse
from recast_cli.tokenizer.model import bare_tokenizer
from recast_cli.tokenizer.vocabulary import add_semantic_ids
from verl_recast.groups import response_fields
from verl_recast.rollout.columns import ROLLOUT, Columns, answer_columns, store
from verl_recast.settings import RecastSettings
from verl_recast.trainer import PPOTrainerRecast

pytestmark = [pytest.mark.verl, pytest.mark.xdist_group("jobs")]

TARGET = "<s_a_0><s_b_1><s_c_2>"
NEAR, FAR, FARTHEST = "<s_a_0><s_b_1><s_c_0>", "<s_a_0><s_b_0><s_c_0>", "<s_a_1><s_b_1><s_c_2>"
BROKEN = "<s_c_0><s_b_0>" * 3  # a thought that never came to its answer
THOUGHTFUL = f"<s_c_0><s_b_0><|sid_begin|>{FAR}"
# Structural scores by hand: u = 10^(m-3) for m leading codes of TARGET.
SCORES = {TARGET: 1.0, NEAR: 0.1, FAR: 0.01, FARTHEST: 0.0, THOUGHTFUL: 0.01, BROKEN: 0.0}
# Index and answers of each group, as they might arrive; index decides the order of groups.
EMPTY, HIT, ALL_HIT = (9, [FAR, NEAR, FARTHEST]), (4, [FARTHEST, TARGET, FAR]), (6, [TARGET, TARGET, TARGET])

COUNTS = ("repaired_groups", "skipped_groups", "kept_samples")


@pytest.fixture(scope="module", autouse=True)
def queue() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        tq.init()
        yield
        tq.close()
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = bare_tokenizer()
    add_semantic_ids(tokenizer, (3, 3, 3))
    return tokenizer


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trainer(tokenizer: Any, mini_batch_prompts: int, **settings: Any) -> PPOTrainerRecast:
    """The trainer with what its hook reads; its workers are not needed here."""
    made = object.__new__(PPOTrainerRecast)
    made.tokenizer, made.settings, made.members = tokenizer, RecastSettings(**settings), None
    made.global_steps, made.timing_raw = 1, {}
    made.config = OmegaConf.create(
        {
            "data": {"train_batch_size": 3},
            "actor_rollout_ref": {
                "actor": {
                    "ppo_mini_batch_size": mini_batch_prompts,
                    "loss_agg_mode": "token-mean",
                    "loss_scale_factor": None,
                },
                "rollout": {"calculate_log_probs": True, "n": 3},
            },
        }
    )
    made._dp_size = lambda: 1  # type: ignore[method-assign]
    return made


def put(
    tokenizer: Any, groups: list[tuple[int, list[str]]], partition: str, ground_truth: Any = TARGET
) -> KVBatchMeta:
    """Rollouts of each group, interleaved, as the agent loop writes them."""
    keys, records, tags = [], [], []
    for g in range(3):
        for index, answers in groups:
            prompt = torch.tensor(ids(tokenizer, "<|sid_begin|><s_a_2><s_b_2><s_c_2>")[: 1 + index % 3])
            response, reward = torch.tensor(ids(tokenizer, answers[g])), float(answers[g] == TARGET)
            info = {"hit": reward, "structural_score": SCORES[answers[g]]}
            record = {
                "prompts": prompt,
                **response_fields(prompt, response, reward),
                "rollout_log_probs": torch.full((3,), -0.5),
                "uid": f"u{index}",
                "index": index,
                "reward_model": {"style": "rule", "ground_truth": ground_truth},
                "extra_fields": {"reward_extra_info": info, "producer": "rollout"},
            }
            keys.append(f"u{index}_{g}_0")
            records.append(record)
            seq_len = len(prompt) + 3
            tags.append(
                {"status": "success", "prompt_len": len(prompt), "response_len": 3, "seq_len": seq_len}
            )
    tq.kv_batch_put(keys=keys, partition_id=partition, fields=list_of_dict_to_tensordict(records), tags=tags)
    return KVBatchMeta(partition_id=partition, keys=keys, tags=tags, extra_info={})


def put_pairs_only(tokenizer: Any, groups: list[tuple[int, list[str]]], partition: str) -> KVBatchMeta:
    """The rows of `put` as our agent loop stores them for a hook that keeps pairs: `columns.store`."""
    batch = put(tokenizer, groups, f"{partition}-whole")
    data = tq.kv_batch_get(keys=batch.keys, partition_id=f"{partition}-whole")
    order = sorted(range(len(batch.keys)), key=lambda row: (batch.keys[row].split("_")[0], batch.keys[row]))
    rows = {name: data[name].unbind() for name in ("prompts", "responses", "rm_scores")}
    columns = {name: list(data[name]) for name in ("uid", "index", "reward_model", "extra_fields")}
    tags = []
    for row in order:
        info = columns["extra_fields"][row]["reward_extra_info"]
        facts = {"index": columns["index"][row], "response": rows["responses"][row].tolist()}
        facts |= {"reward": info["hit"], "structural_score": info["structural_score"]}
        tags.append({**batch.tags[row], ROLLOUT: facts})
    keys = [batch.keys[row] for row in order]
    uids = list(dict.fromkeys(columns["uid"][row] for row in order))
    b_N = np.array([uids.index(columns["uid"][row]) for row in order])
    prompt_of = {columns["uid"][row]: rows["prompts"][row].tolist() for row in order}
    answers = torch.stack([rows["responses"][row] for row in order])
    rewards = np.array([float(rows["rm_scores"][row].sum()) for row in order])
    stored = Columns(
        len(order),
        {
            **{name: [column[row] for row in order] for name, column in columns.items()},
            **answer_columns(answers, rewards),
            "rollout_log_probs": torch.full((len(order), 3), -0.5),
        },
    )
    asyncio.run(store(partition, keys, stored, tags, [prompt_of[uid] for uid in uids], b_N, whole=False))
    return KVBatchMeta(partition_id=partition, keys=keys, tags=tags, extra_info={})


def test_rollouts_without_their_prompts_give_the_same_pairs(tokenizer: Any) -> None:
    groups = [EMPTY, HIT, ALL_HIT, (12, EMPTY[1])]
    expected_metrics: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    expected = trainer(tokenizer, 4)._balance_batch(put(tokenizer, groups, "full"), expected_metrics)
    batch = put_pairs_only(tokenizer, groups, "thin")
    # Before the hook only the first rollout of a group has its prompt.
    first = [key for key in batch.keys if key.split("_")[1] == "0"]
    assert "input_ids" in tq.kv_batch_get(keys=first, partition_id="thin").keys()  # noqa: SIM118
    assert "input_ids" not in tq.kv_batch_get(keys=batch.keys, partition_id="thin").keys()  # noqa: SIM118
    small = trainer(tokenizer, 4)._balance_batch(batch, metrics)
    assert metrics == expected_metrics
    assert (
        small.keys[:6] == expected.keys[:6] == ["u4_1_0", "u4_2_0", "u9_2_0", "u9_1_0", "u12_2_0", "u12_1_0"]
    )
    found = tq.kv_batch_get(keys=small.keys, partition_id="thin")
    wanted = tq.kv_batch_get(keys=expected.keys, partition_id="full")
    for name in (
        "prompts",
        "responses",
        "input_ids",
        "position_ids",
        "response_mask",
        "loss_mask",
        "rm_scores",
    ):
        for one, other in zip(found[name].unbind(), wanted[name].unbind(), strict=True):
            assert torch.equal(one, other), name


def test_the_anchor_takes_the_farthest_miss_and_all_but_the_pairs_is_cleared(tokenizer: Any) -> None:
    batch, metrics = put(tokenizer, [EMPTY, HIT, ALL_HIT], "mixed"), {}
    small = trainer(tokenizer, 3)._balance_batch(batch, metrics)
    # groups by index: 4 (its hit, its nearest miss), 6 has no miss, 9 (the anchor in place of FARTHEST, NEAR)
    kept = ["u4_1_0", "u4_2_0", "u9_2_0", "u9_1_0"]
    assert small.keys[:4] == kept and len(small.keys) == 6
    stored = tq.kv_list("mixed")["mixed"]
    assert stored.keys() == set(small.keys), "what is not kept would stay for the whole run"
    data = tq.kv_batch_get(keys=small.keys, partition_id="mixed")
    answers = [tokenizer.decode(row) for row in data["responses"].unbind()]
    assert answers[:4] == [TARGET, FAR, TARGET, NEAR]
    assert [float(row.sum()) for row in data["rm_scores"].unbind()] == [1, 0, 1, 0, 0, 0]
    assert [int(row.sum()) for row in data["loss_mask"].unbind()] == [3, 3, 3, 3, 0, 0]
    # the anchor is whole: its prompt before it, nobody's sampling log-prob, its producer named
    prompt = ids(tokenizer, "<|sid_begin|>")
    assert data["input_ids"].unbind()[2].tolist() == prompt + ids(tokenizer, TARGET)
    assert data["rollout_log_probs"].unbind()[2].tolist() == [0, 0, 0]
    assert data["rollout_log_probs"].unbind()[3].tolist() == [-0.5, -0.5, -0.5]
    assert small.tags[2]["producer"] == "anchor" and "producer" not in small.tags[3]
    expected = {
        "all_zero": 1 / 3,
        "single_hit": 1 / 3,
        "multi_hit": 1 / 3,
        "duplicate": 2 / 9,  # of 9 answers the second and third of ALL_HIT
        "all_zero_after_repair": 0,
        "repaired_groups": 1,
        "skipped_groups": 1,
        "kept_samples": 4,
        "padding_samples": 2,
        "anchor_share": 1 / 4,
        "rollouts": 9,
        # prompts of 2 (index 4), 1 (index 6 and 9) tokens and answers of 3
        "rollout_tokens": 3 * (5 + 4 + 4),
        "kept_tokens": 2 * (5 + 4),
    }
    assert {name: metrics[f"signal/{name}"] for name in expected} == pytest.approx(expected)
    assert "signal/invalid" not in metrics  # there is no catalogue to ask


def test_an_anchor_is_one_of_several_targets_by_the_rule(tokenizer: Any) -> None:
    """Both rules on eleven groups with two targets each, none of them hit."""
    other = "<s_a_2><s_b_2><s_c_0>"
    groups = [(index, [FAR, NEAR, FARTHEST]) for index in range(11)]
    answers = {}
    for rule in ("first", "seeded"):
        batch = put(tokenizer, groups, f"targets-{rule}", ground_truth=[TARGET, other])
        small = trainer(tokenizer, 11, anchor_rule=rule)._balance_batch(batch, {})
        data = tq.kv_batch_get(keys=small.keys, partition_id=f"targets-{rule}", select_fields=["responses"])
        answers[rule] = [tokenizer.decode(row) for row in data["responses"].unbind()][::2]
    assert answers["first"] == [TARGET] * 11
    draws = [int(hash64(0, 1, np.array([index]))[0]) % 2 for index in range(11)]
    assert answers["seeded"] == [(TARGET, other)[draw] for draw in draws]
    assert set(draws) == {0, 1}


def test_each_pair_stays_in_the_mini_batch_of_its_prompt(tokenizer: Any) -> None:
    groups = [EMPTY, HIT, ALL_HIT, (12, EMPTY[1])]
    batch, metrics = put(tokenizer, groups, "mini-batches"), {}
    small = trainer(tokenizer, 2)._balance_batch(batch, metrics)
    # prompts 4 and 6 (skipped: two rows that nothing is learned from) | 9 and 12
    assert small.keys[:2] == ["u4_1_0", "u4_2_0"] and len(small.keys) == 8
    assert small.keys[4:] == ["u9_2_0", "u9_1_0", "u12_2_0", "u12_1_0"]
    padding = [tag.get("is_padding", False) for tag in small.tags]
    assert padding == [False, False, True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("settings", "global_batch_size", "mini_batch_size"),
    [
        ({}, 3 * 2, 3 * 2),  # prompts x kept
        ({"loss_scale": "full-batch"}, 3 * 3, 3 * 2),  # prompts x rollouts, whatever was kept
        ({"arm": "repair-only"}, 3 * 3, 3 * 3),
    ],
)
def test_losses_divide_by_what_loss_scale_says_and_mini_batches_hold_what_is_kept(
    tokenizer: Any, settings: dict[str, str], global_batch_size: int, mini_batch_size: int
) -> None:
    batch = put(tokenizer, [EMPTY, HIT, ALL_HIT], f"update-{global_batch_size}-{mini_batch_size}")
    hook = trainer(tokenizer, 3, **settings)
    actor = {"calculate_entropy": False, "entropy_coeff": 0.0, "ppo_epochs": 1, "data_loader_seed": 7}
    OmegaConf.update(hook.config, "actor_rollout_ref.actor", actor)
    OmegaConf.update(hook.config, "actor_rollout_ref.rollout.temperature", 1.0)
    sent = []

    class Workers:
        def update_actor(self, batch: KVBatchMeta) -> dict[str, Any]:
            sent.append(batch)
            return {"metrics": {"mfu": [0.5], "pg_loss": [1.0, 2.0]}}

    hook.actor_rollout_wg = Workers()
    metrics: dict[str, Any] = {}
    hook._update_actor(hook._balance_batch(batch, metrics), metrics)
    (batch,) = sent
    assert batch.extra_info["global_batch_size"] == global_batch_size
    assert batch.extra_info["mini_batch_size"] == mini_batch_size == len(batch.keys)
    assert metrics["actor/pg_loss"] == 1.5 and metrics["perf/mfu/actor"] == 0.5


def test_repair_alone_keeps_every_rollout_and_stock_leaves_them_as_they_were(tokenizer: Any) -> None:
    batch, metrics = put(tokenizer, [EMPTY, HIT, ALL_HIT], "repair-only"), {}
    small = trainer(tokenizer, 3, arm="repair-only")._balance_batch(batch, metrics)
    assert small.keys == [f"u{index}_{g}_0" for index in (4, 6, 9) for g in range(3)]
    rewards = tq.kv_batch_get(keys=small.keys, partition_id="repair-only", select_fields=["rm_scores"])
    # group 9 hit nothing: FARTHEST, its third rollout, is the target now
    assert [float(row.sum()) for row in rewards["rm_scores"].unbind()] == [0, 1, 0, 1, 1, 1, 0, 0, 1]
    found = {
        name: metrics[f"signal/{name}"] for name in ("repaired_groups", "skipped_groups", "kept_samples")
    }
    assert found == {"repaired_groups": 1, "skipped_groups": 0, "kept_samples": 9}
    assert metrics["signal/anchor_share"] == pytest.approx(1 / 9)

    batch, metrics = put(tokenizer, [EMPTY, HIT], "stock"), {}
    small = trainer(tokenizer, 3, arm="stock")._balance_batch(batch, metrics)
    data = tq.kv_batch_get(keys=small.keys, partition_id="stock", select_fields=["responses"])
    answers = [tokenizer.decode(row) for row in data["responses"].unbind()]
    assert answers[:6] == HIT[1] + EMPTY[1]
    assert [tag.get("is_padding", False) for tag in small.tags] == [False] * 6 + [True] * 3
    assert metrics["signal/repaired_groups"] == metrics["signal/anchor_share"] == 0
    assert metrics["signal/all_zero"] == metrics["signal/all_zero_after_repair"] == 1 / 2


def test_contrast_alone_drops_the_groups_without_a_hit(tokenizer: Any) -> None:
    batch, metrics = put(tokenizer, [EMPTY, HIT, ALL_HIT], "contrast-only"), {}
    small = trainer(tokenizer, 3, arm="contrast-only")._balance_batch(batch, metrics)
    assert small.keys[:2] == ["u4_1_0", "u4_2_0"]
    assert [tag.get("is_padding", False) for tag in small.tags] == [False] * 2 + [True] * 4
    found = {
        name: metrics[f"signal/{name}"] for name in ("repaired_groups", "skipped_groups", "kept_samples")
    }
    assert found == {"repaired_groups": 0, "skipped_groups": 2, "kept_samples": 2}
    assert "signal/unrepairable_groups" not in metrics


def test_under_the_full_batch_scale_a_minibatch_counts_the_tokens_of_its_whole_groups(tokenizer: Any) -> None:
    batch = put(tokenizer, [EMPTY, HIT, ALL_HIT, (12, EMPTY[1])], "full-batch")
    small = trainer(tokenizer, 2, loss_scale="full-batch")._balance_batch(batch, {})
    data = tq.kv_batch_get(keys=small.keys, partition_id="full-batch")
    counted = [int(row.sum()) for row in data["loss_mask"].unbind()]
    # prompts 4 and 6: 18 response tokens, of which one pair (6) is there | prompts 9 and 12: 18, 12 are there
    assert counted == [3 + 12, 3, 0, 0, 3 + 6, 3, 3, 3]
    assert [int(row.sum()) for row in data["response_mask"].unbind()] == [3, 3, 0, 0, 3, 3, 3, 3]


def test_the_most_probable_of_equally_hard_negatives_is_kept(tokenizer: Any) -> None:
    """Index 9's two rollouts at u = 0.1 tie; which is likelier decides, whatever the seed says."""
    for likely in (0, 1):
        batch = put(tokenizer, [(9, [NEAR, NEAR, FARTHEST])], f"likely-{likely}")
        log_probs = torch.full((1, 3), -0.1)
        fields = TensorDict({"rollout_log_probs": log_probs}, batch_size=1)
        tq.kv_batch_put(keys=[f"u9_{likely}_0"], partition_id=f"likely-{likely}", fields=fields)
        small = trainer(tokenizer, 1, tie_rule="most-probable")._balance_batch(batch, {})
        assert small.keys == ["u9_2_0", f"u9_{likely}_0"]


def test_without_any_signal_one_pair_goes_on_and_is_not_counted(tokenizer: Any) -> None:
    batch, metrics = put(tokenizer, [ALL_HIT], "no-signal"), {}
    hook = trainer(tokenizer, 1)
    small = hook._balance_batch(batch, metrics)
    assert small.keys == ["u6_0_0", "u6_1_0"] and hook.no_signal
    assert metrics["signal/kept_samples"] == metrics["signal/kept_tokens"] == 0
    assert tq.kv_list("no-signal")["no-signal"].keys() == set(small.keys)


def test_what_is_no_item_is_replaced_first_and_is_no_negative(tokenizer: Any) -> None:
    """verl's own agent loop scores text and knows no catalogue: NEAR's score must not make it hard."""
    batch, metrics = put(tokenizer, [(1, [FARTHEST, NEAR, FAR])], "invalid"), {}
    hook = trainer(tokenizer, 1)
    hook.members = frozenset({(0, 1, 2), (0, 0, 0), (1, 1, 2)})  # TARGET, FAR, FARTHEST
    small = hook._balance_batch(batch, metrics)
    assert small.keys == ["u1_1_0", "u1_2_0"]
    assert metrics["signal/invalid"] == pytest.approx(1 / 3)
    assert metrics["signal/mean_score"] == pytest.approx(0.01 / 3)


def test_target_of_no_item_lends_nothing_and_is_counted(tokenizer: Any) -> None:
    """A group that nobody could hit would be repaired with what the catalogue does not hold, every time."""
    batch, metrics = put(tokenizer, [EMPTY], "foreign"), {}
    made = trainer(tokenizer, 1)
    made.config.data.train_batch_size = 1
    items = frozenset(parse(text) for text in (NEAR, FAR, FARTHEST))
    made.members = items
    made._balance_batch(batch, metrics)
    assert (metrics["signal/foreign_targets"], metrics["signal/unrepairable_groups"]) == (1, 1)
    assert (metrics["signal/repaired_groups"], metrics["signal/skipped_groups"]) == (0, 1)
    batch, metrics = put(tokenizer, [EMPTY], "known"), {}
    made.members = items | {parse(TARGET)}
    made._balance_batch(batch, metrics)
    assert (metrics["signal/foreign_targets"], metrics["signal/repaired_groups"]) == (0, 1)


def test_rows_of_one_index_are_refused(tokenizer: Any) -> None:
    batch = put(tokenizer, [(0, [NEAR, FAR, FARTHEST])], "index")
    again = put(tokenizer, [(3, [NEAR, FAR, FARTHEST])], "index")  # the same prompt and target
    rows = {"index": torch.tensor([0, 0, 0])}
    tq.kv_batch_put(keys=again.keys, partition_id="index", fields=TensorDict(rows, batch_size=3))
    both = KVBatchMeta(
        partition_id="index", keys=[*batch.keys, *again.keys], tags=[*batch.tags, *again.tags], extra_info={}
    )
    assert len(trainer(tokenizer, 1)._balance_batch(both, {}).keys) == 4  # one row, drawn twice
    other = put(tokenizer, [(0, [NEAR, FAR, FARTHEST])], "prompts")
    longer = put(tokenizer, [(1, [NEAR, FAR, FARTHEST])], "prompts")
    tq.kv_batch_put(keys=longer.keys, partition_id="prompts", fields=TensorDict(rows, batch_size=3))
    both = KVBatchMeta(
        partition_id="prompts",
        keys=[*other.keys, *longer.keys],
        tags=[*other.tags, *longer.tags],
        extra_info={},
    )
    with pytest.raises(ValueError, match=r"2 of 2 prompts have extra_info\.index 0, each row needs its own"):
        trainer(tokenizer, 1)._balance_batch(both, {})


def test_thought_that_broke_off_is_not_overwritten(tokenizer: Any) -> None:
    """The anchor keeps the thought before the answer; a rollout without an answer has none to lend."""
    batch, metrics = put(tokenizer, [(1, [THOUGHTFUL, BROKEN, BROKEN])], "thoughts"), {}
    small = trainer(tokenizer, 1)._balance_batch(batch, metrics)
    assert small.keys[0] == "u1_0_0" and small.keys[1] in ("u1_1_0", "u1_2_0")
    data = tq.kv_batch_get(keys=small.keys[:1], partition_id="thoughts", select_fields=["responses"])
    assert tokenizer.decode(data["responses"].unbind()[0]) == THOUGHTFUL.replace(FAR, TARGET)
    batch, metrics = put(tokenizer, [(1, [BROKEN] * 3)], "broken"), {}
    trainer(tokenizer, 1)._balance_batch(batch, metrics)
    assert metrics["signal/unrepairable_groups"] == metrics["signal/skipped_groups"] == 1
    assert metrics["signal/all_zero_after_repair"] == 1
