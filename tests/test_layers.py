"""Imports point down: commands -> stages -> core, plugin -> core. Nothing in `recast_cli` imports verl."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLI = ROOT / "recast_cli"
PLUGIN = ROOT / "plugins" / "verl_recast"

STAGES = ("data", "tokenizer", "training", "evaluation", "profiling")
# What a slim environment does not have, or what would make the core slow to import.
HEAVY = {"verl", "ray", "vllm", "transformers", "typer", "polars", "rich", "pydantic", "pyarrow", "faiss"}


def modules_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path: Path) -> str:
    base = PLUGIN.parent if PLUGIN in path.parents else ROOT
    parts = path.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str = "", *, package: bool = False) -> Iterator[str]:
    """Every dotted name that a source imports, wherever the statement stands.

    `from a import b` yields both `a` and `a.b`, since `b` may be a module. Relative imports are resolved.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = parts[: len(parts) - node.level + (1 if package else 0)]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(
        imported(path.read_text(encoding="utf-8"), module_name(path), package=path.name == "__init__.py")
    )


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_scanner_sees_every_kind_of_import() -> None:
    source = """
import verl.trainer as t
from os import path
def f():
    from verl import protocol
if True:
    from . import sibling
    from ..up import thing
"""
    found = set(imported(source, "pkg.sub.mod"))
    assert found >= {"verl.trainer", "os.path", "verl.protocol", "pkg.sub.sibling", "pkg.up.thing"}
    assert set(imported("from .x import y", "pkg.sub", package=True)) == {"pkg.sub.x", "pkg.sub.x.y"}
    assert within("verl.x", "verl")
    assert not within("verl_recast", "verl")


@pytest.mark.parametrize("path", modules_under(CLI / "core"), ids=module_name)
def test_a_core_module_imports_alone(path: Path) -> None:
    program = f"import sys, json; import {module_name(path)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("path", modules_under(CLI / "core"), ids=module_name)
def test_a_core_module_names_only_numpy_torch_and_core(path: Path) -> None:
    ours = {name for name in imports_of(path) if within(name, "recast_cli", "verl_recast")}
    assert {name for name in ours if not within(name, "recast_cli.core") and name != "recast_cli"} == set()
    others = {name.split(".")[0] for name in imports_of(path) - ours} - set(sys.stdlib_module_names)
    assert others <= {"numpy", "torch"}


def test_nothing_in_recast_cli_imports_verl() -> None:
    offenders = {
        module_name(path): sorted(bad)
        for path in modules_under(CLI)
        if (bad := {name for name in imports_of(path) if within(name, "verl", "verl_recast", "vllm")})
    }
    assert offenders == {}


def test_importing_all_of_recast_cli_loads_no_verl() -> None:
    # catches what a scan of import statements cannot: import_module("verl"), or a library that pulls it in
    names = [module_name(path) for path in modules_under(CLI) if path.name != "__main__.py"]
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print([name for name in ("verl", "verl_recast", "vllm") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_meet_only_in_artifacts(stage: str) -> None:
    others = [f"recast_cli.{other}" for other in (*STAGES, "commands", "main") if other != stage]
    offenders = {
        module_name(path): sorted(bad)
        for path in modules_under(CLI / stage)
        if (bad := {name for name in imports_of(path) if within(name, *others)})
    }
    assert offenders == {}


def test_the_plugin_takes_only_the_core_and_what_reads_artifacts() -> None:
    shared = ("core", "artifacts", "errors", "readers", "vocabulary")
    allowed = tuple(f"recast_cli.{name}" for name in shared)
    offenders = {
        module_name(path): sorted(bad)
        for path in modules_under(PLUGIN)
        if (
            bad := {n for n in imports_of(path) if within(n, "recast_cli") and not within(n, *allowed)}
            - {"recast_cli"}
        )
    }
    assert offenders == {}


def test_the_top_of_the_package_stays_below_the_stages() -> None:
    # shared modules (artifacts, errors, console, ...) are used by stages, so they may not use them
    above = [f"recast_cli.{name}" for name in (*STAGES, "commands", "main")]
    offenders = {
        path.name: sorted(bad)
        for path in CLI.glob("*.py")
        if path.name not in ("main.py", "demo.py")
        and (bad := {name for name in imports_of(path) if within(name, *above)})
    }
    assert offenders == {}


def test_verl_finds_the_plugin_by_its_entry_point() -> None:
    (entry,) = (e for e in importlib.metadata.entry_points(group="verl.plugins") if e.name == "recast")
    assert entry.value == "verl_recast"


def test_the_command_is_installed() -> None:
    (entry,) = (e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "recast")
    assert entry.value == "recast_cli.main:main"
