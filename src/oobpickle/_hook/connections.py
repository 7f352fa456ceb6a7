"""Connections: what a message goes through on its way into a channel and out of it.

**What.** Replacements for the name ``_ForkingPickler`` (its ``dumps`` and ``loads``) in
``multiprocessing.connection`` and ``.queues``, and for ``Connection._send_bytes`` and ``._recv``.

**How it works.** On the class, since pools bind the methods early. ::

    dumps        take the object apart, large buffers into blocks of the arena. Below the threshold
                 what was written is the message; above it an envelope, which names the blocks.
                 If that cannot be sent: an ordinary pickle, and the reason is counted. A reader
                 that is older than the arena gets an invitation to join with it; also with a
                 small message, once a large one has come from that reader
    loads        load; if that fails in a pool, hand on the error in the place of the message
    _send_bytes  when an envelope has left, its blocks are the receiver's; the memory of a large
                 in-band message is given back as it is written
    _recv        while a message has left its channel and is not claimed, nobody may reclaim its
                 blocks; a large in-band message is read into the memory of its arrays, and
                 counted if it comes from a process that has not joined

**Lifetime.** Each replacement asks at call time whether the hook is in, and else does what it
replaced.

**When it cannot.** A message travels in-band, as it would have without the hook.
"""

from __future__ import annotations

import errno
import io
import multiprocessing.connection as mp_connection
import multiprocessing.queues as mp_queues
import multiprocessing.reduction as mp_reduction
import pickle
import sys
from collections.abc import Callable
from time import perf_counter_ns
from types import CodeType, FrameType, FunctionType
from typing import Any, Final

from oobpickle import _envelope, _faults, _statistics
from oobpickle._envelope import MARK, MODULUS, PREFIX, PREFIX_NBYTES, Envelope
from oobpickle._errors import ArenaError, ArenaFullError
from oobpickle._foreign import ignoring, pass_on_foreign
from oobpickle._hook import installed, invitations, libraries, loading
from oobpickle._hook.installed import Hook, running
from oobpickle._hook.readers import protocol_of, unserved_of
from oobpickle._memory.pipes import widened
from oobpickle._native import core
from oobpickle._pickling import in_band
from oobpickle._pickling.in_band import Received
from oobpickle._pickling.serializer import take_apart

_LENGTH_NBYTES: Final = 4  # what Connection reads first of each message
_N_ASKING: Final = 64  # small messages that may invite, after a large one from an older process
_PROTO: Final = pickle.PROTO[0]
_NONE: Final = object()
_BYTES: Final = (bytes, memoryview)
_codes: Final[set[CodeType]] = set()  # of the `dumps` that take messages apart here
#: After the end of an in-band message whose sender has counted it, or could not join to count it.
_COUNTED: Final = b"\0oobpickle: counted"
_DETACHED: Final = b"\0oobpickle: no slot"
_TAIL_NBYTES: Final = len(_COUNTED)


def hooked_pickler(original: Any) -> Any:
    if not isinstance(original, type):
        return original  # a module with `dumps` and `loads` is enough
    while original.__module__ == __name__:  # ours, put back by somebody who had found it there
        original = original.__base__
    namespace = original.__dict__
    own = namespace.get("dumps")
    standard = own if is_standard(own) else _NONE
    tables = _envelope.tables(getattr(original, "_extra_reducers", {}))

    class HookedPickler(original):  # type: ignore[misc]
        """The pickler of multiprocessing, with large messages out of band."""

        @classmethod
        def dumps(cls, obj: object, protocol: int | None = None) -> Any:
            # Every message comes here: what is above `_send` is all that it costs a small one.
            hook = installed.current
            blocks = None if hook is None else hook.arena.blocks
            if protocol is not None or hook is None or blocks is None or blocks.closed:
                running()
                return super().dumps(obj, protocol)
            if cls is not HookedPickler or namespace.get("dumps") is not standard:
                return super().dumps(obj)  # by a pickler of somebody else, below or on top of ours
            undo: list[Callable[[], Any]] = []  # for `undo_list_of_message`
            is_lost = False
            if hook.spawned:
                is_lost = hook.channels.is_spawned(descriptor_in(sys._getframe(1)))
            start_ns = perf_counter_ns()
            message = core.Message(hook.destination, hook.threshold, tables, blocks)
            take_apart(obj, message, by_value=True, is_main_lost=is_lost, undo=undo)
            small = message.small()
            if small is None:
                return _send(hook, message, sys._getframe(1), start_ns)
            return _asking(hook, small, sys._getframe(1)) if hook.n_asking else small

        @staticmethod
        def loads(data: Any, /, **options: Any) -> Any:
            try:
                if type(data) in _BYTES and len(data) % MODULUS == MARK and not options:
                    start_ns = perf_counter_ns()
                    obj = original.loads(data)
                    _count_loading(start_ns, data)
                    return obj
                return original.loads(data, **options) if options else original.loads(data)
            except Exception as error:
                # The error refers to this frame: it may not refer to the error or the message.
                substitute = loading.Substitute.of(data, sys._getframe(1))
                data = None
                if substitute is None:
                    raise
                return substitute.with_error(error)

    _codes.add(vars(HookedPickler)["dumps"].__func__.__code__)
    return HookedPickler


