"""Inputs that nobody meant: mutated payloads, envelopes, pickles and ledgers, with an oracle each.

Each fuzzer has ``one(rng)``, which makes one input, feeds it to the library, and raises
`AssertionError` (or what the library raised) if anything but the library's own error comes out.
The checksums are mended after most mutations, or nothing would get past them.
"""

import contextlib
import io
import pickle
import struct
import zlib
from types import SimpleNamespace

import numpy as np

import oobpickle
from ledger_tools import FakeLocks, make_words
from oobpickle import _envelope
from oobpickle._errors import EnvelopeError, OobPickleError, PayloadError
from oobpickle._memory import layout
from oobpickle._memory.arena import Arena
from oobpickle._memory.ledger import Ledger
from oobpickle._memory.options import Options
from oobpickle._memory.participants import OwnRow, Participants
from oobpickle._memory.rows import Shortage
from oobpickle._pickling import payload as payload_module
from oobpickle._pickling.payload import Payload

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
        self._arena = Arena.create(Options(capacity=64 * MIB))
        _envelope.introduce(self._arena)
        objects = [
            [np.full(100_000, 1.0)],
            [np.full(20_000, 2.0), np.full(300, 3), np.full(9000, 4), np.zeros(0)],
            ["t" * 20_000, np.full(10_000, 5.0)],
            [np.full(10 + i, i) for i in range(1500)],
            [np.full(100_000, 6.0)],
        ]
        self._payloads = [oobpickle.dumps(obj) for obj in objects]
        self._sent = [self._send(payload) for payload in self._payloads]
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
        self._arena.drain()
        statistics = self._arena.statistics()
        assert {**statistics.n_blocks, "free": 0} == dict.fromkeys(statistics.n_blocks, 0)
        assert statistics.n_quarantined == 0
        _envelope.forget(self._arena)
        self._arena.close()
        self._arena.detach()
        assert self._arena.try_destroy()

    def _send(self, payload):
        envelope = _envelope.pack(payload, self._arena.acquire, self._arena.name)
        blocks = list(envelope.lease.blocks)
        envelope.lease.settle()
        return bytes(envelope), blocks

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
        body += bytes(_envelope._padding(len(body)))
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
                assert all(isinstance(view, memoryview) for view in loaded[1])
            del loaded
        self._replace_what_was_taken()

    def _replace_what_was_taken(self):
        ledger = self._arena.ledger
        for at, (_, blocks) in enumerate(self._sent):
            if not all(ledger.is_in_flight(*block) for block in blocks):
                left = [(i, ledger.word[i]) for i, g in blocks if ledger.is_in_flight(i, g)]
                self._arena.membership.run(ledger.free_unread, left)
                self._sent[at] = self._send(self._payloads[at])


def _load_pickle(data):
    return _Known(io.BytesIO(data)).load()


