"""Programs: what one that is started, or that a process becomes, inherits of the channels.

**What.** Replacements for ``subprocess.Popen._execute_child``, ``os.posix_spawn`` and
``posix_spawnp``, ``os.execv`` and ``execve``, ``os._spawnvef``, ``os.system``, and
``multiprocessing.util.spawnv_passfds``. All that the standard library has besides goes over these.

**How it works.** A program may lack the library, so no envelope may be on its way to it. Each of
these says which ends of channels the program inherits, before it can have them: they are passed on,
see `channels`. `subprocess` and ``spawnv_passfds`` name them; else they are all that can be
inherited. An end that can only be written to does not count.

**Lifetime.** Each asks at call time whether the hook is in. If there is no such program, who has
the ends is looked up again, and that is who had them before.

**When it cannot.** What was sent before the call is in the channel already. A program that C code
starts is not seen, nor one that is started by a name from before the block (``from os import
execv``).
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from oobpickle._delegate import delegate
from oobpickle._foreign import ignoring
from oobpickle._hook.installed import Hook, running
from oobpickle._memory.pipes import channel_id

_STANDARD: Final = frozenset((-1, 0, 1, 2))
_STREAMS: Final = (0, 1, 2)
#: They start processes that join, and say by themselves what is passed on.
_PACKAGES: Final = ("multiprocessing", "joblib", "loky", "multiprocess")


def hooked_execute_child(original: Any) -> Any:
    return delegate(_execute_child, original)


def _execute_child(original: Any, /, *args: Any, **kwargs: Any) -> Any:
    hook = running()
    if hook is None:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.arguments["pass_fds"] = tuple(bound.arguments["pass_fds"])  # perhaps an iterator
    _note_named(hook, _named(bound.arguments))
    with hook.channels.passing_on(_inherited(hook, bound.arguments)):
        return original(*bound.args, **bound.kwargs)


def hooked_exec(original: Any) -> Any:
    return delegate(_exec, original)


def _exec(original: Any, /, *args: Any, **kwargs: Any) -> Any:
    if _is_of_packages():  # loky before 3.5 starts workers by a fork, which join by themselves
        return original(*args, **kwargs)
    return _with_everything(original, *args, **kwargs)


def hooked_system(original: Any) -> Any:
    return delegate(_with_everything, original)


def _with_everything(original: Any, /, *args: Any, **kwargs: Any) -> Any:
    hook = running()
    if hook is None:
        return original(*args, **kwargs)
    with hook.channels.passing_on(_readable(hook, _inheritable())):
        return original(*args, **kwargs)


def hooked_posix_spawn(original: Any) -> Any:
    return delegate(_posix_spawn, original)


def _posix_spawn(original: Any, /, *args: Any, **kwargs: Any) -> Any:
    hook = running()
    if hook is None or sys._getframe(2).f_globals is vars(subprocess):
        return original(*args, **kwargs)
    named = list[int]()
    with contextlib.suppress(TypeError, ValueError, IndexError):  # the original complains
        if kwargs.get("file_actions"):
            kwargs["file_actions"] = tuple(kwargs["file_actions"])  # perhaps an iterator
            for action in kwargs["file_actions"]:
                if action[0] == os.POSIX_SPAWN_DUP2:
                    named.append(int(action[1]))
    _note_named(hook, named)
    with hook.channels.passing_on(_readable(hook, [*named, *_inheritable()])):
        return original(*args, **kwargs)


def hooked_spawnvef(original: Any) -> Any:
    return delegate(_spawnvef, original)


def _spawnvef(original: Any, /, mode: int, *args: Any) -> Any:
    hook = running()
    if hook is None:
        return original(mode, *args)
    # It forks, and the child execs a moment later: senders are not to wait until that has ended.
    with hook.channels.passing_on(_readable(hook, _inheritable()), by_fork=True):
        pid = original(os.P_NOWAIT, *args)
    return pid if mode == os.P_NOWAIT else _exit_code(pid)


def _exit_code(pid: int) -> int:
    while True:
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            return os.waitstatus_to_exitcode(status)


def hooked_spawnv_passfds(original: Any) -> Any:
    return delegate(_spawnv_passfds, original)


def _spawnv_passfds(original: Any, /, path: Any, args: Any, passfds: Any) -> Any:
    hook = running()
    if hook is None or _is_of_packages():
        return original(path, args, passfds)
    passfds = tuple(passfds)  # perhaps an iterator
    _note_named(hook, _numbers(passfds))
    with hook.channels.passing_on(_readable(hook, [*_numbers(passfds), *_STREAMS])):
        return original(path, args, passfds)


def _is_of_packages() -> bool:
    """Tell whether one of them has called what calls this."""
    caller = sys._getframe(3).f_globals.get("__name__")
    return str(caller).partition(".")[0] in _PACKAGES


# --- what is inherited


def _note_named(hook: Hook, fds: Iterable[int]) -> None:
    """These were given away: nobody here has asked for their numbers in order to read there."""
    for fd in fds:
        with ignoring(OSError), contextlib.suppress(OverflowError):  # not open
            hook.arena.unloaded.passed_on(channel_id(fd))


def _named(given: Mapping[str, Any]) -> Iterator[int]:
    """Yield what the caller says that a program inherits."""
    yield from _numbers(given["pass_fds"])
    pairs = (("p2cread", "p2cwrite"), ("c2pwrite", "c2pread"), ("errwrite", "errread"))
    made = {given[theirs] for theirs, ours in pairs if given[ours] >= 0}
    yield from {given[theirs] for theirs, _ in pairs} - made - _STANDARD


def _numbers(fds: Iterable[Any]) -> list[int]:
    numbers = []
    for fd in fds:
        with contextlib.suppress(TypeError, ValueError):  # the original complains
            numbers.append(int(fd))
    return numbers


def _inherited(hook: Hook, given: Mapping[str, Any]) -> Iterator[int]:
    """Yield what a program inherits, but for pipes that are made for it."""
    yield from _named(given)
    yield from _readable(hook, _STREAMS)
    if not given["close_fds"]:
        yield from (fd for fd in _inheritable() if fd not in _STANDARD)


def _inheritable() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        with ignoring(OSError):  # the one that was listed with
            if os.get_inheritable(int(name)):
                yield int(name)


def _readable(hook: Hook, fds: Iterable[int]) -> Iterator[int]:
    """Yield those with which somebody can read what comes by a channel that may be one of ours."""
    for fd in fds:
        with ignoring(OSError), contextlib.suppress(OverflowError):  # not open
            can_read = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
            if can_read and (fd not in _STREAMS or not hook.channels.is_of_old(fd)):
                yield fd
