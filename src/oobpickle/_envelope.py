"""The envelope: the small picklable message that crosses the pipe. Here pickle meets memory.

**What.** `pack` puts a message that was taken apart (`oobpickle._core.Message`) into the arena, and
returns the envelope; loading it calls `unpack_envelope`.

**How it works.** An envelope is an ordinary pickle with one global and one ``bytes`` argument::

    magic 4 | crc32 u32 | name of the arena 36 | n_blocks u32 | n_buffers u32 | flags u32 | stream
    nbytes u64 index u64, generation u64 of each block | nbytes u64 of each buffer | stream | zeros

The zeros make the whole of it `MARK` bytes long modulo `MODULUS`, as few other messages are; so
the receiver of a message need not look closely at each.

The size of a buffer that lies in published memory is marked (bit 63), and its offset there
follows; its block is a reference, which comes behind the others (``_core/references.c``). Of one
that lies in a file (flag 2) the size is 0; where it lies, stands behind the stream (`_in_files`).

A large stream, or a long table, lies in the arena too: then the envelope names the first block
only, and that block holds the rest (flag 1); the first bytes of the stream follow. Sender and
receiver compute the layout of the buffers within the blocks from the sizes (``_core/plan.c``).

Most messages are in blocks already, since each buffer was copied there when the pickler handed it
out. One that found no room then lies in ordinary memory; for it room is waited for here.

**Lifetime.** The blocks belong to the `Envelope` until it is sent; they are released if it is
collected before. The receiver's arrays are the blocks; if loading the stream raises, they are
released as the exception is handled.

**When it cannot.** `EnvelopeError` for bytes that are truncated, altered, or of an arena that
this process has not joined; `StaleEnvelopeError` if the message was loaded before."""

from __future__ import annotations

import os
import pickle
import struct
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from oobpickle import _faults, _in_files
from oobpickle._errors import ArenaError, ArenaFullError, EnvelopeError, StaleEnvelopeError
from oobpickle._foreign import pass_on_foreign
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.files import NAME_NBYTES
from oobpickle._memory.options import FORCED
from oobpickle._memory.sending import Lease, writing
from oobpickle._native import core
from oobpickle._pickling.reducers import levels, special_reducer
from oobpickle._pickling.serializer import take_apart
from oobpickle._statistics import N_LOADED

_MAGIC: Final = b"OOBE"
_HEADER: Final = struct.Struct(f"<4sI{NAME_NBYTES}sIIIQ")
_CRC_FROM: Final = 8
_CHECKED: Final = struct.Struct(f"<{NAME_NBYTES}sIIIQ")  # the checksum is of this and the rest
_START: Final = struct.Struct("<Q4sI")  # what comes before: length, magic and checksum
_INDIRECT: Final = 1
_IN_FILES: Final = 2
_PAIR_NBYTES: Final = 16
_INLINE_NBYTES: Final = 8 << 10
PREFIX: Final = b"\x80\x04coobpickle._envelope\nunpack_envelope\n\x8e"
_SUFFIX: Final = b"\x85R."
PREFIX_NBYTES: Final = len(PREFIX)
_BODY_AT: Final = PREFIX_NBYTES + 8
MODULUS: Final = 64
MARK: Final = 37
_PADDED_TO: Final = MARK - (_BODY_AT + _HEADER.size + len(_SUFFIX))  # length modulo `MODULUS`
#: Of a stream in the arena the envelope has so much, for those who cannot load it.
START_NBYTES: Final = 40

_arenas: dict[bytes, SharedArena] = {}
_ended: Final[deque[bytes]] = deque(maxlen=1 << 10)  # identities of those that nobody needed


class Envelope(bytes):
    """The bytes to send, with the lease of the blocks that they name."""

    lease: Lease
    is_indirect: bool


