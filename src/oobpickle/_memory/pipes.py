"""Questions to a pipe or socket: can what was written to it still be read?

**What.** `channel_id` names a channel, `reading_end` the one in which a message will be read;
`n_unread`, `is_broken`, `unreadable` and `readers` ask the kernel about it. `widened` lets a pipe
hold more for a while.

**How it works.** FIONREAD on either end of a pipe, or on the reading end of a socket pair
(SIOCOUTQ on the other), counts the bytes that were written and not read; POLLERR on a write end
says that no reader exists anywhere. A process that has no descriptor of the channel looks whether
any participant still has one. The socket at the other end of a Unix connection is named by
``sock_diag(7)``.

**Lifetime.** No state, no descriptor is opened or kept.

**When it cannot.** Where /proc does not show a process's descriptors, the channel counts as
readable: memory is then kept, and never freed wrongly."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Final, TypeVar

from oobpickle import _system
from oobpickle._foreign import ignoring, pass_on_foreign

T = TypeVar("T")

_SOCKET: Final = 1 << 63

# sock_diag(7)
_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_UDIAG_SHOW_PEER: Final = 4
_UNIX_DIAG_PEER: Final = 2
_ANY: Final = 0xFFFFFFFF
_NETLINK: Final = struct.Struct("<IHHII")
_UNIX_DIAG_REQUEST: Final = struct.Struct("<IHHIIBBHIIIII")
_UNIX_DIAG_NBYTES: Final = 16
_DIAG_NBYTES: Final = 4096
_DIAG_TIMEOUT_S: Final = 0.1
_WIDE_NBYTES: Final = 1 << 20  # pipe-max-size, the most without privileges
_PAUSES_S: Final = (0.5e-3, 1e-3, 2e-3, 4e-3, 8e-3, 8e-3)


def channel_id(fd: int) -> int:
    """Return a number that names the pipe or socket behind `fd` on this machine; else 0.

    A message is known by the channel of the end that *reads* it: both ends of a pipe are one,
    those of a socket pair two.
    """
    status = os.fstat(fd)
    if stat.S_ISFIFO(status.st_mode):
        return status.st_ino
    if stat.S_ISSOCK(status.st_mode):
        return status.st_ino | _SOCKET
    return 0


def reading_end(fd: int) -> int:
    """Return the channel in which what is written to `fd` is read; 0 if that cannot be known."""
    channel = channel_id(fd)
    if not channel & _SOCKET:
        return channel
    peer = _peer_of(channel & ~_SOCKET)
    return peer | _SOCKET if peer else 0


def _peer_of(inode: int) -> int:
    """Return the inode of the Unix socket that is connected to the one with `inode`; else 0."""
    request = _UNIX_DIAG_REQUEST.pack(
        *(_UNIX_DIAG_REQUEST.size, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0),
        *(socket.AF_UNIX, 0, 0, _ANY, inode & _ANY, _UDIAG_SHOW_PEER, _ANY, _ANY),
    )
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
            diag.settimeout(_DIAG_TIMEOUT_S)
            diag.send(request)
            answer = diag.recv(_DIAG_NBYTES)
    except OSError as error:  # not on this system, or no descriptor
        pass_on_foreign(error)
        return 0
    nbytes, kind = struct.unpack_from("<IH", answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        return 0  # an error: it is no Unix socket
    at = _NETLINK.size + _UNIX_DIAG_NBYTES
    while at + 8 <= nbytes:
        length, attribute, value = struct.unpack_from("<HHI", answer, at)
        if attribute == _UNIX_DIAG_PEER:
            return int(value)
        at += max(4, -(-length // 4) * 4)
    return 0


def readers(channel: int) -> tuple[set[int], set[int]]:
    """Return the processes that can read from the channel, and those that hide what they have open.

    Raises
    ------
    OSError
        If there is no /proc, or no descriptor is left to look into it.
    """
    name = channel_name(channel)
    found, hidden = set(), set()
    for pid in _pids():
        try:
            for fd, target in _descriptors_of(str(pid)):
                if target == name and (channel & _SOCKET or _is_for_reading(pid, fd)):
                    found.add(pid)
        except PermissionError as error:
            pass_on_foreign(error)
            hidden.add(pid)
    return found, hidden


def _is_for_reading(pid: int, fd: str) -> bool:
    flags = [int(text, 8) for text in _info_of(pid, fd, "flags:")]
    return any(flag & os.O_ACCMODE != os.O_WRONLY for flag in flags)


def n_unread(fd: int, channel: int) -> int:
    """Return how many bytes that were written *through* `fd` are still unread."""
    return _ask(fd, _system.SIOCOUTQ if channel & _SOCKET else _system.FIONREAD)


def _ask(fd: int, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, request, b"\0\0\0\0"))[0])


@contextlib.contextmanager
def widened(fd: int) -> Iterator[None]:
    """Let the pipe behind `fd` hold a megabyte during the block; else, as where refused, nothing.

    While a result of a `Pool` arrives, another thread of `Pool` waits for the same pipe, finds it
    readable and waits again, without end. After each read the reading thread waits up to 5 ms for
    that one to give up the interpreter: sixteen times as rarely if a read takes sixteen times as
    much.
    """
    before = 0
    with ignoring(OSError):  # a socket; or EPERM: the user has many wide pipes already
        before = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        if before < _WIDE_NBYTES:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _WIDE_NBYTES)
    try:
        yield
    finally:
        if 0 < before < _WIDE_NBYTES:
            with ignoring(OSError):  # EBUSY: the next message is there and needs it
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, before)


def is_broken(fd: int, channel: int) -> bool:
    """Tell, from an end that writes, whether no reader of the channel exists any more.

    The read end of a pipe reports POLLHUP, with bytes still in it, when the writers are gone.
    """
    poller = select.poll()
    poller.register(fd, 0)
    gone = select.POLLERR | select.POLLHUP if channel & _SOCKET else select.POLLERR
    return any(events & gone for _, events in poller.poll(0))


def unreadable(
    channels: Collection[int],
    pids: Collection[int],
    *,
    even_if_empty: bool = True,
    unproven: Collection[int] = (),
) -> set[int]:
    """Return those of the channels from which nothing that was written can be read any more.

    Parameters
    ----------
    channels : collection of int
        From `channel_id`; 0 is never unreadable.
    pids : collection of int
        The participants. Besides the processes of this user, they and those that descend from them
        may have a channel open; only these may have one on its way in a socket.
    even_if_empty : bool
        Whether a channel in which nothing is left counts, though it is open.
    unproven : collection of int
        Channels of which that is never to count.
    """
    names = {channel_name(channel): channel for channel in channels if channel}
    found, left = set(), set(names.values())
    try:
        for fd, name in _descriptors_of("self"):
            channel = names.get(name, 0)
            if channel in left:
                try:
                    is_proof = channel not in unproven
                    if even_if_empty and _is_spent(int(fd), channel, is_proof):
                        found.add(channel)
                except OSError as error:
                    pass_on_foreign(error)
                    continue  # closed by another thread a moment ago
                left.discard(channel)
        # A descriptor may be on its way from one process to another: look twice, with none in a
        # socket. One that is there is somebody's in a moment. What waits in a socket of a process
        # that does not descend from a participant is not ours: a strange program with one stuck
        # there would otherwise keep everything from being reclaimed.
        n_looks = 0
        for pause_s in _PAUSES_S:
            others = {*pids, *_own_pids()} if left else set()
            for pid in others - {os.getpid()}:
                left.difference_update(_may_have(pid, names, pids))
            if left and any(_is_receiving(pid) for pid in others if is_related(pid, pids)):
                n_looks = 0
                time.sleep(pause_s)
                continue
            n_looks += 1
            if n_looks == 2 or not left:
                break
        else:
            return found
    except OSError as error:
        pass_on_foreign(error)
        return found  # no descriptor is left to look into /proc
    return found | left


def _is_spent(fd: int, channel: int, even_if_empty: bool) -> bool:
    if even_if_empty and _ask(fd, _system.FIONREAD) == 0:
        return True
    return not channel & _SOCKET and is_broken(fd, channel)


def open_channels() -> set[int]:
    """Return the channels of which this process has an end.

    Raises
    ------
    OSError
        If there is no /proc, or no descriptor is left to look into it.
    """
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with ignoring(OSError):  # closed by another thread a moment ago
            found.add(channel_id(int(fd)))
    return found - {0}


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _own_pids() -> Iterator[int]:
    """Yield the processes of this user: one that has not joined yet may be about to read."""
    me = os.geteuid()
    for pid in _pids():
        if _user_of(pid) == me:
            yield pid


def _user_of(pid: int) -> int | None:
    with ignoring(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return None


def _may_have(pid: int, names: Mapping[str, int], participants: Collection[int]) -> set[int]:
    """Return which of the named channels the process may have open."""
    try:
        return {names[name] for _, name in _descriptors_of(str(pid)) if name in names}
    except PermissionError:
        return set(names.values()) if is_related(pid, participants) else set()


def _is_receiving(pid: int) -> bool:
    """Tell whether descriptors wait in a socket of the process (SCM_RIGHTS), where nobody has
    them; also if it hides them."""
    try:
        sockets = [fd for fd, name in _descriptors_of(str(pid)) if name.startswith("socket:")]
        return any(_n_waiting(pid, fd) for fd in sockets)
    except PermissionError:
        return True


def _n_waiting(pid: int, fd: str) -> int:
    return sum(int(text) for text in _info_of(pid, fd, "scm_fds:"))  # Linux 5.11


def _info_of(pid: int, fd: str, key: str) -> list[str]:
    try:
        with open(f"/proc/{pid}/fdinfo/{fd}") as file:
            return [line.split()[1] for line in file if line.startswith(key)]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_related(pid: int, participants: Collection[int]) -> bool:
    """Tell whether a process is a participant or descends from one."""
    return any(ancestor in participants for ancestor in _lineage(pid))


def _lineage(pid: int) -> Iterator[int]:
    """Yield a process and its ancestors, without init."""
    while pid > 1:
        yield pid
        try:
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except OSError as error:
            pass_on_foreign(error)
            return


def channel_name(channel: int) -> str:
    """Return what /proc calls the channel."""
    return f"socket:[{channel & ~_SOCKET}]" if channel & _SOCKET else f"pipe:[{channel}]"


def _descriptors_of(pid: str) -> Iterator[tuple[str, str]]:
    """Yield each descriptor of a process, and what it refers to.

    Nothing is open where it yields: a Ctrl-C while a generator is closed would be lost.
    """
    for fd in _in_proc(os.listdir, f"/proc/{pid}/fd") or ():
        target = _in_proc(os.readlink, f"/proc/{pid}/fd/{fd}")
        if target is not None:
            yield fd, target


def _in_proc(call: Callable[[str], T], path: str) -> T | None:
    try:
        return call(path)
    except (FileNotFoundError, ProcessLookupError):
        return None
