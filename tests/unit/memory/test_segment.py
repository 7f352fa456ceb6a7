"""Segments: nameless memory that turns private and back without moving."""

import ctypes
import errno
import fcntl
import gc
import os
import resource
import subprocess
import sys
import tempfile
import weakref

import numpy as np
import pytest

from oobpickle import _system
from oobpickle._errors import ArenaError
from oobpickle._memory import backing as backing_module
from oobpickle._memory import remap
from oobpickle._memory import segment as segment_module
from oobpickle._memory.backing import BACKING_VARIABLE, largest_file_nbytes
from oobpickle._memory.descriptors import ClosedDescriptorError
from oobpickle._memory.segment import NoMappingError, Segment, page_round
from oobpickle._system import PAGE_NBYTES

MIB = 1 << 20
NBYTES = 16 * MIB


@pytest.fixture
def backing():
    """What most tests are content with."""
    return "memfd"


every_backing = pytest.mark.parametrize("backing", ["memfd", "shm", "tmp"])


@pytest.fixture
def segment(backing, monkeypatch, tmp_path):
    """A segment of 16 MiB."""
    monkeypatch.setenv(BACKING_VARIABLE, backing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    created = Segment.create(NBYTES, "tests")
    assert created.backing == backing
    yield created
    created.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def other(segment):
    """What another process would see: a second mapping of the same file."""
    attached = Segment.attach(os.dup(segment.fd))
    yield attached
    attached.close()


def flags_of(address):
    """Return the flags of the mapping at an address, from the kernel's own list."""
    at_address = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first = line.split()[0]
            if "-" in first:
                start, end = (int(part, 16) for part in first.split("-"))
                at_address = start <= address < end
            elif at_address and first == "VmFlags:":
                return line.split()[1:]
    return []


def address_of(segment, offset=0):
    return segment.array(offset, 1).ctypes.data


@pytest.mark.parametrize("n", [0, 1, PAGE_NBYTES - 1, PAGE_NBYTES, PAGE_NBYTES + 1, 10**12])
def test_page_round_is_the_next_multiple_of_a_page(n):

    assert page_round(n) % PAGE_NBYTES == 0
    assert 0 <= page_round(n) - n < PAGE_NBYTES


# --- the file


@every_backing
def test_the_file_has_no_name_and_is_ours_alone(segment):
    status = os.fstat(segment.fd)

    assert status.st_nlink == 0
    assert status.st_mode & 0o777 == 0o600
    assert not os.get_inheritable(segment.fd)
    assert (status.st_size, segment.nbytes, segment.mapped) == (NBYTES, NBYTES, True)


@every_backing
def test_a_new_segment_has_no_pages(segment):

    assert segment.resident_nbytes() == 0
    assert not any(segment.view()[:PAGE_NBYTES])


def test_nobody_can_cut_a_memfd_under_the_mapping(monkeypatch):
    monkeypatch.setenv(BACKING_VARIABLE, "memfd")
    segment = Segment.create(NBYTES, "tests")
    try:
        for nbytes in (0, 2 * NBYTES):
            with pytest.raises(PermissionError):
                os.ftruncate(segment.fd, nbytes)
        with pytest.raises(PermissionError):  # nor add a seal that forbids to write
            fcntl.fcntl(segment.fd, 1033, 0x10)
    finally:
        segment.close()


def test_the_memory_is_in_no_core_dump(segment):

    assert "dd" in flags_of(address_of(segment))
    segment.privatize(MIB, MIB)
    assert "dd" in flags_of(address_of(segment, MIB))
    segment.share(MIB, MIB)
    assert "dd" in flags_of(address_of(segment, MIB))
    segment.isolate()
    assert "dd" in flags_of(address_of(segment, MIB))


def test_a_segment_need_not_be_mapped():
    segment = Segment.create(NBYTES, "tests", map_it=False)
    try:
        assert not segment.mapped
        with pytest.raises(ArenaError, match="not mapped"):
            segment.view()
        with pytest.raises(ArenaError, match="not mapped"):
            segment.array(0, 1)
        os.pwrite(segment.fd, b"abc", 100)
        destination = bytearray(3)
        segment.read_into(100, memoryview(destination))

        assert destination == b"abc"
    finally:
        segment.close()


@pytest.mark.parametrize("nbytes", [1 << 62, -1])
def test_a_size_that_cannot_be_is_an_arena_error_and_leaves_nothing(nbytes):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ArenaError, match=f"of {nbytes} bytes.*ulimit") as caught:
        Segment.create(nbytes, "tests")

    assert caught.value.errno
    assert len(before) == len(os.listdir("/proc/self/fd"))


