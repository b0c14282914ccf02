"""Rows and catalogue of OpenOneRec or MiniOneRec in the columns that stock verl and the plugin read.

    python to_verl.py openonerec train.parquet pid2sid.parquet OUT    # rl.parquet, catalogue.parquet
    python to_verl.py minionerec train.csv OUT                        # rl.parquet

What verl needs is `prompt` and `reward_model.ground_truth`, what the plugin needs besides is an
`extra_info.index` of each row's own.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd


def verl_row(index: int, source: str, prompt: list[dict[str, str]], targets: str) -> dict:
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": "recommendation",
        "reward_model": {"style": "rule", "ground_truth": targets},  # one semantic ID, or several in one text
        "extra_info": {"index": index},
    }


def openonerec(rows: str, pid2sid: str, folder: str) -> None:
    """The last message is the answer: all its items are targets."""
    found = []
    for index, row in enumerate(pd.read_parquet(rows).itertuples()):
        messages = [
            {"role": message["role"], "content": "".join(part["text"] for part in message["content"])}
            for message in json.loads(row.messages)
        ]
        found.append(verl_row(index, row.source, messages[:-1], messages[-1]["content"]))
    pd.DataFrame(found).to_parquet(Path(folder) / "rl.parquet")
    table = pd.read_parquet(pid2sid)
    sid = [f"<s_a_{a}><s_b_{b}><s_c_{c}>" for a, b, c in table["sid"]]
    pd.DataFrame({"item_id": table["pid"], "sid": sid}).to_parquet(Path(folder) / "catalogue.parquet")


def minionerec(rows: str, folder: str) -> None:
    """The prompt of its RL stage; the index file is a catalogue as it is."""
    found = []
    for index, row in enumerate(pd.read_csv(rows).itertuples()):
        history = ", ".join(ast.literal_eval(row.history_item_sid))
        text = (
            f"### User Input: \nThe user has interacted with items {history} in chronological order. Can you "
            "predict the next possible item that the user may expect?\n\n### Response:\n"
        )
        found.append(verl_row(index, "minionerec", [{"role": "user", "content": text}], row.item_sid))
    pd.DataFrame(found).to_parquet(Path(folder) / "rl.parquet")


if __name__ == "__main__":
    convert: dict[str, Callable[..., None]] = {"openonerec": openonerec, "minionerec": minionerec}
    convert[sys.argv[1]](*sys.argv[2:])
