"""The versions of the host that this plugin is tested with; outside of them it fails closed.

verl's trainer API moves between minor versions, and a piece that no longer fits would train on something
else without a word.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

# Also in pyproject.toml, where a resolver reads them (a test compares). Of vLLM both ends run in tests.
TESTED = {"verl": ">=0.9.1,<0.10", "TransferQueue": ">=0.1.10,<0.2", "vllm": ">=0.24,<0.29"}
HOST = ("verl", "TransferQueue")
OVERRIDE = "RECAST_UNTESTED_HOST"


def installed(name: str) -> str | None:
    """Version of a distribution, None without one; verl's is the one that was imported."""
    imported = getattr(sys.modules.get(name), "__version__", None)
    if imported is not None:
        return str(imported)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def problem(name: str) -> str | None:
    """Why this version of the host is refused; None where it is tested, absent, or asked for."""
    found, band = installed(name), TESTED[name]
    if found is None or os.environ.get(OVERRIDE) == "1":
        return None
    with contextlib.suppress(InvalidVersion):  # "dev", from a checkout without tags
        if SpecifierSet(band).contains(found, prereleases=True):
            return None
    return (
        f"{name} {found} is outside the versions that verl_recast is tested with ({band}): install one of "
        f"them, or set {OVERRIDE}=1 to try this one"
    )


def require_tested(*names: str) -> None:
    """Refuse a version outside the band, of any of `names`.

    Raises:
        RuntimeError: with the band, the version found and the variable that overrides.
    """
    for name in names:
        found = problem(name)
        if found is not None:
            raise RuntimeError(found)
