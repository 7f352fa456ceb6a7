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
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING

from oobpickle import _interrupts

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
        # Twice: a Ctrl-C that is pending at the fork is raised where a hook begins; the interpreter
        # prints and drops it, and that call with it. The second call does what is left to do, and
        # has the Ctrl-C delivered again. *before* hooks run in reverse order.
        os.register_at_fork(before=_before_again, after_in_parent=_after, after_in_child=_in_child)
        os.register_at_fork(
            before=_before, after_in_parent=_after_again, after_in_child=_in_child_again
        )


def unwatch(arena: Arena) -> None:
    """The arena is gone."""
    _arenas.discard(arena)


# By thread, since several may fork at the same time: whether its hooks were interrupted.
_interrupted: dict[int, bool] = {}
_finished: set[int] = set()


def _each(call: Callable[[Arena], None]) -> bool:
    """Do it to all arenas whatever comes; tell whether it was interrupted."""
    interrupted = False
    while True:
        try:
            for arena in list(_arenas):
                call(arena)
            return interrupted
        except KeyboardInterrupt:
            interrupted = True  # a hook cannot stop the fork: do it all, deliver it afterwards


def _before() -> None:
    _interrupted[get_ident()] = _each(_prepare)


def _before_again() -> None:
    me = get_ident()
    missed = me not in _interrupted
    _interrupted[me] = _each(_prepare) or missed or _interrupted.get(me, False)


def _after() -> None:
    me = get_ident()
    _interrupted[me] = _each(_finish) or _interrupted.get(me, False)
    _finished.add(me)


def _after_again() -> None:
    me = get_ident()
    missed = me not in _finished
    _finished.discard(me)
    if _each(_finish) or _interrupted.pop(me, False) or missed:
        _interrupted.pop(me, None)
        _interrupts.repost()


def _in_child() -> None:
    _each(_begin)


def _in_child_again() -> None:
    _each(_begin)
    if _interrupted.get(get_ident(), False):
        _interrupts.repost()
    _interrupted.clear()
    _finished.clear()


def _prepare(arena: Arena) -> None:
    arena.before_fork()


def _finish(arena: Arena) -> None:
    arena.after_fork_in_parent()


def _begin(arena: Arena) -> None:
    arena.after_fork_in_child()
