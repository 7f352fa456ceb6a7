"""What is replaced in multiprocess, dill's copy of multiprocessing (pathos).

**What.** `replacements` lists what is replaced there, if it is imported.

**How it works.** It pickles with dill, which is Python and has ways of its own with almost every
type. So dill makes the bytes of a message, and nobody interferes: what it can pickle it still can.
Bytes at or above the threshold, and 512 KiB, go through the arena as one buffer, and the envelope
is loaded by `load`, which has dill load them from there. What travels in-band is what it was.

Its connections are a copy of those of multiprocessing, and get the same hooks. A process object
is left as it is, but for what makes a spawned child join first.

**Lifetime.** Each asks at call time whether the hook is in.

**When it cannot.** What is imported inside the block is replaced when the first pipe of
multiprocessing itself is made, and else not at all; `not_served` says so. A process that has not
joined gets its messages in-band, and is asked to join.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
import sys
from collections.abc import Callable
from typing import IO, Any, Final

from oobpickle import _envelope
from oobpickle._hook import installed, invitations
from oobpickle._hook.connections import (
    descriptor_in,
    hooked_recv,
    hooked_send_bytes,
    packed_for,
)
from oobpickle._hook.fileno import hooked_fileno
from oobpickle._hook.installed import Hook, Replacement, running
from oobpickle._hook.processes import Inheritance, dropped, hooked_launch, hooked_pipe, pass_to
from oobpickle._native import core
from oobpickle._pickling.serializer import take_apart

_NAME: Final = "multiprocess"
_LEAST_NBYTES: Final = 512 << 10  # below it the detour costs what it saves: dill copies twice
#: It imports them when they are needed.
_PARTS: Final = ("connection", "queues", "reduction", "popen_spawn_posix", "popen_forkserver")


def _module(name: str) -> Any:
    return sys.modules.get(f"{_NAME}.{name}")


def replacements() -> list[Replacement]:
    """Return what is to be replaced, if it is imported by now."""
    if _NAME in sys.modules:
        for name in _PARTS:
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{_NAME}.{name}")
    connection, reduction = _module("connection"), _module("reduction")
    kind = getattr(connection, "Connection", None)
    wanted: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (connection, "_ForkingPickler", hooked_pickler),
        (_module("queues"), "_ForkingPickler", hooked_pickler),
        (kind, "_send_bytes", hooked_send_bytes),
        (kind, "_recv", hooked_recv),
        (getattr(connection, "_ConnectionBase", None), "fileno", hooked_fileno),
        (connection, "Pipe", hooked_pipe),
        (reduction, "dump", hooked_dump),
        (reduction, "DupFd", hooked_dup_fd),
        *(
            (getattr(_module(f"popen_{how}"), "Popen", None), "_launch", hooked_launch)
            for how in ("spawn_posix", "forkserver")
        ),
    ]
    return [one for one in wanted if one[1] in vars(one[0] or object)]


def hooked_pickler(original: Any) -> Any:
    class HookedPickler(original):  # type: ignore[misc]
        """The pickler of multiprocess, with large messages out of band."""

        @classmethod
        def dumps(cls, obj: object, *args: Any, **kwargs: Any) -> Any:
            data = original.dumps(obj, *args, **kwargs)  # a class of ours would tell dill
            hook = running()
            if hook is None or len(data) < max(hook.threshold, _LEAST_NBYTES):
                return data
            return _to_send(hook, data, sys._getframe(1))

    return HookedPickler


class _Pickled:
    """The bytes that dill has made."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __reduce__(self) -> Any:
        return load, (pickle.PickleBuffer(self._data),)


def load(data: Any) -> Any:
    """Load what dill has made, with the `loads` of multiprocess."""
    from multiprocess import reduction  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return reduction.ForkingPickler.loads(data)


def _to_send(hook: Hook, data: Any, frame: Any) -> Any:
    """Return what to write for bytes that dill has made."""
    fd = descriptor_in(frame)
    channel = 0 if fd is None else hook.channels.known(fd)
    if fd is None or not channel:
        is_lost = not hook.arena.can_be_inherited()
        hook.count_fallback("detached" if is_lost else "channel", len(data))
        if fd is not None and not is_lost and hook.channels.is_older(fd):
            return invitations.prefix(hook.arena.name) + bytes(data)
        return data
    hook.channels.backlog.wait(fd, channel, len(data))
    message = core.Message(hook.arena.blocks, hook.threshold, _envelope.tables({}))
    take_apart(_Pickled(data), message)
    envelope = packed_for(hook, message, channel)
    return data if envelope is None else envelope


def hooked_dump(original: Any) -> Any:
    def dump(obj: object, file: IO[bytes], *args: Any, **kwargs: Any) -> None:
        popen = _module("context").get_spawning_popen()
        is_process = isinstance(obj, _module("process").BaseProcess)
        hook = running() if popen is not None and is_process else None
        if hook is not None and hook.arena.can_be_inherited():
            duplicate = _module("reduction").DupFd
            file.write(dropped(Inheritance(hook, duplicate=duplicate)))
            hook = None
        original(obj, file, *args, **kwargs)
        if hook is not None:
            pass_to(hook, popen)

    return dump


def hooked_dup_fd(original: Any) -> Any:
    def DupFd(fd: int) -> Any:
        hook = installed.current
        if hook is not None and _module("context").get_spawning_popen() is None:
            hook.channels.forget(fd)  # to a process that runs already, and may be older
        return original(fd)

    return DupFd
