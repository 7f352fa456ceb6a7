"""The hook: where multiprocessing pickles, and how to undo it.

**What.** `install`, `uninstall` and `enabled` put oobpickle into ``multiprocessing`` and take it
out again.

**How it works.** Seven objects of the standard library are replaced: the name ``_ForkingPickler``
in ``multiprocessing.connection`` and ``.queues``, ``Connection._send_bytes`` and ``._recv`` (on
the class, since pools bind the methods early), ``connection.Pipe``, ``reduction.dump`` and
``reduction.DupFd``. Each replacement asks at call time whether the hook is still there, and else
does what it replaced.

* dumps: serialize; below the threshold that is the message. Else pack it into the arena and
  return an envelope; if that cannot be,
  return an ordinary pickle of the same payload, and count why.
* _send_bytes: when an envelope has left, its blocks are the receiver's.
* _recv: while a message has left its channel and is not claimed, nobody may reclaim its
  blocks. A large message from a process that does not take part is counted.
* Pipe, DupFd: who has an end of a channel, as far as that can be known.
* reduction.dump: a process object that is spawned takes the arena's descriptors along.

**Lifetime.** The process that installs owns the arena and closes it with the last exit. Children
inherit the hook; they take it out when they see the arena closed.

**When it cannot.** Without an arena `enabled` warns and yields an absent one, and everything stays
as it was.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import multiprocessing.connection as mp_connection
import multiprocessing.context as mp_context
import multiprocessing.forkserver as mp_forkserver
import multiprocessing.process as mp_process
import multiprocessing.queues as mp_queues
import multiprocessing.reduction as mp_reduction
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import IO, Any, Final

from oobpickle import _envelope, _statistics
from oobpickle._absent import AbsentArena
from oobpickle._arena import Arena, users
from oobpickle._channels import Channels
from oobpickle._envelope import MARK, MODULUS, PREFIX, PREFIX_NBYTES, Envelope
from oobpickle._errors import ArenaError, ArenaFullError, FallbackWarning
from oobpickle._options import Options
from oobpickle._payload import Payload
from oobpickle._pipes import is_readable
from oobpickle._serializer import serialize
from oobpickle._statistics import Statistics, describe_fallbacks

_LENGTH_NBYTES: Final = 4  # what Connection reads first of each message
_TICK_S: Final = 0.02
_LARGE_NBYTES: Final = 8 << 20  # what is worth giving back before the next step on the ledger

_PROTO: Final = pickle.PROTO[0]
#: After the end of an in-band message whose sender takes part, and has counted it.
_COUNTED: Final = b"\0oobpickle: counted"

_hook: Hook | None = None
_lingering: list[Arena] = []
_absences: set[object] = set()  # of the blocks, and of an install(), that have to do without
_guard = threading.RLock()


class Hook:
    """One arena in place under multiprocessing in this process.

    Parameters
    ----------
    arena : Arena
        What messages go through.
    channels : Channels
        Where they may go.
    said : Options
        What later uses are compared with: what was said here, with the defaults filled in.
    is_owner : bool
        Whether this process made the arena and closes it.
    """

    def __init__(self, arena: Arena, channels: Channels, said: Options, *, is_owner: bool) -> None:
        self.arena = arena
        self.said = said
        self.channels = channels
        self.threshold = arena.options.threshold or 0
        self.n_users = 0  # enabled() blocks that are open
        self.installed = False  # install() was called
        self.leaving = False
        self._is_owner = is_owner
        self._epoch = arena.holdings.epoch
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    @property
    def is_owner(self) -> bool:
        """Whether this very process, not one that was forked from it, made the arena."""
        return self._is_owner and self.arena.holdings.epoch == self._epoch

    def put_in(self) -> None:
        """Replace the seven objects."""
        connection: Any = mp_connection.Connection
        for module in (mp_connection, mp_queues):
            self._replace(module, "_ForkingPickler", _hooked_pickler(module._ForkingPickler))
        self._replace(connection, "_send_bytes", _hooked_send_bytes(connection._send_bytes))
        self._replace(connection, "_recv", _hooked_recv(connection._recv))
        self._replace(mp_connection, "Pipe", _hooked_pipe(mp_connection.Pipe))
        self._replace(mp_reduction, "dump", _hooked_dump(mp_reduction.dump))
        self._replace(mp_reduction, "DupFd", _hooked_dup_fd(mp_reduction.DupFd))

    def _replace(self, owner: Any, name: str, ours: Any) -> None:
        self._replaced.append((owner, name, ours, getattr(owner, name)))
        setattr(owner, name, ours)

    def take_out(self) -> None:
        """Restore what was there, unless somebody has put something else in its place since."""
        while self._replaced:
            owner, name, ours, original = self._replaced.pop()
            if getattr(owner, name) is ours:
                setattr(owner, name, original)

    def send(self, payload: Payload, frame: FrameType) -> Envelope | memoryview | bytes:
        """Return the bytes to write for a payload at or above the threshold."""
        arena, reason = self.arena, "channel"
        fd = _descriptor_in(frame)
        channel = 0 if fd is None else self.channels.known(fd)
        if fd is not None and channel:
            self.channels.wait_for_budget(fd, channel, payload.nbytes)
            try:
                envelope = _envelope.pack(payload, arena.acquire, arena.name, channel)
            except ArenaFullError as error:
                reason = error.reason
            except OSError:
                reason = "space"
            else:
                self._sent(envelope, channel, payload)
                return envelope
        self.count_fallback(reason, payload.nbytes)
        return _in_band(payload)

    def count_fallback(self, reason: str, nbytes: int) -> None:
        """Count a message of that many bytes that travels in-band for one of the reasons."""
        n_messages_at, nbytes_at = _statistics.fallback_counters(reason)
        self.arena.membership.count((n_messages_at, 1), (nbytes_at, nbytes))

    def _sent(self, envelope: Envelope, channel: int, payload: Payload) -> None:
        lease, arena = envelope.lease, self.arena
        if lease.blocks:
            self.channels.sent(channel, lease.blocks[0], payload.nbytes)
        arena.membership.count(
            (_statistics.N_MESSAGES, 1),
            (_statistics.N_BUFFERS, len(lease.destinations)),
            (_statistics.NBYTES, payload.nbytes),
        )
        if _hook is not self:
            lease.depart()  # uninstalled meanwhile: nobody will say when it has left


# --- the replacements


def _hooked_pickler(original: Any) -> Any:
    class HookedPickler(original):  # type: ignore[misc]
        """The pickler of multiprocessing, with large messages out of band."""

        @classmethod
        def dumps(cls, obj: object, protocol: int | None = None) -> Any:
            # Every message comes here: what is above `_send` is all that it costs a small one.
            hook = _hook
            if hook is None or hook.arena.closed or protocol is not None:
                _running()
                return original.dumps(obj, protocol)
            if hook.arena.holdings.owes(_LARGE_NBYTES):
                _drain(hook)  # the answer to this message can then use the room
            payload = serialize(obj, original._extra_reducers, hook.threshold)
            if payload.sizes or len(payload.stream) >= hook.threshold:
                return _send(hook, payload, sys._getframe(1))
            return payload.stream

    return HookedPickler


def _send(hook: Hook, payload: Payload, frame: FrameType) -> Envelope | memoryview | bytes:
    token = object()
    try:
        users.add(token)
        if _running() is hook:
            return hook.send(payload, frame)
    finally:
        users.discard(token)
    return _in_band(payload)


def _in_band(payload: Payload) -> memoryview | bytes:
    """Return a pickle that every Python can load, and that receivers need not count."""
    return payload.to_pickle(tail=_COUNTED) if payload.sizes else payload.stream + _COUNTED


def _drain(hook: Hook) -> None:
    token = object()
    try:
        users.add(token)
        if _running() is hook:
            hook.arena.drain()
    finally:
        users.discard(token)


def _hooked_send_bytes(original: Any) -> Any:
    most = _envelope.MAX_NBYTES

    def _send_bytes(self: Any, buf: Any) -> None:
        n = len(buf)
        if n % MODULUS != MARK or n > most:
            original(self, buf)
            return
        envelope = buf if type(buf) is Envelope else getattr(buf, "obj", None)
        token = object()
        if type(envelope) is not Envelope:
            if bytes(buf[:PREFIX_NBYTES]) == PREFIX:
                _readdress(buf, self._handle)
            original(self, buf)
            return
        try:
            users.add(token)
            envelope.lease.depart()
            original(self, buf)
        except OSError as error:
            if error.errno == errno.EPIPE:
                envelope.lease.release()  # no reader is left
            raise
        finally:
            try:
                # After any other error a reader may have it: its blocks are reclaimed.
                envelope.lease.settle()
            finally:
                users.discard(token)

    return _send_bytes


def _readdress(message: Any, fd: int) -> None:
    """The bytes of an envelope are sent on as they are: it waits in another channel from now on."""
    token = object()
    try:
        users.add(token)
        hook = _running()
        if hook is not None:
            head = bytes(message[: _envelope.HEAD_NBYTES])
            block = _envelope.head_of(head, hook.arena.identity)
            if block is not None:
                hook.arena.intake.readdress(*block, hook.channels.known(fd))
    finally:
        users.discard(token)


def _hooked_recv(original: Any) -> Any:
    most = _envelope.MAX_NBYTES

    def _recv(self: Any, size: int, *args: Any) -> Any:
        # Comes after the length of the message was read, with the message itself still unread in
        # the channel; so a process that waits for a message does not count as reading one.
        if size % MODULUS != MARK or size > most:
            # Before the length of the next message comes there is time.
            if size == _LENGTH_NBYTES and (hook := _hook) is not None and hook.arena.holdings.held:
                _wait_draining(self._handle)
            message = original(self, size, *args)
            if size > most:
                _count_uncounted(message)
            return message
        token = object()
        try:
            users.add(token)
            hook = _running()
            if hook is None:
                return original(self, size, *args)
            arena = hook.arena
            return arena.intake.receive(_read, arena.identity, original, self, size, *args)
        finally:
            users.discard(token)

    return _recv


def _read(identity: bytes, original: Any, *args: Any) -> tuple[Any, tuple[int, int] | None]:
    """Read a message; return it, and its first block if it is an envelope of the arena."""
    message = original(*args)
    with message.getbuffer() as view:
        head = bytes(view[: _envelope.HEAD_NBYTES])
    return message, _envelope.head_of(head, identity)


def _count_uncounted(message: io.BytesIO) -> None:
    """Count a large message that came in-band from a process that does not take part."""
    hook = _hook
    with message.getbuffer() as view:
        nbytes = len(view)
        if hook is None or nbytes < hook.threshold or bytes(view[-len(_COUNTED) :]) == _COUNTED:
            return
        # What `send_bytes` was given is none of our business.
        is_pickle = view[0] == _PROTO and 2 <= view[1] <= pickle.HIGHEST_PROTOCOL
        is_pickle = is_pickle and bytes(view[-1:]) == pickle.STOP
    token = object()
    try:
        users.add(token)
        if is_pickle and _running() is hook:
            hook.count_fallback("channel", nbytes)
    finally:
        users.discard(token)


def _wait_draining(fd: int) -> None:
    """Wait for the next message, giving back what dies meanwhile: others may wait for the room.

    It is done here because a finalizer in Python would swallow a Ctrl-C.
    """
    while (hook := _hook) is not None and hook.arena.holdings.held:
        _drain(hook)
        if not os.get_blocking(fd) or is_readable(fd, _TICK_S):
            return


def _hooked_pipe(original: Any) -> Any:
    def Pipe(duplex: bool = True) -> tuple[Any, Any]:
        ends: tuple[Any, Any] = original(duplex)
        hook = _running()
        if hook is not None:
            hook.channels.note(ends[0].fileno(), ends[1].fileno())
        return ends

    return Pipe


def _hooked_dump(original: Any) -> Any:
    def dump(obj: object, file: IO[bytes], protocol: int | None = None) -> None:
        hook = _running()
        starting = isinstance(obj, mp_process.BaseProcess)
        if hook is not None and starting and mp_context.get_spawning_popen() is not None:
            obj = _Inheriting(_Inheritance(hook), obj)
        original(obj, file, protocol)

    return dump


def _hooked_dup_fd(original: Any) -> Any:
    def DupFd(fd: int) -> Any:
        hook = _running()
        if hook is not None and mp_context.get_spawning_popen() is None:
            hook.channels.forget(fd)  # to a process that runs already, and may be older
        return original(fd)

    return DupFd


def _descriptor_in(frame: FrameType | None) -> int | None:
    """Return the descriptor of the connection that the caller of ``dumps`` is about to use."""
    names = {} if frame is None else frame.f_locals
    connection = names.get("self")
    if connection is None:
        connection = getattr(names.get("send_bytes"), "__self__", None)  # Queue._feed
    connection = getattr(connection, "_writer", connection)  # SimpleQueue.put
    handle = getattr(connection, "_handle", None)
    return handle if isinstance(handle, int) else None


# --- children that do not inherit by fork


class _Inheriting:
    """A process object that brings an arena along."""

    def __init__(self, inheritance: _Inheritance, process: object) -> None:
        self._parts = (inheritance, process)

    def __reduce__(self) -> Any:
        return _second, self._parts


def _second(_first: object, second: object) -> object:
    return second


class _Inheritance:
    """The arena's descriptors and channels, for the child that is being started."""

    def __init__(self, hook: Hook) -> None:
        self._hook = hook

    def __reduce__(self) -> Any:
        descriptors = [mp_reduction.DupFd(fd) for fd in self._hook.arena.descriptors]
        return _inherit, (*descriptors, self._hook.channels.to_bytes())


