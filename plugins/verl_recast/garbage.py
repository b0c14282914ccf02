"""Garbage collection of processes that live as long as a job.

What torch, transformers, Ray and verl leave behind when they are imported is half a million objects that
never die. Python looks through all of them whenever enough new ones have come up, and a step brings thousands
of tags and rows: 0.3 to 0.5 s in trainer, agent loop and worker each, in a step of 6 s.
"""

from __future__ import annotations

import gc

_done = False


def keep_what_is_there() -> None:
    """Leave the objects of this process to itself from now on; what comes later is looked through as before.

    Call it when a process is set up and work begins; a second call does nothing.
    """
    global _done
    if not _done:
        gc.collect()  # or what is dead already would stay
        gc.freeze()
        _done = True
