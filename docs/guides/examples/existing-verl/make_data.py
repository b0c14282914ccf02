"""Small data and a small model as OpenOneRec or MiniOneRec leave them, to try the guide without either.

    python make_data.py openonerec|minionerec OUT

Only the forms are theirs (github.com/Kuaishou-OneRec/OpenOneRec at 1f4a99e, github.com/AkaliKong/MiniOneRec
at 81b4ba9): files, columns, spelling, order of the tokens. Histories and weights are random.
"""

from __future__ import annotations

import json
import random
import sys
import uuid
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NUM_ITEMS, NUM_ROWS, CODES = 60, 64, 16
# What of Qwen3's counts here.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def write_model(folder: Path, code_tokens: list[str]) -> None:
    """A Qwen3 of 100,000 weights over bytes, whose vocabulary was expanded by the tokens in this order."""
    alphabet = {byte: place for place, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["<|im_start|>", "<think>", "</think>", *code_tokens])
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the least that vLLM computes on a CPU
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def openonerec(out: Path, codes: list[list[int]], histories: list[list[int]]) -> None:
    """`pid2sid.parquet`, and conversations as JSON, whose last message is the answer: some items."""

    def sids(items: list[int]) -> str:
        parts = [f"<s_a_{a}><s_b_{b}><s_c_{c}>" for a, b, c in (codes[item] for item in items)]
        return "".join(f"<|sid_begin|>{part}<|sid_end|>" for part in parts)

    def message(role: str, text: str) -> dict:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    rows = [
        {
            "source": "RecIF_VideoRec",
            "uuid": str(uuid.UUID(int=row)),
            "messages": json.dumps(
                [
                    message("system", "You recommend videos."),
                    message("user", f"The user watched:\n{sids(items[:-2])}\nWhat is next?"),
                    message("assistant", sids(items[-2:])),
                ]
            ),
            "metadata": json.dumps({"uid": row}),
        }
        for row, items in enumerate(histories)
    ]
    pd.DataFrame(rows).to_parquet(out / "train.parquet")
    pid2sid = pd.DataFrame({"pid": [1000 + item for item in range(NUM_ITEMS)], "sid": codes})
    pid2sid.to_parquet(out / "pid2sid.parquet")
    tokens = [f"<s_{level}_{code}>" for level in "abc" for code in range(CODES)]
    write_model(out / "model", [*tokens, "<|sid_begin|>", "<|sid_end|>"])


def minionerec(out: Path, codes: list[list[int]], histories: list[list[int]]) -> None:
    """`toys.index.json` and a csv whose histories are Python lists; only the tokens in use, sorted."""
    index = {str(item): [f"<a_{a}>", f"<b_{b}>", f"<c_{c}>"] for item, (a, b, c) in enumerate(codes)}
    (out / "toys.index.json").write_text(json.dumps(index))
    sids = ["".join(tokens) for tokens in index.values()]
    rows = [
        {
            "user_id": f"A{row}",
            "history_item_id": items[:-1],
            "item_id": items[-1],
            "history_item_sid": [sids[item] for item in items[:-1]],
            "item_sid": sids[items[-1]],
        }
        for row, items in enumerate(histories)
    ]
    pd.DataFrame(rows).to_csv(out / "train.csv", index=False)
    write_model(out / "model", sorted({token for tokens in index.values() for token in tokens}))


def main(form: str, folder: str) -> None:
    draw, out = random.Random(0), Path(folder)
    out.mkdir(parents=True)
    codes = [[draw.randrange(CODES) for _ in "abc"] for _ in range(NUM_ITEMS)]
    codes[-1] = codes[0]  # two items share a semantic ID, as happens there
    histories = [[draw.randrange(NUM_ITEMS) for _ in range(draw.randint(4, 7))] for _ in range(NUM_ROWS)]
    {"openonerec": openonerec, "minionerec": minionerec}[form](out, codes, histories)


if __name__ == "__main__":
    main(*sys.argv[1:])