def _inherit(data: Any, ledger: Any, locks: Any, channels: bytes) -> None:
    """In a child that is being started: take part in the parent's arena."""
    global _hook
    descriptors = [duplicate.detach() for duplicate in (data, ledger, locks)]
    # The parent counts on us, but a process that cannot start is worse than one that cannot load.
    with contextlib.suppress(ArenaError, OSError):
        arena = Arena.attach(*descriptors)
        _envelope.introduce(arena)
        hook = Hook(arena, Channels(arena, channels), arena.options, is_owner=False)
        hook.installed = True
        hook.put_in()
        _hook = hook
        _absences.discard(install)


# --- in and out


def _running() -> Hook | None:
    """Return the hook, if its arena is open; take it out if the owner has closed the arena."""
    hook = _hook
    if hook is None or not hook.arena.closed:
        return hook
    if _guard.acquire(blocking=False):  # else somebody is putting it in or taking it out
        try:
            _take_out(hook)
        finally:
            _guard.release()
    return None


def _take_out(hook: Hook) -> None:
    global _hook
    if _hook is hook and not hook.leaving:
        hook.leaving = True
        # While it is closed the hook still says which messages this process is about to read.
        if hook.is_owner:
            hook.arena.close()
        elif not hook.arena.closed:
            # It goes on receiving without saying when: so nothing may be reclaimed while it lives.
            hook.arena.membership.read_for_ever()
        _hook = None
        hook.arena.detach()
        hook.take_out()
        _lingering.append(hook.arena)
        _sweep()


