"""The masked actor in verl's own worker: log-probs against the rollout server's, gradients against autograd.

The rows: sampled answers, an anchor that nobody sampled, two rows that only fill the batch up.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from test_loss_equality import gradients, padding_row
from test_rollout_server import make_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from recast_cli.vocabulary import encode_prompts
from verl_recast.catalogue import Catalogue
from verl_recast.masked_actor import require_maskable

NUM_PROMPTS, GROUP, TEMPERATURE = 4, 3, 0.7
PADDING = NUM_PROMPTS * GROUP  # where the rows begin that only fill up
WEIGHTS = [1.0, -1.0, 0.5]  # advantages inside each group
HOW = ("padded", "packed", "shared")  # rows alone, in one sequence, behind one copy of their prompt


@pytest.fixture(scope="module")
def rows(tokenizer_folder: Path) -> list[dict[str, torch.Tensor]]:
    """Columns of each row; `trie_log_probs` is what the server said of it, NaN of the anchor."""
    table = pq.read_table(tokenizer_folder / "verl" / "rl.parquet").slice(0, NUM_PROMPTS).to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in table])
    server = make_server(tokenizer_folder)
    out = asyncio.run(
        server.generate_groups(prompts, list(range(4)), GROUP, step=1, seed=0, temperature=TEMPERATURE)
    )
    out["codes_BGL"][1, 2] = sorted(server.catalogue.members)[-1]
    out["trie_log_probs_BGL"][1, 2] = np.nan
    made = []
    for prompt, codes_GL, trie_GL in zip(prompts, out["codes_BGL"], out["trie_log_probs_BGL"], strict=True):
        for codes_L, trie_L, weight in zip(codes_GL, trie_GL, WEIGHTS, strict=True):
            response, ones = torch.from_numpy(server.catalogue.token_ids(codes_L)), torch.ones(3).long()
            made.append(
                {
                    "prompts": torch.tensor(prompt),
                    "responses": response,
                    "input_ids": torch.cat([torch.tensor(prompt), response]),
                    "position_ids": torch.arange(len(prompt) + 3),
                    "response_mask": ones,
                    "loss_mask": ones.clone(),
                    "advantages": torch.full((3,), weight),
                    "old_log_probs": torch.nan_to_num(torch.from_numpy(trie_L), nan=-2.0),
                    "trie_log_probs": torch.from_numpy(trie_L),
                }
            )
    return [*made, padding_row(), padding_row()]


def case(
    rows: list[dict[str, torch.Tensor]], tokenizer: Path, *, how: str, infer: bool, ranks: int = 1
) -> dict[str, Any]:
    names = [name for name in rows[0] if name != "trie_log_probs"]
    return {
        "columns": {name: [row[name] for row in rows] for name in names},
        "extra": {
            "calculate_entropy": True,
            "compute_loss": False,
            "use_remove_padding": how == "packed",
            "distillation_use_topk": False,
            "distillation_only": False,
            "global_batch_size": len(rows),
            "mini_batch_size": len(rows),
            "epochs": 1,
            "seed": 1,
            "dataloader_kwargs": {"shuffle": False},
            "temperature": TEMPERATURE,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": len(rows) // ranks,
            "max_token_len_per_gpu": 128,
        },
        "actor": {"loss_agg_mode": "token-mean", "use_kl_loss": False, "entropy_coeff": 0.0},
        "tokenizer": str(tokenizer),
        "share": how == "shared" and infer,  # once, from the first such case on
        "infer": infer,
    }


@pytest.fixture(scope="module")
def found(
    rows: list[dict[str, torch.Tensor]], tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, bool], list[Any]]:
    """(how rows are read, infer) -> what the child of engine_gradients.py recorded."""
    keys = [(how, infer) for how in HOW for infer in (True, False)]
    cases = [case(rows, tokenizer_folder, how=how, infer=infer) for how, infer in keys]
    folder = tmp_path_factory.mktemp("masked")
    return dict(zip(keys, gradients(cases, 1, tokenizer_folder / "model", folder), strict=True))


def plain_trie_log_probs(
    model: Any, catalogue: Catalogue, row: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs (3,) of the response over the allowed codes and their entropies, by a loop over the items."""
    logits = model(input_ids=row["input_ids"][None]).logits[0] / TEMPERATURE
    codes = (row["responses"] - torch.tensor(catalogue.level_offsets)).tolist()
    log_probs, entropies = [], []
    for level, offset in enumerate(catalogue.level_offsets):
        prefix = tuple(codes[:level])
        allowed = sorted({item[level] for item in catalogue.members if item[:level] == prefix})
        among = logits[len(row["prompts"]) - 1 + level, [offset + code for code in allowed]].log_softmax(-1)
        log_probs.append(among[allowed.index(codes[level])])
        entropies.append(-(among.exp() * among).sum())
    return torch.stack(log_probs), torch.stack(entropies)


