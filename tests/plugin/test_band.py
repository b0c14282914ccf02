"""A host outside the tested band: the plugin stays away, and says so to whoever asks for it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import verl
from fresh import run_fresh
from packaging.requirements import Requirement

from verl_recast import band

OTHER_VERL = """
import json, os, sys
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
import verl
verl.__version__ = "0.10.1"
found = {}
try:
    import verl_recast
    found["import"] = "worked"
except ImportError as exc:
    found["import"] = str(exc)

from hydra import compose, initialize_config_dir
from verl.trainer.ppo import core_algos
from verl.utils.config import validate_config
found["registered"] = "recast" in core_algos.ADV_ESTIMATOR_REGISTRY
names = ("rollout.log_prob_", "ref.log_prob_", "actor.ppo_")
micro = [f"actor_rollout_ref.{name}micro_batch_size_per_gpu=8" for name in names]
folder = os.path.join(os.path.dirname(verl.__file__), "trainer", "config")
for estimator in ("grpo", "recast"):
    with initialize_config_dir(folder, version_base=None):
        named = ["actor_rollout_ref.rollout.name=vllm", f"algorithm.adv_estimator={estimator}"]
        config = compose("ppo_trainer", overrides=[*named, *micro])
    try:
        validate_config(config, use_reference_policy=False, use_critic=False)
        found[estimator] = "accepted"
    except (RuntimeError, ValueError) as exc:
        found[estimator] = str(exc)
with open(sys.argv[1], "w") as out:
    json.dump(found, out)
"""

REFUSAL = (
    "verl 0.10.1 is outside the versions that verl_recast is tested with (>=0.9.1,<0.10): install one of "
    "them, or set RECAST_UNTESTED_HOST=1 to try this one"
)


def test_another_verl_is_refused_by_name_and_stock_jobs_go_on() -> None:
    found, process = run_fresh(OTHER_VERL)
    assert found is not None, process.stderr[-2000:]
    assert found == {"import": REFUSAL, "registered": False, "grpo": "accepted", "recast": REFUSAL}
    assert "verl_recast" not in process.stderr, "who does not ask for it hears nothing of it"


def test_it_is_said_aloud_where_the_cpu_platform_was_asked_for() -> None:
    _, process = run_fresh(OTHER_VERL, VERL_PLATFORM="cpu")
    assert REFUSAL in process.stderr


def test_the_variable_overrides() -> None:
    found, process = run_fresh(OTHER_VERL, RECAST_UNTESTED_HOST="1")
    assert found is not None, process.stderr[-2000:]
    assert found["import"] == "worked" and found["registered"] and found["grpo"] == "accepted"
    assert "trainer.v1.trainer_mode is sync" in found["recast"]  # now our check of the config speaks


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("0.9.0", False),
        ("0.9.1", True),
        ("0.9.7", True),
        ("0.9.2.dev0", True),
        ("0.10.0", False),
        ("dev", False),
    ],
)
def test_the_band(version: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl, "__version__", version)
    assert (band.problem("verl") is None) == accepted


def test_the_band_is_the_one_that_a_resolver_reads() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["vllm"]
    needed = {need.name: need for need in map(Requirement, reversed(lines))}
    for name, versions in band.TESTED.items():
        assert needed[name].specifier == Requirement(f"{name}{versions}").specifier


def test_another_queue_is_refused_like_another_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"verl": "0.9.1", "TransferQueue": "0.2.0"}
    monkeypatch.setattr(band, "installed", versions.get)
    monkeypatch.delenv(band.OVERRIDE, raising=False)
    needed = r"TransferQueue 0\.2\.0 is outside .*\(>=0\.1\.10,<0\.2\): .* set RECAST_UNTESTED_HOST=1"
    with pytest.raises(RuntimeError, match=needed):
        band.require_tested(*band.HOST)
    monkeypatch.setenv(band.OVERRIDE, "1")
    band.require_tested(*band.HOST)