def pack(message: core.Message, arena: SharedArena, channel: int = 0) -> Envelope:
    """Return the envelope of a message, which is in blocks of the arena then.

    As a rule it is there already, since each buffer was copied as the pickler handed it out.

    Parameters
    ----------
    message : Message
        What was taken apart.
    arena : SharedArena
        Where it goes.
    channel : int
        Where the envelope will go, for `Lease.seal`.

    Raises
    ------
    ArenaFullError
        From `Arena.acquire`; the message is in memory of its own then. Nothing stays leased, here
        or after any other exception.
    """
    if arena.blocks.closed or arena.has_lost_files:
        arena.check_open()
    places = message.places
    told = _in_files.describe(places) if places else b""
    sizes, n_stream = message.sizes, message.stream_nbytes + len(told)
    is_indirect = _is_indirect(sizes, n_stream)
    blocks = message.blocks
    index_needs = []
    if is_indirect:
        n_blocks = len(core.plan(sizes) if blocks is None else blocks)
        index_needs = [_index_nbytes(n_blocks, sizes, n_stream)]
        if blocks is not None:
            blocks = _with_index(arena, index_needs, blocks)
    if blocks is None:
        message.leave_blocks()
        references = message.references
        own = core.plan(sizes)[: -len(references) or None]
        blocks = arena.acquire([*index_needs, *own]).blocks
        try:
            with writing(message.nbytes):
                message.move_into(blocks[len(index_needs) :])
        except BaseException:
            arena.blocks.release(blocks)  # else a stored traceback would keep them
            raise
        blocks += references
    if message.nbytes_fresh or message.nbytes >= arena.sending.vain_nbytes:
        arena.sending.note(message.nbytes, message.nbytes_fresh)
    lease = Lease(arena.blocks, blocks)
    pairs = arena.blocks.pairs(blocks)
    if is_indirect:
        table = pairs + sizes
        with writing(index_needs[0]):
            blocks[0].write(0, table)
            message.write_stream_into(blocks[0], len(table))
            blocks[0].write(len(table) + message.stream_nbytes, told)
        start = message.start(START_NBYTES)
        body = pairs[:_PAIR_NBYTES] + _numbers(index_needs) + start.ljust(START_NBYTES, b"\0")
    else:
        body = pairs + sizes + message.stream + told
    _faults.reach("envelope.copied")
    lease.seal(channel)
    flags = (_INDIRECT if is_indirect else 0) | (_IN_FILES if told else 0)
    counts = len(blocks), len(sizes) // 8, flags, n_stream
    envelope = Envelope(_framed(arena.name, counts, body))
    envelope.lease = lease
    envelope.is_indirect = is_indirect
    return envelope


def _with_index(arena: SharedArena, index_needs: list[int], blocks: list[Any]) -> list[Any] | None:
    """Lease a block for the index, if there is to be one, without waiting if others are there.

    Who waits with blocks in his hands may wait for somebody who waits for these.
    """
    if not blocks:
        return arena.acquire(index_needs).blocks
    try:
        return [*arena.acquire(index_needs, wait_timeout=0).blocks, *blocks]
    except ArenaFullError:
        return None


def _is_indirect(sizes: bytes, n_stream: int) -> bool:
    return FORCED or n_stream + len(sizes) > _INLINE_NBYTES or not any(sizes)


def needs_of(obj: object, threshold: int) -> list[int]:
    """Return the bytes of each block that a message with the object would need."""
    message = core.Message(False, threshold, tables({}))
    take_apart(obj, message, by_value=True)
    sizes, n_stream = message.sizes, message.stream_nbytes
    needs: list[int] = core.plan(sizes, True)
    if _is_indirect(sizes, n_stream):
        needs.insert(0, _index_nbytes(len(needs), sizes, n_stream))
    return needs


def tables(special: Mapping[type, Any]) -> tuple[Any, ...]:
    """Return where a `Message` looks for reducers; `special` are those of its pickler."""
    return *levels(special), special_reducer


def _numbers(sizes: list[int]) -> bytes:
    return struct.pack(f"<{len(sizes)}Q", *sizes)


def _index_nbytes(n_others: int, sizes: bytes, n_stream: int) -> int:
    return _PAIR_NBYTES * (1 + n_others) + len(sizes) + n_stream


