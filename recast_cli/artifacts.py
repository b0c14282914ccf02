"""Artifacts: folders that stages hand to each other, each with a manifest, each written all or nothing.

A stage never imports another stage. It reads its parent's folder through `load_manifest`, which refuses a
folder of the wrong kind or format, and `require_parent`, which refuses one built from something else.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from recast_cli import __version__
from recast_cli.errors import ArtifactError
from recast_cli.outputs import atomic_text

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# The weights of a large model take longer to hash than to load; whoever loads them checks what it gets.
MAX_HASHED_BYTES = 256 << 20


@functools.lru_cache(maxsize=4096)
def _sha256_once(path: Path, mtime_ns: int, size: int) -> str:
    return file_sha256(path)


def weights_sha256(model: Path) -> dict[str, str]:
    """File name -> hash of the weights of a Hugging Face folder: what identifies a model."""
    return {path.name: file_sha256(path) for path in weight_files(model)}


def weight_files(model: Path) -> list[Path]:
    """The weights of a Hugging Face folder."""
    return sorted([*model.glob("*.safetensors"), *model.glob("pytorch_model*.bin")])


def read_json_lines(path: Path) -> list[Any]:
    """A file of one JSON document a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_manifest(
    folder: Path,
    kind: str,
    *,
    parents: dict[str, str] | None = None,
    leave_out: Collection[str] = (),
    **facts: Any,
) -> dict[str, Any]:
    """Write `manifest.json` over every file now in `folder` and return it.

    Args:
        folder: The scratch folder of an artifact, complete but for its manifest.
        kind: `dataset`, `tokenizer`, `run`, ...
        parents: kind -> identity (see `identity`) of each artifact it was built from.
        leave_out: Names of subfolders and files that may be deleted later: they are not listed.
        facts: Anything JSON: seed, parameters, counts.
    """
    files = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST and path.relative_to(folder).parts[0] not in leave_out
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "recast_version": __version__,
        "parents": parents or {},
        **facts,
        "files": files,
    }
    atomic_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def find_existing(
    out: Path, kind: str, difference: Callable[[dict[str, Any]], str], *, overwrite: bool
) -> dict[str, Any] | None:
    """The manifest of the artifact in `out` if it may be reused; None if `out` is free or may be replaced.

    Args:
        difference: Manifest -> what keeps it from being reused ("with seed 1, needed 2"); empty if nothing.
        overwrite: Replace an artifact of this kind, even a damaged one; never another folder, and never files
            that are no part of it.

    Raises:
        ArtifactError: `out` holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_artifact(out, kind):
        raise ArtifactError(f"{out} already exists and holds no {kind}", "choose another --out")
    if overwrite:
        _refuse_foreign(out, kind)
        return None
    try:
        manifest = load_manifest(out, kind)
    except ArtifactError as exc:
        raise ArtifactError(exc.message, "pass --overwrite, or choose another --out") from exc
    if found := difference(manifest):
        raise ArtifactError(f"{out} holds a {kind} {found}", "choose another --out or pass --overwrite")
    return manifest


def _refuse_foreign(out: Path, kind: str) -> None:
    """Raises ArtifactError for a file in an artifact's folder that its manifest does not list."""
    try:
        ours = {MANIFEST, *json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (ValueError, KeyError, TypeError):
        return  # damaged beyond telling
    for path in sorted(path for path in out.rglob("*") if not path.is_dir()):
        name = path.relative_to(out).as_posix()
        if name not in ours:
            raise ArtifactError(
                f"{out} holds {name}, which is no part of the {kind}: --overwrite would remove it",
                "move it away, or choose another --out",
            )


def is_artifact(folder: Path, kind: str) -> bool:
    """True if the folder's manifest says that it is of this kind, be it damaged otherwise."""
    try:
        text = (Path(folder) / MANIFEST).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return f'"kind": "{kind}"' in text


# Types of what readers rely on, beside `parents` and `files`.
FACTS: dict[str, dict[str, type]] = {
    "dataset": {
        **dict.fromkeys(("source", "params", "rows", "dropped", "k_core_removed"), dict),
        **dict.fromkeys(("num_items", "num_users", "num_interactions"), int),
        **dict.fromkeys(("tie_share", "target_tie_share"), float),
    },
    "tokenizer": {"params": dict, "num_items": int, "num_levels": int, "quality": dict, "model": dict},
    "warm-start": {"params": dict, "seed": int, "epochs": list, "best_epoch": int},
    "run": {"recipe": dict, "start": dict},
}


def load_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read the manifest of an artifact and check the folder against it.

    Raises:
        ArtifactError: no manifest, unreadable, of another kind or format, a fact missing or of another type,
            or a listed file missing or changed (of those above `MAX_HASHED_BYTES` only: missing).
    """
    path = Path(folder) / MANIFEST
    command = {"dataset": "recast prepare-data", "tokenizer": "recast build-tokenizer"}.get(
        kind, "recast train"
    )
    if not path.is_file():
        raise ArtifactError(f"no {kind} in {folder} ({MANIFEST} not found)", f"make one with `{command}`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise ArtifactError(f"{path} is not readable JSON: {exc}", f"rerun `{command}`") from exc
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtifactError(
            f"{folder} holds a {found!r} artifact, needed {kind!r}", f"point at a folder of `{command}`"
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format version {manifest.get('format_version')}, "
            f"this recast reads {FORMAT_VERSION}",
            f"rerun `{command}`",
        )
    for name, needed in {"parents": dict, "files": dict, **FACTS.get(kind, {})}.items():
        if name not in manifest:
            raise ArtifactError(f"{path} has no {name}, needed {needed.__name__}", f"rerun `{command}`")
        found = manifest[name]
        if not isinstance(found, needed):
            raise ArtifactError(
                f"{path}: {name} is {type(found).__name__}, needed {needed.__name__}", f"rerun `{command}`"
            )
    missing = [name for name in manifest["files"] if not (Path(folder) / name).is_file()]
    if missing:
        raise ArtifactError(
            f"{folder} lacks {missing[0]} (and {len(missing) - 1} more)", f"rerun `{command}`"
        )
    for name, digest in manifest["files"].items():
        file = (Path(folder) / name).resolve()
        stat = file.stat()
        if stat.st_size > MAX_HASHED_BYTES:
            continue
        if _sha256_once(file, stat.st_mtime_ns, stat.st_size) != digest:
            raise ArtifactError(
                f"{Path(folder) / name} differs from its manifest", f"rerun `{command}` with --overwrite"
            )
    return manifest


def identity(manifest: dict[str, Any]) -> str:
    """Content identity of an artifact: a hash of its kind, parents and files (not of dates or paths)."""
    content = {key: manifest[key] for key in ("kind", "parents", "files")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def require_parent(child: dict[str, Any], parent: dict[str, Any], child_dir: Path, parent_dir: Path) -> None:
    """Refuse a child that was not built from this parent.

    Raises:
        ArtifactError: naming both folders and what differs.
    """
    kind = parent["kind"]
    found, needed = child["parents"].get(kind), identity(parent)
    if found == needed:
        return
    detail = ""
    if child.get("num_items") is not None and child["num_items"] != parent.get("num_items"):
        detail = f" ({child['num_items']} items against {parent.get('num_items')})"
    raise ArtifactError(
        f"{child['kind']} {child_dir} was built for another {kind} than {parent_dir}{detail}",
        f"rerun the command that made {child_dir} on {parent_dir}",
    )