def _sweep() -> None:
    """Unmap the arenas of earlier blocks that nobody needs any more."""
    for arena in list(_lingering):
        if arena.try_destroy():
            _lingering.remove(arena)
            _envelope.forget(arena)


def _is_being_started() -> bool:
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


@functools.cache
def _reset_guard_in_children() -> None:
    os.register_at_fork(after_in_child=_guard._at_fork_reinit)  # type: ignore[attr-defined]


def _start(options: Options) -> Hook | None:
    """Return the running hook, or put one in; ``None`` if this process has to do without."""
    global _hook
    hook = _running()
    if hook is not None:
        options.check_compatible(hook.said)
        return hook
    if _is_being_started():
        return None
    _reset_guard_in_children()
    _sweep()
    arena = Arena.create(options)
    _envelope.introduce(arena)
    hook = Hook(arena, Channels(arena), options.resolve(), is_owner=True)
    hook.put_in()
    _hook = hook
    return hook


def install(
    *,
    capacity: int | None = None,
    threshold: int | None = None,
    wait_s: float | None = None,
    copy_out: bool | None = None,
) -> Arena:
    """Send large messages of this process and its children out of band from now on.

    Parameters
    ----------
    capacity, threshold, wait_s, copy_out
        As for `enabled`.

    Returns
    -------
    Arena
        The arena; the same one if it is installed already. In a process that is only just being
        started (the top level of a spawned child's main module) it is one without memory, since
        that process takes part in its parent's.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range, or differs from the running arena's.
    ArenaError
        If this system cannot provide the memory.

    See Also
    --------
    uninstall : the undo.
    """
    options = Options(capacity, threshold, wait_s, copy_out)
    with _guard:
        hook = _start(options)
        if hook is None:
            _absences.add(install)
            return AbsentArena(options)
        hook.installed = True
        return hook.arena


