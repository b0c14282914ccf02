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
from verl_recast.rollout.group_sampling import require_sampling
from verl_recast.rollout.scored import score_groups
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
    server = make_server(tokenizer_folder, calculate_log_probs=True)
    out = generate(server, prompts[:2], [1, 2], temperature=0.7)
    codes_only = generate(make_server(tokenizer_folder), prompts[:2], [1, 2], temperature=0.7)
    assert (codes_only["codes_BGL"] == out["codes_BGL"]).all()
    assert (
        np.isnan(codes_only["log_probs_BGL"]).all() and not np.isnan(codes_only["trie_log_probs_BGL"]).any()
    )
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


@pytest.mark.parametrize("options", [{"temperature": 0}, {"sampling": "beam"}])
def test_the_best_beams_come_in_order(
    tokenizer_folder: Path, prompts: list[list[int]], options: dict[str, Any]
) -> None:
    server = make_server(tokenizer_folder)
    out = generate(server, prompts[:2], [1, 2], **options)
    for group in out["codes_BGL"].tolist():
        assert len({tuple(codes) for codes in group}) == NUM_ROLLOUTS  # distinct items
    assert (np.diff(out["log_probs_BGL"].sum(axis=-1)) <= 0).all()
    shares = np.exp(out["trie_log_probs_BGL"].sum(axis=-1))
    assert (shares > np.exp(out["log_probs_BGL"].sum(axis=-1))).all() and (shares.sum(axis=1) < 1).all()


