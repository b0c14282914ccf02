"""`pip install` of our wheel leaves the versions of an existing verl[vllm] environment as they are.

pip resolves against an environment that holds the metadata of those versions and no files. Of other packages
it reads metadata only, so no torch is fetched. Without a package index there is nothing to resolve: skipped.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from network import missing
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PINNED = ROOT / "constraints" / "verl-vllm.txt"


def pip(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def versions() -> dict[str, str]:
    """Canonical name -> version of every package of the environment."""
    lines = [line for line in PINNED.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def environment(versions: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment in which pip finds those versions installed."""
    if pip("index", "versions", "verl").returncode != 0:
        missing("no package index answers")
    folder = tmp_path_factory.mktemp("existing") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in versions.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.fixture(scope="module")
def wheel(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = pip("wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("verl_recast-*.whl")
    return path


def installed_by(environment: Path, report: Path, *requirements: object) -> dict[str, str]:
    """Canonical name -> version of what pip would install for the requirements."""
    options = ["--dry-run", "--quiet", "--use-feature=fast-deps", "--report", report]
    done = pip("--python", environment, "install", *options, *requirements)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {canonicalize_name(each["metadata"]["name"]): each["metadata"]["version"] for each in found}


def test_the_environment_is_the_one_that_verl_pins(versions: dict[str, str]) -> None:
    pins = {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0", "transformers": "5.9.0"}
    assert {name: versions[name] for name in pins} == pins


def test_our_wheel_changes_no_version(
    environment: Path, wheel: Path, versions: dict[str, str], tmp_path: Path
) -> None:
    constraints = (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8")
    (polars,) = re.findall(r"^polars==\S+", constraints, flags=re.MULTILINE)  # the newest may need more
    found = installed_by(environment, tmp_path / "report.json", wheel, polars)
    assert "verl-recast" in found
    assert {name: version for name, version in found.items() if name in versions} == {}
    added = {name for name in found if not name.startswith("polars")}
    assert added == {"verl-recast"}, "what verl and vLLM do not bring"


def test_a_pin_that_is_too_tight_would_be_seen(
    environment: Path, wheel: Path, versions: dict[str, str], tmp_path: Path
) -> None:
    """What CI itself runs on (constraints/cpu.txt) would replace the environment's transformers."""
    constraints = (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8")
    (pin,) = re.findall(r"^transformers==\S+", constraints, flags=re.MULTILINE)
    found = installed_by(environment, tmp_path / "report.json", wheel, pin)
    assert f"transformers=={found['transformers']}" == pin
    assert found["transformers"] != versions["transformers"]