def _framed(name: bytes, counts: tuple[int, int, int, int], body: bytes) -> bytes:
    checked = _CHECKED.pack(name, *counts) + body + bytes((_PADDED_TO - len(body)) % MODULUS)
    start = _START.pack(_CRC_FROM + len(checked), _MAGIC, zlib.crc32(checked))
    return PREFIX + start + checked + _SUFFIX


def _start_at(flags: int, n_blocks: int, n_buffers: int) -> int:
    return 24 if flags & _INDIRECT else 16 * n_blocks + 8 * n_buffers


def start_of_stream(message: memoryview) -> bytes | None:
    """Return the first bytes of the stream of an envelope, ``None`` of anything else.

    They can be had when the message cannot be loaded.
    """
    if bytes(message[:PREFIX_NBYTES]) != PREFIX or len(message) < MIN_NBYTES:
        return None
    _, _, _, n_blocks, n_buffers, flags, n_stream = _HEADER.unpack_from(message, _BODY_AT)
    at = _BODY_AT + _HEADER.size + _start_at(flags, n_blocks, n_buffers)
    return bytes(message[at : at + min(START_NBYTES, n_stream)])


class _Parsed(NamedTuple):
    name: bytes
    n_blocks: int
    n_buffers: int
    indirect: bool
    in_files: bool
    n_stream: int
    body: memoryview


def _parse(data: bytes) -> _Parsed:
    if not isinstance(data, bytes):
        raise EnvelopeError(f"not an envelope: {type(data).__name__}, expected bytes")
    if len(data) < _HEADER.size:
        raise EnvelopeError(f"envelope truncated: {len(data)} bytes, need {_HEADER.size} or more")
    magic, crc, name, n_blocks, n_buffers, flags, n_stream = _HEADER.unpack_from(data)
    indirect, in_files = bool(flags & _INDIRECT), bool(flags & _IN_FILES)
    if magic != _MAGIC or flags > _INDIRECT | _IN_FILES:
        raise EnvelopeError(f"not an envelope: magic {magic!r}, flags {flags}, expected {_MAGIC!r}")
    checked = memoryview(data)[_CRC_FROM:]
    body, found = checked[_CHECKED.size :], zlib.crc32(checked)
    if found != crc:
        raise EnvelopeError(f"envelope altered: checksum {found:#010x}, expected {crc:#010x}")
    wanted = _start_at(flags, n_blocks, n_buffers) + (START_NBYTES if indirect else n_stream)
    wanted += (_PADDED_TO - wanted) % MODULUS
    if body.nbytes != wanted:
        raise EnvelopeError(f"envelope of {body.nbytes} bytes after its head, expected {wanted}")
    if n_blocks < 1:
        raise EnvelopeError("an envelope without a block")
    return _Parsed(name, n_blocks, n_buffers, indirect, in_files, n_stream, body)


def unpack_envelope(data: bytes) -> Any:
    """Rebuild the object of an envelope; what loading one calls.

    Raises
    ------
    EnvelopeError
        If `data` is truncated, altered, or of an arena that this process has not joined.
    StaleEnvelopeError
        If the message was loaded already, or taken back.
    """
    parsed = buffers = stream = None
    try:
        parsed = _parse(data)
        arena = _arenas.get(parsed.name[:16]) or _joined(parsed.name)
        buffers, stream = _claim(arena, parsed)
        if parsed.in_files:
            _in_files.fill(buffers, stream)
        arena.blocks.count(N_LOADED, 1)
        _faults.reach("envelope.claimed")
        return pickle.loads(stream, buffers=buffers)
    except BaseException:  # if of a signal handler, nobody has the message any more
        if parsed is not None:
            _discard(data)
        raise
    finally:
        parsed = buffers = stream = None  # an error refers to this frame


def _discard(data: bytes) -> None:
    arena = _arenas.get(data[_CRC_FROM : _CRC_FROM + 16])
    if arena is not None:
        arena.receiving.discard(*struct.unpack_from("<2Q", data, _HEADER.size))