def test_an_unknown_backing_is_an_arena_error(monkeypatch):
    monkeypatch.setenv(BACKING_VARIABLE, "cloud")
    with pytest.raises(ArenaError, match="cloud"):
        Segment.create(NBYTES, "tests")


def test_without_memfd_the_next_backing_is_used(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.delenv(BACKING_VARIABLE, raising=False)
    monkeypatch.setattr(os, "memfd_create", refuse)
    segment = Segment.create(NBYTES, "tests")
    segment.close()

    assert segment.backing == "shm"


def test_without_any_backing_the_error_says_why_for_each(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.delenv(BACKING_VARIABLE, raising=False)
    for name in ("memfd_create", "open"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(ArenaError, match=r"memfd: .*shm: .*tmp: "):
        Segment.create(NBYTES, "tests")


def test_kernels_without_the_newest_flag_are_asked_again(monkeypatch):
    memfd_create, asked = os.memfd_create, []

    def old_kernel(name, flags):
        asked.append(flags)
        if flags & 8:
            raise OSError(22, "Invalid argument")
        return memfd_create(name, flags)

    monkeypatch.setenv(BACKING_VARIABLE, "memfd")
    monkeypatch.setattr(os, "memfd_create", old_kernel)
    Segment.create(NBYTES, "tests").close()

    assert [flags & 8 for flags in asked] == [8, 0]


def test_file_systems_without_nameless_files_get_one_that_is_removed(monkeypatch, tmp_path):
    real = os.open

    def old_file_system(path, flags, *mode):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "Operation not supported")
        return real(path, flags, *mode)

    monkeypatch.setenv(BACKING_VARIABLE, "tmp")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "open", old_file_system)
    segment = Segment.create(NBYTES, "tests")
    try:
        assert list(tmp_path.iterdir()) == []
        assert os.fstat(segment.fd).st_nlink == 0
        assert not os.get_inheritable(segment.fd)
    finally:
        segment.close()


# --- views


@every_backing
def test_what_one_writes_the_other_reads(segment, other):
    segment.array(MIB, 100)[:] = 7
    other.view()[MIB + 5] = 8

    assert segment.array(MIB, 100).tolist() == [7] * 5 + [8] + [7] * 94
    assert address_of(segment) != address_of(other)


def test_much_is_written_in_as_many_calls_as_it_takes(segment, monkeypatch):
    """One pwrite(2) writes 2 GiB - 4096 at most."""
    pwrite, n_calls = os.pwrite, []

    def write_some(fd, data, offset):
        n_calls.append(offset)
        return pwrite(fd, data[:100_000], offset)

    monkeypatch.setattr(os, "pwrite", write_some)
    data = os.urandom(MIB)
    segment.write(4096, memoryview(data))

    assert len(n_calls) == 11
    found = memoryview(bytearray(MIB))
    segment.read_into(4096, found)
    assert found == data


def test_a_file_that_was_dropped_before_it_was_kept_is_closed():
    before = os.listdir("/proc/self/fd")
    segment = Segment.create(NBYTES, "tests")
    address = segment._address
    del segment
    gc.collect()

    assert before == os.listdir("/proc/self/fd")
    with open("/proc/self/maps") as maps:
        assert f"{address:x}-" not in maps.read()


def test_arrays_are_exact_and_their_base_is_none(segment):
    array = segment.array(MIB + 1, 100)

    assert type(array) is np.ndarray
    assert (array.shape, array.dtype) == ((100,), np.uint8)
    assert array.flags.writeable
    assert not isinstance(array.base, np.ndarray)
    assert array.ctypes.data == address_of(segment) + MIB + 1


def test_every_view_of_an_array_keeps_that_array_alive(segment):
    for make in (
        lambda a: a[96:].view("f8")[::2],
        lambda a: np.frombuffer(a, "f8").reshape(10, 10).T,
        lambda a: np.ndarray((10,), "f8", memoryview(a)[80:]),
        lambda a: memoryview(a)[5:],
    ):
        array = segment.array(0, 800)
        gone, view = weakref.ref(array), make(array)
        del array

        assert gone() is not None
        del view
        assert gone() is None


def test_words_are_the_same_memory_in_units_of_eight_bytes(segment):
    segment.words()[3] = 0x0102030405060708

    assert bytes(segment.view()[24:32]) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert len(segment.words()) == NBYTES // 8


# --- pages


@every_backing
def test_reserved_pages_are_there(segment):
    segment.reserve(MIB, 3 * MIB)

    assert segment.resident_nbytes() >= 3 * MIB
    assert not any(segment.view()[MIB : MIB + 100])


def test_reserving_goes_step_by_step(monkeypatch, segment):
    steps = []
    monkeypatch.setattr(segment_module, "STEP_NBYTES", MIB)
    monkeypatch.setattr(_system, "allocate", lambda fd, *step: steps.append(step))
    segment.reserve(MIB, 2 * MIB + 5)

    assert steps == [(MIB, MIB), (2 * MIB, MIB), (3 * MIB, 5)]


def test_an_error_while_reserving_reaches_the_caller(monkeypatch, segment):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_system, "allocate", full)
    with pytest.raises(OSError, match="No space"):
        segment.reserve(0, MIB)


