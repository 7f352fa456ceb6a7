"""System calls: each does what its name says, and says what the kernel said."""

import ctypes
import errno
import mmap
import os

import pytest

from oobpickle import _system
from oobpickle._system import PAGE_NBYTES

PAGES = 8
NBYTES = PAGES * PAGE_NBYTES


@pytest.fixture
def fd():
    """A file in memory of some pages, all holes."""
    number = os.memfd_create("tests", os.MFD_CLOEXEC)
    os.ftruncate(number, NBYTES)
    yield number
    os.close(number)


@pytest.fixture
def second(fd):
    """Another description of the same file."""
    number = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    yield number
    os.close(number)


@pytest.fixture
def mapped(fd):
    """The address of the whole file, mapped shared."""
    address = _system.map_memory(fd, 0, NBYTES, flags=_system.MAP_SHARED)
    yield address
    _system.unmap_memory(address, NBYTES)


def resident(fd):
    return os.fstat(fd).st_blocks * 512


def test_this_system_is_supported():

    assert _system.SUPPORTED
    assert mmap.PAGESIZE == PAGE_NBYTES


# --- mapping


def test_a_shared_mapping_shows_the_file_and_changes_it(fd, mapped):
    os.pwrite(fd, b"from the file", 100)
    ctypes.memmove(mapped + PAGE_NBYTES, b"from the memory", 15)

    assert ctypes.string_at(mapped + 100, 13) == b"from the file"
    assert os.pread(fd, 15, PAGE_NBYTES) == b"from the memory"


def test_an_offset_is_where_the_mapping_begins(fd):
    os.pwrite(fd, b"second", PAGE_NBYTES)
    address = _system.map_memory(fd, PAGE_NBYTES, PAGE_NBYTES, flags=_system.MAP_SHARED)
    try:
        assert ctypes.string_at(address, 6) == b"second"
    finally:
        _system.unmap_memory(address, PAGE_NBYTES)


def test_a_private_mapping_over_a_shared_one_keeps_the_address_and_hides_writes(fd, mapped):
    os.pwrite(fd, b"before", PAGE_NBYTES)
    flags = _system.MAP_PRIVATE | _system.MAP_FIXED
    target = mapped + PAGE_NBYTES
    address = _system.map_memory(fd, PAGE_NBYTES, PAGE_NBYTES, flags=flags, address=target)
    ctypes.memmove(address, b"after!", 6)

    assert address == target
    assert ctypes.string_at(target, 6) == b"after!"
    assert os.pread(fd, 6, PAGE_NBYTES) == b"before"


@pytest.mark.parametrize(
    ("nbytes", "offset", "number"),
    [(0, 0, errno.EINVAL), (PAGE_NBYTES, 7, errno.EINVAL), (1 << 62, 0, errno.ENOMEM)],
)
def test_a_mapping_that_cannot_be_is_an_error_with_its_number(fd, nbytes, offset, number):
    with pytest.raises(OSError, match="mmap: ") as caught:
        _system.map_memory(fd, offset, nbytes, flags=_system.MAP_SHARED)

    assert caught.value.errno == number


def test_a_closed_descriptor_is_an_error_with_its_number():
    number = os.memfd_create("tests")
    os.close(number)
    with pytest.raises(OSError, match="mmap: Bad file") as caught:
        _system.map_memory(number, 0, PAGE_NBYTES, flags=_system.MAP_SHARED)

    assert caught.value.errno == errno.EBADF


# --- advice


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
    return None


def test_advice_reaches_the_kernel(mapped):

    assert _system.advise(mapped, NBYTES, _system.MADV_DONTDUMP)
    assert _system.advise(mapped, NBYTES, _system.MADV_DONTFORK)
    assert {"dd", "dc"} <= set(flags_of(mapped))


def test_advice_that_the_kernel_refuses_is_no_error(mapped):

    assert not _system.advise(mapped, NBYTES, 12345)
    assert not _system.advise(mapped + 1, NBYTES, _system.MADV_DONTDUMP)


def test_advice_to_populate_gives_pages(fd, mapped):

    assert resident(fd) == 0
    assert _system.advise(mapped, 2 * PAGE_NBYTES, _system.MADV_POPULATE_WRITE)
    assert resident(fd) == 2 * PAGE_NBYTES


def test_advice_to_remove_frees_the_pages_of_a_shared_mapping(fd, mapped):
    os.pwrite(fd, b"x" * NBYTES, 0)
    _system.advise_ignoring(mapped, PAGE_NBYTES, _system.MADV_REMOVE)

    assert resident(fd) == NBYTES - PAGE_NBYTES
    assert os.pread(fd, 5, PAGE_NBYTES - 2) == b"\0\0xxx"


# --- pages of a file


