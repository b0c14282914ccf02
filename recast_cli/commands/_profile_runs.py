"""`recast profile --from-run`: the phases of runs that are there already."""

from __future__ import annotations

from pathlib import Path

from recast_cli.errors import ArtifactError


def show_runs(folders: list[Path], out: Path, *, json_output: bool) -> None:
    """Print the phases of finished runs and write runs.json, runs.png and runs.html."""
    import json

    from recast_cli.console import note, print_json, print_table
    from recast_cli.outputs import atomic_text
    from recast_cli.profiling import finished
    from recast_cli.profiling.page import page

    runs = [finished.read_run(folder) for folder in folders]
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"--out {out} is a file, needed a folder", "choose another --out")
    atomic_text(out / "runs.json", json.dumps({"runs": runs}, indent=2) + "\n")
    finished.plot(runs, out / "runs.png")
    table = finished.table(runs)
    text = page("Phases of a step", [], out / "runs.png", "seconds of each phase, run by run", table)
    atomic_text(out / "runs.html", text)
    if json_output:
        print_json(runs)
    else:
        print_table("Phases of a step", *table)
    note(f"wrote {out / 'runs.json'}, {out / 'runs.png'} and {out / 'runs.html'}")