class LedgerFuzzer:
    """A table that is written over while participants lease, pass on, hold, die and give back.

    Whatever is written without a right check, nobody gets a range that somebody else uses. With
    one, no step raises, and each ends.
    """

    N_SLOTS = 3
    N_ROWS = 24

    def __init__(self):
        self._words = make_words(64 * MIB)
        self._columns = [
            layout.BLOCKS_AT + column * layout.MAX_BLOCKS for column in range(layout.N_COLUMNS)
        ]
        self._empty = bytes(self._words[: layout.HEADER_WORDS])
        self.n_inputs = self.n_quarantined = 0
        self._anew(None)

    def _anew(self, rng):
        words = self._words
        words.cast("B")[: len(self._empty)] = self._empty
        participants = layout.MAX_PARTICIPANTS * layout.PARTICIPANT_WORDS
        for start, n in ((layout.HEADER_WORDS, participants), *((c, 64) for c in self._columns)):
            words[start : start + n] = memoryview(bytes(8 * n)).cast("Q")
        self._ledgers = [Ledger(words) for _ in range(self.N_SLOTS)]
        self._locks = FakeLocks()
        self._participants = Participants(self._ledgers[0])
        self._slots = [self._participants.join(self._locks) for _ in range(self.N_SLOTS)]
        self._used = {}  # index to (who, generation, nbytes, state)
        self._forged = False

    def one(self, rng):
        if self.n_inputs % 16 == 0:
            self._anew(rng)
            for _ in range(8):
                self._step(rng)
        self.n_inputs += 1
        self._damage(rng)
        for _ in range(3):
            self._step(rng)

    def _damage(self, rng):
        words = self._words
        index = rng.randrange(self.N_ROWS)
        if rng.random() < 0.3:
            at = rng.choice(
                (
                    *range(layout.H_DIRTY, layout.H_INCARNATION + 1),
                    *(layout.H_CLOSED, layout.H_STRANGERS, layout.H_HANDED),
                    layout.H_WARM + rng.randrange(256),
                    layout.H_TOTALS + rng.randrange(256),
                    layout.HEADER_WORDS + rng.randrange(4 * layout.PARTICIPANT_WORDS),
                )
            )
        else:
            at = rng.choice(self._columns) + index
        kind = rng.random()
        if kind < 0.1:
            words[at] = words[rng.choice(self._columns) + rng.randrange(self.N_ROWS)]
        elif kind < 0.15:  # a stray memset
            for word in range(at, at + rng.randrange(2, 12)):
                words[word] = 0
        elif kind < 0.25:
            self._forge(rng, index)
        else:
            words[at] = some_number(rng, words[at])

    def _forge(self, rng, index):
        """Write what is wrong with a check that is right."""
        self._forged = True
        generation, number = self._columns[layout.C_GENERATION] + index, some_number(rng)
        words, kind = self._words, rng.randrange(4)
        if kind == 0:
            low = rng.randrange(7) | rng.choice((0, 1, 2, 5000, layout.OWNER_MASK)) << 8
            words[self._columns[layout.C_WORD] + index] = layout.checked_word(
                index, low, words[generation]
            )
        elif kind == 1:
            offset, size_class = number // 4096 * 4096, rng.randrange(layout.N_CLASSES)
            for column, value in (
                (layout.C_OFFSET, offset),
                (layout.C_CLASS, size_class),
                (layout.C_CHECK, layout.row_check(index, offset, size_class)),
            ):
                words[self._columns[column] + index] = value
        elif kind == 2:
            number &= layout.RESIDENT_MASK
            words[self._columns[layout.C_RESIDENT] + index] = layout.resident_word(index, number)
        else:
            n_rows = rng.randrange(self.N_ROWS + 2)
            words[layout.H_ROWS], words[layout.H_N_BLOCKS] = layout.rows_word(n_rows), n_rows

    # --- the participants go on

    def _step(self, rng):
        who = rng.randrange(self.N_SLOTS)
        if rng.random() < 0.1:
            self._ledgers[who] = Ledger(self._words)  # as a process that comes later sees it
        steps = (
            *(self._lease, self._lease, self._pass_on, self._give_back, self._give_back),
            *(self._look, self._repair, self._others),
        )
        rng.choice(steps)(rng, who, self._ledgers[who], self._slots[who])

    def _lease(self, rng, who, ledger, slot):
        if ledger.rows.n_rows > self.N_ROWS:
            return
        needs = [rng.choice((100, 70_000, MIB, 3 * MIB)) for _ in range(rng.randint(1, 3))]
        taken = []
        shortage = ledger.lease(needs, slot, taken)
        assert shortage is None or isinstance(shortage, Shortage)
        for (index, present), nbytes in zip(taken, needs, strict=False):
            row = ledger.rows.get(index)
            assert row.offset + nbytes <= row.end <= 1 << 40
            assert 0 <= present
            if not self._forged:
                assert index not in self._used, f"block {index} is somebody else's"
                for other in self._used:
                    found = self._place(other)
                    assert found is None or found.end <= row.offset or row.end <= found.offset
            generation = ledger.generation[index]
            self._used[index] = (who, generation, nbytes, layout.LEASED, row)

    def _place(self, index):
        return self._used[index][4]

    def _pass_on(self, rng, who, ledger, slot):
        mine = [(i, u) for i, u in self._used.items() if u[0] == who and u[3] == layout.LEASED]
        if not mine:
            return
        index, (_, generation, nbytes, _, row) = rng.choice(mine)
        ledger.seal([(index, generation)], slot, some_number(rng))
        if rng.random() < 0.5:
            self._damage(rng)
        other = rng.randrange(self.N_SLOTS)
        reader = self._ledgers[other]
        reader.adopt(index, generation, self._slots[other])
        if rng.random() < 0.3:
            reader.readdress(index, generation, self._slots[other], some_number(rng))
        if reader.claim([(index, generation)], [nbytes], self._slots[other]) is None:
            found = reader.rows.get(index)
            assert nbytes <= found.nbytes
            assert self._forged or found == row, "another range than the message's"
            self._used[index] = (other, generation, nbytes, layout.HELD, row)
        else:
            del self._used[index]  # refused: nobody has it any more
            word = reader.word[index]
            reader.free_unread([(index, word)])

    def _give_back(self, rng, who, ledger, slot):
        mine = [i for i, used in self._used.items() if used[0] == who]
        if mine:
            index = rng.choice(mine)
            generation = self._used.pop(index)[1]
            if ledger.rows.get(index):
                ledger.pages_of(index)
            ledger.release([(index, generation)], slot)

    def _look(self, rng, who, ledger, slot):
        census = ledger.census()
        assert 0 <= census.n_quarantined <= ledger.rows.n_rows
        self.n_quarantined = max(self.n_quarantined, census.n_quarantined)
        kept = Participants(ledger).kept()[0] | {some_number(rng)}
        for _, word, _ in ledger.in_flight([slot], kept, keeps_all=rng.random() < 0.3):
            assert word & layout.STATE_MASK == layout.IN_FLIGHT
        for _, word in ledger.abandoned():
            assert word & layout.STATE_MASK == layout.IN_FLIGHT
        ledger.sources()
        with contextlib.suppress(OobPickleError):
            ledger.rows.offset(rng.choice((index_ := rng.randrange(64), index_, 1 << 63)))

    def _repair(self, rng, who, ledger, slot):
        ledger.rebuild()
        ledger.forget_unknown(slot, {i for i, used in self._used.items() if used[0] == who})
        taken = []
        ledger.take_idle(rng.choice((1, MIB, 1 << 62)), slot, taken)
        ledger.mark_punched(taken)
        if not self._forged:
            assert not set(taken) & set(self._used), "pages in use were given back"
        ledger.release([(index, ledger.generation[index]) for index in taken], slot)

    def _others(self, rng, who, ledger, slot):
        """Counting, dying and joining."""
        participants = Participants(ledger)
        OwnRow(self._words, slot).count((0, 1), (3, MIB))
        participants.counters()
        list(participants.readers())
        participants.pids()
        dead = rng.randrange(self.N_SLOTS)
        self._locks.alive.discard(self._slots[dead])
        self._used = {i: used for i, used in self._used.items() if used[0] != dead}
        participants.reap(self._locks, self._slots[dead - 1])
        joined = participants.join(self._locks)
        assert joined is None or 0 <= joined < layout.MAX_PARTICIPANTS
        if joined is None:
            joined = self._slots[dead]
            self._locks.alive.add(joined)
        self._slots[dead], self._ledgers[dead] = joined, Ledger(self._words)
