"""ReCast under OpenRLHF: an agent that searches wide and hands two rollouts of each group to training.

`--train.agent_func_path FILE --rollout.n_samples_per_prompt 2 --algo.advantage.estimator dr_grpo`; see
docs/guides/openrlhf.md. OpenRLHF imports this file by its path, so it stands alone.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from openrlhf.utils.agent import AgentExecutorBase

from recast_cli.core.pairs import Pairs, choose_pairs
from recast_cli.core.spelling import find_all, read_code, spell

WIDTH = 32  # G, rollouts searched for each prompt
SEED = 0  # of ties and of the drawn target; what is sampled is vLLM's own

Label = str | Sequence[str] | Mapping[str, Any]


def targets_of(label: Label) -> list[tuple[int, ...]]:
    """Codes of the targets: of one text, of several, or of the column `reward_model` of `verl/rl.parquet`.

    Raises:
        ValueError: no semantic ID in it.
    """
    truth = label["ground_truth"] if isinstance(label, Mapping) else label
    targets = [codes for text in ([truth] if isinstance(truth, str) else truth) for codes in find_all(text)]
    if not targets:
        raise ValueError(f"label holds no semantic ID: {label!r}")
    return targets


def read_answer(tokens: Sequence[str], num_levels: int) -> list[int] | None:
    """Codes of an answer that begins with one semantic ID and holds no further code; None for any other."""
    read = [read_code(token) for token in tokens]
    levels = [level for level, _ in read]
    whole = levels[:num_levels] == list(range(num_levels)) and max(levels[num_levels:], default=-1) < 0
    return [code for _, code in read[:num_levels]] if whole else None


class Search(NamedTuple):  # not a dataclass: those look their module up, and OpenRLHF does not register it
    """A group's prompt and the answers of its pair as token ids, and what `choose_pairs` said."""

    prompt_ids: list[int]
    answers: tuple[list[int], list[int]]
    pairs: Pairs


class AgentExecutor(AgentExecutorBase):
    """OpenRLHF calls `execute` twice for a prompt: the first call searches and gets i+, the second i-."""

    def __init__(self) -> None:
        self.searches: dict[tuple[str, str], asyncio.Task[Search]] = {}
        self.visits: Counter[str] = Counter()

    async def execute(
        self,
        prompt: str,
        label: Label,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """One of the pair, as OpenRLHF's record of a rollout.

        Raises:
            ValueError: an importance correction is on, answers are not limited, or the label is no target.
        """
        if sampling_params.logprobs is not None:
            raise ValueError("--algo.advantage.is_correction_level must be off: nobody sampled an anchor")
        if sampling_params.max_tokens is None:
            raise ValueError("--rollout.max_new_tokens is not set, needed the number of codes of an answer")
        key = (prompt, repr(label))
        side = int(key in self.searches)
        if side == 0:
            prompt_ids = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
            prompt_ids = prompt_ids[-(max_length - sampling_params.max_tokens) :]
            search = self.search(
                prompt, prompt_ids, targets_of(label), sampling_params, hf_tokenizer, llm_engine
            )
            self.searches[key] = asyncio.ensure_future(search)
        task = self.searches.pop(key) if side else self.searches[key]
        found = await task
        end = len(found.prompt_ids) + len(found.answers[side])
        return {
            "prompt": prompt,
            "label": label,
            "images": images,
            "mm_train_inputs": None,
            "observation_tokens": found.prompt_ids + found.answers[side],
            "action_ranges": [(len(found.prompt_ids), end)],
            "rollout_log_probs": None,
            "truncated": False,
            "reward": float(found.pairs.advantages_B2[0, side]),
            # Dynamic filtering replaces a prompt whose mean is 1: a group that hits everywhere, never a pair.
            "scores": 0.0 if side and found.pairs.trainable_B[0] else 1.0,
            "extra_logs": found.pairs.signal,
        }

    async def search(
        self,
        prompt: str,
        prompt_ids: list[int],
        targets: list[tuple[int, ...]],
        sampling_params: Any,
        hf_tokenizer: Any,
        llm_engine: Any,
    ) -> Search:
        """Sample a group and keep its pair."""
        outputs = await asyncio.gather(
            *(llm_engine.generate(prompt_ids, sampling_params) for _ in range(WIDTH))
        )
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        num_levels = len(targets[0])
        codes = [read_answer(hf_tokenizer.convert_ids_to_tokens(answer), num_levels) for answer in answers]
        self.visits[prompt] += 1
        pairs = choose_pairs(
            np.array([[each or [-1] * num_levels for each in codes]]),
            np.array([[each is not None for each in codes]]),
            [targets],
            np.array([zlib.crc32(prompt.encode())]),
            seed=SEED,
            step=self.visits[prompt],
        )
        best, worst = (answers[place] for place in pairs.kept_B2[0])
        if pairs.repaired_B[0]:
            text = spell(pairs.codes_B2L[0, 0], enclose=False)
            end = [token for token in best[-1:] if token == hf_tokenizer.eos_token_id]
            best = hf_tokenizer(text=text, add_special_tokens=False)["input_ids"] + end
        return Search(prompt_ids, (best, worst), pairs)