@pytest.mark.parametrize("how", HOW)
def test_old_log_probs_are_what_rollouts_were_drawn_with(
    found: dict[tuple[str, bool], list[Any]],
    rows: list[dict[str, torch.Tensor]],
    tokenizer_folder: Path,
    how: str,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tokenizer_folder / "model", dtype=torch.float32)
    catalogue = Catalogue.load(tokenizer_folder)
    log_probs, entropies, _ = found[how, True]
    for place, row in enumerate(rows):
        with torch.no_grad():
            plain = (model(input_ids=row["input_ids"][None]).logits[0] / TEMPERATURE).log_softmax(-1)
        # every token's own successor, but for the last, whose label is whatever verl rolled in
        full = plain[:-1].gather(1, row["input_ids"][1:, None])[:, 0]
        assert len(full) == len(log_probs[place]) - 1
        answer = slice(len(row["prompts"]) - 1, None)
        if how == "shared":  # 0 where nothing is predicted
            full = torch.cat([torch.zeros(answer.start), full[answer]])
        if place >= PADDING:
            torch.testing.assert_close(log_probs[place][:-1], full, atol=1e-5, rtol=0)
            continue
        prompt = slice(0, len(row["prompts"]) - 1)
        torch.testing.assert_close(log_probs[place][:-1][prompt], full[prompt], atol=1e-5, rtol=0)
        with torch.no_grad():
            expected, entropy = plain_trie_log_probs(model, catalogue, row)
        torch.testing.assert_close(log_probs[place][:-1][answer], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropies[place][:-1][answer], entropy, atol=1e-5, rtol=0)
        assert float((expected - full[answer]).min()) > 0.1  # or the mask would not show
        if not row["trie_log_probs"].isnan().any():
            torch.testing.assert_close(
                log_probs[place][:-1][answer], row["trie_log_probs"], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("how", HOW)
def test_gradient_is_autograds_of_the_masked_policy(
    found: dict[tuple[str, bool], list[Any]],
    rows: list[dict[str, torch.Tensor]],
    tokenizer_folder: Path,
    how: str,
) -> None:
    """The clipped loss, mean over the tokens of the answers; the ratio is 1 but for the anchor's."""
    model = AutoModelForCausalLM.from_pretrained(tokenizer_folder / "model", dtype=torch.float32)
    catalogue = Catalogue.load(tokenizer_folder)
    losses = []
    for row in rows[:PADDING]:
        log_probs, _ = plain_trie_log_probs(model, catalogue, row)
        ratio, weight = (log_probs - row["old_log_probs"]).exp(), row["advantages"]
        losses.append(-torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight))
    grads = torch.autograd.grad(torch.cat(losses).mean(), list(model.parameters()))
    expected = torch.cat([grad.flatten() for grad in grads])
    (gradient,) = found[how, False]
    assert expected.norm() > 1e-3
    assert (gradient - expected).norm() < 2e-5 * expected.norm()


def test_two_sharded_ranks_have_the_gradient_of_one(
    found: dict[tuple[str, bool], list[Any]],
    rows: list[dict[str, torch.Tensor]],
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    shared = case(rows, tokenizer_folder, how="padded", infer=False, ranks=2)
    ((gradient,),) = gradients([shared], 2, tokenizer_folder / "model", tmp_path)
    (alone,) = found["padded", False]
    assert (gradient - alone).norm() < 2e-5 * alone.norm()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollout.custom.tokenizer", None, "rollout.custom.tokenizer is None, needs a folder"),
        ("rollout.name", "recast_vllm", "calculate_log_probs is True, needs False .engine recast_vllm"),
        ("actor.strategy", "megatron", "actor.strategy is megatron, needs fsdp or fsdp2"),
        ("actor.use_fused_kernels", True, "model.use_fused_kernels is True, needs False"),
        ("actor.use_prefix_grouper", True, "actor.use_prefix_grouper is True, needs False"),
        (
            "actor.fsdp_config.ulysses_sequence_parallel_size",
            2,
            "actor.fsdp_config.ulysses_sequence_parallel_size is 2, needs 1",
        ),
        ("ref.strategy", "megatron", "ref.strategy is megatron, needs fsdp or fsdp2"),
        ("ref.ulysses_sequence_parallel_size", 2, "ref.ulysses_sequence_parallel_size is 2, needs 1"),
    ],
)
def test_an_engine_that_cannot_be_masked_is_refused(key: str, value: Any, message: str) -> None:
    worker = OmegaConf.create(
        {
            "actor": {"strategy": "fsdp", "fsdp_config": {}},
            "ref": {"strategy": "fsdp", "fsdp_config": {}},
            "rollout": {
                "name": "recast_sid",
                "calculate_log_probs": True,
                "custom": {"tokenizer": "t", "masked_actor": True},
            },
        }
    )
    require_maskable(worker)
    OmegaConf.update(worker, key, value)
    with pytest.raises(ValueError, match=message):
        require_maskable(worker)