@every_backing
def test_a_punched_range_is_empty_and_has_no_pages(segment, other):
    segment.array(0, 4 * MIB)[:] = 7
    before = segment.resident_nbytes()
    segment.punch(MIB, 2 * MIB - 5)

    assert before - segment.resident_nbytes() >= 2 * MIB - PAGE_NBYTES
    assert not other.array(MIB, 2 * MIB).any()
    assert other.array(0, MIB).all()
    assert other.array(3 * MIB, MIB).all()


def test_populating_changes_nothing_that_can_be_seen(segment):
    segment.array(MIB, MIB)[:] = 7
    segment.populate(MIB + 5, 1000, write=False)
    segment.populate(MIB - 5, 10, write=True)
    segment.populate(5 * MIB + 5, 1, write=True)

    assert segment.array(MIB, MIB).tolist() == [7] * MIB
    assert not segment.array(0, MIB).any()


def test_populating_for_a_write_gives_pages(segment):
    segment.populate(MIB + 5, 3 * PAGE_NBYTES, write=True)

    assert segment.resident_nbytes() >= 4 * PAGE_NBYTES


@every_backing
def test_reading_takes_the_bytes_of_the_file(segment):
    segment.array(MIB, 1000)[:] = np.arange(1000) % 251
    destination = bytearray(1000)
    segment.read_into(MIB, memoryview(destination))

    assert destination == (np.arange(1000) % 251).astype("u1").tobytes()


def test_reading_goes_on_after_a_short_read(monkeypatch, segment):
    preadv = os.preadv
    segment.array(0, 1000)[:] = np.arange(1000) % 251
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    destination = bytearray(1000)
    segment.read_into(0, memoryview(destination))

    assert destination == segment.array(0, 1000).tobytes()


def test_reading_beyond_the_end_is_an_error(segment):
    with pytest.raises(ArenaError, match=f"end of file at {NBYTES}"):
        segment.read_into(NBYTES - 5, memoryview(bytearray(10)))


# --- private and shared


