"""Writing: from the arrays themselves, in few calls, and without a copy of all of them."""

import errno
import os
import pickle
import tracemalloc

import numpy as np
import pytest

import oobpickle
from oobpickle._files import writing
from oobpickle._files.writing import FileSink, WriteFailedError, Writer
from samples import address_of

MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@pytest.fixture
def written(monkeypatch):
    """Note address, nbytes and offset of each write."""
    calls = []
    real = os.pwrite

    def pwrite(fd, memory, at):
        address = address_of(memory) if memory.nbytes else 0
        calls.append((address, memory.nbytes, at))
        return real(fd, memory, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return calls


LAYOUTS = {
    "C": lambda a: a,
    "F": lambda a: a.T,
    "axes in another order": lambda a: a.reshape(4, 16, -1).transpose(1, 0, 2),
    "reversed dates": lambda a: a.astype("i8").view("M8[s]"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_contiguous_is_written_from_where_it_is(name, path, written):
    array = LAYOUTS[name](np.arange(MIB / 8).reshape(64, -1))
    oobpickle.dump(array, path)

    assert (array.__array_interface__["data"][0], MIB, 4096) in written
    assert sum(nbytes for _, nbytes, _ in written) < MIB + 8192


STRIDED = {
    "every second": lambda a: a[::2],
    "backwards": lambda a: a[::-1],
    "a column of a box": lambda a: a.reshape(128, 64, -1)[:, 3:, :],
    "half of Fortran's": lambda a: a.reshape(1024, -1)[:, ::2].T,
    "one number": lambda a: np.broadcast_to(a[:1], a.shape),
    "many axes": lambda a: a.reshape(2, 2, 2, 2, 2, 2, 2, -1)[..., ::3],
    "long rows": lambda a: a.reshape(2, -1)[:, ::2],
    "fields": lambda a: a.view([("a", "f4"), ("b", "f4")])[::2],
    "large items": lambda a: a.view("V4194304")[::2],
}


@pytest.mark.parametrize("has_checksums", [False, True])
@pytest.mark.parametrize("name", STRIDED)
def test_strides_are_written_without_a_copy_of_all(name, has_checksums, path):
    array = STRIDED[name](np.arange(4.0 * MIB))
    oobpickle.dump(0, path)
    tracemalloc.start()
    try:
        oobpickle.dump(array, path, checksum=has_checksums)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    loaded = oobpickle.load(path)

    assert array.nbytes > 4 * MIB
    assert peak < 2.5 * MIB + (2 * array.itemsize if array.itemsize > MIB else 0)
    assert loaded.dtype == array.dtype
    assert loaded.tobytes() == array.tobytes()


def test_the_stream_of_an_object_with_buffers_has_no_bytes_of_them(path):
    flat = np.frombuffer(b"unmistakable" * 100_000, "u1")
    oobpickle.dump([flat, flat[::2], flat.reshape(12, -1).T], path)

    stream_nbytes = oobpickle.verify(path).stream_nbytes

    assert stream_nbytes < 300
    assert b"mistak" not in path.read_bytes()[-stream_nbytes:]


def test_small_buffers_are_written_together(path, written):
    oobpickle.dump([np.arange(100) for _ in range(5000)], path)

    assert 4 * MIB / MIB < len(written) < 12


def test_large_bytes_and_texts_are_written_from_where_they_are(path, written):
    data = os.urandom(MIB)
    oobpickle.dump([data, "t" * MIB], path)

    assert oobpickle.load(path) == [data, "t" * MIB]
    assert [nbytes for _, nbytes, _ in written].count(MIB) == 2


def test_a_write_of_less_than_was_asked_for_is_gone_on_with(path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, m, at: real(fd, m[: max(1, len(m) // 3)], at))
    obj = [np.arange(300_000), np.arange(300_000)[::2], np.arange(5), b"b" * 200_000]
    oobpickle.dump(obj, path, checksum=True)
    oobpickle.verify(path)

    assert [np.asarray(one).tobytes() for one in obj] == [
        np.asarray(one).tobytes() for one in oobpickle.load(path)
    ]


def test_a_failed_write_is_told_as_the_system_told_it_and_reducers_run_once(path, monkeypatch):
    def pwrite(*_):
        raise OSError(errno.EIO, "Input/output error")

    class Counted:
        n = 0

        def __reduce__(self):
            Counted.n += 1
            return int, ()

    oobpickle.dump("old", path)
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="Input/output error") as caught:
        oobpickle.dump([Counted(), np.arange(MIB), Counted()], path)
    monkeypatch.undo()

    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    assert Counted.n == 1
    assert oobpickle.load(path) == "old"


def test_an_alarm_in_the_middle_of_a_write_reaches_the_program(path, monkeypatch):
    def pwrite(*_):
        raise TimeoutError("alarm")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(TimeoutError, match="alarm") as caught:
        oobpickle.dump(np.arange(MIB), path)

    assert caught.value.filename is None


# --- room on the disk


@pytest.fixture
def reserved(monkeypatch):
    monkeypatch.setattr(writing, "_LEAST_RESERVED_NBYTES", MIB)
    calls = []
    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda *a: (calls.append(a[1:]), real(*a)))
    return calls


@pytest.mark.parametrize("n", [1, 30])
def test_what_was_reserved_and_not_written_is_given_back(n, path, reserved):
    oobpickle.dump([np.full(300_000 // n, 1.0) for _ in range(n)], path)
    layout = oobpickle.verify(path)

    assert len(reserved) == 1
    assert reserved[0][1] == 64 * MIB
    assert path.stat().st_size == layout.nbytes < 3 * MIB
    assert path.stat().st_blocks * 512 < 3 * MIB


def test_a_small_file_reserves_nothing(path, reserved):
    oobpickle.dump([np.arange(100_000), "x" * 100_000], path)

    assert reserved == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_nothing_can_be_reserved_it_is_written_all_the_same(number, path, monkeypatch):
    calls = []

    def fallocate(*_):
        calls.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    monkeypatch.setattr(writing, "_LEAST_RESERVED_NBYTES", MIB)
    oobpickle.dump([np.ones(MIB), np.ones(MIB)], path)

    assert calls == [1]
    assert oobpickle.load(path)[1].all()


# --- the parts themselves


def test_a_writer_in_its_parts(tmp_path):
    with (tmp_path / "raw").open("wb") as file:
        writer = Writer(file.fileno(), has_checksums=True, reserves=False)
        sink = FileSink(writer)
        pickler = pickle.Pickler(sink, 5, buffer_callback=sink.take)
        pickler.dispatch_table = sink.table
        pickler.dump([np.arange(3), pickle.PickleBuffer(b"")])
        writer.finish(sink.pieces)

    assert oobpickle.verify(tmp_path / "raw").sizes == [24, 0]
    assert oobpickle.load(tmp_path / "raw")[0].tolist() == [0, 1, 2]


def test_a_writer_of_a_descriptor_that_is_read_only_says_so(tmp_path):
    (tmp_path / "raw").touch()
    with (tmp_path / "raw").open("rb") as file:
        writer = Writer(file.fileno(), has_checksums=False, reserves=False)
        with pytest.raises(WriteFailedError) as caught:
            writer.append(np.arange(MIB), 8 * MIB)

    assert caught.value.error.errno == errno.EBADF
