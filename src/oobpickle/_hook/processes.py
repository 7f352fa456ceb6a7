"""Processes and pipes: who has an end of a channel, and how a child that is started joins.

**What.** Replacements for ``connection.Pipe``, ``reduction.dump`` and ``reduction.DupFd``, and for
``Popen._launch`` of spawned processes.

**How it works.** A pipe that is made while the hook is in is a known channel. Its ends go to
children with their process objects; an end that is handed to a process that runs already may be in
one that has not joined. (For programs that are started see `programs`.) A process object that is
spawned brings the arena's descriptors along, and is a message itself. What the child loads::

    join the arena | POP | the process object
    join the arena | POP | its envelope | close the guard | POP

The *guard* is the channel of that envelope: a pipe with an unread byte, of which the child has an
end until it has loaded the envelope. If it dies before, the blocks come back as those of any
message that nobody can read any more.

**Lifetime.** Each replacement asks at call time whether the hook is in, and else does what it
replaced. The parent has the guard until the child is launched.

**When it cannot.** A child that cannot attach starts all the same; also if somebody has closed the
descriptors that it would inherit. Then it is a stranger: who can read from the channels that it is
given is looked up again, as with a program that inherits them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing.connection as mp_connection
import multiprocessing.context as mp_context
import multiprocessing.process as mp_process
import multiprocessing.reduction as mp_reduction
import multiprocessing.resource_sharer as mp_resource_sharer
import os
import pickle
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import IO, Any, Final

from oobpickle._envelope import Envelope, tables
from oobpickle._hook import libraries
from oobpickle._hook.connections import is_standard, pack, undo_list_of_message
from oobpickle._hook.installed import Hook, running
from oobpickle._hook.main_module import is_lost
from oobpickle._memory.descriptors import File, close_if, file_of
from oobpickle._memory.pipes import channel_id
from oobpickle._native import core
from oobpickle._pickling import in_band
from oobpickle._pickling.serializer import take_apart

SPAWNING: list[Any] = []  # the classes ``Popen`` that pickle their process object
# Now, not when it is needed: a process may have lost its files by then.
with contextlib.suppress(ImportError):
    import multiprocessing.popen_spawn_posix as mp_popen_spawn

    SPAWNING.append(mp_popen_spawn.Popen)
with contextlib.suppress(ImportError):
    import multiprocessing.popen_forkserver as mp_popen_forkserver

    SPAWNING.append(mp_popen_forkserver.Popen)

#: By ``Popen``: the message in a process object that is being launched, and its guard.
_launching: Final[weakref.WeakKeyDictionary[Any, tuple[Envelope, Guard]]] = (
    weakref.WeakKeyDictionary()
)
#: By ``Popen``: what ends the passing on of channels to a child that cannot attach.
_passing: Final[weakref.WeakKeyDictionary[Any, contextlib.AbstractContextManager[None]]] = (
    weakref.WeakKeyDictionary()
)


def hooked_pipe(original: Any) -> Any:
    def Pipe(duplex: bool = True) -> tuple[Any, Any]:
        ends: tuple[Any, Any] = original(duplex)
        hook = running()
        if hook is not None:
            hook.look_for_libraries()
            hook.channels.note(ends[0].fileno(), ends[1].fileno())
            if not libraries.calls(sys._getframe(1)):
                hook.made.update(ends)
        return ends

    return Pipe


def hooked_dump(original: Any) -> Any:
    def dump(obj: object, file: IO[bytes], protocol: int | None = None) -> None:
        hook = running()
        popen: Any = mp_context.get_spawning_popen()
        if hook is None or popen is None or not isinstance(obj, mp_process.BaseProcess):
            original(obj, file, protocol)
            return
        can_attach = hook.arena.can_be_inherited()
        if can_attach:
            file.write(dropped(Inheritance(hook)))
        if is_standard(original) and _is_standard_pickler(mp_reduction.ForkingPickler):
            for part in _parts(hook, obj, popen):
                file.write(part)
        else:
            original(obj, file, protocol)
        if not can_attach:
            pass_to(hook, popen)

    return dump


def pass_to(hook: Hook, popen: Any) -> None:
    """A child that is being launched cannot attach: it gets its ends as a program does."""
    passing = hook.channels.passing_on(popen._fds)
    passing.__enter__()
    _passing[popen] = passing


def _parts(hook: Hook, process: object, popen: Any) -> Iterator[bytes | memoryview]:
    """Yield the pickle of a process object, or its envelope and what closes the guard."""
    n_fds = len(popen._fds)
    special = mp_reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    undo = [lambda: popen._fds.__delitem__(slice(n_fds, None))]
    message = core.Message(hook.arena.blocks, hook.threshold, tables(special))
    take_apart(process, message, by_value=True, is_main_lost=is_lost(), undo=undo)
    if message.nbytes_in_band >= hook.threshold or message.references:
        guard = Guard()
        envelope = pack(hook, message, guard.channel)
        if envelope is not None:
            envelope.lease.depart()
            _launching[popen] = envelope, guard
            yield envelope[:-1]
            yield dropped(guard)
            yield pickle.STOP
            return
    yield in_band.as_pickle(message) if message.n_buffers else message.stream


def _is_standard_pickler(pickler: Any) -> bool:
    """Tell whether it is the standard library's, and nobody has given it a way of its own."""
    own = getattr(pickler, "__dict__", {})
    return is_standard(own.get("dumps")) and "reducer_override" not in own