def undo_list_of_message(frame: FrameType | None) -> list[Callable[[], Any]] | None:
    """Return the list of what to undo if the message at hand has to be pickled once more.

    Parameters
    ----------
    frame : frame
        Of a reducer, or below one.
    """
    while frame is not None:
        if frame.f_code in _codes:
            return frame.f_locals["undo"]  # type: ignore[no-any-return]
        frame = frame.f_back
    return None


def is_standard(function: Any) -> bool:
    """Tell whether it is the standard library's, of ``multiprocessing.reduction``."""
    function = getattr(function, "__func__", function)  # of a class method
    return getattr(function, "__globals__", None) is vars(mp_reduction)


def to_send(
    hook: Hook, message: core.Message, frame: FrameType, start_ns: int
) -> Envelope | memoryview | bytes:
    """Return the bytes to write for a message that was taken apart.

    `frame` is that of whoever gives them to a connection; at `start_ns` it was begun.
    """
    small = message.small()
    if small is None:
        return _send(hook, message, frame, start_ns)
    return _asking(hook, small, frame) if hook.n_asking else small


def _send(
    hook: Hook, message: core.Message, frame: FrameType, start_ns: int
) -> Envelope | memoryview | bytes:
    """Return the bytes to write for a message at or above the threshold."""
    if installed.current is not hook or hook.arena.blocks.closed:
        return _in_band(message)  # since it was begun
    pickled_ns = perf_counter_ns()
    result = _send_through(hook, message, frame)
    hook.arena.blocks.count(
        *(_statistics.NS_PICKLING, pickled_ns - start_ns),
        *(_statistics.NS_WAITING, perf_counter_ns() - pickled_ns),
    )
    return result


def _count_loading(start_ns: int, data: Any) -> None:
    """Count how long it took to load a message, if it is an envelope."""
    hook = installed.current
    if hook is not None and bytes(data[:PREFIX_NBYTES]) == PREFIX:
        hook.arena.blocks.count(_statistics.NS_LOADING, perf_counter_ns() - start_ns)


def _send_through(
    hook: Hook, message: core.Message, frame: FrameType
) -> Envelope | memoryview | bytes:
    fd = descriptor_in(frame)
    channel = 0 if fd is None else hook.channels.known(fd)
    tail = _COUNTED if hook.arena.blocks.joined else _DETACHED
    # The next message is copied to where this one went. If that is wrong, it is copied once more.
    hook.destination = hook.arena.blocks if channel else None
    if fd is None or not channel:
        # Who has joined cannot be asked without the lock's descriptor.
        lost = not hook.arena.can_be_inherited()
        hook.count_fallback("detached" if lost else "channel", message.nbytes_in_band)
        older = fd is not None and hook.channels.is_older(fd) and hook.arena.can_be_inherited()
        head = invitations.prefix(hook.arena.name) if older else b""
        return _in_band(message, head, tail, frame if fd is not None else None)
    hook.channels.backlog.wait(fd, channel, message.nbytes)
    envelope = packed_for(hook, message, channel)
    return _in_band(message, b"", tail, frame) if envelope is None else envelope


def packed_for(hook: Hook, message: core.Message, channel: int) -> Envelope | None:
    """Return the envelope to write into a channel that is known; ``None`` as `pack` does."""
    envelope = pack(hook, message, hook.channels.marked(channel))
    if envelope is None:
        return None
    first, n_in_channel = envelope.lease.blocks[0], _LENGTH_NBYTES + len(envelope)
    block = first.index, first.generation
    hook.channels.backlog.note(channel, block, message.nbytes, n_in_channel)
    if installed.current is not hook:
        envelope.lease.depart()  # uninstalled meanwhile: nobody will say when it has left
    return envelope


