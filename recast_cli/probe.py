"""Ask a fresh child process whether stock verl sees our plugin.

Only a child can tell: verl loads plugins while it is being imported, and swallows their errors at DEBUG. The
program below is text, run with `python -c`, because nothing in `recast_cli` imports verl.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

MARK = "RECAST-PROBE "  # verl and its dependencies print on stdout too
TIMEOUT_SECONDS = 180

PROGRAM = r"""
import importlib, json, logging, sys, traceback

report = {"load_error": None, "verl_error": None, "pieces": {}, "cuda": []}


class Swallowed(logging.Handler):
    # verl/__init__.py logs "Failed to load plugin '%s': %s" with the entry point's name and the exception.
    def emit(self, record):
        name, exc = record.args if isinstance(record.args, tuple) and len(record.args) == 2 else ("", None)
        if name == "recast" and isinstance(exc, Exception):
            report["load_error"] = describe(exc)


def describe(exc):
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if "verl_recast" in f.filename]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(exc).__name__}: {exc}{where}"


def piece(name, resolve):
    try:
        found = resolve()
        if found is None:
            raise LookupError("not in verl's registry")
        report["pieces"][name] = {"registered": True, "is": f"{found.__module__}.{found.__qualname__}"}
    except Exception as exc:
        report["pieces"][name] = {"registered": False, "error": describe(exc)}


def of(module, path):
    value = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


try:
    log = logging.getLogger("verl")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(Swallowed())
    importlib.import_module("verl")
    piece("trainer", lambda: of("verl.trainer.ppo.v1", "get_trainer_cls")("recast"))
    piece("estimator", lambda: of("verl.trainer.ppo.core_algos", "get_adv_estimator_fn")("recast"))
    piece("rollout", lambda: of("verl.workers.rollout.replica", "RolloutReplicaRegistry.get")("recast_sid"))
    worker = ("recast_sid", "async")
    piece("rollout_worker", lambda: of("verl.workers.rollout.base", "get_rollout_class")(*worker))
    piece("platform", lambda: of("verl.plugin.platform.platform_manager", "PlatformRegistry.get")("cpu"))
except Exception as exc:
    report["verl_error"] = describe(exc)

try:
    cuda = of("torch", "cuda")
    for place in range(cuda.device_count()):
        facts = cuda.get_device_properties(place)
        report["cuda"].append({"name": facts.name, "memory_bytes": facts.total_memory})
except Exception:
    pass  # a broken torch already shows as verl_error

sys.stdout.write("\n" + "RECAST-PROBE " + json.dumps(report) + "\n")
"""


def probe_plugin(timeout: float = TIMEOUT_SECONDS) -> dict[str, Any]:
    """Import verl in a child process and resolve every piece the plugin registers.

    Args:
        timeout: Seconds to wait for the child.

    Returns:
        `registered` (bool: all pieces resolve), `error` (the first reason, or None), `pieces`
        (name -> registered, and what it is or the error), `cuda` (name and memory of each device).
    """
    command = [sys.executable, "-P", "-c", PROGRAM]  # -P: not the verl.py of this folder
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return {
            "registered": False,
            "error": f"importing verl took over {timeout:g} s",
            "pieces": {},
            "cuda": [],
        }
    marked = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not marked:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no output")
        error = f"the child process ended with code {done.returncode}: {last.strip()}"
        return {"registered": False, "error": error, "pieces": {}, "cuda": []}
    found = json.loads(marked[-1].removeprefix(MARK))
    missing = {name: facts["error"] for name, facts in found["pieces"].items() if not facts["registered"]}
    reasons = [found["verl_error"] and f"verl: {found['verl_error']}", found["load_error"], _policy_reason()]
    reasons += [f"{name}: {reason}" for name, reason in missing.items()]
    registered = not missing and found["verl_error"] is None
    return {
        "registered": registered,
        "error": None if registered else next(reason for reason in reasons if reason),
        "pieces": found["pieces"],
        "cuda": found["cuda"],
    }


def _policy_reason() -> str | None:
    """Whether the environment tells verl to leave our plugin out."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    allowed = {name.strip() for name in policy.split(",")}
    if policy == "auto" or "recast" in allowed:
        return None
    return f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps it out"