def test_requests_that_wait_are_answered_together(tokenizer_folder: Path, prompts: list[list[int]]) -> None:
    """verl's own agent loops ask for one answer at a time; eight at once cost one reading of the prompts."""
    server, read = make_server(tokenizer_folder), []
    server.model.register_forward_pre_hook(
        lambda _, __, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    asked = [(f"request-{k}", prompts[k % 6], {"temperature": 0.5 if k == 7 else 1.0}) for k in range(8)]

    async def ask(*requests: tuple[str, list[int], dict[str, float]]) -> list[Any]:
        calls = [
            server.generate(name, prompt_ids=prompt, sampling_params=params)
            for name, prompt, params in requests
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    together = asyncio.run(ask(*asked))
    prefills = [shape for shape in read if shape[1] > 3]
    assert [rows for rows, _ in prefills] == [7, 1]  # another temperature is another batch
    for request, answer in zip(asked, together, strict=True):
        alone = asyncio.run(ask(request))[0]
        assert answer.token_ids == alone.token_ids
        assert answer.log_probs == pytest.approx(alone.log_probs, abs=1e-5)
    assert len({tuple(answer.token_ids) for answer in together}) > 1
    server.global_steps = None
    failures = asyncio.run(ask(*asked[:3]))
    assert [str(failure) for failure in failures] == ["the rollout server has no weights yet"] * 3


def test_without_replacement_answers_are_distinct_and_do_not_depend_on_order(
    tokenizer_folder: Path, prompts: list[list[int]]
) -> None:
    server = make_server(tokenizer_folder)
    out = generate(server, prompts, list(range(6)), sampling="without-replacement")
    assert all(len({tuple(codes) for codes in group}) == NUM_ROLLOUTS for group in out["codes_BGL"].tolist())
    backwards = generate(server, prompts[::-1], list(range(6))[::-1], sampling="without-replacement")
    assert np.array_equal(backwards["codes_BGL"][::-1], out["codes_BGL"])
    other = generate(server, prompts, list(range(6)), sampling="without-replacement", step=2)
    assert not np.array_equal(other["codes_BGL"], out["codes_BGL"])


@pytest.mark.parametrize("sampling", ["iid", "without-replacement", "beam"])
def test_an_excluded_history_is_never_answered(
    tokenizer_folder: Path, prompts: list[list[int]], sampling: str
) -> None:
    server = make_server(tokenizer_folder)
    sids = pq.read_table(tokenizer_folder / "semantic_ids.parquet")["sid"].to_pylist()
    row_of = {find_all(sid)[0]: row for row, sid in enumerate(sids)}
    free = generate(server, prompts[:2], [1, 2], sampling=sampling)["codes_BGL"].tolist()
    history = [sorted({row_of[tuple(codes)] for codes in group})[:30] for group in free]
    assert all(history)
    out = generate(server, prompts[:2], [1, 2], sampling=sampling, history=history)
    for closed, group in zip(history, out["codes_BGL"].tolist(), strict=True):
        assert not {row_of[tuple(codes)] for codes in group if codes[0] >= 0} & set(closed)
    if sampling == "without-replacement":  # 3 items are open to a group of 16
        most = [list(range(37)), []]
        few = generate(server, prompts[:2], [1, 2], sampling=sampling, history=most)["codes_BGL"]
        assert (few[0, 3:] == -1).all() and (few[0, :3] >= 0).all() and (few[1] >= 0).all()


def test_top_p_narrows_what_is_drawn(tokenizer_folder: Path, prompts: list[list[int]]) -> None:
    server = make_server(tokenizer_folder, top_p=0.3)
    wide = generate(server, prompts, list(range(6)))["codes_BGL"]
    narrow = generate(server, prompts, list(range(6)), top_p=0.3)["codes_BGL"]
    assert len(np.unique(narrow.reshape(-1, 3), axis=0)) < len(np.unique(wide.reshape(-1, 3), axis=0))


@pytest.mark.parametrize(
    ("sampling", "found"),
    [
        ({"val_kwargs": SamplingConfig(top_p=0.9)}, "val_kwargs.top_p=0.9: set .*.val_kwargs.top_p=1"),
        ({"top_k": 50}, "top_k=50: set actor_rollout_ref.rollout.top_k=-1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1: "),
        ({"val_kwargs": SamplingConfig(top_k=5)}, "val_kwargs.top_k=5: set .*.val_kwargs.top_k=-1"),
    ],
)
def test_a_sampler_that_it_does_not_have_is_refused(
    tokenizer_folder: Path, sampling: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=f"samples by temperature and top_p, found {found}"):
        make_server(tokenizer_folder, **sampling)


@pytest.mark.parametrize(
    ("sampling", "options", "found"),
    [
        ("gumbel", {}, "custom.sampling is 'gumbel', needed one of iid, without-replacement, beam"),
        ("beam", {"temperature": 0.5}, "temperature is 0.5, custom.sampling=beam needs 1"),
        ("beam", {"top_p": 0.5}, "top_p is 0.5, custom.sampling=beam needs 1"),
        ("without-replacement", {"top_p": 0.5}, "top_p is 0.5, custom.sampling=without-replacement needs 1"),
        ("iid", {"top_p": 0.0}, "top_p is 0.0, needed above 0 and at most 1"),
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused(
    sampling: str, options: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        require_sampling(RolloutConfig(name="recast_sid", custom={"sampling": sampling}, **options))


def test_verls_one_answer_interface(tokenizer_folder: Path, prompts: list[list[int]]) -> None:
    server = make_server(tokenizer_folder, calculate_log_probs=True)

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


@pytest.mark.parametrize("masked", [False, True])
def test_one_answer_comes_with_the_log_probs_of_its_actor(
    tokenizer_folder: Path, prompts: list[list[int]], masked: bool
) -> None:
    custom = {"tokenizer": str(tokenizer_folder), "masked_actor": masked}
    config = RolloutConfig(name="recast_sid", dtype="float32", custom=custom, calculate_log_probs=True)
    server = SIDServer(config, HFModelConfig(path=str(tokenizer_folder / "model")), "cpu")
    server.global_steps = 0
    answer = asyncio.run(server.generate("r", prompt_ids=prompts[0], sampling_params={"temperature": 1.0}))
    members = server.catalogue.members
    offsets = server.catalogue.level_offsets
    expected = []
    for level, token in enumerate(answer.token_ids):
        read = prompts[0] + answer.token_ids[:level]
        with torch.no_grad():
            log_probs = server.model(input_ids=torch.tensor([read])).logits[0, -1].log_softmax(-1)
        written = tuple(t - o for t, o in zip(answer.token_ids[:level], offsets, strict=False))
        open_ids = sorted({offsets[level] + sid[level] for sid in members if sid[:level] == written})
        whole = float(log_probs[open_ids].logsumexp(0)) if masked else 0.0
        expected.append(float(log_probs[token]) - whole)
    assert answer.log_probs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("custom", [{"sampling": "beam"}, {"exclude_history": True}])
def test_a_stock_agent_loop_cannot_ask_for_groups(tokenizer_folder: Path, custom: dict[str, Any]) -> None:
    config = RolloutConfig(
        name="recast_sid", dtype="float32", custom={"tokenizer": str(tokenizer_folder)} | custom
    )
    server = SIDServer(config, HFModelConfig(path=str(tokenizer_folder / "model")), "cpu")
    with pytest.raises(ValueError, match=f"rollout.custom.{next(iter(custom))} is .*GroupLoopManager"):
        asyncio.run(server.generate("r", prompt_ids=[1], sampling_params={}))


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

    def everything(
        self: Trie, level: int, nodes_R: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes_RK = torch.arange(size[level]).expand(len(nodes_R), -1)
        return codes_RK, torch.ones_like(codes_RK, dtype=torch.bool)

    monkeypatch.setattr(Trie, "choices", everything)
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