def _asking(hook: Hook, message: bytes, frame: FrameType) -> bytes:
    """Put an invitation to join before a small message, if one of its readers is to be asked."""
    hook.n_asking = max(0, hook.n_asking - 1)
    if running() is hook:
        fd, head = descriptor_in(frame), invitations.prefix(hook.arena.name)
        if fd is not None and len(head) + len(message) < hook.threshold:
            with ignoring(OSError):  # closed: the write will say so
                return head + message if hook.channels.asks(fd) else message
    return message


def pack(hook: Hook, message: core.Message, channel: int) -> Envelope | None:
    """Put a message into the arena and count it.

    Returns
    -------
    Envelope or None
        ``None`` if it has to travel in-band; that is counted, too.
    """
    arena = hook.arena
    try:
        envelope = _envelope.pack(message, arena, channel)
    except ArenaFullError as error:
        hook.count_fallback(error.reason, message.nbytes_in_band)
        return None
    except OSError as error:
        pass_on_foreign(error)
        detached = isinstance(error, ArenaError)
        hook.count_fallback("detached" if detached else "space", message.nbytes_in_band)
        return None
    n_buffers = message.n_buffers + envelope.is_indirect
    arena.blocks.count(
        *(_statistics.N_MESSAGES, 1),
        *(_statistics.N_BUFFERS, n_buffers),
        *(_statistics.NBYTES, message.nbytes),
        *(_statistics.NBYTES_STREAM, message.stream_nbytes),
    )
    places = message.places
    if places:
        arena.blocks.count(_statistics.NBYTES_IN_FILES, sum(nbytes for _, _, nbytes, _ in places))
    if places or hook.kept.messages:
        block = envelope.lease.blocks[0]
        hook.kept.note((block.index, block.generation), [file for *_, file in places])
    if message.nbytes_spilled:
        arena.blocks.count(
            *(_statistics.N_SPILLED, 1),
            *(_statistics.NBYTES_SPILLED, message.nbytes_spilled),
            *(_statistics.NS_SPILLING, 1000 * message.us_spilling),
        )
    return envelope


def _writes_at_once(frame: FrameType) -> bool:
    """Tell whether the caller of ``dumps`` gives the bytes to a connection, and to nobody else."""
    queues: Any = [mp_queues, *libraries.of_loky("backend.queues")]
    codes = [mp_connection.Connection.send.__code__, *_codes_in(queues, "SimpleQueue", "put")]
    return _is_feeder(frame) or frame.f_code in codes


def _is_feeder(frame: FrameType) -> bool:
    queues: Any = [mp_queues, *libraries.of_loky("backend.queues"), *libraries.of_multiprocess()]
    return frame.f_code in _codes_in(queues, "Queue", "_feed")


def _codes_in(modules: list[Any], kind: str, method: str) -> list[CodeType]:
    """Return the code of a method, of each module that has it."""
    found = [getattr(getattr(module, kind, None), method, None) for module in modules]
    return [function.__code__ for function in found if isinstance(function, FunctionType)]


def _in_band(
    message: core.Message, head: bytes = b"", tail: bytes = _COUNTED, frame: FrameType | None = None
) -> memoryview | bytes:
    """Return a pickle that every Python can load, and whose tail says who has counted it.

    `frame` is that of the caller of ``dumps``, if it is known where the message goes.
    """
    is_large = message.nbytes_in_band >= in_band.LEAST_NBYTES
    message.is_for_one = is_large and frame is not None and _writes_at_once(frame)
    if not message.is_for_one and not message.n_buffers:
        return head + message.stream + tail
    return in_band.as_pickle(message, head=head, tail=tail)


def hooked_send_bytes(original: Any) -> Any:
    most = _envelope.MAX_NBYTES

    def _send_bytes(self: Any, buf: Any) -> None:
        n = len(buf)
        if n % MODULUS != MARK or n > most:
            if n >= in_band.LEAST_NBYTES:
                message: Any = getattr(buf, "obj", None)
                if type(message) is core.Message and message.is_for_one:
                    in_band.write(message, buf, self._send)
                    return
            if n > most:
                _note_unserved(n, sys._getframe(1))
            original(self, buf)
            return
        envelope = getattr(buf, "obj", buf)
        if type(envelope) is not Envelope:
            if bytes(buf[:PREFIX_NBYTES]) == PREFIX:
                _send_on(original, self, buf)
            else:
                original(self, buf)
            return
        try:
            envelope.lease.depart()
            _faults.reach("connections.departing")
            original(self, buf)
            _faults.reach("connections.written")
        except OSError as error:
            if error.errno == errno.EPIPE:
                envelope.lease.release()  # no reader is left
            raise
        finally:
            # After any other error a reader may have it: its blocks are reclaimed.
            envelope.lease.settle()

    return _send_bytes


