"""The table of an arena as a test sees it: every word, and whether all of it is in order.

Written anew from what `layout.h` says, so that it is a second opinion.
"""

import mmap
from collections import Counter
from types import SimpleNamespace

import numpy as np

from internals import inner
from oobpickle._native import core
from oobpickle._pickling.payload import Payload  # noqa: F401  imported before a limit is set

PAGE = 4096
ROWS = 1 << 20
SLOTS = 4096
LISTS = 256  # of free blocks: 128 classes, in memory and on disk
ON_DISK = 0x80
NONE, FREE, LEASED, IN_FLIGHT, HELD, RELEASED, EMPTIED, QUARANTINED, PUBLISHED = range(9)
FOLLOWS, ADOPTED, UNPROVEN, PREPARED = 1 << 62, 1 << 61, 1 << 60, 1 << 59
NAMES = 1 << 63
VACANT, JOINED = 0, 1
_U64 = (1 << 64) - 1
_LOW = (1 << 32) - 1
_BY_FIRST, _BY_SECOND, _PLUS = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_ROW = np.dtype(
    [
        *((n, "u8") for n in ("commit", "generation", "place", "used", "resident", "channel")),
        *((n, "u4") for n in ("next", "below", "last", "punches")),
    ]
)
_AT = core.LAYOUT
assert all(_ROW.fields[name][1] == _AT[f"row.{name}"] for name in _ROW.names)


def commit_word(index, state, slot, generation):
    low = slot << 8 | state
    return (generation * _BY_FIRST + (index << 32 | low) * _BY_SECOND + _PLUS) & _U64 & ~_LOW | low


def place_word(index, offset, size_class):
    place = offset // PAGE << 8 | size_class
    mask = (1 << 40) - 1
    return (place * _BY_FIRST + index * _BY_SECOND + _PLUS) & _U64 & ~mask | place


def resident_word(index, nbytes):
    mask = (1 << 48) - 1
    return (nbytes * _BY_FIRST + index * _BY_SECOND + _PLUS) & _U64 & ~mask | nbytes


def counted_word(index, n):
    return (n * _BY_FIRST + index * _BY_SECOND + _PLUS) & _U64 & ~_LOW | n


def name_word(reference, index, generation):
    mask = (1 << 48) - 1
    named = (generation << 20 | index) & mask
    mixed = (named * _BY_FIRST + reference * _BY_SECOND + _PLUS) & _U64 & ~mask & ~NAMES
    return NAMES | mixed | named


def rows_word(n_rows):
    return (n_rows * _BY_FIRST + _PLUS) & _U64 & ~_LOW | n_rows


def class_nbytes(size_class):
    size_class &= ~ON_DISK
    if size_class < 4:
        return (size_class + 1) * PAGE
    shift, step = divmod(size_class - 4, 4)
    return ((step + 5) << shift) * PAGE


