"""`recast recommend`: titles for one history."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def recommend(
    tokenizer: Annotated[Path, typer.Option(help="Folder of `recast build-tokenizer`.")],
    data: Annotated[Path, typer.Option(help="Folder of `recast prepare-data`.")],
    items: Annotated[list[str] | None, typer.Argument(help="History: item ids, oldest first.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder. Default: the untrained model of --tokenizer.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="A user of the dataset instead of item ids.")] = None,
    num_items: Annotated[int, typer.Option("--num-items", "-k", min=1, help="Length of the list.")] = 10,
    keep_history: Annotated[
        bool, typer.Option("--keep-history", help="Also list items that are in the history.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document, no table.")] = False,
) -> None:
    """Recommend the next items after a history, of a user in the dataset or of item ids.

    Items already in the history are left out. The score is the log-probability of the item's semantic ID.

    Examples:

        \b
        recast recommend --user 7 --data data/ml-100k --tokenizer data/ml-100k-tokenizer \\
            --model runs/demo/recast/model

        \b
        recast recommend 50 172 181 -k 5 --data data/ml-100k --tokenizer data/ml-100k-tokenizer \\
            --model runs/demo/recast/model
    """
    import dataclasses

    import torch

    from recast_cli.console import note, print_json, print_table
    from recast_cli.data.prompts import build_messages
    from recast_cli.evaluation.recommend import recommend as recommend_items
    from recast_cli.host import require_threads

    if threads is not None:
        require_threads(threads)
        torch.set_num_threads(threads)
    found = recommend_items(
        model or tokenizer / "model",
        tokenizer,
        data,
        build_messages=build_messages,
        items=items or [],
        user=user,
        num_items=num_items,
        keep_history=keep_history,
    )
    if len(found) < num_items:
        note(f"only {len(found)} items are left")
    if json_output:
        print_json([dataclasses.asdict(answer) for answer in found])
        return
    rows = [
        [
            str(answer.rank),
            answer.item_id,
            answer.title + (" (in history)" if answer.in_history else ""),
            answer.log_prob,
        ]
        for answer in found
    ]
    print_table("", ["rank", "item", "title", "score"], rows, numeric=False)