def dropped(obj: object) -> bytes:
    """Return opcodes that load an object and drop it."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, 3)  # without frames
    pickler.fast = True  # and without a memo, which would be in the way of what follows
    pickler.dump(obj)
    return file.getvalue()[:-1] + pickle.POP


class Guard:
    """A pipe that is there to be closed."""

    def __init__(self) -> None:
        fd, other_fd = os.pipe()
        # They close themselves.
        self._end = mp_connection.Connection(fd, writable=False)
        other_end = mp_connection.Connection(other_fd, readable=False)
        os.write(other_end.fileno(), b"\0")
        self.channel = channel_id(fd)
        self._file = file_of(fd)

    def __reduce__(self) -> Any:
        return _close, (mp_reduction.DupFd(self._end.fileno()), self._file)


def _close(duplicate: Any, file: File) -> None:
    close_if(duplicate.detach(), file)  # the child's main module may have closed it, and opened one


def hooked_launch(original: Any) -> Any:
    def _launch(self: Any, process_obj: object) -> None:
        try:
            original(self, process_obj)
        finally:
            envelope, _guard = _launching.pop(self, (None, None))
            if envelope is not None:
                envelope.lease.settle()
            passing = _passing.pop(self, None)
            if passing is not None:
                passing.__exit__(None, None, None)

    return _launch


def hooked_dup_fd(original: Any) -> Any:
    def DupFd(fd: int) -> Any:
        hook = running()
        duplicate = original(fd)
        if hook is None:
            return duplicate
        if mp_context.get_spawning_popen() is not None:
            if is_lost():
                hook.channels.note_spawned(fd)
        else:
            hook.channels.forget(fd)  # to a process that runs already, and may be older
            undo = undo_list_of_message(sys._getframe(1))
            if undo is not None:
                undo.append(functools.partial(_take_back, duplicate))
        return duplicate

    return DupFd


def _take_back(duplicate: Any) -> None:
    """Close what `resource_sharer` keeps for a message that nobody will get."""
    with contextlib.suppress(AttributeError):  # of a Python that has other names for it
        sharer = mp_resource_sharer._resource_sharer  # type: ignore[attr-defined]
        with sharer._lock:
            _send, close = sharer._cache.pop(duplicate._id[1], (None, None))
        if close is not None:
            close()


class Inheritance:
    """The arena's descriptors and channels, for the child that is being started."""

    def __init__(
        self, hook: Hook, descriptors: Sequence[int] | None = None, *, duplicate: Any = None
    ) -> None:
        self._hook = hook
        self._descriptors = hook.arena.descriptors if descriptors is None else descriptors
        self._duplicate = duplicate or mp_reduction.DupFd  # of the library that starts the child

    def __reduce__(self) -> Any:
        descriptors = [self._duplicate(fd) for fd in self._descriptors]
        return self._hook.inherit, (*descriptors, self._hook.channels.to_bytes())


_HELPERS: Final = (
    "spawn import spawn_main",
    "forkserver import main",
    "resource_tracker import main",
)
_STARTS: Final = tuple(
    f"from {package}.{helper}"
    for package in ("multiprocessing", "multiprocess")
    for helper in _HELPERS
)


def is_being_started() -> bool:
    """Whether this process is one of multiprocessing's that has not come to run its target yet.

    A child that imports its main module gets an arena with its process object; the fork server and
    the resource tracker must not become participants. The command line tells, since this may be
    asked before any of multiprocessing runs: by a ``sitecustomize`` module.
    """
    modules: Any = [mp_process, sys.modules.get("multiprocess.process", mp_process)]
    if any(getattr(module.current_process(), "_inheriting", False) for module in modules):
        return True
    wanted = ("--multiprocessing-fork", *_STARTS)
    return all(module.parent_process() is None for module in modules) and any(
        argument.startswith(wanted) for argument in sys.orig_argv
    )