def test_allocated_pages_are_there_and_empty(fd):
    _system.allocate(fd, PAGE_NBYTES, 3 * PAGE_NBYTES)

    assert resident(fd) == 3 * PAGE_NBYTES
    assert not any(os.pread(fd, NBYTES, 0))


def test_allocating_keeps_what_is_there(fd):
    os.pwrite(fd, b"kept", PAGE_NBYTES)
    _system.allocate(fd, 0, NBYTES)

    assert os.pread(fd, 4, PAGE_NBYTES) == b"kept"


def test_a_punched_range_has_no_pages_and_reads_as_zeros(fd, mapped):
    os.pwrite(fd, b"x" * NBYTES, 0)
    _system.punch_hole(fd, PAGE_NBYTES, 2 * PAGE_NBYTES)

    assert resident(fd) == NBYTES - 2 * PAGE_NBYTES
    assert os.fstat(fd).st_size == NBYTES
    assert ctypes.string_at(mapped, NBYTES) == (
        b"x" * PAGE_NBYTES + bytes(2 * PAGE_NBYTES) + b"x" * (NBYTES - 3 * PAGE_NBYTES)
    )


@pytest.mark.parametrize("call", ["allocate", "punch_hole"])
def test_pages_of_something_else_are_an_error_with_its_number(call):
    reader, writer = os.pipe()
    try:
        with pytest.raises(OSError, match="fallocate") as caught:
            getattr(_system, call)(writer, 0, PAGE_NBYTES)
    finally:
        os.close(reader)
        os.close(writer)

    assert caught.value.errno == errno.ESPIPE


def test_a_range_beyond_a_sealed_end_is_an_error_with_its_number():
    import fcntl

    number = os.memfd_create("tests", os.MFD_ALLOW_SEALING)
    try:
        fcntl.fcntl(number, 1033, 4)  # F_ADD_SEALS, F_SEAL_GROW
        with pytest.raises(PermissionError, match="fallocate"):
            _system.allocate(number, 0, PAGE_NBYTES)
    finally:
        os.close(number)


# --- locks


def test_one_description_at_a_time_holds_a_byte(fd, second):

    assert _system.try_lock_byte(fd, 5)
    assert not _system.try_lock_byte(second, 5)
    assert _system.try_lock_byte(second, 6)


def test_a_description_may_take_its_own_byte_again(fd):

    assert _system.try_lock_byte(fd, 5)
    assert _system.try_lock_byte(fd, 5)


def test_a_byte_is_locked_for_the_others_only(fd, second):
    _system.try_lock_byte(fd, 5)

    assert _system.is_byte_locked(second, 5)
    assert not _system.is_byte_locked(fd, 5)
    assert not _system.is_byte_locked(second, 4)


def test_asking_takes_no_lock(fd, second):

    assert not _system.is_byte_locked(second, 5)
    assert not _system.is_byte_locked(fd, 5)
    assert _system.try_lock_byte(fd, 5)


def test_a_byte_is_free_again_when_it_is_unlocked(fd, second):
    _system.try_lock_byte(fd, 5)
    unlock = _system.flock_argument(lock=False, byte=5)

    assert _system.fcntl_keeping_gil(fd, _system.F_OFD_SETLK, unlock) == 0
    assert _system.try_lock_byte(second, 5)


def test_bytes_are_free_again_when_the_description_ends(fd):
    number = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    copy = os.dup(number)
    _system.try_lock_byte(number, 5)
    os.close(number)

    assert _system.is_byte_locked(fd, 5)  # the copy is the same description
    os.close(copy)
    assert not _system.is_byte_locked(fd, 5)


def test_an_argument_can_be_used_again(fd, second):
    lock = _system.flock_argument(lock=True, byte=0)
    unlock = _system.flock_argument(lock=False, byte=0)
    for _ in range(3):
        assert _system.fcntl_keeping_gil(fd, _system.F_OFD_SETLK, lock) == 0
        assert _system.fcntl_keeping_gil(second, _system.F_OFD_SETLK, lock) == -1
        assert ctypes.get_errno() in (errno.EAGAIN, errno.EACCES)
        assert _system.fcntl_keeping_gil(fd, _system.F_OFD_SETLK, unlock) == 0


@pytest.mark.parametrize("call", ["try_lock_byte", "is_byte_locked"])
def test_locking_a_closed_descriptor_is_an_error_with_its_number(call):
    number = os.memfd_create("tests")
    os.close(number)
    with pytest.raises(OSError, match="fcntl") as caught:
        getattr(_system, call)(number, 0)

    assert caught.value.errno == errno.EBADF


def test_a_lock_on_a_description_without_write_access_is_an_error(fd):
    number = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="fcntl"):
            _system.try_lock_byte(number, 0)
    finally:
        os.close(number)
