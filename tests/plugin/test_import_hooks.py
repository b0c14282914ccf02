"""The one-shot import hooks, on throw-away modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from verl_recast import import_hooks
from verl_recast.import_hooks import after_import

Write = Callable[[dict[str, str]], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write modules (path without suffix -> source) that can be imported during the test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def make(sources: dict[str, str]) -> None:
        for name, source in sources.items():
            path = tmp_path / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(source, encoding="utf-8")
        importlib.invalidate_caches()

    yield make
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    import_hooks._pending.clear()


def test_callback_runs_once_and_sees_the_whole_module(write: Write) -> None:
    write({"hooked_a": "first = 1\nlast = 2\n"})
    seen = []
    after_import("hooked_a", lambda: seen.append(sys.modules["hooked_a"].last))
    assert seen == []
    module = importlib.import_module("hooked_a")
    assert seen == [2]
    importlib.import_module("hooked_a")
    importlib.reload(module)
    assert seen == [2]


def test_callbacks_run_in_the_order_they_were_given(write: Write) -> None:
    write({"hooked_b": ""})
    seen = []
    after_import("hooked_b", lambda: seen.append("first"))
    after_import("hooked_b", lambda: seen.append("second"))
    importlib.import_module("hooked_b")
    assert seen == ["first", "second"]


def test_callback_runs_at_once_for_an_imported_module() -> None:
    seen = []
    after_import("json", lambda: seen.append("now"))
    assert seen == ["now"]


def test_half_imported_module_is_refused(write: Write) -> None:
    write(
        {"hooked_c": "from verl_recast.import_hooks import after_import\nafter_import('hooked_c', print)\n"}
    )
    with pytest.raises(ImportError, match="hooked_c is half imported"):
        importlib.import_module("hooked_c")


def test_failing_callback_fails_the_import_and_is_tried_again(write: Write) -> None:
    write({"hooked_d": "value = 1"})
    attempts = []

    def register() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("registry is closed")

    after_import("hooked_d", register)
    with pytest.raises(RuntimeError, match="registry is closed"):
        importlib.import_module("hooked_d")
    assert "hooked_d" not in sys.modules
    importlib.import_module("hooked_d")
    assert len(attempts) == 2


def test_module_that_fails_to_import_keeps_its_callback(write: Write) -> None:
    write({"hooked_e": "import sys\nif not hasattr(sys, 'ready_for_e'): raise ImportError('not yet')\n"})
    seen = []
    after_import("hooked_e", lambda: seen.append("ran"))
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module("hooked_e")
    assert seen == []
    sys.ready_for_e = True  # type: ignore[attr-defined]
    try:
        importlib.import_module("hooked_e")
    finally:
        del sys.ready_for_e  # type: ignore[attr-defined]
    assert seen == ["ran"]


def test_looking_a_module_up_does_not_use_up_its_callback(write: Write) -> None:
    write({"hooked_f": ""})
    seen = []
    after_import("hooked_f", lambda: seen.append("ran"))
    assert importlib.util.find_spec("hooked_f") is not None
    assert seen == []
    importlib.import_module("hooked_f")
    assert seen == ["ran"]


def test_module_keeps_its_own_loader_and_spec(write: Write) -> None:
    write({"hooked_g": "value = 1"})
    after_import("hooked_g", lambda: None)
    module = importlib.import_module("hooked_g")
    assert type(module.__loader__) is SourceFileLoader
    assert type(module.__spec__.loader) is SourceFileLoader
    assert module.__spec__.origin == module.__file__
    assert module.__loader__.get_source("hooked_g") == "value = 1"


def test_submodule_of_a_package(write: Write) -> None:
    write({"pack/__init__": "", "pack/part": "value = 3", "pack/other": ""})
    seen = []
    after_import("pack.part", lambda: seen.append(sys.modules["pack.part"].value))
    importlib.import_module("pack")
    importlib.import_module("pack.other")
    assert seen == []
    from pack import part  # type: ignore[import-not-found]

    assert seen == [3] and part.value == 3


def test_missing_module_stays_missing(write: Write) -> None:
    after_import("no_such_module_here", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        importlib.import_module("no_such_module_here")
