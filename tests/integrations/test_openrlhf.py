"""The guide's OpenRLHF examples, in OpenRLHF's own code from the reward file to the advantages.

Its wheel is fetched and unpacked, not installed: it needs CUDA packages (deepspeed, flash-attn, vLLM) that
these parts of it import but do not use. Those are left empty here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from network import missing
from transformers import AutoModelForCausalLM, AutoTokenizer

from recast_cli.core.pairs import choose_pairs
from recast_cli.core.spelling import spell
from recast_cli.data.movielens import cache_dir
from recast_cli.vocabulary import encode_prompts

VERSION = "0.11.2"
EXAMPLES = Path(__file__).parents[2] / "docs" / "guides" / "examples"
MODULES = {
    "agent": "utils.agent",
    "data": "datasets.prompts_dataset",
    "engine": "trainer.ray.vllm_engine",
    "generator": "trainer.ppo_utils.samples_generator",
    "maker": "trainer.ppo_utils.experience_maker",
}
# Their __init__ imports CUDA libraries: left empty, while their modules are read from the wheel.
PACKAGES = (
    "openrlhf",
    *(f"openrlhf.{name}" for name in ("utils", "models", "datasets", "trainer", "trainer.ray")),
)
UNUSED = {
    "deepspeed": (),
    "vllm": ("SamplingParams",),
    "openrlhf.trainer.ray.launcher": ("RayActorGroup",),
    "vllm.inputs": ("TokensPrompt",),
    "vllm.utils": ("random_uuid",),
}


def fetch(scratch: Path) -> Path:
    """The wheel, from the cache or the package index; without either the tests are skipped."""
    cache, pattern = cache_dir(), f"openrlhf-{VERSION}-*.whl"
    if not list(cache.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version=3.11", "--platform=manylinux1_x86_64", f"--dest={scratch}"]
        done = subprocess.run(
            [*command, f"openrlhf=={VERSION}"], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            missing(f"openrlhf=={VERSION} cannot be fetched: {done.stderr.strip()[-200:]}")
        (found,) = scratch.glob(pattern)
        cache.mkdir(parents=True, exist_ok=True)
        shutil.move(found, cache / f"{found.name}.part")
        (cache / f"{found.name}.part").rename(cache / found.name)
    return next(cache.glob(pattern))


@contextmanager
def left_empty(names: dict[str, tuple[str, ...]]) -> Iterator[None]:
    """Modules that hold nothing but the given names, for as long as something imports them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in names.items():
            module = ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, object)
            patch.setitem(sys.modules, name, module)
        yield


@pytest.fixture(scope="module")
def openrlhf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """OpenRLHF's own modules, read from its wheel."""
    folder = tmp_path_factory.mktemp("openrlhf")
    with zipfile.ZipFile(fetch(folder)) as wheel:
        wheel.extractall(folder)
    (root,) = {path.parents[1] for path in folder.rglob("openrlhf/__init__.py")}
    with pytest.MonkeyPatch.context() as patch:
        for name in PACKAGES:
            package = ModuleType(name)
            package.__path__ = [str(root / name.replace(".", "/"))]
            patch.setitem(sys.modules, name, package)
        with left_empty(UNUSED):
            modules = {name: importlib.import_module(f"openrlhf.{path}") for name, path in MODULES.items()}
        yield SimpleNamespace(root=root, **modules)
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder / "model")


class Engine:
    """What OpenRLHF's executors ask of vLLM, by a real model: an answer a call, of one code a level."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        vocabulary = tokenizer.get_vocab()
        self.levels = [[vocabulary[f"<s_{level}_{code}>"] for code in range(8)] for level in "abc"]
        self.draw = torch.Generator().manual_seed(0)
        self.answers: list[list[int]] = []
        self.executor: Any = None

    @torch.no_grad()
    async def generate(self, prompt_ids: list[int], params: Any, multi_modal_data: Any = None) -> Any:
        await asyncio.sleep(0)  # others run meanwhile, as in vLLM
        ids: list[int] = []
        for level in range(params.max_tokens):
            logits = self.model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, -1]
            chosen = torch.multinomial(logits[self.levels[level]].softmax(-1), 1, generator=self.draw)
            ids.append(self.levels[level][int(chosen)])
        self.answers.append(ids)
        output = SimpleNamespace(token_ids=ids, text="", finish_reason="length", logprobs=None)
        return SimpleNamespace(outputs=[output])


PARAMS = SimpleNamespace(max_tokens=3, logprobs=None)
TARGET = "<s_a_1><s_b_2><s_c_3>"


def prompt_text(tokenizer: Any, *history: str) -> str:
    messages = [{"role": "assistant", "content": f"<|sid_begin|>{sid}<|sid_end|>"} for sid in history]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def run(
    openrlhf: SimpleNamespace,
    executor: Any,
    rows: list[tuple[str, Any]],
    engine: Engine,
    tokenizer: Any,
    num_samples: int = 2,
) -> list[dict[str, Any]]:
    """Records of all rows at once, by the method of OpenRLHF's actor that asks an executor for them."""
    generate = openrlhf.engine.RolloutRayActor.__ray_metadata__.modified_class.generate_responses
    engine.executor = executor

    async def all_rows() -> list[dict[str, Any]]:
        of_rows = await asyncio.gather(
            *(generate(engine, prompt, label, PARAMS, 512, tokenizer, num_samples) for prompt, label in rows)
        )
        return [record for records in of_rows for record in records]

    return asyncio.run(all_rows())


