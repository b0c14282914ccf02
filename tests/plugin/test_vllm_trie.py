"""Real vLLM on the CPU with the trie logits processor: what it lets pass, and what it answers.

The reference for what may follow is the catalogue parquet, item by item; the reference for probabilities is
the SID engine over the same model. Two engines, since vLLM reports log-probs either before or after the mask.
"""

# ruff: noqa: E402 (an environment without vLLM skips this file before it imports what needs it)

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

vllm = pytest.importorskip("vllm")

from recast_cli.core.beam_group import beam_group
from recast_cli.core.beam_search import beam_searches
from recast_cli.core.spelling import find_all
from recast_cli.vocabulary import Vocabulary, encode_prompts
from verl_recast import band
from verl_recast.catalogue import Catalogue
from verl_recast.rollout.vllm_beams import Request, expand_beams
from verl_recast.rollout.vllm_trie import TrieLogitsProcessor

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]

PROCESSOR = "verl_recast.rollout.vllm_trie:TrieLogitsProcessor"
NUM_LEVELS = 3


def make_engine(folder: Path, **options: Any) -> Any:
    return vllm.LLM(
        str(folder / "model"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_logprobs=-1,
        disable_log_stats=False,
        logits_processors=[PROCESSOR],
        additional_config={"recast_tokenizer": str(folder)},
        **options,
    )


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def raw_engine(tokenizer_folder: Path) -> Iterator[Any]:
    """So short of memory and of tokens per step that it preempts requests and cuts prompts into chunks."""
    engine = make_engine(
        tokenizer_folder,
        logprobs_mode="raw_logprobs",
        max_num_seqs=48,
        max_num_batched_tokens=128,
        block_size=32,
        num_gpu_blocks_override=7,  # one is vLLM's own
        enable_prefix_caching=False,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def masked_engine(tokenizer_folder: Path) -> Iterator[Any]:
    """As it comes, with log-probs taken after the mask."""
    engine = make_engine(tokenizer_folder, logprobs_mode="processed_logprobs", max_num_seqs=64)
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def vocabulary(tokenizer_folder: Path) -> Vocabulary:
    return Vocabulary.load(tokenizer_folder / "vocabulary.json")


@pytest.fixture(scope="module")
def prompts(tokenizer_folder: Path) -> list[list[int]]:
    rows = pq.read_table(tokenizer_folder / "verl" / "rl.parquet").to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder / "model")
    return encode_prompts(tokenizer, [row["prompt"] for row in rows])[:50]


@pytest.fixture(scope="module")
def items(tokenizer_folder: Path, vocabulary: Vocabulary) -> list[list[int]]:
    """Every item of the catalogue parquet as token ids."""
    sids = pq.read_table(tokenizer_folder / "semantic_ids.parquet")["sid"].to_pylist()
    codes = [find_all(sid)[0] for sid in sids]
    return [[o + c for o, c in zip(vocabulary.level_offsets, item, strict=True)] for item in codes]


def ask(engine: Any, prompts: list[list[int]], **options: Any) -> list[Any]:
    """First completion of each prompt."""
    params = vllm.SamplingParams(**{"max_tokens": NUM_LEVELS, "temperature": 1.0, **options})
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in engine.generate(requests, params, use_tqdm=False)]


