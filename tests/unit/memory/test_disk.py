"""The file on disk: what cannot be used is refused at entry, and says what to do."""

import contextlib
import errno
import gc
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import oobpickle
from conftest import is_installed
from messages import message_of
from oobpickle import _envelope, _system
from oobpickle._errors import ArenaFullError
from oobpickle._memory import disk, sending
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options, folder_named
from oobpickle._native import core
from table import Table

MIB = 1 << 20


@pytest.fixture
def spilling(disk_folder):
    """An arena with 8 MiB of memory, all of it taken, and a file on disk."""
    arena = SharedArena.create(Options(capacity=8 * MIB, spill_dir=str(disk_folder)))
    _envelope.introduce(arena)
    lease = arena.acquire([8 * MIB])
    yield arena
    gc.collect()
    lease.release()
    del lease
    arena.trim()
    Table.of(arena).assert_in_order()
    assert os.fstat(arena.descriptors[3]).st_blocks == arena.statistics().nbytes_on_disk == 0
    _envelope.forget(arena)
    arena.close()
    arena.detach()
    assert arena.try_destroy(), "a test left a lease, an array or a message"


@contextlib.contextmanager
def no_descriptor_is_left():
    gc.collect()
    before = os.listdir("/proc/self/fd")
    yield
    gc.collect()
    assert len(before) == len(os.listdir("/proc/self/fd"))


# --- at entry


def start(folder):
    with oobpickle.enabled(spill_dir=folder):
        raise AssertionError("it was entered")


@pytest.mark.parametrize("begin", [start, lambda folder: oobpickle.install(spill_dir=folder)])
def test_a_folder_that_is_not_there_is_refused_at_entry(tmp_path, begin):
    missing = tmp_path / "missing"
    with no_descriptor_is_left(), pytest.raises(FileNotFoundError) as caught:
        begin(missing)

    assert caught.value.filename == str(missing)
    assert "spill_dir cannot be used" in str(caught.value)
    assert "Make it first" in str(caught.value)


def test_a_file_is_refused_at_entry(tmp_path):
    (tmp_path / "file").touch()

    with no_descriptor_is_left(), pytest.raises(NotADirectoryError, match="Name a folder"):
        start(tmp_path / "file")


def test_a_folder_of_the_system_is_refused_at_entry():
    with no_descriptor_is_left(), pytest.raises(OSError, match="cannot make a file there"):
        start("/proc/self/fdinfo")


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.EACCES, PermissionError, "this user may write to"),
        (errno.EROFS, OSError, "not mounted read-only"),
        (errno.ENOSPC, OSError, "on another disk"),
        (errno.EIO, OSError, "Name another folder"),
    ],
)
def test_what_the_system_refuses_is_said(monkeypatch, disk_folder, number, kind, text):
    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk, "open_unlinked", refuse)
    with no_descriptor_is_left(), pytest.raises(kind, match=text) as caught:
        start(disk_folder)

    assert (caught.value.errno, caught.value.filename) == (number, os.path.realpath(disk_folder))


@pytest.mark.parametrize("what", ["fallocate", "write", "mmap", "punch"])
def test_what_a_file_system_cannot_do_is_said(monkeypatch, disk_folder, what):
    monkeypatch.setattr(core, "try_disk", lambda _: (what, errno.EOPNOTSUPP))

    with no_descriptor_is_left(), pytest.raises(OSError, match=r"ext4, XFS or Btrfs") as caught:
        start(disk_folder)
    assert disk._WHAT[what] in str(caught.value)


def test_what_a_real_one_cannot_do_is_found_out(tmp_path):
    read, write = os.pipe()
    file = os.open(tmp_path / "file", os.O_RDONLY | os.O_CREAT)

    assert core.try_disk(write) == ("fallocate", errno.ESPIPE)
    assert core.try_disk(file) == ("fallocate", errno.EBADF)
    for fd in (read, write, file):
        os.close(fd)


