"""The locks file: exclusion, and the proof of life that survives all but death."""

import ctypes
import errno
import os
import re
import signal
import threading
from types import SimpleNamespace

import pytest

from oobpickle import _system
from oobpickle._errors import ArenaError
from oobpickle._memory import descriptors
from oobpickle._memory.descriptors import ClosedDescriptorError
from oobpickle._memory.locks import LockFile


@pytest.fixture
def handle():
    """The inherited descriptor of a locks file."""
    number = os.memfd_create("tests", os.MFD_CLOEXEC)
    os.ftruncate(number, _system.PAGE_NBYTES)
    yield number
    os.close(number)


@pytest.fixture
def make(handle):
    """Make descriptions of the locks file, as participants would."""
    made = []

    def _make():
        made.append(LockFile(handle))
        return made[-1]

    yield _make
    for lock in made:
        lock.close()


def unlock(lock):
    call, (fd, command, argument) = _system.fcntl_keeping_gil, lock.unlock_call
    assert call(fd, command, argument) == 0


# --- the ledger's lock


def test_one_participant_at_a_time_has_the_lock(make):
    first, second = make(), make()

    assert first.try_lock()
    assert not second.try_lock()
    unlock(first)
    assert second.try_lock()
    assert not first.try_lock()


def test_threads_of_one_participant_have_one_lock(make):
    lock, answers = make(), []
    lock.try_lock()
    thread = threading.Thread(target=lambda: answers.append(lock.try_lock()))
    thread.start()
    thread.join()

    assert answers == [True]  # which is why the ledger has a lock between threads besides


def test_the_lock_is_free_again_when_its_holder_closes(make):
    first, second = make(), make()
    first.try_lock()
    first.close()

    assert second.try_lock()


def test_holding_a_slot_is_not_having_the_lock(make):
    first, second = make(), make()
    first.hold(0)

    assert second.try_lock()


# --- the proof of life


def test_a_slot_is_held_by_one_participant(make):
    first, second = make(), make()

    assert first.hold(3)
    assert not second.hold(3)
    assert second.hold(4)


def test_a_participant_that_holds_its_slot_is_alive_to_the_others(make):
    first, second = make(), make()
    first.hold(3)

    assert second.is_alive(3)
    assert not second.is_alive(4)
    assert not first.is_alive(3)  # one does not ask about oneself


def test_a_participant_that_has_closed_is_dead(make):
    first, second = make(), make()
    first.hold(3)
    first.close()

    assert not second.is_alive(3)
    assert second.hold(3)


def test_closing_the_handle_or_another_description_kills_nobody(handle, make):
    first, second = make(), make()
    first.hold(3)
    first.try_lock()
    third = LockFile(handle)
    third.close()
    os.close(os.open(f"/proc/self/fd/{handle}", os.O_RDWR))
    os.close(os.dup(handle))

    assert second.is_alive(3)
    assert not second.try_lock()


def test_a_killed_participant_is_dead_and_has_no_lock(handle, make):
    survivor = make()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lock = LockFile(handle)
        os.write(writer, bytes([lock.hold(3), lock.try_lock()]))
        signal.pause()
    try:
        assert os.read(reader, 2) == b"\x01\x01"
        assert survivor.is_alive(3)
        assert not survivor.try_lock()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)

    assert not survivor.is_alive(3)
    assert survivor.try_lock()


# --- forked children


def in_a_forked_child(work):
    """Run `work` in a forked child that waits to be told; return how to end it."""
    ready_reader, ready_writer = os.pipe()
    end_reader, end_writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end_writer)
        work()
        os.write(ready_writer, b"x")
        os.read(end_reader, 1)
        os._exit(0)
    os.close(ready_writer)
    os.close(end_reader)
    assert os.read(ready_reader, 1) == b"x"
    os.close(ready_reader)

    def end():
        os.close(end_writer)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return end


def test_a_child_that_abandons_the_description_unlocks_nothing(make):
    parent, other = make(), make()
    parent.hold(3)
    parent.try_lock()
    end = in_a_forked_child(parent.abandon)

    assert other.is_alive(3)
    assert not other.try_lock()
    assert end() == 0
    assert other.is_alive(3)
    assert not other.try_lock()


def test_a_child_that_abandoned_does_not_keep_a_dead_parent_alive(make):
    parent, other = make(), make()
    parent.hold(3)
    end = in_a_forked_child(parent.abandon)
    parent.close()

    assert not other.is_alive(3)
    assert end() == 0


def test_an_abandoned_description_can_be_closed_without_harm(make):
    parent, other = make(), make()
    parent.hold(3)

    def work():
        number = parent.fd
        parent.abandon()
        assert os.open("/dev/null", os.O_RDONLY) == number
        parent.abandon()
        parent.close()
        os.fstat(number)

    end = in_a_forked_child(work)

    assert end() == 0
    assert other.is_alive(3)


def test_the_mapped_page_is_not_inherited(handle, make):
    lock, other = make(), make()
    lock.hold(3)

    def work():
        for fd in lock.descriptors:  # by hand, as os.closerange does
            os.close(fd)

    end = in_a_forked_child(work)
    lock.close()

    assert not other.is_alive(3)
    assert end() == 0


