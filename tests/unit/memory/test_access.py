"""Access: a range can be touched once it was opened, and no more of the mapping than that."""

import errno
import os

import pytest

from oobpickle import _system
from oobpickle._memory.segment import Segment

MIB = 1 << 20
UNIT = 2 * MIB


@pytest.fixture
def segment():
    segment = Segment.create(64 * MIB, "access")
    yield segment
    segment.close()


def accessible(segment):
    """Return the ranges of the mapping that can be touched, by offset."""
    found = []
    with open("/proc/self/maps") as file:
        for line in file:
            span, permissions, _ = line.split(" ", 2)
            start, end = (int(part, 16) - segment._address for part in span.split("-"))
            if 0 <= start < segment.nbytes and permissions.startswith("rw"):
                found.append((start, end))
    return found


def test_nothing_is_accessible_at_first(segment):
    assert accessible(segment) == []


def test_what_is_used_is_accessible_in_units(segment):
    segment.array(5 * MIB, 10)[:] = 1
    segment.bytes(20 * MIB, 3 * MIB)[:1] = b"1"
    segment.populate(40 * MIB, 100, write=True)

    assert accessible(segment) == [
        (4 * MIB, 6 * MIB),
        (20 * MIB, 24 * MIB),
        (40 * MIB, 42 * MIB),
    ]


def test_a_larger_use_of_a_range_opens_more(segment):
    segment.bytes(0, 10)
    segment.bytes(0, 3 * MIB)[3 * MIB - 1] = 7

    assert accessible(segment) == [(0, 4 * MIB)]


def test_a_closed_range_is_opened_by_its_next_use(segment):
    segment.bytes(UNIT, UNIT)[:1] = b"1"
    segment.close_range(UNIT, 2 * UNIT)
    assert accessible(segment) == []

    assert bytes(segment.bytes(UNIT, UNIT)[:1]) == b"1"


def test_units_that_are_shared_stay_accessible(segment):
    segment.bytes(0, 4096)[:1] = b"1"
    neighbour = segment.bytes(MIB, 4096)
    segment.close_range(0, 8192)
    segment.close_range(MIB + UNIT // 2 - MIB, 8192)

    neighbour[:1] = b"2"


def test_where_no_further_mapping_is_allowed_everything_is_opened(segment, monkeypatch):
    protect, refused = _system.protect, []

    def refuse(address, nbytes, protection):
        if nbytes < segment.nbytes:
            refused.append(nbytes)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        protect(address, nbytes, protection)

    monkeypatch.setattr(_system, "protect", refuse)
    segment.bytes(UNIT, 10)[:1] = b"1"
    segment.close_range(UNIT, UNIT)
    segment.bytes(UNIT, 10)[:1] = b"2"

    assert refused == [UNIT]
    assert accessible(segment) == [(0, segment.nbytes)]


def test_a_child_can_touch_what_its_parent_has_opened_and_more(segment):
    segment.bytes(0, 10)[:1] = b"1"
    pid = os.fork()
    if pid == 0:
        segment.bytes(0, 10)[:1] = b"2"
        segment.bytes(10 * UNIT, 10)[:1] = b"3"
        os._exit(0)

    assert os.waitpid(pid, 0)[1] == 0
    assert bytes(segment.bytes(0, 1)) == b"2"
    assert bytes(segment.bytes(10 * UNIT, 1)) == b"3"