@pytest.mark.parametrize("value", [3, 1.5, True, ["/tmp"]], ids=repr)
def test_what_is_no_path_is_refused_before_anything_starts(value):
    with no_descriptor_is_left(), pytest.raises(TypeError, match="spill_dir must be the path"):
        oobpickle.enabled(spill_dir=value)


@pytest.mark.parametrize("value", ["", b"", "a\0b"], ids=repr)
def test_what_can_be_no_folder_is_refused_before_anything_starts(value):
    with no_descriptor_is_left(), pytest.raises(ValueError, match="spill_dir must be the path"):
        oobpickle.enabled(spill_dir=value)


def test_a_path_is_absolute_and_without_links(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    monkeypatch.chdir(tmp_path)

    for spelled in (
        "folder",
        b"folder",
        Path("folder"),
        "link",
        "folder/../link/",
        tmp_path / "link",
    ):
        assert folder_named("spill_dir", spelled) == os.path.realpath(tmp_path / "folder")
    assert folder_named("spill_dir", None) is None


def test_nested_uses_agree_by_where_the_folder_is(disk_folder):
    with oobpickle.enabled(spill_dir=disk_folder) as outer:
        with oobpickle.enabled() as inner, oobpickle.enabled(spill_dir=f"{disk_folder}/./") as same:
            assert outer is inner is same
        with pytest.raises(ValueError, match=r"spill_dir='/.*' differs"):
            oobpickle.enabled(spill_dir="/").__enter__()
    with oobpickle.enabled(), pytest.raises(ValueError, match="already with spill_dir=None"):
        oobpickle.enabled(spill_dir=disk_folder).__enter__()


def test_without_an_arena_it_is_accepted_and_ignored(monkeypatch):
    monkeypatch.setattr(_system, "lacking", lambda: "nothing can be had here")

    with (
        pytest.warns(oobpickle.FallbackWarning, match="nothing can be had"),
        oobpickle.enabled(spill_dir="/missing") as arena,
    ):
        assert arena.options.spill_dir == "/missing"
        assert arena.statistics().n_spilled == arena.statistics().nbytes_on_disk == 0


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs that everybody may write to")
def test_a_folder_in_memory_is_said_where_it_is_named():
    with (
        pytest.warns(oobpickle.FallbackWarning, match=r"'/dev/shm' is in memory as well") as caught,
        oobpickle.enabled(spill_dir="/dev/shm"),
        oobpickle.enabled(spill_dir="/dev/shm"),  # not once more
    ):
        pass
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(oobpickle.FallbackWarning, match="in memory as well") as caught:
        oobpickle.install(spill_dir="/dev/shm")
        oobpickle.install(spill_dir="/dev/shm")
    oobpickle.uninstall()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no tmpfs that everybody may write to")
def test_where_warnings_are_errors_nothing_is_installed():
    for begin in (oobpickle.install, lambda **said: oobpickle.enabled(**said).__enter__()):
        with no_descriptor_is_left():
            with pytest.raises(oobpickle.FallbackWarning):
                begin(spill_dir="/dev/shm")
            assert not is_installed()


def test_nothing_is_on_disk_without_the_option():
    with oobpickle.enabled() as arena:
        assert len(arena._memory.descriptors) == 3
        assert not arena._memory.blocks.has_disk
        assert arena.options.spill_dir is None


# --- who joins


def test_whoever_joins_has_the_file_and_knows_the_folder(spilling, disk_folder):
    inherited = SharedArena.attach(*(os.dup(fd) for fd in spilling.descriptors))
    found = SharedArena.find(spilling.name)
    for other in (inherited, found):
        assert other.options == spilling.options
        assert other.options.spill_dir == os.path.realpath(disk_folder)
        sent = spilling.acquire([MIB])
        sent.blocks[0].write(0, b"x" * MIB)
        sent.seal(7)
        (view,) = other.receiving.claim(sent.pairs, [MIB])
        sent.settle()
        assert bytes(view) == b"x" * MIB
        del view
        other.blocks.abandon()
        other._files.close()


def test_another_file_than_the_tables_is_refused(spilling, disk_folder):
    descriptors = [os.dup(fd) for fd in spilling.descriptors]
    other = disk.open_in(str(disk_folder), 64 * MIB)
    for wrong in ([*descriptors[:3], other], descriptors[:3]):
        with pytest.raises(oobpickle.ArenaError, match="data on disk is another file"):
            SharedArena.attach(*wrong)
    numbers = [*spilling.descriptors[:3], other]
    name = spilling.identity + struct.pack("<5I", os.getpid(), *numbers)
    with pytest.raises(oobpickle.ArenaError, match="has not got it any more"):
        SharedArena.find(name)
    for fd in (*descriptors, other):
        os.close(fd)


# --- blocks


def test_blocks_are_on_disk_when_memory_is_full(spilling):
    lease = spilling.acquire([100, 3 * MIB])

    assert [block.is_on_disk for block in lease.blocks] == [True, True]
    assert spilling.statistics().nbytes_on_disk == 3 * MIB + 4096
    assert spilling.statistics().nbytes["leased"] == 8 * MIB
    assert spilling.statistics().n_blocks["leased"] == 3
    with pytest.raises(BufferError, match="not mapped before it is received"):
        memoryview(lease.blocks[0])
    with pytest.raises(ValueError, match="too small"):
        lease.blocks[0].write(99, b"xx")
    lease.release()
    assert os.fstat(spilling.descriptors[3]).st_blocks == 0


def test_a_block_that_is_released_outlives_its_list(spilling):
    """Its pages go back without the GIL."""
    lease = spilling.acquire([16 * MIB])
    lease.blocks[0].write(0, os.urandom(16 * MIB))
    pairs = lease.pairs
    lease.seal(0)
    lease.depart()
    lease.settle()
    blocks = spilling.blocks.claim(pairs, [16 * MIB], False)
    begins = threading.Event()

    def clear():
        begins.wait()
        blocks.clear()

    thread = threading.Thread(target=clear)
    thread.start()
    begins.set()
    spilling.blocks.release(blocks)
    thread.join()

    assert spilling.statistics().n_blocks["held"] == 0


def test_what_is_prepared_is_memory(spilling):
    with pytest.raises(ArenaFullError) as caught:
        spilling.preallocate(nbytes=MIB)

    assert caught.value.reason == "full"


def test_memory_comes_first(disk_folder):
    arena = SharedArena.create(Options(capacity=8 * MIB, spill_dir=str(disk_folder)))
    leases = [arena.acquire([3 * MIB]) for _ in range(4)]
    where = [lease.blocks[0].is_on_disk for lease in leases]
    leases[0].release()
    again = arena.acquire([3 * MIB])

    assert where == [False, False, True, True]
    assert not again.blocks[0].is_on_disk
    arena.blocks.abandon()
    arena._files.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_refusal_says_so_and_leaves_nothing(spilling, number):
    core.arm("disk.reserve", 1, -number)
    with pytest.raises(ArenaFullError, match=r"the disk of spill_dir refuses 3\.0 MiB") as caught:
        spilling.acquire([MIB, 2 * MIB])
    core.arm(None, 0, 0)

    assert caught.value.reason == "disk"
    assert os.strerror(number) in str(caught.value)
    assert spilling.statistics().n_blocks["leased"] == 1


def test_what_the_dead_had_on_disk_makes_room(spilling):
    other = SharedArena.attach(*(os.dup(fd) for fd in spilling.descriptors))
    dead = other.acquire([3 * MIB])
    other.blocks.abandon()
    core.arm("disk.reserve", 1, -errno.ENOSPC)
    spilling.reclaim.look_for_lost = lambda *_: core.arm(None, 0, 0) or spilling.reclaim.look()
    lease = spilling.acquire([2 * MIB])

    assert lease.blocks[0].is_on_disk
    assert spilling.statistics().nbytes_on_disk <= 2 * MIB
    lease.release()
    del dead
    other._files.close()


# --- messages


def test_a_message_goes_to_disk_as_it_is_taken_apart(spilling):
    arrays = [np.arange(500_000), np.arange(600_000)[::3], b"y" * 40_000]
    message = message_of(arrays, spilling.blocks)

    assert [block.is_on_disk for block in message.blocks] == [True, True]
    assert message.nbytes_spilled == 500_000 * 8 + 200_000 * 8
    assert message.us_spilling >= 0
    message.leave_blocks()
    assert message.nbytes_spilled == 0
    assert message.blocks is None
    message.to_pickle(b"", b"", b"")
    assert np.array_equal(np.frombuffer(message, "i8", 10, 9), np.arange(10))


def test_a_message_moves_to_disk_whole_or_not_at_all(spilling):
    arrays = [np.arange(100_000), np.arange(200_000)]
    message = message_of(arrays)
    blocks = spilling.acquire(core.plan(message.sizes)).blocks
    core.arm("disk.write", 2, -errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        message.move_into(blocks)
    core.arm(None, 0, 0)
    assert message.blocks is None
    message.move_into(blocks)
    assert len(message.blocks) == 2
    assert message.nbytes_spilled >= 2_400_000
    message.leave_blocks()
    again = message_of(arrays)
    assert bytes(_pickle_of(message)) == bytes(_pickle_of(again))


def _pickle_of(message):
    message.to_pickle(b"", b"", b"")
    return memoryview(message)


def test_a_message_that_cannot_be_read_back_is_lost_and_says_so(spilling):
    message = message_of([np.arange(100_000), np.arange(200_000)], spilling.blocks)
    assert message.nbytes_spilled
    core.arm("disk.read", 2, -errno.EIO)
    with pytest.raises(OSError, match="Input/output") as caught:
        message.leave_blocks()
    core.arm(None, 0, 0)
    assert caught.value.errno == errno.EIO

    with pytest.raises(RuntimeError, match="half of this message is lost"):
        _pickle_of(message)


@pytest.mark.parametrize("hit", [1, 2, 3])
def test_an_envelope_that_the_disk_refuses_leaves_nothing(spilling, hit):
    stream = ["t" * 50_000]
    core.arm("disk.write", hit, -errno.EIO)
    refused = []
    for obj in (np.arange(100_000), stream, [np.arange(100_000), stream]):
        message = message_of(obj)
        try:
            envelope = _envelope.pack(message, spilling)
        except ArenaFullError as error:
            refused.append(error.reason)
            message.leave_blocks()  # as for the pipe
        else:
            envelope.lease.release()
            del envelope
        del message
    core.arm(None, 0, 0)

    assert set(refused) == {"disk"}
    gc.collect()
    assert spilling.statistics().n_blocks["leased"] == 1


def test_a_wait_that_was_asked_for_comes_before_the_disk(disk_folder):
    for wait_timeout, spills in ((None, True), (0, True), (3, False)):
        options = Options(capacity=MIB, wait_timeout=wait_timeout, spill_dir=str(disk_folder))
        arena = SharedArena.create(options)
        assert arena.blocks.spills is spills
        arena.blocks.abandon()
        arena._files.close()


def test_the_text_of_a_refusal():
    text = str(sending.disk_full(3 << 30, "No space left on device"))

    assert "memory is full" in text
    assert "3.0 GiB" in text
    assert "No space left" in text
    assert "Make room there" in text


def test_a_limit_of_file_size_ends_the_file_earlier(disk_folder):
    """What is beyond it is refused, not fatal."""
    program = f"""
import resource, signal
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
resource.setrlimit(resource.RLIMIT_FSIZE, (96 << 20, 96 << 20))
arena = SharedArena.create(Options(capacity=1 << 20, spill_dir={str(disk_folder)!r}))
leases = []
try:
    while True:
        leases.append(arena.acquire([8 << 20]))
        leases[-1].blocks[0].write(0, bytes(8 << 20))
except MemoryError as error:
    print(len(leases), error.reason)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stderr == ""
    assert done.stdout.split()[1] == "disk"
    assert 5 <= int(done.stdout.split()[0]) <= 12
