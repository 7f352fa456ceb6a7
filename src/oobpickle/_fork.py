"""The fork hooks: one registration for the life of the process, asked by each arena.

**What.** `watch` makes an arena take part in every later fork of this process.

**How it works.** ``os.register_at_fork`` cannot be undone, so one set of hooks is registered with
the first arena and looks at a weak set of arenas from then on. *before* keeps other threads out
and turns what this process holds into ordinary memory; *after* lets them in again, or makes the
child a participant of its own.

**Lifetime.** With no arena the hooks do nothing. They run for ``os.fork`` and everything built on
it, not for ``subprocess`` or ``posix_spawn``, which need nothing: the new program inherits no
mapping.

**When it cannot.** A hook cannot prevent a fork. A fork from C code runs no hooks; the child then
must not use what it inherited."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from oobpickle._arena import Arena

_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()
_registered = False


def watch(arena: Arena) -> None:
    """Let the arena take part in every fork from now on."""
    global _registered
    _arenas.add(arena)
    if not _registered:
        _registered = True
        # Twice: a Ctrl-C that is pending at the fork is raised where a hook begins, and dropped by
        # the interpreter together with that call. The second call does what is left to do. Threads
        # may fork at the same time, so nothing is remembered here from one hook to the next.
        for _ in range(2):
            os.register_at_fork(
                before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
            )


def unwatch(arena: Arena) -> None:
    """The arena is gone."""
    _arenas.discard(arena)


def _before() -> None:
    for arena in list(_arenas):
        arena.before_fork()


def _after_in_parent() -> None:
    for arena in list(_arenas):
        arena.after_fork_in_parent()


def _after_in_child() -> None:
    for arena in list(_arenas):
        arena.after_fork_in_child()
