"""Run one of verl's entry points as a child process: log to a file, progress from its metrics, errors in
one line; and read what it leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recast_cli.errors import ArtifactError, EnvironmentFault
from recast_cli.host import nearest_parent
from recast_cli.probe import probe_plugin

OnStep = Callable[[dict[str, Any]], None]

DAMAGED = "the run is damaged: pass --overwrite or choose another out="  # hint of what cannot be read

_POLL_SECONDS = 0.2
# A line that names what went wrong, as Python, Ray ("(actor pid=1) ...") and torchrun ("[rank0]: ...")
# print it.
_CAUSE = re.compile(
    r"^(?:\x1b\[\d+m)?(?:\([^)]*\)\s*|\[rank\d+\]:\s*)?(?:\x1b\[\d+m)?\s*"
    r"((?:[\w.]+\.)?\w*(?:Error|Exception|Fault): .+)"
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """verl's file log: one `{"step": n, "data": {...}}` per line; a torn last line is left out."""
    return _read_from(path, 0)[0]


def _read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole records from a byte offset on, and the offset behind them."""
    if not path.exists():
        return [], offset
    with path.open("rb") as log:
        log.seek(offset)
        text = log.read()
    text = text[: text.rfind(b"\n") + 1]
    try:
        records = [json.loads(line) for line in text.splitlines()]
        return [{"step": int(record["step"]), **record["data"]} for record in records], offset + len(text)
    except (ValueError, KeyError, TypeError) as exc:
        raise ArtifactError(
            f"{path} holds a line that is no record of a step ({exc!r:.80})",
            DAMAGED,
        ) from exc


def checkpoints(folder: Path) -> dict[int, Path]:
    """verl's checkpoints, whole or torn, by their step in ascending order."""
    named = ((path.name.removeprefix("global_step_"), path) for path in folder.glob("global_step_*"))
    return dict(sorted((int(step), path) for step, path in named if step.isascii() and step.isdigit()))


def hf_checkpoints(folder: Path) -> list[Path]:
    """Hugging Face folders of verl's checkpoints, by step."""
    inner = [
        next((sub for sub in (step / "huggingface", step / "actor" / "huggingface") if sub.is_dir()), None)
        for step in checkpoints(folder).values()
    ]
    return [path for path in inner if path is not None]


def cause_of(log: Path) -> str:
    """The last exception line of a log, with the name of the Ray actor that it is about, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    causes = [(place, match[1]) for place, line in enumerate(lines) if (match := _CAUSE.match(line))]
    if not causes:
        return lines[-1][:300] if lines else "it printed nothing"
    place, cause = causes[-1]
    # Ray says who died below it: "\tclass_name: X", "\tactor_id: ...", "\tpid: ...", "\tname: ...".
    about = [line.split(":", 1) for line in lines[place + 1 : place + 6] if line.startswith("\t")]
    facts = {name.strip(): value.strip() for name, *rest in about for value in rest}
    who = [facts[name] for name in ("class_name", "name") if name in facts]
    return cause[:300] + (f" ({', '.join(who)})" if who else "")


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse to start on a disk that cannot hold the checkpoints of a job (and 64 MiB of logs).

    Raises:
        EnvironmentFault: naming what is free and what is needed.
    """
    needed = num_bytes + (64 << 20)
    free = shutil.disk_usage(nearest_parent(folder.resolve())).free
    if free < needed:
        raise EnvironmentFault(
            f"the disk of {folder} has {free >> 20} MiB free, the checkpoints need {needed >> 20} MiB",
            "free some space or choose another out=",
        )


