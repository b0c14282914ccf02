"""The rollout server and the scoring of its answers, without Ray: weights, seeds, and a broken constraint."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sealing import reseal
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.workers.config import HFModelConfig, RolloutConfig, SamplingConfig

from recast_cli.core.signal import group_statistics
from recast_cli.core.spelling import find_all
from recast_cli.core.trie import Trie
from verl_recast.catalogue import Catalogue
from verl_recast.reward import require_targets
from verl_recast.rollout.agent_loop import score_groups
from verl_recast.rollout.server import SIDServer

NUM_ROLLOUTS = 16


def make_server(folder: Path, *, load: bool = True, **sampling: Any) -> SIDServer:
    config = RolloutConfig(name="recast_sid", dtype="float32", custom={"tokenizer": str(folder)}, **sampling)
    server = SIDServer(config, HFModelConfig(path=str(folder / "model")), "cpu")
    if load:
        server.update_weights(state(folder), 0, True)
    return server


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).state_dict()


@pytest.fixture(scope="module")
def rows(tokenizer_folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(tokenizer_folder / "verl" / "rl.parquet").slice(0, 6).to_pylist()


@pytest.fixture(scope="module")
def prompts(tokenizer_folder: Path, rows: list[dict[str, Any]]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    return [
        tokenizer(
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False),
            add_special_tokens=False,
        )["input_ids"]
        for row in rows
    ]


def generate(server: SIDServer, prompts: list[list[int]], index: list[int], **options: Any) -> dict[str, Any]:
    options = {"step": 1, "seed": 0, "temperature": 1.0, **options}
    return asyncio.run(server.generate_groups(prompts, index, NUM_ROLLOUTS, **options))


def score(folder: Path, rows: list[dict[str, Any]], codes_BGL: np.ndarray) -> dict[str, float]:
    """Statistics of rollouts, scored by the agent loop's own function."""
    targets = [require_targets(row["reward_model"]["ground_truth"]) for row in rows]
    hits_BG, scores_BG, valid_BG = score_groups(Catalogue.load(folder), targets, codes_BGL)
    return group_statistics(hits_BG, scores_BG, codes_BGL, valid_BG)


def test_answers_are_items_and_do_not_depend_on_order_or_company(
    tokenizer_folder: Path, rows: list[dict[str, Any]], prompts: list[list[int]]
) -> None:
    server = make_server(tokenizer_folder)
    index = [row["extra_info"]["index"] for row in rows]
    out = generate(server, prompts, index)
    assert out["codes_BGL"].shape == (6, NUM_ROLLOUTS, 3)
    assert score(tokenizer_folder, rows, out["codes_BGL"])["invalid"] == 0
    backwards = generate(server, prompts[::-1], index[::-1])
    assert np.array_equal(backwards["codes_BGL"][::-1], out["codes_BGL"])
    alone = generate(server, prompts[2:3], index[2:3])
    assert np.array_equal(alone["codes_BGL"][0], out["codes_BGL"][2])
    other = generate(server, prompts, index, step=2)
    assert not np.array_equal(other["codes_BGL"], out["codes_BGL"])