def test_a_privatized_range_keeps_address_and_content(segment):
    array = segment.array(MIB, 3 * MIB)
    array[:] = 7
    address = array.ctypes.data
    segment.privatize(MIB, 3 * MIB)

    assert array.ctypes.data == address
    assert array.all()
    assert not segment.array(0, MIB).any()


@every_backing
def test_a_privatized_range_shares_nothing_with_the_file(segment, other):
    array = segment.array(MIB, MIB)
    array[:] = 7
    segment.privatize(MIB, MIB)
    array[5] = 8
    other.array(MIB, MIB)[:] = 9

    assert (array[4], array[5], array[-1]) == (7, 8, 7)
    assert set(other.array(MIB, MIB).tolist()) == {9}


@every_backing
def test_the_pages_of_the_file_under_a_privatized_range_are_given_back(segment, other):
    segment.array(0, 4 * MIB)[:] = 7
    before = segment.resident_nbytes()
    segment.privatize(MIB, 2 * MIB)

    assert before - segment.resident_nbytes() >= 2 * MIB - PAGE_NBYTES
    assert not other.array(MIB, 2 * MIB).any()
    assert other.array(3 * MIB, MIB).all()


def test_neighbours_of_a_privatized_range_stay_shared(segment, other):
    segment.privatize(MIB, 10)
    segment.array(MIB - 1, 1)[:] = 5
    segment.array(MIB + PAGE_NBYTES, 1)[:] = 6

    assert other.view()[MIB - 1] == 5
    assert other.view()[MIB + PAGE_NBYTES] == 6


@pytest.mark.parametrize("step", [PAGE_NBYTES, 64 << 20])
def test_privatizing_without_the_newest_advice_gives_the_same(monkeypatch, segment, step):
    advise = _system.advise
    monkeypatch.setattr(segment_module, "STEP_NBYTES", step)
    monkeypatch.setattr(
        _system,
        "advise",
        lambda address, n, advice: (
            advice != _system.MADV_POPULATE_WRITE and advise(address, n, advice)
        ),
    )
    array = segment.array(MIB, 8 * PAGE_NBYTES)
    array[:] = np.arange(8 * PAGE_NBYTES) % 251
    expected = array.tobytes()
    segment.privatize(MIB, 8 * PAGE_NBYTES)
    os.pwrite(segment.fd, b"\xff" * 8 * PAGE_NBYTES, MIB)

    assert expected == array.tobytes()


class Interrupted(Exception):
    pass


def test_privatizing_can_be_resumed_without_a_loss(monkeypatch, segment):
    punched = []

    def punch_twice_then_stop(fd, offset, nbytes):
        if len(punched) == 2:
            raise Interrupted
        punched.append(offset)
        _system_punch(fd, offset, nbytes)

    _system_punch = _system.punch_hole
    array = segment.array(MIB, 5 * PAGE_NBYTES)
    array[:] = np.arange(5 * PAGE_NBYTES) % 251
    expected = array.tobytes()
    with monkeypatch.context() as patch:
        patch.setattr(segment_module, "STEP_NBYTES", PAGE_NBYTES)
        patch.setattr(_system, "punch_hole", punch_twice_then_stop)
        with pytest.raises(Interrupted):
            segment.privatize(MIB, 5 * PAGE_NBYTES)
    segment.privatize(MIB, 5 * PAGE_NBYTES, resume=True)

    assert punched == [MIB, MIB + PAGE_NBYTES]
    assert expected == array.tobytes()


def test_resuming_what_never_began_begins_it(segment, other):
    array = segment.array(MIB, MIB)
    array[:] = 7
    segment.privatize(MIB, MIB, resume=True)
    other.array(MIB, MIB)[:] = 9

    assert array.all()
    assert set(array.tolist()) == {7}


@every_backing
def test_a_range_that_is_shared_again_shows_the_file(segment, other):
    array = segment.array(MIB, MIB)
    array[:] = 7
    segment.privatize(MIB, MIB)
    other.array(MIB, MIB)[:] = 9
    segment.share(MIB, MIB)

    assert set(array.tolist()) == {9}
    array[:] = 3
    assert set(other.array(MIB, MIB).tolist()) == {3}


