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
_searching: set[str] = set()


class _RunAfter(importlib.abc.Loader):
    """Loads with the module's own loader, then runs the callbacks."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # leave no trace in the module
        self.loader.exec_module(module)
        for callback in _pending.get(module.__name__, []):
            callback()
        _pending.pop(module.__name__, None)  # not before: an import that failed may be tried again


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _pending or fullname in _searching:
            return None
        _searching.add(fullname)  # the search below comes back here, and goes on to the next finder
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            _searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RunAfter(spec.loader)
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
