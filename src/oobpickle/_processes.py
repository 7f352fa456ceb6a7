"""Processes and pipes: who has an end of a channel, and how a child that is started takes part.

**What.** Replacements for ``connection.Pipe``, ``reduction.dump`` and ``reduction.DupFd``.

**How it works.** A pipe that is made while the hook is in is a known channel. Its ends go to
children with their process objects; an end that is handed to a process that runs already may be in
one that does not take part. A process object that is spawned brings the arena's descriptors along.

**Lifetime.** Each replacement asks at call time whether the hook is in, and else does what it
replaced.

**When it cannot.** A child that cannot attach starts all the same.
"""

from __future__ import annotations

import copyreg
import multiprocessing.context as mp_context
import multiprocessing.forkserver as mp_forkserver
import multiprocessing.process as mp_process
import multiprocessing.reduction as mp_reduction
import sys
from types import FrameType
from typing import IO, Any

from oobpickle._foreign import pass_on_foreign
from oobpickle._hook import Hook, running
from oobpickle._serializer import REFUSALS, write_by_value


def hooked_pipe(original: Any) -> Any:
    def Pipe(duplex: bool = True) -> tuple[Any, Any]:
        ends: tuple[Any, Any] = original(duplex)
        hook = running()
        if hook is not None:
            hook.channels.note(ends[0].fileno(), ends[1].fileno())
        return ends

    return Pipe


def hooked_dump(original: Any) -> Any:
    def dump(obj: object, file: IO[bytes], protocol: int | None = None) -> None:
        hook = running()
        starting = isinstance(obj, mp_process.BaseProcess)
        popen: Any = mp_context.get_spawning_popen()
        if hook is None or not starting or popen is None:
            original(obj, file, protocol)
            return
        obj = Inheriting(Inheritance(hook), obj)
        at, n_fds = file.tell(), len(popen._fds)
        try:
            original(obj, file, protocol)
        except REFUSALS:
            file.seek(at)
            file.truncate()
            del popen._fds[n_fds:]
            # Somebody may have put a pickler of their own there, which has no such table.
            extra = getattr(mp_reduction.ForkingPickler, "_extra_reducers", {})
            reducers = {**copyreg.dispatch_table, **extra}
            if not _write_by_value(obj, file, protocol, reducers):
                raise

    return dump


def _write_by_value(obj: object, file: IO[bytes], *args: Any) -> bool:
    try:
        write_by_value(obj, file, *args)
    except Exception as error:  # then the plain pickler's error is the one to be seen
        pass_on_foreign(error)
        return False
    return True


def hooked_dup_fd(original: Any) -> Any:
    def DupFd(fd: int) -> Any:
        hook = running()
        if hook is not None and mp_context.get_spawning_popen() is None:
            hook.channels.forget(fd)  # to a process that runs already, and may be older
        return original(fd)

    return DupFd


class Inheriting:
    """A process object that brings an arena along."""

    def __init__(self, inheritance: Inheritance, process: object) -> None:
        self._parts = (inheritance, process)

    def __reduce__(self) -> Any:
        return _second, self._parts


def _second(_first: object, second: object) -> object:
    return second


class Inheritance:
    """The arena's descriptors and channels, for the child that is being started."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __reduce__(self) -> Any:
        descriptors = [mp_reduction.DupFd(fd) for fd in self._hook.arena.descriptors]
        return self._hook.inherit, (*descriptors, self._hook.channels.to_bytes())


def is_being_started() -> bool:
    """Whether this process is importing its main module for its parent, or is a fork server.

    The former gets an arena with its process object; the latter must not become a participant.
    """
    if getattr(mp_process.current_process(), "_inheriting", False):
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is mp_forkserver._serve_one.__code__:  # type: ignore[attr-defined]
            return False
        if frame.f_code is mp_forkserver.main.__code__:
            return True
        frame = frame.f_back
    return False