def test_a_forked_child_and_its_parent_do_not_share_a_privatized_range(segment):
    array = segment.array(MIB, PAGE_NBYTES)
    array[:] = 7
    segment.privatize(MIB, PAGE_NBYTES)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        array[0] = 9
        os.write(writer, bytes(array[:2]))
        os._exit(0)
    os.waitpid(child, 0)
    seen_by_child = os.read(reader, 2)
    os.close(reader)
    os.close(writer)

    assert seen_by_child == b"\x09\x07"
    assert set(array.tolist()) == {7}


@every_backing
def test_freeing_a_shared_range_gives_its_pages_back_and_no_others(segment, other):
    segment.array(0, 4 * MIB)[:] = 7
    before = segment.resident_nbytes()
    for call in segment.freeing_calls(MIB, MIB):
        call(0)

    assert before - segment.resident_nbytes() == MIB
    assert not other.array(MIB, MIB).any()
    assert other.array(0, MIB).all()
    assert other.array(2 * MIB, 2 * MIB).all()


@every_backing
def test_freeing_a_private_range_leaves_the_file_alone(segment, other):
    segment.array(MIB, MIB)[:] = 7
    segment.privatize(MIB, MIB)
    other.array(MIB, MIB)[:] = 9
    before = segment.resident_nbytes()
    for call in segment.freeing_calls(MIB, MIB):
        call(0)

    assert segment.resident_nbytes() == before
    assert set(other.array(MIB, MIB).tolist()) == {9}


class Reference(weakref.ref):
    """What a callback in C is called with."""

    __slots__ = ()
    _as_parameter_ = 0


def test_freeing_as_a_weakref_callback_runs_no_python(segment):
    segment.array(MIB, MIB)[:] = 7
    anchor = np.zeros(1)
    references = [Reference(anchor, call) for call in segment.freeing_calls(MIB, MIB)]
    frames = []
    sys.setprofile(lambda frame, event, _: frames.append(event) if event == "call" else None)
    try:
        del anchor
    finally:
        sys.setprofile(None)

    assert frames == []
    assert [reference() for reference in references] == [None, None]
    assert not segment.array(MIB, MIB).any()


# --- descriptors


REFUSED = {
    "reserve": lambda segment: segment.reserve(0, MIB),
    "write": lambda segment: segment.write(0, memoryview(b"ours")),
    "resident_nbytes": Segment.resident_nbytes,
}