def _note_unserved(nbytes: int, frame: FrameType) -> None:
    """Note who sends a large message, if it is a library that should be served and is not.

    `frame` is that of the caller of ``_send_bytes``.
    """
    hook, caller = installed.current, frame.f_back
    if hook is not None and caller is not None and nbytes >= hook.threshold:
        library = libraries.unserved(str(caller.f_globals.get("__name__")))
        if library:
            hook.not_served.add(library)


def _send_on(write: Any, connection: Any, message: Any) -> None:
    """The bytes of an envelope are sent on as they are: it waits in another channel from now on."""
    hook = running()
    if hook is not None:
        head = bytes(message[: _envelope.HEAD_NBYTES])
        block = _envelope.head_of(head, hook.arena.identity)
        if block is not None:
            channel = hook.channels.marked(hook.channels.known(connection._handle))
            hook.arena.receiving.send_on(*block, channel, write, connection, message)
            return
    write(connection, message)


def hooked_recv(original: Any) -> Any:
    most = _envelope.MAX_NBYTES

    def _recv(self: Any, size: int, *args: Any) -> Any:
        # Comes after the length of the message was read, with the message itself still unread in
        # the channel; so a process that waits for a message does not count as reading one.
        if size % MODULUS != MARK or size > most:
            if size < in_band.LEAST_NBYTES or args or installed.current is None:
                message = original(self, size, *args)
            else:
                with widened(self._handle):
                    message = in_band.receive(self._handle, size)
            if size > most:
                _count_uncounted(size, message, sys._getframe(1))
            return message
        hook = installed.current
        if hook is not None and hook.arena.blocks.closed:
            hook = running()
        if hook is None:
            return original(self, size, *args)
        arena = hook.arena
        return arena.receiving.receive(_read, arena.identity, original, self, size, *args)

    return _recv


def _read(identity: bytes, original: Any, *args: Any) -> tuple[Any, tuple[int, int] | None]:
    """Read a message; return it, and its first block if it is an envelope of the arena."""
    message = original(*args)
    with message.getbuffer() as view:
        head = bytes(view[: _envelope.HEAD_NBYTES])
    return message, _envelope.head_of(head, identity)


def _count_uncounted(nbytes: int, message: io.BytesIO, frame: FrameType) -> None:
    """Count a large message that came in-band from a process that has not joined.

    `frame` is that of the caller of ``_recv``.
    """
    hook = installed.current
    with message.getbuffer() as view:
        tail = message.tail if type(message) is Received else bytes(view[-_TAIL_NBYTES:])
        if hook is None or nbytes < hook.threshold or tail == _COUNTED:
            return
        # What `send_bytes` was given is none of our business.
        is_pickle = view[0] == _PROTO and tail[-1:] == pickle.STOP and view[1] == protocol_of(frame)
    if (is_pickle or tail == _DETACHED) and running() is hook:
        # What was started without our descriptors could not attach.
        is_detached = tail == _DETACHED or not hook.arena.can_be_inherited()
        hook.count_fallback("detached" if is_detached else "channel", nbytes)
        if not is_detached:
            hook.channels.ask_again()
            hook.n_asking = _N_ASKING
    elif library := unserved_of(frame):
        hook.not_served.add(library)


def descriptor_in(frame: FrameType | None) -> int | None:
    """Return the descriptor of the connection that the caller of ``dumps`` is about to use.

    ``None`` if somebody has put a `_send_bytes` on top of ours: what we are given there need not be
    the envelope, so nobody would know when it has left.
    """
    names = {} if frame is None else frame.f_locals
    connection = names.get("self")
    if connection is None:
        connection = getattr(names.get("send_bytes"), "__self__", None)  # Queue._feed
        if frame is not None and _is_feeder(frame) and type(names) is dict:
            # Before CPython 3.13 the frame keeps this copy of its variables, and so the object that
            # was sent: until the next large message, since a feeder does not return. Another
            # function may have got the very same from `locals`, and use it.
            names.clear()
    connection = getattr(connection, "_writer", connection)  # SimpleQueue.put
    handle = getattr(connection, "_handle", None)
    send_bytes = getattr(type(connection), "_send_bytes", None)
    knows = getattr(send_bytes, "__globals__", None) is globals()
    return handle if isinstance(handle, int) and knows else None
