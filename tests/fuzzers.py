"""Inputs that nobody meant: mutated payloads, envelopes, pickles and tables, with an oracle each.

Each fuzzer has ``one(rng)``, which makes one input, feeds it to the library, and raises
`AssertionError` (or what the library raised) if anything but the library's own error comes out.
The checksums are mended after most mutations, or nothing would get past them.
"""

import contextlib
import io
import os
import pickle
import struct
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import oobpickle
from messages import envelope_of
from oobpickle import _envelope
from oobpickle._errors import (
    ArenaError,
    ArenaFullError,
    EnvelopeError,
    FileFormatError,
    PayloadError,
)
from oobpickle._files import layout as layout_module
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._native import core
from oobpickle._pickling import payload as payload_module
from oobpickle._pickling.payload import Payload
from table import IN_FLIGHT, Table, commit_word, place_word, resident_word, rows_word

MIB = 1 << 20
#: What `pickle` raises for a stream that makes no sense.
OF_PICKLE = (
    *(pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError),
    *(AttributeError, ImportError, MemoryError, OverflowError),
)
NUMBERS = (0, 1, 2, 3, 4, 5, 7, 63, 64, 255, 4096, 65535, 65536, MIB, 1 << 31, (1 << 32) - 1)
LARGE = (1 << 32, 1 << 44, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def some_number(rng, old=0):
    """Return a 64-bit number of the kind that hurts."""
    return (
        rng.choice(NUMBERS + LARGE),
        rng.getrandbits(64),
        old ^ 1 << rng.randrange(64),
        (old + rng.choice((-1, 1))) % (1 << 64),
    )[rng.randrange(4)]


def mutate(rng, data):
    """Return bytes that are wrong in one to three places."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(8)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 24, 64)))
        elif kind == 2:
            del data[at : at + rng.choice((1, 4, 8, 24))]
        elif kind == 3 and len(data) > 16:
            other = rng.randrange(len(data) - 8)
            data[at : at + 8] = data[other : other + 8]
        elif kind in (4, 5) and len(data) >= 8:
            at = min(at, len(data) - 8) // 4 * 4
            (old,) = struct.unpack_from("<Q", data, at)
            struct.pack_into("<Q", data, at, some_number(rng, old))
        elif kind == 6 and len(data) >= 4:
            struct.pack_into("<I", data, min(at, len(data) - 4) // 4 * 4, rng.choice(NUMBERS))
        elif data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


class PayloadFuzzer:
    """The bytes of payloads, for `Payload.from_bytes`."""

    def __init__(self):
        objects = [
            *(5, b"x" * 100, np.arange(10), [np.arange(i) for i in range(5)]),
            [np.ones(0), np.arange(300, dtype="u1"), {"a": np.arange(64.0)[::2]}],
        ]
        self._corpus = [oobpickle.dumps(obj).to_bytes() for obj in objects]
        self.n_accepted = 0

    def one(self, rng):
        data = mutate(rng, rng.choice(self._corpus))
        at = payload_module._CRC_AT
        if rng.random() < 0.8 and len(data) > at + 4:
            data = data[:at] + bytes(4) + data[at + 4 :]
            data = data[:at] + struct.pack("<I", zlib.crc32(data)) + data[at + 4 :]
        try:
            payload = Payload.from_bytes(data)
        except PayloadError:
            return
        self.n_accepted += 1
        sizes = [buffer.raw().nbytes for buffer in payload.buffers]

        assert sizes == payload.sizes
        assert payload.nbytes <= len(data)


MODES = (None, "r", "c", "r+")


class FileFuzzer:
    """Files of `oobpickle.dump`, for `load` in each mode and for `verify`.

    The stream is the user's: only one that is whole is loaded.
    """

    def __init__(self):
        objects = [
            *(5, b"x" * 100, np.arange(10), [np.arange(i) for i in range(5)]),
            [np.ones(0), np.arange(3000, dtype="u1"), {"a": np.arange(64.0)[::2]}],
        ]
        self._corpus = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "file")
            for n, obj in enumerate(objects):
                oobpickle.dump(obj, path, checksum=n % 2 == 1)
                self._corpus.append(path.read_bytes())
        self._fd = os.memfd_create("fuzzed")
        self._path = f"/proc/self/fd/{self._fd}"
        self.n_accepted = 0

    def close(self):
        os.close(self._fd)

    def one(self, rng):
        original = rng.choice(self._corpus)
        data = mutate(rng, original)
        if rng.random() < 0.8 and len(data) >= 64:
            data = self._mended(data)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        try:
            layout, stream = layout_module.read(self._fd, self._path)
        except FileFormatError:
            self._refused(rng)
            return
        self.n_accepted += 1
        self._look(layout, data)
        if bytes(stream) == original[-len(stream) :]:
            # The table may be that of another object, and the data be altered.
            with contextlib.suppress(FileFormatError, *OF_PICKLE):
                oobpickle.load(self._path, rng.choice(MODES))
        with contextlib.suppress(FileFormatError):
            oobpickle.verify(self._path)

    def _refused(self, rng):
        for call in (oobpickle.verify, lambda path: oobpickle.load(path, rng.choice(MODES))):
            try:
                call(self._path)
            except FileFormatError:
                continue
            raise AssertionError("it is refused, and then it is not")

    @staticmethod
    def _look(layout, data):
        ends = [at + n for at, n in zip(layout.offsets, layout.sizes, strict=True)]

        assert layout.nbytes == len(data)
        assert all(at % 64 == 0 for at in layout.offsets)
        assert sorted([64, *layout.offsets, *ends]) == [
            64,
            *(end for pair in zip(layout.offsets, ends, strict=True) for end in pair),
        ]
        assert max(ends, default=64) <= len(data) - layout.stream_nbytes

    @staticmethod
    def _mended(data):
        """Return it with checksums that are right, of whatever the header says."""
        data = bytearray(data)
        n_buffers, stream_at, stream_nbytes = struct.unpack_from("<QQQ", data, 32)
        table_at = stream_at - 24 * n_buffers
        if 64 <= table_at <= stream_at <= len(data):
            table = data[table_at:stream_at]
            struct.pack_into("<I", data, 60, zlib.crc32(table))
            struct.pack_into("<I", data, 56, zlib.crc32(data[stream_at:][:stream_nbytes]))
        struct.pack_into("<I", data, 12, 0)
        struct.pack_into("<I", data, 12, zlib.crc32(data[:64]))
        return bytes(data)


class _Known(pickle.Unpickler):
    """Loads no function but ours: the mutated name of another one must not be called."""

    def find_class(self, module, name):
        if (module, name) == ("oobpickle._envelope", "unpack_envelope"):
            return _envelope.unpack_envelope
        raise pickle.UnpicklingError("not the name of our function")


class EnvelopeFuzzer:
    """Envelopes of messages in flight: the argument of the unpack function, and the pickle.

    The stream within is the user's. It is compared, not loaded.
    """

    def __init__(self):
        self._arena = SharedArena.create(Options(capacity=64 * MIB))
        self._table = Table.of(self._arena)
        _envelope.introduce(self._arena)
        objects = [
            [np.full(100_000, 1.0)],
            [np.full(20_000, 2.0), np.full(300, 3), np.full(9000, 4), np.zeros(0)],
            ["t" * 20_000, np.full(10_000, 5.0)],
            [np.full(10 + i, i) for i in range(1500)],
            [np.full(100_000, 6.0)],
        ]
        self._objects = objects
        self._payloads = [oobpickle.dumps(obj) for obj in objects]
        self._sent = [self._send(obj) for obj in objects]
        self.n_accepted = 0

    def close(self):
        """Load what is left, whole; nothing may be left leased, held or in flight then."""
        for payload, (envelope, _) in zip(self._payloads, self._sent, strict=True):
            stream, buffers = self._load(
                _envelope.unpack_envelope, envelope[_envelope._BODY_AT : -3]
            )
            assert payload.stream == stream
            assert [bytes(b.raw()) for b in payload.buffers] == [bytes(b) for b in buffers]
            del buffers, stream
        statistics = self._arena.statistics()
        assert {**statistics.n_blocks, "free": 0} == dict.fromkeys(statistics.n_blocks, 0)
        assert statistics.n_quarantined == 0
        _envelope.forget(self._arena)
        self._arena.close()
        self._arena.detach()
        assert self._arena.try_destroy()

    def _send(self, obj):
        envelope = envelope_of(obj, self._arena)
        numbers = struct.unpack(f"<{len(envelope.lease.pairs) // 8}Q", envelope.lease.pairs)
        envelope.lease.settle()
        return bytes(envelope), list(zip(numbers[::2], numbers[1::2], strict=True))

    @staticmethod
    def _load(call, argument):
        # What crosses is handed on as it is, instead of being loaded.
        original = _envelope.pickle
        _envelope.pickle = SimpleNamespace(loads=lambda s, buffers: (bytes(s), buffers))
        try:
            return call(argument)
        finally:
            _envelope.pickle = original

    def one(self, rng):
        envelope, _ = rng.choice(self._sent)
        if rng.random() < 0.3:
            self._refused(_load_pickle, mutate(rng, envelope), (EnvelopeError, *OF_PICKLE))
        else:
            framed = mutate(rng, envelope[_envelope._BODY_AT : -3])
            if rng.random() < 0.9:
                framed = self._mended(framed)
            self._refused(_envelope.unpack_envelope, framed, EnvelopeError)

    @staticmethod
    def _mended(framed):
        head = _envelope._HEADER.size
        body = framed[head:]
        if len(framed) < head:
            return framed
        body += bytes((_envelope._PADDED_TO - len(body)) % _envelope.MODULUS)
        crc = zlib.crc32(body, zlib.crc32(framed[8:head]))
        return framed[:4] + struct.pack("<I", crc) + framed[8:head] + body

    def _refused(self, call, argument, errors):
        try:
            loaded = self._load(call, argument)
        except errors:
            pass
        else:
            self.n_accepted += 1
            if isinstance(loaded, tuple) and len(loaded) == 2 and isinstance(loaded[1], list):
                assert all(isinstance(view, (memoryview, bytearray)) for view in loaded[1])
            del loaded
        self._replace_what_was_taken()

    def _replace_what_was_taken(self):
        blocks, table = self._arena.blocks, self._table
        for at, (_, sent) in enumerate(self._sent):
            in_flight = [(i, table.generation(i)) for i, _ in sent if table.state(i) == IN_FLIGHT]
            if in_flight != sent:
                for block in sent:  # as if somebody had read it, and given it up
                    blocks.adopt(*block)
                    blocks.discard(*block)
                self._sent[at] = self._send(self._objects[at])


def _load_pickle(data):
    return _Known(io.BytesIO(data)).load()


class TableFuzzer:
    """A table that is written over while participants lease, send, hold, die and give back.

    Whatever is written without a right check, nobody's memory is somebody else's: each has content
    of its own. With one, no call raises or hangs.
    """

    N_PARTICIPANTS = 3
    N_ROWS = 24

    def __init__(self):
        self.n_inputs = self.n_quarantined = 0
        self._arenas = []
        core.wait_for_the_lock(3_000)

    def close(self):
        self._bury()
        core.wait_for_the_lock(2_000_000)

    def _bury(self):
        self._mine, self._sent = [], []
        for arena in self._arenas:
            arena.blocks.abandon()
            arena._files.close()
        self._arenas = []

    def _anew(self, rng):
        self._bury()
        first = SharedArena.create(Options(capacity=64 * MIB))
        self._arenas = [first]
        while len(self._arenas) < self.N_PARTICIPANTS:
            self._arenas.append(self._attached())
        self._table = Table.of(first)
        self._words = np.frombuffer(self._table.bytes, np.uint64)
        self._forged = False

    def _attached(self):
        return SharedArena.attach(*(os.dup(fd) for fd in self._arenas[0].descriptors))

    def one(self, rng):
        if self.n_inputs % 16 == 0:
            self._anew(rng)
            for _ in range(8):
                self._step(rng)
        self.n_inputs += 1
        self._damage(rng)
        for _ in range(3):
            self._step(rng)
        if not self._forged:
            for _, view, content in self._mine:
                assert bytes(view[:8]) + bytes(view[-8:]) == content, "somebody else wrote there"

    def _damage(self, rng):
        words, layout = self._words, core.LAYOUT
        rows, participants = layout["table.rows"] // 8, layout["table.participants"] // 8
        first, last = layout["header.lock"] // 8, layout["header.totals"] // 8 + 98
        index = rng.randrange(self.N_ROWS)
        if rng.random() < 0.3:
            at = rng.choice((rng.randrange(first, last), participants + rng.randrange(4 * 128)))
        else:
            at = rows + 8 * index + rng.randrange(8)
        kind = rng.random()
        if kind < 0.1:
            words[at] = words[rows + rng.randrange(8 * self.N_ROWS)]
        elif kind < 0.15:  # a stray memset
            words[at : at + rng.randrange(2, 12)] = 0
        elif kind < 0.25:
            self._forge(rng, index)
        else:
            words[at] = some_number(rng, int(words[at]))

    def _forge(self, rng, index):
        """Write what is wrong with a check that is right."""
        self._forged = True
        table, number, kind = self._table, some_number(rng), rng.randrange(4)
        row = table.rows[index : index + 1]
        if kind == 0:
            state, slot = rng.randrange(9), rng.choice((0, 1, 2, 5000, 0xFFFFFF))
            row["commit"] = commit_word(index, state, slot, table.generation(index))
        elif kind == 1:
            offset = number % (1 << 44) // 4096 * 4096
            row["place"] = place_word(index, offset, rng.randrange(128))
        elif kind == 2:
            row["resident"] = resident_word(index, number % (1 << 48))
        else:
            n_rows = rng.randrange(self.N_ROWS + 2)
            table["n_rows"], table["n_rows_again"] = rows_word(n_rows), n_rows

    # --- the participants go on

    def _step(self, rng):
        if rng.random() < 0.1:  # one dies, and another one comes
            who = rng.randrange(1, self.N_PARTICIPANTS)
            gone = self._arenas[who]
            self._mine = [one for one in self._mine if one[0] is not gone]
            gone.blocks.abandon()
            gone._files.close()
            with contextlib.suppress(ArenaError):
                self._arenas[who] = self._attached()
        arena = rng.choice(self._arenas)
        steps = (
            *(self._send, self._send, self._receive, self._receive, self._drop, self._drop),
            *(self._look, self._reclaim),
        )
        rng.choice(steps)(rng, arena)

    def _send(self, rng, arena):
        if self._table.n_rows > self.N_ROWS:
            return
        sizes = [rng.choice((100, 70_000, MIB, 3 * MIB)) for _ in range(rng.randint(1, 3))]
        try:
            lease = arena.acquire(sizes, wait_timeout=0)
        except ArenaFullError:
            return
        contents = [rng.randbytes(16) for _ in sizes]
        for view, content in zip(lease.destinations, contents, strict=True):
            view[:8], view[-8:] = content[:8], content[8:]
        pairs = lease.pairs
        if rng.random() < 0.2:
            self._mine += [
                (arena, view, content)
                for view, content in zip(lease.destinations, contents, strict=True)
            ]
            return
        lease.seal(some_number(rng))
        lease.depart()
        lease.settle()
        self._sent.append((pairs, sizes, contents))

    def _receive(self, rng, arena):
        if not self._sent:
            return
        pairs, sizes, contents = self._sent.pop(rng.randrange(len(self._sent)))
        if rng.random() < 0.5:
            self._damage(rng)
        block = struct.unpack_from("<2Q", pairs)
        if rng.random() < 0.5:
            arena.blocks.adopt(*block)
        if rng.random() < 0.2:
            arena.blocks.settle(arena.blocks.send_on(*block, some_number(rng)))
        if rng.random() < 0.1:
            arena.blocks.discard(*block)
        try:
            found = arena.receiving.claim(pairs, sizes)
        except EnvelopeError:
            return
        for view, content in zip(found, contents, strict=True):
            assert self._forged or bytes(view[:8]) + bytes(view[-8:]) == content
            self._mine.append((arena, view, bytes(view[:8]) + bytes(view[-8:])))

    def _drop(self, rng, arena):
        if self._mine:
            del self._mine[rng.randrange(len(self._mine))]

    def _look(self, rng, arena):
        statistics = arena.statistics()
        self.n_quarantined += statistics.n_quarantined
        assert all(n >= 0 for n in statistics.n_blocks.values())
        arena.blocks.participants()
        arena.blocks.sources()
        arena.blocks.passed_since(some_number(rng))
        arena.blocks.pass_on([some_number(rng)])

    def _reclaim(self, rng, arena):
        arena.reclaim.reap()
        arena.blocks.free_lost(arena.blocks.unowned())
        if rng.random() < 0.3:
            arena.reclaim.punch_idle(some_number(rng))


class CallFuzzer:
    """The functions of the extension module, with arguments that nobody means."""

    ERRORS = (
        *(TypeError, ValueError, OverflowError, BufferError, OSError, IndexError, KeyError),
        *(MemoryError, SystemError),
    )

    def __init__(self):
        self._arena = SharedArena.create(Options(capacity=16 * MIB))
        self._blocks, self.n_accepted = [], 0
        core.wait_for_the_lock(3_000)
        spare = {"abandon", "close", "end", "read_for_ever", "say_that_it_reads", "keep_all"}
        blocks = self._arena.blocks
        self._calls = [
            getattr(blocks, name)
            for name in sorted(vars(type(blocks)))
            if not name.startswith("_") and name not in spare and callable(getattr(blocks, name))
        ]
        self._calls += [core.copy, core.constants, core.header, core.epoch, core.plan, core.spread]
        self._calls += [core.headroom, core.Message, core.Rebuild]
        self._message = self._kept = None

    def _call_of_message(self, rng):
        if self._message is None or rng.random() < 0.1:
            blocks = rng.choice((None, False, self._arena.blocks))
            self._message = core.Message(blocks, rng.choice((0, 1000)), _envelope.tables({}))
        name = rng.choice([n for n in sorted(vars(core.Message)) if not n.startswith("_")])
        found = getattr(self._message, name)
        if callable(found):
            return found
        return rng.choice((self._message.__getitem__, lambda: memoryview(self._message)))

    def close(self):
        self._message = self._kept = None
        self._arena.sending._tell_limits()
        self._blocks.clear()
        core.wait_for_the_lock(2_000_000)
        self._arena.blocks.release([])
        self._arena.close()
        assert not any(self._arena.statistics().n_blocks[state] for state in ("leased", "held"))
        self._arena.blocks.free_lost(self._arena.blocks.unowned())
        self._arena.blocks.abandon()
        self._arena._files.close()

    def one(self, rng):
        call = rng.choice(self._calls)
        arguments = [self._argument(rng) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
        if rng.random() < 0.4:
            call = self._call_of_message(rng)
        elif rng.random() < 0.3 and self._blocks:
            call = rng.choice((self._blocks[-1].reserve, self._blocks[-1].empty))
        try:
            result = call(*arguments)
        except self.ERRORS:
            return
        self.n_accepted += 1
        self._kept = result if rng.random() < 0.5 else None  # a view keeps its message
        if isinstance(result, list):
            self._blocks += [one for one in result if isinstance(one, core.Block)]
        del self._blocks[: -rng.randrange(1, 20)]

    def _argument(self, rng):
        kind = rng.randrange(11)
        if kind == 0:
            return some_number(rng)
        if kind == 9:
            return rng.choice((np.ones(9000), np.ones(9000)[::3], np.ones(9, "M8[s]"), np.ndarray))
        if kind == 10:
            return rng.choice((pickle.PickleBuffer(b"x" * 5000), bytearray(70_000), b"\x96" * 9))
        if kind == 1:
            return rng.choice((None, -1, 1.5, "text", (), {}, object(), True))
        if kind == 2:
            return [rng.choice((0, 1, 100, 70_000, MIB, some_number(rng))) for _ in range(3)]
        if kind == 3:
            return self._blocks[-rng.randrange(1, 4) :]
        if kind == 4:
            return [(rng.randrange(30), some_number(rng)), self._argument(rng)]
        if kind == 5:
            return rng.randbytes(rng.choice((0, 8, 16, 32, 4000)))
        if kind == 6:
            return struct.pack("<2Q", rng.randrange(30), rng.randrange(5))
        if kind == 7:
            return bytearray(rng.choice((0, 16, 100)))
        return rng.randrange(40)