def load_reward(openrlhf: SimpleNamespace) -> Any:
    """The executor that OpenRLHF makes of `--reward.remote_url FILE`."""
    return openrlhf.agent.SingleTurnAgentExecutor([str(EXAMPLES / "openrlhf_reward.py")])


# --- the guide ---


def test_openrlhf_reads_our_rows_as_they_are(
    openrlhf: SimpleNamespace, tokenizer: Any, tokenizer_folder: Path
) -> None:
    rows = Dataset.from_parquet(str(tokenizer_folder / "verl" / "rl.parquet")).select(range(3)).to_list()
    read = openrlhf.data.preprocess_data
    for row in rows:
        prompt, label = read(row, None, "prompt", "reward_model", tokenizer.apply_chat_template)
        ids = tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        assert [ids] == encode_prompts(tokenizer, [row["prompt"]])
        answer = row["reward_model"]["ground_truth"]
        assert load_reward(openrlhf).reward_func([prompt + answer], [prompt], [label])[
            "rewards"
        ].tolist() == [1]


def test_openrlhf_knows_every_option_of_the_guide(openrlhf: SimpleNamespace) -> None:
    guide = (EXAMPLES.parent / "openrlhf.md").read_text(encoding="utf-8")
    options = set(re.findall(r"--[a-z]+\.[a-z_.]+", guide))
    assert len(options) > 10
    known = (openrlhf.root / "openrlhf" / "cli" / "train_ppo_ray.py").read_text(encoding="utf-8")
    assert {option for option in options if f'"{option}"' not in known} == set()


# --- the reward file ---


def test_rewards_by_hand(openrlhf: SimpleNamespace) -> None:
    reward = load_reward(openrlhf).reward_func
    prompt = f"<|sid_begin|>{TARGET}<|sid_end|><|sid_begin|>"  # the target stands in the history: no hit
    answers = [TARGET, "<s_a_1><s_b_2><s_c_0><|im_end|>", "<s_a_1><s_b_0><s_c_3>", "<s_a_0>", "no idea"]
    found = reward([prompt + answer for answer in answers], [prompt] * 5, [TARGET] * 5)
    assert found["rewards"].tolist() == found["scores"].tolist() == [1, 0, 0, 0, 0]
    expected = [1, 0.1, 0.01, 0, 0]
    assert found["extra_logs"]["structural_score"].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "label",
    [TARGET, ["<s_a_0><s_b_0><s_c_0>", TARGET], {"style": "rule", "ground_truth": TARGET}],
)
def test_a_label_is_a_text_several_or_the_column_of_our_parquet(
    openrlhf: SimpleNamespace, label: Any
) -> None:
    found = load_reward(openrlhf).reward_func([f"history {TARGET}"], ["history "], [label])
    assert found["rewards"].tolist() == [1]


def test_a_prompt_that_was_cut_on_the_left_is_still_left_out(openrlhf: SimpleNamespace) -> None:
    reward = load_reward(openrlhf).reward_func
    prompt = f"a long history <|sid_begin|>{TARGET}<|sid_end|><|sid_begin|>"
    cut = prompt[len("a long history ") :]
    assert reward([f"{cut}<s_a_0><s_b_0><s_c_0>"], [prompt], [TARGET])["rewards"].tolist() == [0]


