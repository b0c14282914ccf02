"""Small artifacts with known answers, written by the project's own stages.

`bigram_model` is a real Qwen3 whose layers add nothing: the next token depends on the last one alone, by a
table of probabilities that a test can multiply by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from sealing import reseal, whole

from recast_cli.artifacts import identity, load_manifest, write_manifest
from recast_cli.core.spelling import spell
from recast_cli.core.trie import Trie
from recast_cli.data.prompts import CHAT_TEMPLATE
from recast_cli.data.render import render
from recast_cli.tokenizer.model import write_scratch_model

SHARP = -1e4  # logit of everything that has probability 0


@dataclass(frozen=True)
class Folders:
    data: Path
    tokenizer: Path

    @property
    def model(self) -> Path:
        return self.tokenizer / "model"


Sequences = dict[str, list[int]]  # user -> item rows in time order; the last is the test target
Write = Callable[..., Folders]  # the fixture `write`


def write_dataset(folder: Path, sequences: Sequences, num_items: int, history: int = 20) -> None:
    """A dataset artifact: leave-one-out over the given sequences."""
    folder.mkdir(parents=True)
    ids = [f"i{row}" for row in range(num_items)]
    titles = [f"Title {row}" for row in range(num_items)]
    pl.DataFrame({"item_id": ids, "title": titles, "text": titles}).write_parquet(folder / "items.parquet")
    users = sorted(sequences)
    events = [(u, ids[row], float(t), t) for u in users for t, row in enumerate(sequences[u])]
    schema = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Float64, "position": pl.Int32}
    pl.DataFrame(events, schema=schema, orient="row").write_parquet(folder / "interactions.parquet")
    row_schema = {
        "index": pl.Int64,
        "user_id": pl.String,
        "position": pl.Int32,
        "history": pl.List(pl.String),
        "target": pl.String,
    }
    for number, (split, back) in enumerate((("rl", 3), ("validation", 2), ("test", 1))):
        rows = []
        for place, user in enumerate(users):
            position = len(sequences[user]) - back
            shown = [ids[row] for row in sequences[user][max(0, position - history) : position]]
            if shown:
                target = ids[sequences[user][position]]
                rows.append((1000 * number + place, user, position, shown, target))
        pl.DataFrame(rows, schema=row_schema, orient="row").write_parquet(folder / f"{split}.parquet")
    pl.DataFrame(
        {"index": [0], "user_id": users[:1], "items": [ids[:1]], "learn_from": [0]},
        schema_overrides={"learn_from": pl.Int32},
    ).write_parquet(folder / "sft.parquet")
    write_manifest(
        folder,
        "dataset",
        seed=0,
        **whole(
            "dataset",
            num_users=len(users),
            num_items=num_items,
            num_interactions=len(events),
            params={"history": history, "rl_rows": "sft"},
            source={"name": "by-hand", "sha256": ""},
        ),
    )


def write_tokenizer(folder: Path, data: Path, codes_NL: np.ndarray, sizes: Sequence[int], seed: int) -> None:
    """A tokenizer artifact around given codes, with a random model."""
    folder.mkdir(parents=True)
    ids = pl.read_parquet(data / "items.parquet")["item_id"]
    sids = pl.Series("sid", [spell(codes) for codes in codes_NL])
    pl.DataFrame([ids, sids]).write_parquet(folder / "semantic_ids.parquet")
    Trie.from_codes(codes_NL, sizes).save(folder / "trie.npz")
    facts = write_scratch_model(
        folder / "model", sizes, chat_template=CHAT_TEMPLATE, seed=seed, hidden_size=64, num_layers=2
    )
    (folder / "vocabulary.json").write_text(facts.vocabulary.to_json())
    render(data, folder / "semantic_ids.parquet", folder / "verl")
    manifest = load_manifest(data, "dataset")
    facts_of_kind = whole("tokenizer", num_items=len(codes_NL), num_levels=len(sizes))
    write_manifest(folder, "tokenizer", parents={"dataset": identity(manifest)}, seed=0, **facts_of_kind)


def bigram_model(folders: Folders, first: Sequence[float], then: dict[int, Sequence[float]]) -> None:
    """Replace the model by one with P(a) = first[a] after the begin token and P(b | a) = then[a][b]."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    vocabulary = json.loads((folders.tokenizer / "vocabulary.json").read_text())
    size, width = vocabulary["vocab_size"], 64
    assert size <= width
    table_VV = torch.full((size, size), SHARP)
    offset_a, offset_b = vocabulary["level_offsets"]
    for a, p in enumerate(first):
        table_VV[vocabulary["sid_begin"], offset_a + a] = np.log(p)
    for a, row in then.items():
        for b, p in enumerate(row):
            table_VV[offset_a + a, offset_b + b] = np.log(p)
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        # One-hot rows of root mean square 1 pass the final norm unchanged.
        model.model.embed_tokens.weight.copy_(torch.eye(size, width) * width**0.5)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :size] = table_VV.T / width**0.5
    model.save_pretrained(folders.model)
    reseal(folders.tokenizer)
    assert len(AutoTokenizer.from_pretrained(folders.model)) == size  # the tokenizer stays
