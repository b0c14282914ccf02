"""Garbage collection of processes that live as long as a job.

What torch, transformers, Ray and verl leave behind when they are imported never dies. Python looks through
all of it whenever enough new objects have come up, and a step brings thousands of tags and rows: 0.3 to 0.5 s
in each process, in a step of 6 s (docs/log.md).
"""

from __future__ import annotations

import gc

_done = False


def keep_what_is_there() -> None:
    """Leave what this process has made so far out of garbage collection, what comes later in.

    Call it when a process is set up and work begins; a second call does nothing.
    """
    global _done
    if not _done:
        gc.collect()  # or what is dead already would stay
        gc.freeze()
        _done = True
