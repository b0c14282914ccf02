"""For tests that write into an artifact by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recast_cli.artifacts import FACTS, MANIFEST, file_sha256


def reseal(folder: Path) -> None:
    """Make the manifest agree with the files it lists as they are now."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"] = {name: file_sha256(folder / name) for name in manifest["files"]}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def whole(kind: str, **facts: Any) -> dict[str, Any]:
    """`facts`, and an empty value for every other fact that a manifest of this kind must have."""
    return {name: needed() for name, needed in FACTS[kind].items()} | facts
