"""What a process has when its work begins is collected once and then left alone."""

from __future__ import annotations

from fresh import run_fresh


def test_what_is_dead_goes_and_what_lives_is_looked_through_no_more() -> None:
    found, process = run_fresh("""
        import gc, json, sys, weakref
        from verl_recast.garbage import keep_what_is_there

        class Node: pass

        def ring():
            node = Node()
            node.itself = node
            return weakref.ref(node)

        gc.collect()
        living, dead = len(gc.get_objects()), ring()
        keep_what_is_there()
        frozen, watched = gc.get_freeze_count(), len(gc.get_objects())
        later = ring()
        keep_what_is_there()
        unchanged = gc.get_freeze_count() == frozen
        gc.collect()
        found = living, frozen, watched, dead() is None, unchanged, later() is None
        json.dump(found, open(sys.argv[1], "w"))
    """)
    assert process.returncode == 0, process.stderr
    living, frozen, watched, dead_gone, unchanged, later_gone = found
    assert frozen >= 0.9 * living and watched < 0.1 * living
    assert dead_gone, "a ring that died before must not be kept for ever"
    assert unchanged, "the second call does nothing"
    assert later_gone, "what dies later is collected as before"
