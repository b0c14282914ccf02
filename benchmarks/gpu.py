"""The four arms of `shared_prompts.py` on a GPU, at the sizes of real models; no such run is recorded yet.

    python benchmarks/gpu.py                      (one GPU; verl's own engine, bfloat16)
    python benchmarks/gpu.py --shape tiny --device cpu --lengths 32 --prompts 2 --result trial.json

Qwen3 with the layers of its 0.6B or 1.7B model, random weights and a vocabulary of about 1,000; G = 32,
answers of 3 tokens, prompts of 1,024 and 3,072 tokens. Seconds of the clock, ratios over stock GRPO with rows
read alone.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
from shared_prompts import GROUP, prepare, show, sweep
from transformers import Qwen3Config, Qwen3ForCausalLM

RESULT = Path(__file__).parent / "results" / "gpu.json"
COMMON = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28}
SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, **COMMON},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, **COMMON},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, **COMMON, "head_dim": 16, "num_hidden_layers": 2},
}


def write_model(shape: str, tokenizer: Path, folder: Path) -> None:
    """The tokenizer's own model folder with other weights: of another shape, and random."""
    shutil.copytree(tokenizer / "model", folder)
    config = Qwen3Config.from_pretrained(folder)
    config.update(SHAPES[shape] | {"layer_types": ["full_attention"] * SHAPES[shape]["num_hidden_layers"]})
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def measure(shape: str, lengths: list[int], prompts: int, steps: int, device: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, device)
        write_model(shape, folder / "tokenizer", folder / "model")
        return [
            row for length in lengths for row in sweep(folder, length, prompts, steps, "--model", "model")
        ]


def main() -> None:
    parser = record.parser(__doc__, RESULT)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 3072])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args()

    start = record.before()
    rows = measure(args.shape, args.lengths, args.prompts, args.steps, args.device)
    show(rows)
    for row in rows:
        phases = ("old_log_prob_s", "ref_log_prob_s", "actor_update_s")
        seconds = "  ".join(f"{phase} {row[phase]:.3f}" for phase in phases)
        print(f"{row['prompt_length']:6} {row['arm']:14} {seconds}  MFU {row['actor_update_mfu']:.0%}")
    record.write(args.result, start, {"shape": args.shape, "group": GROUP, "rows": rows})


if __name__ == "__main__":
    main()
