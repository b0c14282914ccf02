"""Run a callback once, right after a named module has been imported.

verl loads plugins at the end of `import verl`, in every process. Importing its trainer there would cost
seconds in each of them, so each registration waits for the module it extends.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_pending: dict[str, list[Callable[[], None]]] = {}


class _RunAfter(importlib.abc.Loader):
    """Loads with the module's own loader, then runs the callbacks."""

    def __init__(self, loader: importlib.abc.Loader, callbacks: list[Callable[[], None]]) -> None:
        self.loader = loader
        self.callbacks = callbacks

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # leave no trace in the module
        self.loader.exec_module(module)
        for callback in self.callbacks:
            callback()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        callbacks = _pending.pop(fullname, None)
        if callbacks is None:
            return None
        spec = importlib.util.find_spec(
            fullname
        )  # comes back here, finds nothing pending, goes on to the next finder
        if spec is None or spec.loader is None:
            return spec
        spec.loader = _RunAfter(spec.loader, callbacks)
        return spec


_finder = _Finder()


def after_import(name: str, callback: Callable[[], None]) -> None:
    """Run `callback` after module `name` is imported; at once if it already is (fully) imported."""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    if module is not None and not getattr(spec, "_initializing", False):
        callback()
        return
    if module is not None:
        raise ImportError(f"{name} is half imported: the plugin cannot hook it any more")
    _pending.setdefault(name, []).append(callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
