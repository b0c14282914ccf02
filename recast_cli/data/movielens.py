"""MovieLens-100K, read from the recbole wheel on PyPI (its licence forbids us to redistribute it).

The wheel is only unpacked, never installed: recbole pins an old ray.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import polars as pl

from recast_cli.artifacts import file_sha256
from recast_cli.data.files import ColumnMap, interactions_frame
from recast_cli.data.source import RawTables, Source, hash_json
from recast_cli.errors import DataError, EnvironmentFault
from recast_cli.readers import READERS

REQUIREMENT = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
FOLDER = "recbole/dataset_example/ml-100k"
FILES_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}


def cache_dir() -> Path:
    """Where fetched files are kept: `$RECAST_CACHE`, else `recast` in `$XDG_CACHE_HOME` or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    place = os.environ.get("RECAST_CACHE") or f"{home}/recast"
    try:
        return Path(place).expanduser()
    except RuntimeError as exc:
        raise EnvironmentFault(f"cache folder {place}: {exc}", "set RECAST_CACHE to a folder") from exc


def cached_wheel() -> Path:
    """Where the wheel lies once it was fetched."""
    return cache_dir() / WHEEL


def source() -> Source:
    """ML-100K as a source: 943 users, 1,682 items, 100,000 events. Fetched on `load`."""
    return Source(name="ml-100k", sha256=hash_json(FILES_SHA256), load=load, facts={"files": FILES_SHA256})


def load() -> RawTables:
    """Fetch the wheel if the cache lacks it, check hashes, and read events and items.

    Raises:
        EnvironmentFault: the wheel cannot be fetched.
        DataError: the wheel or a file in it is not the one we know.
    """
    contents = read_wheel(fetch_wheel(cached_wheel()))
    atomic = READERS[".inter"]
    return RawTables(
        interactions_frame(atomic(contents["ml-100k.inter"]), ColumnMap(), "ml-100k.inter"),
        movie_items(atomic(contents["ml-100k.item"])),
    )


def movie_items(table: pl.DataFrame) -> pl.DataFrame:
    """Items with the year in the title and the genres in the text: "Toy Story (1995) | Animation, Comedy"."""
    year, genres = pl.col("release_year"), pl.col("class")
    # One film has no real title, year or genre ("unkonwn" in this edition of the data): keep what is there.
    title = (
        pl.when(year.str.contains(r"^\d{4}$"))
        .then(pl.format("{} ({})", "movie_title", year))
        .otherwise("movie_title")
    )
    listed = pl.when(genres != "unknown").then(genres.str.split(" ").list.join(", "))
    return table.select("item_id", title.alias("title"), listed.alias("genres")).select(
        pl.row_index("row") + 1,
        "item_id",
        "title",
        pl.concat_str("title", "genres", separator=" | ", ignore_nulls=True).alias("text"),
    )


def fetch_wheel(wheel: Path) -> Path:
    """The cached wheel, downloaded with pip if it is absent or damaged."""
    cache = wheel.parent
    if wheel.is_file() and file_sha256(wheel) == WHEEL_SHA256:
        return wheel
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".download.", dir=cache))
    except OSError as exc:
        raise EnvironmentFault(f"cannot write the cache {cache}: {exc.strerror}", "set RECAST_CACHE") from exc
    try:
        _pip_download(scratch, wheel)
        found = file_sha256(scratch / WHEEL)
        if found != WHEEL_SHA256:
            raise DataError(
                f"{WHEEL} has sha256 {found[:12]}..., needed {WHEEL_SHA256[:12]}...",
                "the package index served another file: fetch it from pypi.org",
            )
        os.replace(scratch / WHEEL, wheel)  # two processes may fetch at once: the last rename wins
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return wheel


def _pip_download(folder: Path, wanted: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary=:all:", "--dest", str(folder), REQUIREMENT],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not (folder / WHEEL).is_file():
        reason = (done.stderr.strip() or "pip left no wheel").splitlines()[-1]
        raise EnvironmentFault(
            f"cannot fetch {REQUIREMENT}, which carries ml-100k: {reason}",
            f"check the network and pip, or put {WHEEL} at {wanted}",
        )


def read_wheel(wheel: Path) -> dict[str, bytes]:
    """The ML-100K files inside the wheel, by name.

    Raises:
        DataError: a file is missing or has another hash.
    """
    contents: dict[str, bytes] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, needed in FILES_SHA256.items():
            try:
                contents[name] = archive.read(f"{FOLDER}/{name}")
            except KeyError as exc:
                raise DataError(f"{wheel} has no {FOLDER}/{name}", f"delete {wheel} and rerun") from exc
            found = hashlib.sha256(contents[name]).hexdigest()
            if found != needed:
                raise DataError(
                    f"{name} in {wheel} has sha256 {found[:12]}..., needed {needed[:12]}...",
                    f"delete {wheel}",
                )
    return contents