def class_stride(size_class):
    nbytes = class_nbytes(size_class)
    unit = 2 << 20 if nbytes >= 2 << 20 else PAGE
    return -(-(nbytes + PAGE) // unit) * unit


class Table:
    """A table, mapped once more.

    Parameters
    ----------
    fd : int
        Of the table file.
    """

    def __init__(self, fd):
        self._map = mmap.mmap(fd, core.TABLE_NBYTES)
        self.bytes = memoryview(self._map)
        self.rows = np.frombuffer(self._map, _ROW, offset=_AT["table.rows"])

    @classmethod
    def of(cls, arena):
        return cls(inner(arena).descriptors[1])

    # --- words

    def _words(self, at, n, kind):
        return np.frombuffer(self._map, kind, n, at)

    def header(self, name, kind="u8", n=1):
        """Return a word of the header as an array of one: write to ``[0]``."""
        return self._words(_AT[f"header.{name}"], n, kind)

    def __getitem__(self, name):
        return int(self.header(name)[0])

    def __setitem__(self, name, value):
        self.header(name)[0] = value

    def lists(self, name):
        return self.header(name, "u4", LISTS)

    def participant(self, slot):
        at = _AT["table.participants"] + slot * 1024
        words = {
            name: self._words(at + _AT[f"participant.{name}"], n, "u8")
            for name, n in (
                *(("state", 1), ("incarnation", 1), ("pid", 1), ("pid_namespace", 1)),
                *(("reading", 1), ("keeps_all", 1), ("steps", 1), ("inherits", 1)),
                *(("counters", 48), ("kept", 64)),
            )
        }
        return SimpleNamespace(**words)

    # --- rows

    @property
    def n_rows(self):
        return self["n_rows"] & _LOW

    def state(self, index):
        return int(self.rows["commit"][index]) & 0xFF

    def owner(self, index):
        return int(self.rows["commit"][index]) >> 8 & 0xFFFFFF

    def generation(self, index):
        return int(self.rows["generation"][index])

    def resident(self, index):
        return int(self.rows["resident"][index]) & (1 << 48) - 1

    def size_class(self, index):
        return int(self.rows["place"][index]) & 0xFF

    def is_on_disk(self, index):
        return bool(self.size_class(index) & ON_DISK)

    def offset(self, index):
        return (int(self.rows["place"][index]) & (1 << 40) - 1) >> 8 << 12

    def owned(self):
        """Return ``(index, state, slot)`` of each block that is not free."""
        free = (FREE, RELEASED, EMPTIED)
        found = ((i, self.state(i), self.owner(i)) for i in range(self.n_rows))
        return [one for one in found if one[1] not in free]

    def chain(self, link, name):
        """Yield the indices of a list of blocks."""
        seen = set()
        while link:
            index = int(link) - 1
            assert index < self.n_rows, f"a link to block {index} of {self.n_rows}"
            assert index not in seen, f"block {index} is in a list twice"
            seen.add(index)
            yield index
            link = self.rows[name][index]

    # --- what is published

    def used(self, index):
        """Bytes of a message in a block; none if it is a reference."""
        used = int(self.rows["used"][index])
        return 0 if used & NAMES else used

    def named(self, index):
        """The block that a reference names, or None."""
        used = int(self.rows["used"][index])
        return used & (ROWS - 1) if used & NAMES and self.state(index) != FREE else None

    def n_named(self, index):
        """How many references a published block says to have."""
        return int(self.rows["channel"][index]) & _LOW

    def _problems_of_references(self, n):
        names = Counter()
        for i in range(n):
            if int(self.rows["used"][i]) & NAMES and self.state(i) == FREE:
                yield f"block {i} is free and names another"
            named = self.named(i)
            if named is None:
                continue
            names[named] += 1
            if self.state(named) != PUBLISHED:
                yield f"block {i} names block {named}, which has state {self.state(named)}"
            right = name_word(i, named, int(self.rows["generation"][named]))
            if int(self.rows["used"][i]) != right:
                yield f"block {i}: the check of what it names is wrong"
        for i in range(n):
            if self.state(i) != PUBLISHED:
                continue
            if int(self.rows["channel"][i]) != counted_word(i, names[i]):
                yield f"block {i} says {self.n_named(i)} references, and has {names[i]}"
            if not names[i] and not self["unheld"]:
                yield f"block {i} is published, without a reference"

    # --- all of it

    def problems(self):
        """Return what is out of order, if nobody works with the table meanwhile."""
        n = self.n_rows
        try:
            return [
                *self._problems_of_rows(n),
                *self._problems_of_lists(n),
                *self._problems_of_sums(n),
                *self._problems_of_owners(n),
                *self._problems_of_references(n),
            ]
        except AssertionError as error:  # a list that leads nowhere
            return [str(error)]

    def _problems_of_rows(self, n):
        ends = {False: 0, True: 0}
        for i in range(n):
            row, state = self.rows[i], self.state(i)
            if state in (NONE, QUARANTINED) or state > PUBLISHED:
                yield f"row {i}: state {state}"
            right = commit_word(i, state, self.owner(i), int(row["generation"]))
            if right != int(row["commit"]):
                yield f"row {i}: the check of its commit word is wrong"
            offset, size_class = self.offset(i), self.size_class(i)
            if place_word(i, offset, size_class) != int(row["place"]):
                yield f"row {i}: the check of its place is wrong"
            room, resident = class_nbytes(size_class), self.resident(i)
            used = self.used(i)
            if state not in (FREE, RELEASED, EMPTIED) and used > room:
                yield f"row {i}: {used} bytes used of {room}"
            if resident_word(i, resident) != int(row["resident"]) or resident % PAGE:
                yield f"row {i}: {resident} bytes resident"
            if resident > class_stride(size_class):
                yield f"row {i}: {resident} bytes resident of {room}"
            if offset < ends[self.is_on_disk(i)]:
                yield f"row {i} overlaps the one before it"
            ends[self.is_on_disk(i)] = offset + class_stride(size_class)
        for end, name in zip(ends.values(), ("data_nbytes", "disk_nbytes"), strict=True):
            if end > self[name]:
                yield f"the last block ends at {end} of {self[name]}"
        # One that is free was made by somebody who died before it was counted.
        beyond = self.rows["commit"][n : n + 4096] & 0xFF
        yield from (f"row {n + i} is in use beyond {n}" for i in np.flatnonzero(beyond > FREE))

    def _problems_of_lists(self, n):
        seen = Counter()
        for name, is_warm in (("warm", True), ("empty", False)):
            for size_class, link in enumerate(self.lists(name)):
                for i in self.chain(link, "next"):
                    seen[i] += 1
                    if self.state(i) != FREE:
                        yield f"{name} list {size_class}: block {i} has state {self.state(i)}"
                    if self.size_class(i) != size_class:
                        yield f"{name} list {size_class}: block {i} is of another class"
                    if (self.resident(i) > 0) != is_warm:
                        yield f"{name} list {size_class}: block {i}: {self.resident(i)} bytes"
        yield from (f"block {i} is in {k} lists" for i, k in seen.items() if k > 1)
        released = set(self.chain(self["released"], "below"))
        for i in range(n):
            if self.state(i) == FREE and i not in seen:
                yield f"block {i} is free and in no list"
            if self.state(i) in (RELEASED, EMPTIED) and i not in released:
                yield (
                    f"block {i} was released by slot {self.owner(i)} and is not on the stack: "
                    f"{sorted(released)}, below it {self.rows['below'][i]}"
                )

    def _problems_of_sums(self, n):
        states = [self.state(i) for i in range(n)]
        in_memory = [i for i in range(n) if not self.is_on_disk(i)]
        held = sum(self.used(i) for i in in_memory if states[i] == HELD)
        idle = sum(
            self.resident(i)
            for i in in_memory
            if states[i] in (FREE, RELEASED) and not int(self.rows["channel"][i]) & PREPARED
        )
        resident = sum(map(self.resident, in_memory))
        on_disk = sum(map(self.resident, range(n))) - resident
        sums = {"held": held, "idle": idle, "resident": resident, "on_disk": on_disk}
        for name, expected in sums.items():
            if self[name] != expected:
                yield f"{name} is {self[name]}, the rows add up to {expected}"
        if resident > self["capacity"]:
            yield f"{resident} bytes resident, capacity {self['capacity']}"

    def _problems_of_owners(self, n):
        for i, state, slot in self.owned():
            if state == IN_FLIGHT:
                continue  # of somebody who has died, or a newcomer in the same slot
            if slot >= self["n_slots"] or self.participant(slot).state[0] != JOINED:
                yield f"block {i} (state {state}) belongs to slot {slot}, which nobody has"

    def assert_in_order(self):
        problems = self.problems()
        assert not problems, "the table is out of order:\n" + "\n".join(problems[:20])