@pytest.mark.parametrize(
    ("query", "label", "message"),
    [("history x", "no target", "label holds no semantic ID"), ("x", TARGET, "does not begin with")],
)
def test_a_row_that_cannot_be_scored_is_an_error(
    openrlhf: SimpleNamespace, query: str, label: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_reward(openrlhf).reward_func([query], ["history "], [label])


def experiences(openrlhf: SimpleNamespace, responses: list[dict[str, Any]]) -> list[Any]:
    """OpenRLHF's own step from an executor's record to what training reads."""
    convert = openrlhf.generator.SamplesGenerator._process_response_into_experience
    return [convert(None, response, max_len=512) for response in responses]


def test_openrlhf_takes_what_the_file_returns(
    openrlhf: SimpleNamespace, tokenizer: Any, tokenizer_folder: Path
) -> None:
    engine, prompt = Engine(tokenizer_folder, tokenizer), prompt_text(tokenizer, "<s_a_0><s_b_1><s_c_2>")
    everyone = [f"<s_a_{a}><s_b_{b}><s_c_{c}>" for a in range(4) for b in range(8) for c in range(8)]
    responses = run(openrlhf, load_reward(openrlhf), [(prompt, everyone)], engine, tokenizer, 8)
    expected = [float(answer[0] in engine.levels[0][:4]) for answer in engine.answers]
    assert set(expected) == {0.0, 1.0}
    made = experiences(openrlhf, responses)
    by_answer = {tuple(answer): hit for answer, hit in zip(engine.answers, expected, strict=True)}
    for one in made:
        hit = by_answer[tuple(one.sequences[0, -3:].tolist())]
        assert one.rewards.tolist() == one.scores.tolist() == one.info["reward"].tolist() == [hit]
        assert one.info["structural_score"].shape == (1,)


# --- the agent file ---


@pytest.fixture
def agent(openrlhf: SimpleNamespace) -> Any:
    """The executor that OpenRLHF makes of `--train.agent_func_path FILE`, with groups of 8."""
    executor = openrlhf.engine._load_agent_executor(str(EXAMPLES / "openrlhf_recast.py"))
    executor.execute.__func__.__globals__["WIDTH"] = 8  # of this load alone
    return executor


def advantages(openrlhf: SimpleNamespace, made: list[Any]) -> list[list[float]]:
    """Advantage of every answer token by OpenRLHF's own code, under `dr_grpo` and two samples a prompt."""
    maker = openrlhf.maker.RemoteExperienceMaker.__new__(openrlhf.maker.RemoteExperienceMaker)
    advantage = SimpleNamespace(estimator="dr_grpo", gamma=1.0)
    maker.args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=2, max_new_tokens=3),
        reward=SimpleNamespace(
            clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None
        ),
    )
    maker.strategy = SimpleNamespace(args=maker.args)
    maker.advantage_estimator = "dr_grpo"
    maker.kl_ctl = SimpleNamespace(value=0.0)
    for place, one in enumerate(made):
        one.index = [place]
        one.kl = torch.zeros_like(one.action_mask, dtype=torch.float32)
    maker.compute_advantages_and_returns(made)
    return [one.advantages[one.action_mask.bool()].tolist() for one in made]


def test_the_pair_of_a_group_reaches_training_with_its_advantages(
    openrlhf: SimpleNamespace, agent: Any, tokenizer: Any, tokenizer_folder: Path
) -> None:
    engine, prompt = Engine(tokenizer_folder, tokenizer), prompt_text(tokenizer, "<s_a_0><s_b_1><s_c_2>")
    responses = run(openrlhf, agent, [(prompt, TARGET)], engine, tokenizer)
    assert len(engine.answers) == 8
    target = tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    assert target not in engine.answers

    def shared(answer: list[int]) -> int:
        return next((i for i in range(3) if answer[i] != target[i]), 3)

    positive, negative = (response["observation_tokens"][-3:] for response in responses)
    assert positive == target  # repaired
    assert shared(negative) == max(shared(answer) for answer in engine.answers)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert all(response["observation_tokens"][:-3] == prompt_ids for response in responses)
    made = experiences(openrlhf, responses)
    assert [one.info["all_zero"].item() for one in made] == [1.0, 1.0]
    assert [one.info["all_zero_after_repair"].item() for one in made] == [0.0, 0.0]
    assert advantages(openrlhf, made) == [[1.0] * 3, [-1.0] * 3]
    assert [one.scores.item() for one in made] == [1.0, 0.0]  # mean .5 stays inside the filter's range


