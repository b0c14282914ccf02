"""`recast doctor`: versions against the tested band, the machine, and whether verl really sees the plugin."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from recast_cli import environment, host
from recast_cli.environment import GIB, Finding
from recast_cli.probe import probe_plugin

ROOT = Path(__file__).parent.parent
PIECES = {"trainer", "estimator", "rollout", "rollout_worker", "platform"}

# --- versions


def test_pins_are_read_by_canonical_name() -> None:
    text = "# torch==1.0\n\nTransferQueue==0.1.11  # why\nPyYAML==6.0.3\nnumpy>=2\n"
    assert environment.read_pins(text) == {"transferqueue": Version("0.1.11"), "pyyaml": Version("6.0.3")}


def test_the_constraints_pin_what_doctor_judges() -> None:
    pins = environment.tested_pins()
    wanted = {"verl": "0.9.1", "torch": "2.13.0", "transformers": "5.10.4", "ray": "2.60.0"}
    assert {name: str(pins[name]) for name in wanted} == wanted
    assert {name.lower() for name in (*environment.HOST, *environment.OPTIONAL)} <= set(pins)


def test_the_constraints_lie_inside_every_band() -> None:
    # what CI installs must be what our own metadata, and verl's, allow
    requirements = environment.installed_requirements()
    assert set(requirements) == {"verl-recast", "verl", "TransferQueue", "tensordict"}
    bands = environment.allowed_bands(requirements)
    for name, version in environment.tested_pins().items():
        for by, band in bands.get(name, {}).items():
            assert band.contains(version), f"{name}=={version} against {by}'s {band}"


def test_requirements_behind_an_extra_or_another_system_do_not_count() -> None:
    lines = {
        "host": [
            "torch>=2.8",
            'torch==2.11.0; extra == "vllm"',
            'ray<1; sys_platform == "none"',
            "Ray[default]>=2.41",
        ],
        "other": ["torch<3"],
    }
    bands = environment.allowed_bands(lines)
    assert bands == {
        "torch": {"host": SpecifierSet(">=2.8"), "other": SpecifierSet("<3")},
        "ray": {"host": SpecifierSet(">=2.41")},
    }
    assert environment.allowed_bands(lines, extra="vllm")["torch"]["host"] == SpecifierSet("==2.11.0")


BANDS = {"verl": SpecifierSet(">=5.5.3,<5.11"), "ours": SpecifierSet("!=5.6.0")}


@pytest.mark.parametrize(
    ("found", "status", "message", "action"),
    [
        ("5.10.4", "ok", "5.10.4 (tested)", ""),
        ("5.10.4+cpu", "ok", "5.10.4+cpu (tested)", ""),
        ("5.9.0", "warning", "5.9.0 is allowed, 5.10.4 is tested", "fine unless something breaks"),
        ("5.11.0", "error", "5.11.0, but verl needs <5.11,>=5.5.3", "pip install 'transformers==5.10.4'"),
        ("5.6.0", "error", "5.6.0, but ours needs !=5.6.0", "pip install 'transformers==5.10.4'"),
        (None, "error", "not installed", "pip install 'transformers==5.10.4'"),
    ],
)
def test_a_version_is_judged(found: str | None, status: str, message: str, action: str) -> None:
    version = Version(found) if found else None
    finding = environment.check_version("transformers", version, Version("5.10.4"), BANDS)
    assert (finding.status, finding.message) == (status, message)
    assert finding.action.startswith(action)


def test_a_missing_extra_is_a_warning_that_names_it() -> None:
    finding = environment.check_version("faiss-cpu", None, None, {}, extra="cpu")
    assert finding == Finding(
        "faiss-cpu", "warning", "not installed", "pip install '.[cpu]' in a checkout of recast"
    )


def test_a_tested_version_outside_a_band_means_stale_metadata() -> None:
    finding = environment.check_version(
        "x", Version("2.0"), Version("2.0"), {"verl-recast": SpecifierSet("<2")}
    )
    assert (finding.status, finding.action) == ("error", "reinstall verl-recast")


def test_the_worst_finding_decides() -> None:
    ok, warning, error = (Finding("x", status, "") for status in ("ok", "warning", "error"))  # type: ignore[arg-type]
    assert environment.worst([]) == "ok"
    assert environment.worst([ok, warning, ok]) == "warning"
    assert environment.worst([warning, error, ok]) == "error"


# --- the machine


def test_a_small_machine_gets_warnings() -> None:
    small = environment.check_device(1, 4 * GIB, [])
    assert [(finding.check, finding.status) for finding in small] == [
        ("cpu", "warning"),
        ("memory", "warning"),
        ("gpu", "ok"),
    ]
    assert small[1].message == "4.0 GiB, the demo needs 8 GiB"
    assert environment.worst(environment.check_device(2, 8 * GIB, [])) == "ok"


def test_gpus_are_named() -> None:
    gpu = environment.check_device(2, None, [{"name": "H200", "memory_bytes": 139 * GIB}])[-1]
    assert gpu == Finding("gpu", "ok", "H200 (139 GiB)")


def test_cores_and_memory_are_those_of_this_process() -> None:
    assert host.cpu_count() == len(os.sched_getaffinity(0))
    memory = host.memory_bytes()
    assert memory is not None and GIB // 4 < memory < 1 << 50


def test_the_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    later = tmp_path / "a" / "b"
    assert host.nearest_parent(later) == tmp_path
    assert environment.check_disk("disk", later, 1, "free some").status == "ok"
    full = environment.check_disk("disk", later, 1 << 60, "free some")
    assert (full.status, full.action) == ("warning", "free some")


def test_a_ray_cluster_in_the_environment_is_pointed_out() -> None:
    assert environment.check_ray({}, 2)[0].status == "ok"
    cluster = environment.check_ray({"RAY_ADDRESS": "10.0.0.1:6379"}, 2)[0]
    assert cluster.status == "warning"
    assert "10.0.0.1:6379" in cluster.message and "unset RAY_ADDRESS" in cluster.action


# --- the cache


def test_the_cache_whole_damaged_empty(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"wheel").hexdigest()
    cache = tmp_path / "cache"
    assert environment.check_cache(cache, "x.whl", digest).status == "ok"  # will be fetched
    cache.mkdir()
    (cache / "x.whl").write_bytes(b"wheel")
    assert environment.check_cache(cache, "x.whl", digest).message.endswith("hash checked")
    (cache / "x.whl").write_bytes(b"whee")
    damaged = environment.check_cache(cache, "x.whl", digest)
    assert (damaged.status, "damaged" in damaged.message) == ("warning", True)


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = environment.check_cache(tmp_path / "file" / "cache", "x.whl", "")
    assert (finding.status, finding.action) == ("error", "point RECAST_CACHE at a folder you can write to")


# --- the plugin, in real child processes


def package(folder: Path, name: str, source: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)


def test_a_plugin_that_fails_to_load_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # real verl meets a broken verl_recast, and swallows its error
    package(tmp_path, "verl_recast", "import a_missing_dependency\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probed = probe_plugin()
    assert probed["registered"] is False
    assert probed["error"].startswith("ModuleNotFoundError: No module named 'a_missing_dependency'")
    assert str(tmp_path / "verl_recast" / "__init__.py") + ":1" in probed["error"]
    assert not any(facts["registered"] for name, facts in probed["pieces"].items())
    assert environment.check_plugin(probed).status == "error"


def test_a_policy_that_keeps_plugins_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other")
    probed = probe_plugin()
    assert probed["registered"] is False
    assert probed["error"] == "VERL_USE_EXTERNAL_PLUGINS=other keeps it out"
    assert environment.check_plugin(probed).action == "unset VERL_USE_EXTERNAL_PLUGINS, or add recast to it"


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise RuntimeError('broken host')", "verl: RuntimeError: broken host"),
        (
            "import os, sys; sys.stderr.write('boom\\n'); os._exit(3)",
            "the child process ended with code 3: boom",
        ),
    ],
)
def test_a_host_that_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, error: str
) -> None:
    package(tmp_path, "verl", source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probed = probe_plugin()
    assert (probed["registered"], probed["error"]) == (False, error)


def test_a_child_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "verl", "import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert probe_plugin(timeout=1)["error"] == "importing verl took over 1 s"


# --- the command


def doctor(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "recast_cli.main", "doctor", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)


def test_doctor_finds_the_plugin_registered() -> None:
    done = doctor("--json")
    report = json.loads(done.stdout)
    assert report["plugin"]["error"] is None
    assert report["plugin"]["registered"] is True
    assert set(report["plugin"]["pieces"]) == PIECES
    assert report["versions"]["verl"] == "0.9.1"
    assert report["device"]["cpu_cores"] == host.cpu_count()
    errors = [finding for finding in report["findings"] if finding["status"] == "error"]
    assert errors == []
    assert done.returncode == 0, done.stderr
    assert all(finding["action"] for finding in report["findings"] if finding["status"] != "ok")


def test_an_error_gives_exit_code_2_and_a_whole_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, "verl", "raise RuntimeError('broken host')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = doctor()
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert "error: plugin: not registered in verl: verl: RuntimeError: broken host" in lines
    assert lines[-1].startswith("hint: ")
    for check in ("python", "transformers", "plugin", "memory", "disk"):
        assert any(line.split()[1:2] == [check] for line in done.stdout.splitlines()), check


def test_a_trl_that_would_stop_verl_is_an_error_with_its_band() -> None:
    band = {"verl 0.9": environment.BESIDE_VERL["trl"]}
    assert environment.check_version("trl", Version("1.12.0"), None, band).status == "ok"
    finding = environment.check_version("trl", Version("1.16.0"), None, band)
    assert (finding.status, finding.message) == ("error", "1.16.0, but verl 0.9 needs <1.13")
