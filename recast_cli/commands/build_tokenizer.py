"""`recast build-tokenizer`: give every item a semantic ID, and make the model that speaks them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recast_cli.errors import RecipeError

if TYPE_CHECKING:
    from recast_cli.tokenizer.build import TokenizerParams


def build_tokenizer(
    data: Annotated[Path, typer.Option("--data", help="Dataset folder of `recast prepare-data`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    levels: Annotated[int, typer.Option(help="Codes of a semantic ID.")] = 3,
    codebook_size: Annotated[
        str, typer.Option(help="Codes of each level: one number, or a comma list with one for each level.")
    ] = "64",
    embeddings: Annotated[
        str, typer.Option(help="What items are told apart by: text, cooccurrence or text+cooccurrence.")
    ] = "text+cooccurrence",
    cooccurrence_weight: Annotated[
        float, typer.Option(help="Share of the variance that co-occurrence gets in text+cooccurrence.")
    ] = 0.5,
    dimensions: Annotated[
        int, typer.Option(help="Principal components kept of the embeddings; 0 keeps all.")
    ] = 32,
    base_model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Hugging Face causal LM to expand. Default: a small Qwen3 from scratch."
        ),
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option(help="Width of the model from scratch, a multiple of 64. Default: 128.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model from scratch. Default: 4.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of k-means and of new weights.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a tokenizer that is in --out.")
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead of a table.")
    ] = False,
) -> None:
    """Give every item its own semantic ID and make the model whose vocabulary holds them.

    Writes semantic IDs, trie, vocabulary, model, the parquet files that verl reads, and a quality report. The
    co-occurrence factors see every user's events but the last two. A tokenizer in --out that was built from
    the same dataset with the same options is reused.

    Examples:

        \b
        recast build-tokenizer --data data/ml-100k --out runs/tokenizer

        \b
        recast build-tokenizer --data data/books --out runs/tokenizer --codebook-size 256,256,128 \\
            --embeddings text

        \b
        recast build-tokenizer --data data/ml-100k --out runs/tokenizer --base-model models/Qwen3-0.6B
    """
    from recast_cli.artifacts import load_manifest
    from recast_cli.console import note, print_json, progress
    from recast_cli.data.prompts import CHAT_TEMPLATE
    from recast_cli.data.render import render
    from recast_cli.tokenizer.build import TokenizerParams, build
    from recast_cli.tokenizer.quantize import parse_codebook_sizes

    sizes = {"hidden_size": hidden_size, "num_layers": layers}
    given = {name: size for name, size in sizes.items() if size is not None}
    if base_model is not None and given:
        raise RecipeError(
            f"--base-model {base_model} has its own size, found --hidden-size or --layers as well",
            "leave the one or the other out",
        )
    params = TokenizerParams(
        codebook_sizes=parse_codebook_sizes(codebook_size, levels),
        embeddings=embeddings,
        cooccurrence_weight=cooccurrence_weight,
        num_dimensions=dimensions,
        base_model=None if base_model is None else str(base_model),
        seed=seed,
        **given,
    )

    def finish(folder: Path) -> None:
        render(data, folder / "semantic_ids.parquet", folder / "verl")

    num_items = load_manifest(data, "dataset")["num_items"]
    with progress("embedding items", num_items if "text" in embeddings else None) as advance:
        manifest, reused = build(
            data,
            out,
            params,
            chat_template=CHAT_TEMPLATE,
            overwrite=overwrite,
            finish=finish,
            progress=advance,
        )
    if reused:
        note(f"{out}: reused, same dataset and options (--overwrite rebuilds it)")
    if json_output:
        print_json({"out": str(out), "reused": reused, **_summary(manifest)})
    else:
        _print(params, manifest)
    if not reused:
        note(f"wrote {out} in {manifest['seconds']:.1f} s")


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = ("num_items", "num_levels", "codebook_sizes", "seed", "seconds", "model", "quality")
    return {key: manifest[key] for key in keys}


def _print(params: TokenizerParams, manifest: dict[str, Any]) -> None:
    from recast_cli.console import note, print_table

    quality, made = manifest["quality"], manifest["model"]
    rows = [
        (
            f"level {place + 1}",
            level["codebook_size"],
            f"{level['utilisation']:.1%}",
            f"{level['perplexity']:.1f}",
            f"{level['relative_error']:.3f}",
            level["moved_items"],
        )
        for place, level in enumerate(quality["levels"])
    ]
    columns = ("", "codes", "used", "perplexity", "variance left", "items moved")
    print_table(f"semantic IDs of {manifest['num_items']} items ({params.embeddings})", columns, rows)
    before, after = quality["before"], quality["after"]
    note(
        f"items without a semantic ID of their own: {before['colliding_items']} before resolving collisions, "
        f"{after['colliding_items']} after; cosine to the embedding {after['mean_cosine']:.3f}"
    )
    padded = made["embedding_rows"] - made["vocab_size"]
    note(
        f"model: {made['architecture']}, {made['num_parameters']:,} parameters, {made['vocab_size']} tokens"
        + (f" (and {padded} padding rows)" if padded else "")
    )
