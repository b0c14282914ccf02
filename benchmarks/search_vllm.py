"""Rollouts under one trie: our engine beside vLLM on the CPU, in the environment of `make setup-vllm`.

    .venv-vllm-0.28.0/bin/python benchmarks/search_vllm.py

A Qwen3 of width 128 with 4 layers and random weights, 2,000 items of 3 codes out of 256, 64 prompts of 64 and
of 512 tokens, 32 samples each at temperature 1, one thread. vLLM has our trie logits processor and its prefix
cache, which is emptied between repeats as new weights would; of two engines (256 and 1,024 sequences at once)
the faster one counts. Wall-clock seconds, medians; arms take turns.
"""

from __future__ import annotations

import os

# Before vLLM is imported: one core, its engine in this process, memory for every sequence.
os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from commands import recast
from timing import compared, in_turns

from verl_recast.catalogue import Catalogue

RESULT = Path(__file__).parent / "results" / "search_vllm.json"
PROMPTS, GROUP, LEVELS = 64, 32, 3
ENGINES = (256, 1024)  # sequences at once


def artifacts(folder: Path) -> Path:
    """A tokenizer folder: its model, trie and vocabulary."""
    log = ["--num-users", "3000", "--num-items", "2000", "--num-clusters", "50"]
    recast(folder, "prepare-data", "synthetic", "--out", "data", *log)
    sizes = [
        "--embeddings",
        "cooccurrence",
        "--codebook-size",
        "256",
        "--hidden-size",
        "128",
        "--layers",
        "4",
    ]
    recast(folder, "build-tokenizer", "--data", "data", "--out", "tokenizer", *sizes)
    return folder / "tokenizer"


class VLLM:
    """An engine as it comes, with the trie."""

    def __init__(self, folder: Path, num_sequences: int) -> None:
        from vllm import LLM, SamplingParams

        self.engine = LLM(
            str(folder / "model"),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=num_sequences,
            max_num_batched_tokens=6144,
            logits_processors=["verl_recast.rollout.vllm_trie:TrieLogitsProcessor"],
            additional_config={"recast_tokenizer": str(folder)},
        )
        self.params = SamplingParams(
            n=GROUP, max_tokens=LEVELS, temperature=1.0, detokenize=False, extra_args={"recast_given": 0}
        )

    def sample(self, prompts: list[list[int]]) -> list[list[list[int]]]:
        """Tokens of every answer, drawn by the engine's own state: seeds of requests fail on a CPU (0.28)."""
        self.engine.reset_prefix_cache()
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.engine.generate(requests, self.params, use_tqdm=False)
        return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


class Recast:
    """Our engine, with what verl's server gives it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.catalogue = Catalogue.load(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()

    def sample(self, prompts: list[list[int]]) -> list[list[list[int]]]:
        from verl_recast.rollout.group_sampling import draw_groups

        group = draw_groups(
            self.model,
            self.catalogue,
            prompts,
            range(len(prompts)),
            GROUP,
            sampling="iid",
            step=0,
            seed=0,
            temperature=1.0,
            top_p=1.0,
            history=None,
            full_vocabulary=False,
            token_budget=None,
        )
        return self.catalogue.token_ids(group.codes_BGL.numpy()).tolist()


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    start = record.before()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = artifacts(Path(temporary))
        arms: dict[str, Any] = {f"vllm, {size} sequences": VLLM(folder, size) for size in ENGINES}
        torch.set_num_threads(1)
        arms = {"recast": Recast(folder), **arms}
        catalogue = arms["recast"].catalogue
        items = set(map(tuple, catalogue.token_ids(np.array(sorted(catalogue.members))).tolist()))
        words = min(catalogue.level_offsets)
        for length in (64, 512):
            prompts = np.random.default_rng(2).integers(0, words, (PROMPTS, length)).tolist()
            drawn: list[list[list[list[int]]]] = []

            def drawing(arm: Any, prompts: Any = prompts, drawn: Any = drawn) -> Callable[[], None]:
                return lambda: drawn.append(arm.sample(prompts))

            asked = {name: drawing(arm) for name, arm in arms.items()}
            found = compared(in_turns(asked, args.repeats, time.perf_counter))
            assert all(tuple(answer) in items for groups in drawn for group in groups for answer in group)
            for name, row in found.items():
                rows.append({"prompt_length": length, "arm": name, **row})
                print(f"{length:4} {name:22} {row['median_s']:7.3f} s {row['ratio']:6.1f}x", flush=True)
    record.write(args.result, start, {"prompts": PROMPTS, "group": GROUP, "rows": rows})


if __name__ == "__main__":
    main()
