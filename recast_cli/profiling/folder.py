"""Where a profile keeps what its jobs read and wrote."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from recast_cli.errors import ArtifactError
from recast_cli.outputs import atomic_dir

MARKER = ".recast-profile"  # in OUT/jobs: what lies there may be replaced


@contextlib.contextmanager
def new_folder(jobs: Path) -> Iterator[Path]:
    """A folder that takes the place of an earlier profile's if all goes well, and leaves nothing if not.

    Raises:
        ArtifactError: what is there is no folder of a profile.
    """
    if jobs.exists() and not (jobs / MARKER).exists():
        raise ArtifactError(f"{jobs} is no folder of a profile", "choose another --out")
    was_there = jobs.parent.exists()
    try:
        with atomic_dir(jobs, replace=True) as scratch:
            (scratch / MARKER).touch()
            yield scratch
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):  # the parent itself could not be made
                jobs.parent.rmdir()
        raise
