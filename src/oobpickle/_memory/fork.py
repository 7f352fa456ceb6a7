"""The fork hooks: one registration for the life of the process, asked by each arena.

**What.** `watch` has an arena told of every later fork of this process.

**How it works.** ``os.register_at_fork`` cannot be undone, so one set of hooks is registered with
the first arena and looks at a weak set of arenas from then on. *before* keeps other threads out
and turns what this process holds into ordinary memory; *after* lets them in again, or makes the
child a participant of its own.

**Lifetime.** With no arena the hooks do nothing. They run for ``os.fork`` and everything built on
it, not for ``subprocess`` or ``posix_spawn``, which need nothing: the new program inherits no
mapping.

C code that forks by itself, as a pre-forking server does, may tell Python only afterwards, in the
child (``PyOS_AfterFork_Child``). The child sees that no *before* hook ran for this fork, and makes
its own copy of what the parent holds before anything else: see `Arena.after_fork_in_child`.

**When it cannot.** A hook cannot prevent a fork. What the parent does with a received array between
such a fork from C and the child's hook, the child may see. A fork from C code that runs no hooks at
all is not noticed; the child then must not use what it inherited."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Final, Protocol

from oobpickle import _faults, _interrupts
from oobpickle._memory.mutex import fork_wheel


class Forked(Protocol):
    """What every fork is told to."""

    def before_fork(self) -> None: ...
    def after_fork_in_parent(self) -> None: ...
    def after_fork_in_child(self, *, prepared: bool = True) -> None: ...


_arenas: weakref.WeakSet[Forked] = weakref.WeakSet()
_registered = False


def watch(arena: Forked) -> None:
    """Tell the arena of every fork from now on."""
    global _registered
    _arenas.add(arena)
    if not _registered:
        _registered = True
        os.register_at_fork(after_in_parent=fork_wheel.rotate)
        # Twice: a Ctrl-C that is pending at the fork is raised where a hook begins; the interpreter
        # prints and drops it, and that call with it. The second call does what is left to do, and
        # has the Ctrl-C delivered again. *before* hooks run in reverse order.
        os.register_at_fork(before=_before_again, after_in_parent=_after, after_in_child=_in_child)
        os.register_at_fork(
            before=_before, after_in_parent=_after_again, after_in_child=_in_child_again
        )


def unwatch(arena: Forked) -> None:
    """The arena is gone."""
    _arenas.discard(arena)


class _Fork:
    """A fork that a thread is in the middle of.

    Attributes
    ----------
    ready : bool
        Both *before* hooks were called.
    finished : bool
        The first *after* hook was called.
    interrupt : BaseException or None
        What came in between.
    turn : int
        What `fork_wheel` showed: another number, and the fork is over.
    """

    __slots__ = ("finished", "interrupt", "ready", "turn")

    def __init__(self) -> None:
        self.ready = self.finished = False
        self.turn = fork_wheel[0]
        self.interrupt: BaseException | None = None


# By thread, since several may fork at the same time. A list of them, since a signal handler may
# fork below the hooks of a fork.
_forks: dict[int, list[_Fork]] = {}
_MOST_INTERRUPTS: Final = 100


def _each(call: Callable[[Forked], None]) -> BaseException | None:
    """Do it to all arenas, whatever comes in between; return what came."""
    interrupt: BaseException | None = None
    for _ in range(_MOST_INTERRUPTS):
        try:
            for arena in list(_arenas):
                call(arena)
            break
        except BaseException as error:  # a hook cannot stop the fork: finish, deliver it afterwards
            interrupt = error
    return interrupt


def _before() -> None:
    fork = _Fork()
    _forks.setdefault(get_ident(), []).append(fork)
    fork.interrupt = _each(_prepare)


def _before_again() -> None:
    forks, missed = _forks.setdefault(get_ident(), []), None
    if not forks or forks[-1].ready:
        forks.append(_Fork())
        missed = _what_was_missed()
    fork = forks[-1]
    fork.ready = True
    fork.interrupt = _each(_prepare) or missed or fork.interrupt
    _faults.reach("fork.before")


def _after() -> None:
    _faults.reach("fork.after_in_parent")
    forks = _forks.get(get_ident(), [])
    if len(forks) <= 1:  # else the fork around this one still needs the locks
        interrupt = _each(_finish)
        if forks:
            forks[-1].interrupt = interrupt or forks[-1].interrupt
    if forks:
        forks[-1].finished = True


def _after_again() -> None:
    forks = _forks.get(get_ident(), [])
    fork = forks.pop() if forks else _Fork()
    missed = None if fork.finished else _what_was_missed()
    if forks:
        interrupt = None
    else:
        _forks.pop(get_ident(), None)
        interrupt = _each(_finish)
    _deliver(interrupt or fork.interrupt or missed)


def _in_child() -> None:
    _faults.reach("fork.after_in_child")
    _each(_begin if _was_prepared() else _begin_unprepared)


def _in_child_again() -> None:
    _each(_begin if _was_prepared() else _begin_unprepared)
    _forks.clear()  # the parent's, and so are the interrupts: a signal is delivered to one process


def _was_prepared() -> bool:
    """Tell whether a *before* hook was called for the fork that has made this process.

    Not if C code has forked, and told Python of it in the child only.
    """
    forks = _forks.get(get_ident(), [])
    return bool(forks) and forks[-1].turn == fork_wheel[0]


def _what_was_missed() -> BaseException | None:
    """Return what aborted a hook where it begins: a Ctrl-C, if no other signal can have done it."""
    others = signal.valid_signals() - {signal.SIGINT}
    known = {number for number in others if callable(signal.getsignal(number))}
    return None if known else KeyboardInterrupt()


def _deliver(interrupt: BaseException | None) -> None:
    if isinstance(interrupt, KeyboardInterrupt):
        _interrupts.repost()
    elif interrupt is not None:
        raise interrupt  # of a signal handler of the user's: the interpreter prints it


def _prepare(arena: Forked) -> None:
    arena.before_fork()


def _finish(arena: Forked) -> None:
    arena.after_fork_in_parent()


def _begin(arena: Forked) -> None:
    arena.after_fork_in_child()


def _begin_unprepared(arena: Forked) -> None:
    arena.after_fork_in_child(prepared=False)