def require_cluster(needed: int) -> None:
    """Refuse a running Ray cluster (`RAY_ADDRESS`) with too few CPUs: verl would wait there for ever.

    Raises:
        EnvironmentFault: it is too small, or none answers.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return
    program = (
        "import ray; ray.init(logging_level='ERROR', log_to_driver=False); "
        "print(int(ray.cluster_resources().get('CPU', 0)))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=90, check=True
        )
        found = int(done.stdout.split()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as exc:
        lines = (getattr(exc, "stderr", None) or "no answer within 90 s").strip().splitlines()
        raise EnvironmentFault(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {lines[-1][:200]}",
            "start it, or unset RAY_ADDRESS for a Ray of this job's own",
        ) from exc
    if found < needed:
        raise EnvironmentFault(
            f"the Ray cluster at RAY_ADDRESS={address} has {found} CPUs, verl needs {needed} and would wait "
            "for ever",
            f"start it with --num-cpus={needed} (they are logical), or unset RAY_ADDRESS",
        )


def _end_with_parent() -> Callable[[], None] | None:
    """What a child calls before it becomes the job, so that not even a kill of ours leaves it behind.

    Linux: the system sends it SIGTERM when its parent dies, and Ray's processes end with their driver.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork, after which little is safe
    set_parent_death_signal = 1
    return lambda: prctl(set_parent_death_signal, signal.SIGTERM)


def run_verl(
    module: Sequence[str],
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    cwd: Path,
    log: Path,
    metrics: Path,
    ray_cpus: int = 0,
    on_step: OnStep | None = None,
    append: bool = False,
) -> list[dict[str, Any]]:
    """Run `python -m MODULE ARGUMENTS` to its end and return its metrics, a record per step.

    Args:
        module: What follows `python -m`, for example `["verl.trainer.main_ppo"]`.
        arguments: Hydra overrides.
        environment: Added to the caller's environment.
        cwd: Working directory (Hydra writes its `outputs/` there).
        log: File for stdout and stderr.
        metrics: verl's file log.
        ray_cpus: CPUs that the job reserves on Ray, 0 if it does not use it.
        on_step: Called with each new record.
        append: The log goes on behind what is in it.

    Raises:
        EnvironmentFault: the process failed; names the cause and the log.
    """
    if ray_cpus:
        require_cluster(ray_cpus)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", *module, *arguments]
    offset = 0
    with log.open("a" if append else "w", encoding="utf-8") as sink:
        child = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C reaches Ray's workers through us, once
            preexec_fn=_end_with_parent(),
        )
        try:
            while child.poll() is None:
                time.sleep(_POLL_SECONDS)
                offset = _report(metrics, offset, on_step)
        except BaseException:
            _stop(child)
            raise
    _report(metrics, offset, on_step)
    if child.returncode:
        raise _fault(f"{module[-1]} exited with {child.returncode}", cause_of(log), log)
    return read_metrics(metrics)


# What verl says when it does not know a piece of the plugin. Why it was not loaded, verl keeps to itself.
_UNREGISTERED = (
    "Unknown trainer 'recast'",
    "Unknown rollout mode: recast_",
    "Unknown platform 'cpu'",
    "Unknown advantage estimator",
)


def _fault(ended: str, cause: str, log: Path) -> EnvironmentFault:
    """How a job ended, why, and what to do about it."""
    hint = f"read {log}"
    if any(sign in cause for sign in _UNREGISTERED):
        reason = probe_plugin()["error"] or "it loads in a fresh process"
        cause = f"the plugin is not registered in verl ({reason}): {cause}"
        hint = f"run `recast doctor`; the log is {log}"
    elif "No space left" in cause:
        hint = f"free some space on the disk of {log.parent}"
    return EnvironmentFault(f"{ended}: {cause}", hint)


def _report(metrics: Path, offset: int, on_step: OnStep | None) -> int:
    """Pass on what was logged since `offset`."""
    if on_step is None:
        return offset
    records, offset = _read_from(metrics, offset)
    for record in records:
        on_step(record)
    return offset


def _stop(child: subprocess.Popen) -> None:
    """End the child's whole process group: politely, then for good."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(child.pid, signal.SIGINT)
        child.wait(10.0)
    with contextlib.suppress(ProcessLookupError):  # raised if nobody is left
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(5.0)