def uninstall() -> None:
    """Undo `install`: restore what was replaced, and give every free block back to the system.

    Does nothing if nothing is installed. Inside an `enabled` block the end of the block does it.
    Objects that were received stay valid.
    """
    with _guard:
        _absences.discard(install)
        hook = _hook
        if hook is not None:
            hook.installed = False
            if hook.n_users == 0:
                _take_out(hook)


@contextlib.contextmanager
def enabled(
    *,
    capacity: int | None = None,
    threshold: int | None = None,
    wait_s: float | None = None,
    copy_out: bool | None = None,
) -> Iterator[Arena]:
    """Send the large buffers of multiprocessing messages through shared memory inside the block.

    Parameters
    ----------
    capacity : int, optional
        The most bytes that the arena may occupy. Default: half of the machine's memory, or of the
        memory cgroup's limit. What is available is looked at again whenever fresh memory is
        taken.
    threshold : int, optional
        Messages of fewer bytes in all travel as they always did. Default: 160 KiB, the
        measured crossover.
    wait_s : float, optional
        How long a sender waits for room that others hold, seconds, before the message travels
        in-band. Default: as long as a pipe would take for it.
    copy_out : bool, optional
        Whether receivers copy into ordinary memory and give the block back at once. Default: only
        when held blocks pass half of `capacity`.

    Yields
    ------
    Arena
        The arena; nested uses yield the same. Where the system offers no shared memory, a
        `FallbackWarning` says so, everything works as without oobpickle, and what is yielded is an
        arena without memory, whose statistics are zeros.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range, or differs from the running arena's; before anything starts.

    Warns
    -----
    FallbackWarning
        Once, when the block is left, if messages travelled in-band although they were large enough.

    Examples
    --------
    >>> import multiprocessing, numpy as np, oobpickle
    >>> with oobpickle.enabled() as arena:
    ...     with multiprocessing.get_context("fork").Pool(1) as pool:
    ...         total = pool.map(np.sum, [np.ones(100_000)] * 2)
    ...     arena.statistics().n_messages_out_of_band
    2
    """
    options = Options(capacity, threshold, wait_s, copy_out)
    with _guard:
        try:
            hook = _start(options)
        except ArenaError as error:
            warnings.warn(
                f"oobpickle is not in use: {str(error).rstrip('.')}. "
                "Messages travel as without it.",
                FallbackWarning,
                stacklevel=3,
            )
            hook = None
        if hook is not None:
            hook.n_users += 1
    if hook is None:
        absence = AbsentArena(options)
        _absences.add(absence)
        try:
            yield absence
        finally:
            _absences.discard(absence)
        return
    try:
        yield hook.arena
    finally:
        fallbacks = _leave(hook)
        if fallbacks:
            warnings.warn(describe_fallbacks(fallbacks), FallbackWarning, stacklevel=3)


def _leave(hook: Hook) -> dict[str, _statistics.Fallback]:
    """Leave one block; return what to warn of, if it was the last one of the owner."""
    with _guard:
        hook.n_users -= 1
        if hook.n_users or hook.installed or _hook is not hook:
            return {}
        is_owner = hook.is_owner
        _take_out(hook)
        return dict(hook.arena.statistics().fallbacks) if is_owner else {}


def statistics() -> Statistics:
    """Return the statistics of the arena in use; see `Arena.statistics`.

    Raises
    ------
    ArenaError
        If this process is not inside `enabled`, and `install` was not called.
    """
    hook = _running()
    if hook is not None:
        return hook.arena.statistics()
    if _absences:
        return _statistics.nothing()
    raise ArenaError(
        "oobpickle is not enabled in this process. Call it inside enabled(); after the block, "
        "call statistics() of the arena that it yielded."
    )