def _joined(name: bytes) -> SharedArena:
    """Join an arena that a message names."""
    if name[:16] in _ended:
        raise StaleEnvelopeError(
            f"arena {name.hex()[:8]} has ended, and had no message left: this one was loaded "
            "already, or its sender took it back. Load each message once; keep the object "
            "instead."
        )
    # The sender knows its readers; this is for those that it cannot know, such as a program
    # that inherited a connection through subprocess.
    try:
        arena = SharedArena.find(name)
    except (ArenaError, OSError) as error:
        pass_on_foreign(error)
        raise EnvelopeError(
            f"this message lies in arena {name.hex()[:8]}, which process {os.getpid()} has "
            f"not joined and cannot reach: {error}. Receive it in a process that was "
            "started inside enabled()."
        ) from error
    arena.blocks.read_for_ever()  # there is no hook to say when this process reads
    introduce(arena)
    return arena


def _claim(arena: SharedArena, parsed: _Parsed) -> tuple[list[memoryview], memoryview]:
    rest, n_pairs, claim = parsed.body, _PAIR_NBYTES * parsed.n_blocks, arena.receiving.claim
    parts = stream = None
    try:
        if parsed.indirect:
            (index_nbytes,) = struct.unpack_from("<Q", rest, _PAIR_NBYTES)
            if index_nbytes < n_pairs + 8 * parsed.n_buffers + parsed.n_stream:
                raise EnvelopeError(
                    f"an index of {index_nbytes} bytes for {parsed.n_blocks} blocks"
                )
            (rest,) = claim(bytes(rest[:_PAIR_NBYTES]), [index_nbytes], is_index=True)
        start = n_pairs + 8 * parsed.n_buffers
        sizes = bytes(rest[n_pairs:start])
        stream = rest[start : start + parsed.n_stream]
        pairs = bytes(rest[_PAIR_NBYTES if parsed.indirect else 0 : n_pairs])
        needs = core.plan(sizes)
        n_named = len(pairs) // _PAIR_NBYTES
        if len(needs) != n_named:
            raise EnvelopeError(f"{n_named} blocks for buffers that need {len(needs)}")
        if n_named > 1 and len(set(struct.unpack(f"<{2 * n_named}Q", pairs)[::2])) != n_named:
            raise EnvelopeError("an envelope names a block twice")
        parts = _spread(claim(pairs, needs, sizes), sizes)
        # A need of 0 is a reference, which has a mapping of its own.
        return (arena.receiving.within_limit(parts) if 0 in needs else parts), stream
    finally:
        del rest, parts, stream  # an error refers to this frame


def _spread(blocks: list[memoryview], sizes: bytes) -> list[memoryview]:
    try:
        return core.spread(blocks, sizes, True)
    except (ValueError, IndexError) as error:  # sizes that are none, with a right checksum
        raise EnvelopeError(f"an envelope that does not fit its blocks: {error}") from error
    finally:
        del blocks  # an error refers to this frame


def introduce(arena: SharedArena) -> None:
    """Let this process load envelopes of the arena, and prepare for them."""
    arena.keep()
    threshold = arena.options.threshold or 0
    arena.needs_of = lambda like: needs_of(like, threshold)
    _arenas[arena.identity] = arena


def forget(arena: SharedArena) -> None:
    """No envelope of the arena can be loaded any more."""
    _ended.append(arena.identity)
    _arenas.pop(arena.identity, None)


def head_of(message: bytes, identity: bytes) -> tuple[int, int] | None:
    """Return index and generation of the first block of an envelope of the given arena.

    Parameters
    ----------
    message : bytes
        The first `HEAD_NBYTES` of a message; ``None`` is returned if it is no such envelope.
    identity : bytes
        The arena's.
    """
    if not message.startswith(PREFIX) or message[_IDENTITY_AT : _IDENTITY_AT + 16] != identity:
        return None
    index, generation = struct.unpack_from("<2Q", message, _BODY_AT + _HEADER.size)
    return index, generation


_IDENTITY_AT: Final = _BODY_AT + 8
HEAD_NBYTES: Final = _BODY_AT + _HEADER.size + 16
#: No envelope is smaller or larger than this; each names at least one block.
MIN_NBYTES: Final = HEAD_NBYTES + len(_SUFFIX)
MAX_NBYTES: Final = MIN_NBYTES + 3 * _INLINE_NBYTES + MODULUS