def test_two_rows_of_equal_prompt_and_several_prompts_keep_their_pairs(
    openrlhf: SimpleNamespace, agent: Any, tokenizer: Any, tokenizer_folder: Path
) -> None:
    engine = Engine(tokenizer_folder, tokenizer)
    prompt, other = (
        prompt_text(tokenizer, "<s_a_0><s_b_1><s_c_2>"),
        prompt_text(tokenizer, "<s_a_5><s_b_1><s_c_2>"),
    )
    second = "<s_a_7><s_b_7><s_c_7>"
    rows = [(prompt, TARGET), (other, TARGET), (prompt, TARGET), (prompt, second)]
    responses = run(openrlhf, agent, rows, engine, tokenizer)
    assert len(engine.answers) == 4 * 8
    assert agent.searches == {}
    assert [response["reward"] for response in responses] == [1.0, -1.0] * 4
    targets = [tokenizer(label, add_special_tokens=False)["input_ids"] for _, label in rows]
    assert [r["observation_tokens"][-3:] for r in responses][::2] == targets
    assert [(r["prompt"], r["label"]) for r in responses][::2] == rows


def test_a_group_that_hits_everywhere_teaches_nothing_and_is_filtered(
    openrlhf: SimpleNamespace, agent: Any, tokenizer: Any, tokenizer_folder: Path
) -> None:
    engine, prompt = Engine(tokenizer_folder, tokenizer), prompt_text(tokenizer, "<s_a_0><s_b_1><s_c_2>")
    everyone = [spell(codes, enclose=False) for codes in np.ndindex(8, 8, 8)]
    made = experiences(openrlhf, run(openrlhf, agent, [(prompt, everyone)], engine, tokenizer))
    assert advantages(openrlhf, made) == [[0.0] * 3] * 2
    assert [one.scores.item() for one in made] == [1.0, 1.0]


def test_an_anchor_ends_as_the_rollout_ended_that_it_replaces(agent: Any, tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    miss = tokenizer("<s_a_5><s_b_5><s_c_5>", add_special_tokens=False)["input_ids"]

    class Fixed:
        async def generate(self, prompt_ids: list[int], params: Any) -> Any:
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[*miss, end])])

    params = SimpleNamespace(max_tokens=4, logprobs=None)

    async def first() -> dict[str, Any]:
        return await agent.execute("", TARGET, params, 512, tokenizer, Fixed())

    target = tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    assert asyncio.run(first())["observation_tokens"] == [*target, end]


@pytest.mark.parametrize(
    ("tokens", "codes"),
    [
        (["<s_a_1>", "<s_b_2>", "<s_c_3>"], [1, 2, 3]),
        (["<s_a_1>", "<s_b_2>", "<s_c_3>", "<|sid_end|>"], [1, 2, 3]),
        (["<s_a_1>", "<s_b_2>"], None),
        (["<s_a_1>", "<s_c_2>", "<s_b_3>"], None),
        (["<s_a_1>", "<s_b_2>", "<s_c_3>", "<s_d_4>"], None),
        (["the", "<s_a_1>", "<s_b_2>", "<s_c_3>"], None),
    ],
)
@pytest.mark.usefixtures("openrlhf")
def test_an_answer_is_one_semantic_id(tokens: list[str], codes: list[int] | None) -> None:
    assert importlib.import_module("openrlhf_recast").read_answer(tokens, 3) == codes


@pytest.mark.parametrize(
    ("params", "label", "message"),
    [
        (SimpleNamespace(max_tokens=3, logprobs=1), TARGET, "is_correction_level must be off"),
        (SimpleNamespace(max_tokens=None, logprobs=None), TARGET, "max_new_tokens is not set"),
        (PARAMS, "nothing", "label holds no semantic ID"),
    ],
)
def test_a_call_that_cannot_be_repaired_is_an_error(
    agent: Any, tokenizer: Any, params: Any, label: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        asyncio.run(agent.execute("", label, params, 512, tokenizer, None))
    assert agent.searches == {}


def test_the_core_agrees(
    openrlhf: SimpleNamespace, agent: Any, tokenizer: Any, tokenizer_folder: Path
) -> None:
    engine, prompt = Engine(tokenizer_folder, tokenizer), prompt_text(tokenizer, "<s_a_3><s_b_1><s_c_2>")
    responses = run(openrlhf, agent, [(prompt, TARGET)], engine, tokenizer)
    codes = [
        [level.index(token) for level, token in zip(engine.levels, a, strict=True)] for a in engine.answers
    ]
    index = zlib.crc32(prompt.encode())
    expected = choose_pairs(
        np.array([codes]), np.ones((1, 8), dtype=bool), [[(1, 2, 3)]], np.array([index]), seed=0, step=1
    )
    assert responses[1]["observation_tokens"][-3:] == engine.answers[expected.kept_B2[0, 1]]
    assert responses[0]["extra_logs"] == expected.signal