def test_log_probs_are_the_full_vocabularys_of_a_plain_forward(
    tokenizer_folder: Path, rows: list[dict[str, Any]], prompts: list[list[int]]
) -> None:
    server = make_server(tokenizer_folder)
    out = generate(server, prompts[:2], [1, 2], temperature=0.7)
    model = AutoModelForCausalLM.from_pretrained(tokenizer_folder / "model", dtype=torch.float32)
    for b, prompt in enumerate(prompts[:2]):
        for g in range(3):
            response = server.catalogue.token_ids(out["codes_BGL"][b, g]).tolist()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
            log_probs = (logits / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = log_probs[torch.arange(3), torch.tensor(response)]
            assert out["log_probs_BGL"][b, g] == pytest.approx(expected.numpy(), abs=1e-5)


def test_new_weights_decide_the_next_answers(tokenizer_folder: Path, prompts: list[list[int]]) -> None:
    server = make_server(tokenizer_folder, load=False)
    with pytest.raises(RuntimeError, match="no weights yet"):
        generate(server, prompts[:1], [1])
    old = state(tokenizer_folder)
    server.update_weights(old, 4, True)
    first = generate(server, prompts, list(range(6)))
    assert first["global_steps"] == 4
    torch.manual_seed(0)
    new = {name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in old.items()}
    new["lm_head.weight"] = new["model.embed_tokens.weight"]  # tied
    names = sorted(new)
    server.update_weights({name: new[name] for name in names[:5]}, None, False)  # first bucket
    server.update_weights({name: new[name] for name in names[5:]}, 5, True)
    second = generate(server, prompts, list(range(6)))
    assert second["global_steps"] == 5
    assert not np.array_equal(second["codes_BGL"], first["codes_BGL"])
    for name, tensor in server.model.state_dict().items():
        assert torch.equal(tensor, new[name]), name
    with pytest.raises(RuntimeError, match=rf"{len(names) - 6} parameters did not arrive, .* '{names[6]}'"):
        server.update_weights(
            {name: new[name] for name in names[:6]}, 6, True
        )  # one of them the head, which is tied
    assert server.global_steps == 5
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' has shape \(1,\), needed \(64,\)"):
        server.update_weights({**new, "model.norm.weight": torch.ones(1)}, 6, True)
    with pytest.raises(KeyError, match=r"no parameter 'model\.extra'"):
        server.update_weights({"model.extra": torch.zeros(1)}, 6, True)


def test_temperature_zero_gives_the_best_beams_in_order(
    tokenizer_folder: Path, prompts: list[list[int]]
) -> None:
    server = make_server(tokenizer_folder)
    out = generate(server, prompts[:2], [1, 2], temperature=0)
    for group in out["codes_BGL"].tolist():
        assert len({tuple(codes) for codes in group}) == NUM_ROLLOUTS  # distinct items
    assert np.isnan(out["log_probs_BGL"]).all()


@pytest.mark.parametrize(
    ("sampling", "found"),
    [
        ({"top_p": 0.9}, "top_p=0.9: set actor_rollout_ref.rollout.top_p=1"),
        ({"top_k": 50}, "top_k=50: set actor_rollout_ref.rollout.top_k=-1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1: "),
        ({"val_kwargs": SamplingConfig(top_k=5)}, "val_kwargs.top_k=5: set .*.val_kwargs.top_k=-1"),
    ],
)
def test_a_sampler_that_it_does_not_have_is_refused(
    tokenizer_folder: Path, sampling: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=f"samples by temperature alone, found {found}"):
        make_server(tokenizer_folder, **sampling)


def test_verls_one_answer_interface(tokenizer_folder: Path, prompts: list[list[int]]) -> None:
    server = make_server(tokenizer_folder)

    def ask(request_id: str) -> Any:
        return asyncio.run(
            server.generate(request_id, prompt_ids=prompts[0], sampling_params={"temperature": 1.0})
        )

    answer = ask("r1")
    codes = tuple(t - o for t, o in zip(answer.token_ids, server.catalogue.level_offsets, strict=True))
    assert codes in server.catalogue.members
    assert len(answer.log_probs) == 3 and answer.stop_reason == "completed"
    assert ask("r1").token_ids == answer.token_ids
    assert len({tuple(ask(f"r{i}").token_ids) for i in range(12)}) > 1


# -- a constraint that is broken on purpose --------------------------------------------------------------


def test_trie_of_other_items_makes_the_invalid_count_rise(
    tokenizer_folder: Path, tmp_path: Path, rows: list[dict[str, Any]], prompts: list[list[int]]
) -> None:
    """Validity is membership in the parquet: a wrong trie cannot vouch for itself."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    codes_NL = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    Trie.from_codes(codes_NL, (8, 8, 8)).save(folder / "trie.npz")  # everything is allowed
    reseal(folder)
    out = generate(make_server(folder), prompts, list(range(6)))
    found = score(folder, rows, out["codes_BGL"])
    assert found["invalid"] > 0.5  # 40 of 512 codes are items
    members = {find_all(sid)[0] for sid in pq.read_table(folder / "semantic_ids.parquet")["sid"].to_pylist()}
    outside = sum(tuple(codes) not in members for codes in out["codes_BGL"].reshape(-1, 3).tolist())
    assert found["invalid"] == pytest.approx(outside / (6 * NUM_ROLLOUTS))


def test_mask_that_lets_everything_pass_makes_the_invalid_count_rise(
    tokenizer_folder: Path,
    rows: list[dict[str, Any]],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = make_server(tokenizer_folder)
    size = server.catalogue.trie.codebook_sizes
    assert (
        score(tokenizer_folder, rows, generate(server, prompts, list(range(6)))["codes_BGL"])["invalid"] == 0
    )

    def everything(self: Trie, level: int, nodes_R: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.ones(len(nodes_R), size[level], dtype=torch.bool)

    monkeypatch.setattr(Trie, "mask", everything)
    found = score(tokenizer_folder, rows, generate(server, prompts, list(range(6)))["codes_BGL"])
    assert found["invalid"] > 0.5


def test_invalid_rollout_never_hits_and_several_targets_count(tokenizer_folder: Path) -> None:
    members = sorted(Catalogue.load(tokenizer_folder).members)
    outside = next(c for c in np.ndindex(8, 8, 8) if c not in set(members))
    codes_BGL = np.array([[outside, members[3], members[4]]])
    targets = [[outside, members[3]]]
    hits_BG, scores_BG, valid_BG = score_groups(Catalogue.load(tokenizer_folder), targets, codes_BGL)
    assert valid_BG.tolist() == [[False, True, True]]
    assert hits_BG.tolist() == [[0, 1, 0]]
    assert scores_BG[0, 0] == 0 and scores_BG[0, 1] == 1


def test_vocabulary_file_and_server_agree(tokenizer_folder: Path) -> None:
    vocabulary = json.loads((tokenizer_folder / "vocabulary.json").read_text(encoding="utf-8"))
    server = make_server(tokenizer_folder)
    assert server.model.get_input_embeddings().weight.shape[0] == vocabulary["embedding_rows"]
    assert list(server.catalogue.level_offsets) == vocabulary["level_offsets"]
