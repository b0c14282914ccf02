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

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

from verl_recast.catalogue import Catalogue

RESULT = Path(__file__).parent / "results" / "search_vllm.json"
PROGRAM = "import sys; from recast_cli.main import main; sys.argv[0] = 'recast'; main()"
PROMPTS, GROUP, LEVELS = 64, 32, 3
ENGINES = (256, 1024)  # sequences at once


def artifacts(folder: Path) -> Path:
    """A tokenizer folder: its model, trie and vocabulary."""

    def recast(*arguments: str) -> None:
        command = [sys.executable, "-c", PROGRAM, *arguments]
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)

    log = ["--num-users", "3000", "--num-items", "2000", "--num-clusters", "50"]
    recast("prepare-data", "synthetic", "--out", "data", *log)
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
    recast("build-tokenizer", "--data", "data", "--out", "tokenizer", *sizes)
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

    def sample(self, prompts: list[list[int]], _: int) -> list[list[list[int]]]:
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

    def sample(self, prompts: list[list[int]], repeat: int) -> list[list[list[int]]]:
        from verl_recast.rollout.group_sampling import draw_groups

        group = draw_groups(
            self.model,
            self.catalogue,
            prompts,
            range(len(prompts)),
            GROUP,
            sampling="iid",
            step=repeat,
            seed=0,
            temperature=1.0,
            top_p=1.0,
            history=None,
            full_vocabulary=False,
            token_budget=None,
        )
        return self.catalogue.token_ids(group.codes_BGL.numpy()).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--result", type=Path, default=RESULT)
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
            seconds: dict[str, list[float]] = {name: [] for name in arms}
            for repeat in range(args.repeats + 1):
                for name, arm in arms.items():
                    begin = time.perf_counter()
                    answers = arm.sample(prompts, repeat)
                    if repeat:
                        seconds[name].append(time.perf_counter() - begin)
                    assert all(tuple(answer) in items for group in answers for answer in group), name
            base = statistics.median(seconds["recast"])
            for name, found in seconds.items():
                middle = statistics.median(found)
                rows.append(
                    {
                        "prompt_length": length,
                        "arm": name,
                        "median_s": middle,
                        "min_s": min(found),
                        "max_s": max(found),
                        "ratio": middle / base,
                    }
                )
                print(f"{length:4} {name:22} {middle:7.3f} s {middle / base:6.1f}x", flush=True)
    record.write(args.result, start, {"prompts": PROMPTS, "group": GROUP, "rows": rows})


if __name__ == "__main__":
    main()
