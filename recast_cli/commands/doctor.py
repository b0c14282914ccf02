"""`recast doctor`: is this machine ready?"""

from __future__ import annotations

from typing import Annotated, Any

import typer


def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON document, no table.")] = False,
) -> None:
    """Check versions, device, data cache and the plugin inside verl, and say what to do.

    Takes up to a minute: only a child process that imports verl can tell whether the plugin is registered.

    Exit code 0, or 2 when a finding is an error. Warnings do not change it.

    Examples:

        \b
        recast doctor

        \b
        recast doctor --json > doctor.json
    """
    from recast_cli import __version__, console, environment
    from recast_cli.errors import EnvironmentFault

    found = _examine()
    findings = found.pop("findings")
    status = environment.worst(findings)
    if json_output:
        facts = {"recast": __version__, "status": status, **found}
        console.print_json({**facts, "findings": [finding.as_dict() for finding in findings]})
    else:
        rows = [(finding.status, finding.check, finding.message, finding.action) for finding in findings]
        columns = ("status", "check", "found", "what to do")
        console.print_table(f"recast {__version__}", columns, rows, numeric=False)
    *others, last = [finding for finding in findings if finding.status == "error"] or [None]
    for finding in others:
        console.error(f"{finding.check}: {finding.message}")
        console.hint(finding.action)
    if last is not None:
        raise EnvironmentFault(f"{last.check}: {last.message}", last.action)


def _examine() -> dict[str, Any]:
    """Gather the facts and judge them: `plugin`, `device`, `versions`, `cache`, `findings`."""
    import os
    from pathlib import Path

    from recast_cli import console, environment, host
    from recast_cli.probe import probe_plugin

    console.note("importing verl in a child process, to see whether the plugin is registered")
    cores, memory, probed = host.cpu_count(), host.memory_bytes(), probe_plugin()
    try:
        from recast_cli.data import movielens

        cache = movielens.cache_dir()
        cached = environment.check_cache(cache, movielens.WHEEL, movielens.WHEEL_SHA256)
    except ImportError as exc:  # a broken installation is what doctor is called for
        cache = None
        cached = environment.Finding(
            "data cache", "error", f"cannot be looked at: {exc}", "mend the versions above"
        )
    return {
        "versions": environment.judged_versions(),
        "plugin": {key: probed[key] for key in ("registered", "error", "pieces")},
        "device": {"cpu_cores": cores, "memory_bytes": memory, "cuda": probed["cuda"]},
        "cache": None if cache is None else str(cache),
        "findings": [
            *environment.check_versions(),
            environment.check_plugin(probed),
            *environment.check_device(cores, memory, probed["cuda"]),
            *environment.check_ray(os.environ, cores),
            cached,
            environment.check_disk(
                "disk", Path.cwd(), environment.MIN_DISK_BYTES, "free some space before a run"
            ),
        ],
    }