def num_preemptions(engine: Any) -> float:
    return sum(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")


def reference_log_probs(
    folder: Path, prompts: list[list[int]], answers: list[list[int]], offsets: tuple[int, ...]
) -> np.ndarray:
    """The SID engine's log-probs (full vocabulary) of given answers."""
    catalogue = Catalogue.load(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    codes = np.array(answers) - np.array(offsets)
    _, log_probs = beam_searches(
        model,
        catalogue.trie,
        offsets,
        prompts,
        1,
        pad_token_id=catalogue.pad_token_id,
        exclusions=[None],
        given_BL=codes,
    )
    return log_probs.numpy()


# -- what it lets pass -----------------------------------------------------------------------------------


def test_allowed_tokens_of_every_step_are_those_of_the_parquet(
    masked_engine: Any, prompts: list[list[int]], items: list[list[int]], vocabulary: Vocabulary
) -> None:
    """Mixed with requests that ask for no item, which may write any token."""
    free = [prompt[:-1] for prompt in prompts]
    mixed = [prompt for pair in zip(prompts, free, strict=True) for prompt in pair] * 4
    seen = set()
    for place, answer in enumerate(ask(masked_engine, mixed, logprobs=-1)):
        written: list[int] = []
        for token, log_probs in zip(answer.token_ids, answer.logprobs, strict=True):
            found = {i for i, entry in log_probs.items() if entry.logprob > -np.inf}
            if place % 2:
                assert found == set(range(vocabulary.vocab_size))
                continue
            assert found == {item[len(written)] for item in items if item[: len(written)] == written}
            seen.add((*written,))
            written.append(token)
        assert place % 2 or written in items
    partial = {tuple(item[:length]) for item in items for length in range(NUM_LEVELS)}
    assert len(seen) > 0.9 * len(partial)  # nearly every node of the trie was asked


def test_thousands_of_answers_are_all_items_though_requests_are_preempted_and_chunked(
    raw_engine: Any, prompts: list[list[int]], items: list[list[int]]
) -> None:
    history = [token for item in items[:18] for token in (3, *item, 4)]
    # 30 to 64 tokens: answers cross from one block of 32 into the next
    long = [[*history[-length:], 3] for length in range(29, 64)]
    before = num_preemptions(raw_engine)
    asked = (prompts + long) * 50
    found = [list(answer.token_ids) for answer in ask(raw_engine, asked, seed=None)]
    assert len(found) == len(asked) > 4000
    assert sum(answer not in items for answer in found) == 0
    assert num_preemptions(raw_engine) > before
    assert len({tuple(answer) for answer in found}) == len(items)


def test_best_answer_is_the_walk_by_the_best_child(
    masked_engine: Any, tokenizer_folder: Path, prompts: list[list[int]], items: list[list[int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tokenizer_folder / "model", dtype=torch.float32)
    for prompt, answer in zip(prompts[:8], ask(masked_engine, prompts[:8], temperature=0.0), strict=True):
        written: list[int] = []
        for _ in range(NUM_LEVELS):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + written])).logits[0, -1]
            children = sorted({item[len(written)] for item in items if item[: len(written)] == written})
            written.append(max(children, key=lambda token: float(logits[token])))
        assert list(answer.token_ids) == written


def test_answer_goes_on_where_the_prompt_breaks_off_and_ends_after_its_last_code(
    masked_engine: Any, prompts: list[list[int]], items: list[list[int]], vocabulary: Vocabulary
) -> None:
    begun = [prompt + item[:length] for prompt in prompts[:4] for item in items[:5] for length in (1, 2)]
    for prompt, answer in zip(begun, ask(masked_engine, begun, max_tokens=10), strict=True):
        whole = prompt[len(prompt) - prompt[::-1].index(vocabulary.sid_begin) :] + list(answer.token_ids)
        assert whole[:NUM_LEVELS] in items
        assert whole[NUM_LEVELS] == vocabulary.sid_end and len(whole) == NUM_LEVELS + 2
        assert answer.finish_reason == "stop"


# -- log-probs -------------------------------------------------------------------------------------------


def test_log_probs_before_the_mask_are_the_sid_engines(
    raw_engine: Any, tokenizer_folder: Path, prompts: list[list[int]], vocabulary: Vocabulary
) -> None:
    answers = ask(raw_engine, prompts, logprobs=0)
    found = [
        [entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
        for answer in answers
    ]
    expected = reference_log_probs(
        tokenizer_folder, prompts, [list(answer.token_ids) for answer in answers], vocabulary.level_offsets
    )
    assert np.array(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("width", [1, 8, 60])
def test_beams_by_expansion_are_the_sid_engines(
    raw_engine: Any, tokenizer_folder: Path, prompts: list[list[int]], width: int
) -> None:
    catalogue = Catalogue.load(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(tokenizer_folder / "model", dtype=torch.float32)
    asked, pad = prompts[:12], catalogue.pad_token_id
    expected = beam_group(model, catalogue.trie, catalogue.level_offsets, asked, width, pad_token_id=pad)

    async def score(requests: list[Request]) -> list[list[float]]:
        params = [
            vllm.SamplingParams(max_tokens=1, temperature=0.0, logprobs=len(ids), logprob_token_ids=ids)
            for _, _, ids in requests
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
        outputs = raw_engine.generate(inputs, params, use_tqdm=False)
        first = [output.outputs[0].logprobs[0] for output in outputs]
        return [[found[i].logprob for i in ids] for found, (_, _, ids) in zip(first, requests, strict=True)]

    found = asyncio.run(expand_beams(score, catalogue.trie, catalogue.level_offsets, asked, width))
    assert torch.equal(found.codes_BGL, expected.codes_BGL)
    for name in ("log_probs_BGL", "trie_log_probs_BGL"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=1e-5, equal_nan=True), name


def test_draws_follow_the_sid_engines_distribution(
    masked_engine: Any,
    tokenizer_folder: Path,
    prompts: list[list[int]],
    items: list[list[int]],
    vocabulary: Vocabulary,
) -> None:
    """Chi-square over the items of one prompt; the expected share of an item is computed, not sampled."""
    num_draws = 3000
    full = reference_log_probs(tokenizer_folder, [prompts[0]] * len(items), items, vocabulary.level_offsets)
    # p(item) of the renormalised policy: at each level, over the children of the item's own prefix
    shares = np.empty(len(items))
    for i, item in enumerate(items):
        share = 1.0
        for level in range(NUM_LEVELS):
            siblings = {
                tuple(other[: level + 1]): np.exp(full[j, level])
                for j, other in enumerate(items)
                if other[:level] == item[:level]
            }
            share *= siblings[tuple(item[: level + 1])] / sum(siblings.values())
        shares[i] = share
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    drawn = Counter(
        tuple(answer.token_ids) for answer in ask(masked_engine, [prompts[0]] * num_draws, seed=None)
    )
    counts = np.array([drawn[tuple(item)] for item in items])
    chi_square = float(((counts - num_draws * shares) ** 2 / (num_draws * shares)).sum())
    degrees = len(items) - 1
    assert counts.sum() == num_draws
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


# -- what it refuses -------------------------------------------------------------------------------------


def test_engine_without_a_tokenizer_artifact_does_not_start(tokenizer_folder: Path) -> None:
    model = SimpleNamespace(get_vocab_size=lambda: 29)
    for found in ({}, None, {"recast_tokenizer": ""}):
        config = SimpleNamespace(additional_config=found, model_config=model)
        with pytest.raises(
            ValueError, match=r"set the engine argument additional_config=\{'recast_tokenizer'"
        ):
            TrieLogitsProcessor(config, torch.device("cpu"), False)
    config = SimpleNamespace(
        additional_config={"recast_tokenizer": str(tokenizer_folder)},
        model_config=SimpleNamespace(get_vocab_size=lambda: 20),
    )
    with pytest.raises(ValueError, match="the model has 20 tokens, codes use ids up to 28"):
        TrieLogitsProcessor(config, torch.device("cpu"), False)


@pytest.mark.parametrize("version", ["0.18.1", "0.23.9", "0.29.0", "0.1.dev7+gabc"])
def test_vllm_outside_the_tested_band_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is looked at."""
    monkeypatch.setattr(vllm, "__version__", version)
    found = f"vllm {version} is outside the versions that verl_recast is tested with (>=0.24,<0.29)"
    with pytest.raises(RuntimeError, match=re.escape(found)):
        TrieLogitsProcessor(SimpleNamespace(), torch.device("cpu"), False)
    monkeypatch.setenv("RECAST_UNTESTED_HOST", "1")
    assert band.problem("vllm") is None


def test_this_vllm_lies_inside_the_tested_band() -> None:
    assert band.problem("vllm") is None