# --- descriptors that were closed


def test_a_lock_whose_descriptor_is_closed_under_it_ends_with_the_step(make):
    lock, other = make(), make()
    assert lock.try_lock()
    lock.hold(3)
    os.close(lock.fd)

    assert not other.try_lock()  # not in the middle of the step
    lock.see_to_loss()
    assert other.try_lock()
    assert other.is_alive(3)
    lock.close()


@pytest.mark.parametrize("call", ["try_lock", "hold", "is_alive"])
def test_a_strangers_file_is_not_locked_nor_asked(make, tmp_path, monkeypatch, call):
    """Also if it comes between the look at the descriptor and its use."""
    lock, other = make(), make()
    other.hold(3)
    arguments = {"try_lock": ()}.get(call, (3,))
    real = _system.fcntl_keeping_gil
    with open(tmp_path / "theirs", "w+b") as file:

        def late(fd, command, argument):
            if fd in lock.descriptors:
                os.dup2(file.fileno(), fd)
            return real(fd, command, argument)

        with monkeypatch.context() as patch:
            patch.setattr(_system, "fcntl_keeping_gil", late)
            with pytest.raises(ClosedDescriptorError):
                getattr(lock, call)(*arguments)
        with pytest.raises(ClosedDescriptorError):
            getattr(lock, call)(*arguments)
        with open(tmp_path / "theirs", "r+b") as again:
            for byte in (0, 4):
                assert not _system.is_byte_locked(again.fileno(), byte)
        numbers = lock.descriptors
        lock.close()
        for fd in numbers:
            if os.path.realpath(f"/proc/self/fd/{fd}") == str(tmp_path / "theirs"):
                os.close(fd)
    assert other.try_lock()


def test_a_strangers_file_is_not_opened_for_a_handle(handle, monkeypatch):
    file = descriptors.file_of(handle)
    read_fd, write_fd = os.pipe()
    monkeypatch.setattr(os, "open", None)
    with pytest.raises(ClosedDescriptorError, match=f"descriptor {read_fd} "):
        LockFile(read_fd, file)
    monkeypatch.undo()
    os.close(read_fd)
    with pytest.raises(ClosedDescriptorError, match=f"descriptor {read_fd} "):
        LockFile(read_fd, file)
    os.close(write_fd)


def test_a_participant_whose_descriptor_was_closed_is_still_alive(make):
    first, second = make(), make()
    first.hold(3)
    for fd in first.descriptors:
        os.close(fd)

    assert second.is_alive(3)
    first.close()
    assert not second.is_alive(3)


def test_a_closed_descriptor_is_an_error_that_says_so(make):
    lock = make()
    number = lock.fd
    os.close(number)
    with pytest.raises(
        ArenaError, match=rf"descriptor {number} .*process {os.getpid()}.*closerange"
    ):
        lock.try_lock()


def test_a_strangers_file_under_our_number_excludes_nobody_and_stays_open(make, tmp_path):
    lock = make()
    number = lock.fd
    with open(tmp_path / "theirs", "w+b") as file:
        os.dup2(file.fileno(), number)
    with pytest.raises(ArenaError, match=re.escape(f"descriptor {number} ")):
        lock.try_lock()
    lock.close()
    os.fstat(number)
    os.close(number)


def test_a_strangers_file_with_the_same_inode_number_is_a_strangers_file(
    make, tmp_path, monkeypatch
):
    monkeypatch.setattr(_system, "status_call", lambda _: None)
    lock = make()
    number, own = lock.fd, os.fstat(lock.fd)
    real = os.fstat

    def other_device(fd):
        if fd == number:
            return SimpleNamespace(st_ino=own.st_ino, st_dev=own.st_dev + 1)
        return real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", other_device)
        with pytest.raises(ArenaError, match=re.escape(f"descriptor {number} ")):
            lock.try_lock()
        lock.close()
    os.fstat(number)
    os.close(number)


def test_another_error_of_the_kernel_is_an_arena_error(make, monkeypatch):
    def no_locks(*_):
        ctypes.set_errno(errno.ENOLCK)
        return -1

    lock = make()
    monkeypatch.setattr(_system, "fcntl_keeping_gil", no_locks)
    with pytest.raises(ArenaError, match="No locks available"):
        lock.try_lock()


def test_without_a_second_description_there_is_an_os_error():
    number = os.memfd_create("tests")
    os.close(number)
    with pytest.raises(FileNotFoundError):
        LockFile(number)


def test_a_description_is_kept_from_programs(make):

    assert not os.get_inheritable(make().fd)


def test_without_the_mapped_page_locks_work_all_the_same(make, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(_system, "map_memory", refuse)
    first, second = make(), make()

    assert first.try_lock()
    assert not second.try_lock()
    assert first.hold(3)
    assert second.is_alive(3)


def test_closing_twice_is_no_error(make):
    lock = make()
    number = lock.fd
    lock.close()
    with open("/dev/null", "rb") as file:
        lock.close()
        os.fstat(file.fileno())

    assert number >= 0