def lost(tmp_path, how):
    """Return a segment whose descriptor somebody has closed, and what must stay as it is."""
    segment = Segment.create(NBYTES, "tests")
    segment.view()[:NBYTES:MIB] = bytes(range(NBYTES // MIB))
    path = tmp_path / "theirs"
    path.write_bytes(b"theirs" * 1_000_000)
    if how == "closed":
        os.close(segment.fd)
    else:
        with open(path, "r+b") as file:
            os.dup2(file.fileno(), segment.fd)
    return segment, path


@pytest.fixture(params=["closed", "another file"])
def lost_segment(request, tmp_path):
    segment, path = lost(tmp_path, request.param)
    number = segment.fd
    yield segment
    segment.close()
    if request.param == "another file":
        assert os.fstat(number).st_ino == path.stat().st_ino
        os.close(number)
    assert path.read_bytes() == b"theirs" * 1_000_000


@pytest.mark.parametrize("operation", REFUSED)
def test_what_needs_the_descriptor_is_refused_without_it(lost_segment, operation):
    with pytest.raises(ClosedDescriptorError, match=f"descriptor {lost_segment.fd} .*closerange"):
        REFUSED[operation](lost_segment)


@pytest.mark.parametrize("offset", [0, 2 * MIB])
def test_without_the_descriptor_a_range_becomes_private_and_shared_again(lost_segment, offset):
    segment, value = lost_segment, offset // MIB
    array = segment.array(offset, 2 * MIB)
    array[-1] = 77
    segment.privatize(offset, 2 * MIB)

    assert (array[0], array[MIB], array[-1]) == (value, value + 1, 77)
    assert segment.is_private(offset)
    assert not segment.is_private(offset + 2 * MIB)
    array[0] = 99
    copy = bytearray(MIB)
    segment.read_into(offset, memoryview(copy))
    assert not any(copy)  # the file's pages are gone
    segment.share(offset, 2 * MIB)
    assert not segment.is_private(offset)
    assert not array.any()
    array[0] = 98
    segment.read_into(offset, memoryview(copy))
    assert copy[0] == 98


def test_without_the_descriptor_pages_go_back(lost_segment):
    lost_segment.punch(MIB, MIB)

    assert lost_segment.view()[MIB] == 0
    assert lost_segment.view()[2 * MIB] == 2


def test_what_is_read_without_the_descriptor_need_not_begin_at_a_page(lost_segment):
    lost_segment.view()[2 * MIB + 5 : 2 * MIB + 8] = b"abc"
    copy = bytearray(3)
    lost_segment.read_into(2 * MIB + 5, memoryview(copy))

    assert copy == b"abc"


@pytest.mark.parametrize("how", ["closed", "another file"])
@pytest.mark.parametrize("call", ["privatize", "share"])
def test_a_descriptor_that_is_lost_while_a_range_is_mapped(tmp_path, monkeypatch, how, call):
    """Another thread may close it between the look and the mapping."""
    other, path = lost(tmp_path, how)
    theirs = os.open(path, os.O_RDWR)
    other.close()
    segment = Segment.create(NBYTES, "tests")
    segment.view()[2 * MIB] = 5
    if call == "share":
        segment.privatize(2 * MIB, MIB, keep_file=True)
    map_memory = _system.map_memory

    def late(fd, *args, **kwargs):
        if fd == segment.fd:
            os.dup2(theirs, fd)
        return map_memory(fd, *args, **kwargs)

    monkeypatch.setattr(_system, "map_memory", late)
    getattr(segment, call)(2 * MIB, MIB)

    assert segment.view()[2 * MIB] == 5
    assert not segment.view()[2 * MIB + 1 : 3 * MIB].tobytes().strip(b"\0")
    assert segment.is_private(2 * MIB) is (call == "privatize")
    number = segment.fd
    segment.close()
    os.close(number)  # theirs, and left open
    os.close(theirs)


def test_without_the_descriptor_a_range_that_cannot_be_moved_stays_shared(
    lost_segment, monkeypatch
):
    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(_system, "copy_and_move_mapping", refuse)
    with pytest.raises(NoMappingError) as caught:
        lost_segment.privatize(2 * MIB, MIB)

    assert caught.value.n_done == 0
    assert not lost_segment.is_private(2 * MIB)
    assert lost_segment.view()[2 * MIB] == 2


def test_without_the_descriptor_what_was_done_of_a_range_is_said_and_gone_on_with(
    lost_segment, monkeypatch
):
    monkeypatch.setattr(segment_module, "STEP_NBYTES", MIB)
    make_private, n_calls = remap.make_private, []

    def refuse_the_second(*args):
        n_calls.append(args)
        if len(n_calls) == 2:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        make_private(*args)

    monkeypatch.setattr(remap, "make_private", refuse_the_second)
    with pytest.raises(NoMappingError) as caught:
        lost_segment.privatize(2 * MIB, 2 * MIB)
    assert caught.value.n_done == MIB
    lost_segment.view()[2 * MIB] = 9
    lost_segment.privatize(2 * MIB, 2 * MIB, resume=True)

    assert (lost_segment.view()[2 * MIB], lost_segment.view()[3 * MIB]) == (9, 3)
    assert lost_segment.is_private(3 * MIB)


def test_a_range_becomes_private_and_the_files_pages_stay(segment):
    segment.view()[MIB] = 5
    segment.privatize(MIB, MIB, keep_file=True)
    segment.view()[MIB] = 6
    copy = bytearray(1)
    segment.read_into(MIB, memoryview(copy))

    assert copy == b"\5"
    segment.share(MIB, MIB)
    assert segment.view()[MIB] == 5


def test_a_closed_segment_is_unmapped_and_gone(segment):
    other = Segment.create(MIB, "tests")
    number, address = other.fd, address_of(other)
    other.close()

    assert not other.mapped
    assert flags_of(address) == []
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)
    other.close()


def test_attaching_maps_the_same_file_and_keeps_it_from_programs(segment):
    number = os.dup(segment.fd)
    os.set_inheritable(number, True)
    other = Segment.attach(number)
    try:
        assert (other.nbytes, other.mapped) == (NBYTES, True)
        assert not os.get_inheritable(number)
    finally:
        other.close()


def in_a_process(code, *fds):
    """Run code in a fresh interpreter and return what it prints."""
    program = (
        "import os, resource\n"
        "from oobpickle._memory.backing import largest_file_nbytes\n"
        "from oobpickle._memory.segment import Segment\n"
        f"{code}"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        pass_fds=fds,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (child.returncode, child.stderr) == (0, "")
    return child.stdout.split()


def test_without_address_space_a_segment_can_still_be_read():
    segment = Segment.create(1 << 40, "tests")
    segment.array(12345, 3)[:] = 7
    try:
        printed = in_a_process(
            f"""
resource.setrlimit(resource.RLIMIT_AS, (1 << 38, resource.RLIM_INFINITY))
segment = Segment.attach({segment.fd})
destination = bytearray(3)
segment.read_into(12345, memoryview(destination))
print(segment.mapped, *destination)
""",
            segment.fd,
        )
    finally:
        segment.close()

    assert printed == ["False", "7", "7", "7"]


def test_without_address_space_creating_says_so():
    printed = in_a_process(
        """
from oobpickle import ArenaError
resource.setrlimit(resource.RLIMIT_AS, (1 << 38, resource.RLIM_INFINITY))
before = len(os.listdir("/proc/self/fd"))
try:
    Segment.create(1 << 40, "tests")
except ArenaError as error:
    print(error.errno, "ulimit" in str(error), len(os.listdir("/proc/self/fd")) - before)
"""
    )

    assert printed == ["12", "True", "0"]


# --- how large a file may be


def test_a_file_may_be_as_large_as_wanted_without_limits(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)

    assert largest_file_nbytes(1 << 44) == 1 << 44
    assert largest_file_nbytes((1 << 44) + 5) == 1 << 44


def test_a_limit_of_file_sizes_is_kept():
    printed = in_a_process(
        """
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 2**20 + 7, 5 * 2**20 + 7))
nbytes = largest_file_nbytes(1 << 44)
segment = Segment.create(nbytes, "tests")
segment.reserve(0, nbytes)
print(nbytes)
"""
    )

    assert printed == [str(4 * MIB)]


def test_a_quarter_of_the_address_space_is_left_for_it():
    printed = in_a_process(
        """
resource.setrlimit(resource.RLIMIT_AS, (1 << 38, 1 << 38))
nbytes = largest_file_nbytes(1 << 44)
Segment.create(nbytes, "tests")
print(nbytes)
"""
    )

    assert (1 << 36) - (1 << 31) < int(printed[0]) <= 1 << 36


def test_a_limit_that_is_exceeded_already_leaves_nothing(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (PAGE_NBYTES, PAGE_NBYTES))

    assert largest_file_nbytes(1 << 44) == 0


def test_a_process_that_locks_its_memory_gets_no_sparse_mapping(monkeypatch):
    libc = ctypes.CDLL(None, use_errno=True)
    page = ctypes.create_string_buffer(2 * PAGE_NBYTES)
    if libc.mlock(page, PAGE_NBYTES) != 0:
        monkeypatch.setattr(backing_module, "_own_status", lambda: {"VmLck": 8192})
    try:
        with pytest.raises(ArenaError, match=r"locks \d+ bytes .*mlockall"):
            largest_file_nbytes(1 << 44)
    finally:
        libc.munlock(page, PAGE_NBYTES)
