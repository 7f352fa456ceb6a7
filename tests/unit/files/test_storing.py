"""dump, load and verify: what comes out of a file is what pickle delivers, in every mode."""

import array
import ctypes
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import oobpickle
import samples
from conftest import by_turns
from oobpickle import FileFormatError
from oobpickle._files import writing
from oobpickle._native import core
from samples import LAYOUTS, described, pickled

MODES = (None, "r", "c", "r+")
MIB = 1 << 20


class Structure(ctypes.Structure):
    _fields_ = (("numbers", ctypes.c_int * 30_000),)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def address_of(obj):
    return obj.__array_interface__["data"][0]


def mapped_ranges(path):
    """Return ``(start, end, permissions)`` of where the file is mapped in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *rest = line.split(maxsplit=5)
        if rest[-1].removesuffix(" (deleted)") == str(path):
            found.append((*(int(a, 16) for a in addresses.split("-")), permissions))
    return found


def is_mapped(obj, path):
    return any(start <= address_of(obj) < end for start, end, _ in mapped_ranges(path))


# --- values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_arrive_as_pickle_would_deliver_them(layout, mode, path):
    def cross(given):
        oobpickle.dump(given, path)
        found = oobpickle.load(path, mode)
        assert found.flags.owndata or address_of(found) % 64 == 0
        assert found.flags.writeable == (mode != "r") or found.size == 0
        return found

    assert samples.differing(layout, cross, writable=mode != "r") == {}


@pytest.mark.parametrize("mode", MODES)
def test_special_arrays_arrive_as_pickle_would_deliver_them(mode, path, tmp_path):
    special = samples.special_arrays(tmp_path)
    oobpickle.dump(special, path)
    loaded = oobpickle.load(path, mode)

    assert described(pickled(special)) == described(loaded)


@pytest.mark.parametrize("mode", MODES)
def test_what_holds_memory_of_its_own_arrives_in_every_mode(mode, path):
    structure = Structure((ctypes.c_int * 30_000)(*range(100)))
    obj = {
        "bytes": b"b" * 200_000,
        "few bytes": b"b",
        "bytearray": bytearray(b"a" * 200_000),
        "array": array.array("d", range(20_000)),
        "text": "t" * 200_000,
        "nothing": pickle.PickleBuffer(b""),
    }
    oobpickle.dump([obj, structure], path)
    loaded, other = oobpickle.load(path, mode)
    nothing = loaded.pop("nothing")
    obj.pop("nothing")

    assert (obj, b"", bytes(structure)) == (loaded, bytes(nothing), bytes(other))
    assert [type(value) for value in obj.values()] == [type(value) for value in loaded.values()]
    loaded["bytearray"].append(1)


@pytest.mark.parametrize("mode", MODES)
def test_one_array_in_two_places_stays_one(mode, path):
    one = np.arange(1000)
    oobpickle.dump({"a": one, "b": [one, one[:10]]}, path)
    loaded = oobpickle.load(path, mode)

    assert loaded["a"] is loaded["b"][0]
    assert not np.shares_memory(loaded["a"], loaded["b"][1])
    assert len(oobpickle.verify(path).sizes) == 2


@pytest.mark.parametrize("mode", by_turns(MODES))
def test_a_hundred_thousand_small_arrays(mode, path):
    obj = [np.full(3, n) for n in range(100_000)]
    oobpickle.dump(obj, path)
    loaded = oobpickle.load(path, mode)

    assert len(oobpickle.verify(path).sizes) == 100_000
    assert path.stat().st_size < 20 * MIB
    assert sum(int(a[-1]) for a in loaded) == sum(range(100_000))


def test_a_buffer_is_what_it_was_when_the_pickler_reached_it(path):
    scratch = np.zeros(100_000)

    class Part:
        def __init__(self, number):
            self.number = number

        def __reduce__(self):
            scratch[:] = self.number
            return np.frombuffer, (pickle.PickleBuffer(scratch), "f8")

    oobpickle.dump([Part(n) for n in range(3)], path)

    assert [0, 1, 2] == [one[-1] for one in oobpickle.load(path)]


def test_a_registered_reducer_is_used(path):
    oobpickle.register(samples.Signal, samples.reduce_signal)
    try:
        oobpickle.dump(samples.Signal(bytearray(100_000)), path)
    finally:
        oobpickle.unregister(samples.Signal)

    assert oobpickle.verify(path).sizes == [100_000]
    assert bytes(100_000) == bytes(oobpickle.load(path, "r").samples)


def test_nothing_of_the_object_is_kept_and_a_bytearray_can_grow_again(path):
    data, held = bytearray(100_000), np.zeros(1000)
    gone = weakref.ref(held)
    oobpickle.dump([data, held], path)
    del held
    data.append(1)

    assert gone() is None


# --- memory


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_arrays_are_the_mapping_itself(mode, path):
    oobpickle.dump([np.arange(3), np.arange(MIB), np.arange(6.0).reshape(2, 3).T], path)
    loaded = oobpickle.load(path, mode)

    assert [is_mapped(one, path) for one in loaded] == [True] * 3
    assert [address_of(one) % 64 for one in loaded] == [0] * 3
    assert address_of(loaded[1]) % 4096 == 0


def test_read_into_memory_is_not_mapped(path):
    oobpickle.dump([np.arange(3), np.arange(MIB)], path)
    loaded = oobpickle.load(path)

    assert mapped_ranges(path) == []
    assert [address_of(one) % 64 for one in loaded] == [0] * 2


def test_mode_r_refuses_to_write(path):
    oobpickle.dump(
        [np.arange(3), np.ma.masked_array([1.0, 2.0], [0, 1]), np.ones((1, 1)).view(np.matrix)],
        path,
    )
    for loaded in oobpickle.load(path, "r"):
        with pytest.raises(ValueError, match="read-only"):
            loaded[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            loaded.flags.writeable = True


def test_mode_c_writes_to_memory_of_its_own(path):
    oobpickle.dump(np.arange(MIB), path)
    before = path.read_bytes()
    one, two = oobpickle.load(path, "c"), oobpickle.load(path, "c")
    one[:] = 7

    assert path.read_bytes() == before
    assert two[-1] == MIB - 1


def test_mode_r_plus_writes_memory_of_arrays_to_the_file_and_nothing_else(path):
    fields = np.zeros(2, [("a", "i4"), ("b", "f8")])
    plain = [np.zeros(1), np.zeros(MIB), fields, np.array(0.0), np.zeros((3, 4), order="F")]
    objects = [np.zeros(3).view(np.recarray), np.ma.masked_array([1.0, 2.0], [0, 0])]
    oobpickle.dump({"plain": plain, "more": objects, "n": 1}, path)
    loaded = oobpickle.load(path, "r+")
    for one in loaded["plain"]:
        one[...] = 5
    loaded["more"][0][:] = 6
    loaded["more"][1][0] = np.ma.masked
    loaded["more"][1][1] = 8
    loaded["n"] = 2
    loaded["plain"][0] = None
    again = oobpickle.load(path)

    assert oobpickle.verify(path).checksums is None
    assert [one.tobytes() for one in again["plain"]] == [
        np.full_like(one, 5).tobytes() if one.dtype.names is None else one.tobytes()
        for one in [plain[0], plain[1], loaded["plain"][2], plain[3], plain[4]]
    ]
    assert (again["plain"][2]["b"] == 5).all()
    assert again["more"][0].tolist() == [6, 6, 6]
    assert again["more"][1].tolist() == [None, 8.0]
    assert again["n"] == 1


def test_two_mappings_of_one_file_show_the_same_memory(path):
    oobpickle.dump(np.zeros(MIB), path)
    writer, reader = oobpickle.load(path, "r+"), oobpickle.load(path, "r")
    writer[5] = 3

    assert reader[5] == 3


def test_a_mapping_ends_with_its_last_array_and_keeps_no_descriptor(path):
    oobpickle.dump([np.zeros(MIB), np.zeros(MIB)], path)
    before = len(os.listdir("/proc/self/fd"))
    first, second = oobpickle.load(path, "r")
    n_kept = len(os.listdir("/proc/self/fd")) - before
    part = first[10:20]
    del first, second
    assert len(mapped_ranges(path)) == 1
    del part

    assert mapped_ranges(path) == []
    assert n_kept == (0 if core is not None or sys.version_info >= (3, 13) else 1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_files_that_have_an_inode_in_turn_are_told_apart(path):
    """On ext4 the next file gets the inode of the last one that was deleted."""
    seen = set()
    for n in range(100):
        oobpickle.dump(np.full(10, n), path)
        status = os.stat(path)
        seen.add((status.st_ino, status.st_mtime_ns))
    assert len(seen) == 100
    assert len({mtime_ns for _, mtime_ns in seen}) == 100


def test_a_mapping_goes_on_when_its_file_is_replaced_or_deleted(path):
    oobpickle.dump(np.full(MIB, 1), path)
    old = {mode: oobpickle.load(path, mode) for mode in ("r", "c", "r+")}
    oobpickle.dump(np.full(100, 2), path)
    new = oobpickle.load(path, "r")
    path.unlink()

    assert {mode: int(one.sum()) for mode, one in old.items()} == dict.fromkeys(old, MIB)
    assert int(new.sum()) == 200


def test_what_was_loaded_can_be_dumped_over_its_own_file(path, tmp_path):
    oobpickle.dump({"a": np.arange(MIB)}, path)
    for mode in ("r", "c", "r+", None):
        loaded = oobpickle.load(path, mode)
        oobpickle.dump({"a": loaded["a"][::-1]}, path)
        assert oobpickle.load(path)["a"].tolist()[:2] == loaded["a"].tolist()[:-3:-1]
    memory = np.memmap(tmp_path / "raw", "u1", "w+", shape=(100_000,))
    memory[:] = 3
    oobpickle.dump(memory, tmp_path / "raw")
    again = oobpickle.load(tmp_path / "raw", "r")

    assert (type(again), int(again.sum()), int(memory.sum())) == (np.memmap, 300_000, 300_000)


def test_a_reader_that_has_the_old_file_open_reads_all_of_it(path):
    oobpickle.dump(np.full(MIB, 1), path)
    before = path.read_bytes()
    with path.open("rb") as old:
        start = old.read(1000)
        oobpickle.dump(np.full(MIB, 2), path)
        rest = old.read()

    assert before == start + rest
    assert before != path.read_bytes()


def test_more_than_4_gib(path, monkeypatch):
    """As a hole: large writes of zeros are left out, and nothing is reserved."""
    n = (4 << 30) // 8 + 3
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, m, at: m.nbytes if m.nbytes > 2 * MIB else real(fd, m, at)
    )
    monkeypatch.setattr(writing, "_LEAST_RESERVED_NBYTES", 1 << 60)
    oobpickle.dump([np.zeros(n), np.ones(1)], path)

    assert oobpickle.verify(path).sizes == [8 * n, 8]
    assert path.stat().st_blocks * 512 < 2 * MIB
    for mode in ("r", "c", "r+"):
        zeros, last = oobpickle.load(path, mode)

        assert zeros.nbytes == 8 * n
        assert (zeros[0], zeros[-1], last[0]) == (0, 0, 1)


# --- checksums


def flipped(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_checksum_of_each_buffer_is_stored_if_it_is_asked_for(path):
    obj = [np.arange(10), np.arange(MIB), np.arange(MIB)[::3]]
    oobpickle.dump(obj, path, checksum=True)
    layout = oobpickle.verify(path)

    import zlib

    assert layout.checksums == [zlib.crc32(one.tobytes()) for one in obj]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_altered_data_is_found_by_verify_and_by_reading(position, path):
    oobpickle.dump([np.arange(10), np.arange(MIB), np.arange(300_000)[::3]], path, checksum=True)
    layout = oobpickle.verify(path)
    flipped(path, layout.offsets[position] + layout.sizes[position] - 1)
    for call in (oobpickle.verify, oobpickle.load):
        with pytest.raises(FileFormatError, match=f"checksum of buffer {position} "):
            call(path)
    oobpickle.load(path, "r")


def test_writing_into_a_file_with_checksums_is_refused(path):
    oobpickle.dump(np.arange(10), path, checksum=True)
    with pytest.raises(FileFormatError, match="checksum=False"):
        oobpickle.load(path, "r+")


def test_verify_runs_nothing(path):
    class Bomb:
        def __reduce__(self):
            return os._exit, (3,)

    oobpickle.dump([Bomb(), np.zeros(100)], path, checksum=True)

    assert oobpickle.verify(path).sizes == [800]


# --- what is refused


def test_an_object_that_cannot_be_pickled_leaves_the_old_file(path, tmp_path):
    oobpickle.dump("old", path)
    for wrong in ([np.zeros(MIB), threading.Lock()], [np.zeros(MIB), lambda: 1]):
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            oobpickle.dump(wrong, path)

    assert oobpickle.load(path) == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_where_it_is_that_cannot_be_pickled_is_noted(path):
    with pytest.raises(TypeError) as caught:
        oobpickle.dump({"a": [threading.Lock()]}, path)

    assert "oobpickle: pickling a _thread.lock at $['a'][0]" in caught.value.__notes__


def test_a_foreign_error_of_a_reducer_keeps_its_own_path(path):
    class Missing:
        def __reduce__(self):
            raise FileNotFoundError(2, "No such file", "elsewhere")

    with pytest.raises(FileNotFoundError, match="elsewhere"):
        oobpickle.dump(Missing(), path)

    assert not path.exists()


@pytest.mark.parametrize("mode", ["w", "w+", "", 1, b"r", "readonly"])
def test_another_mode_is_refused(mode, path):
    oobpickle.dump(1, path)
    with pytest.raises(ValueError, match="must be None, 'r', 'c' or"):
        oobpickle.load(path, mode)


@pytest.mark.parametrize("call", [oobpickle.load, oobpickle.verify])
def test_a_missing_file_is_an_error_of_the_system_with_its_path(call, path):
    with pytest.raises(FileNotFoundError, match=str(path)):
        call(path)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_regular_file_is_refused_at_once(mode, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for place, what in (("fifo", "a FIFO"), (".", "a directory")):
        with pytest.raises(FileFormatError, match=what):
            oobpickle.load(tmp_path / place, mode)
    with pytest.raises(FileFormatError, match="a device"):
        oobpickle.load("/dev/zero", mode)


def test_a_path_is_a_path(path):
    for wrong in (3, None, open):
        with pytest.raises(TypeError):
            oobpickle.dump(1, wrong)
        with pytest.raises(TypeError):
            oobpickle.load(wrong)
    for right in (path, str(path), os.fsencode(path)):
        oobpickle.dump(right, right)
        assert oobpickle.load(right) == right


def test_the_bytes_of_a_payload_and_of_a_file_are_not_taken_for_each_other(path):
    path.write_bytes(oobpickle.dumps([1, np.arange(1000)]).to_bytes())
    with pytest.raises(FileFormatError, match=r"Payload: use oobpickle\.loads"):
        oobpickle.load(path)
    oobpickle.dump([1, np.arange(1000)], path)
    with pytest.raises(
        oobpickle.PayloadError, match=r"use oobpickle\.load\(path\)|oobpickle\.load"
    ):
        oobpickle.loads(path.read_bytes())


# --- files of before


HERE = Path(__file__).parent / "data"


def first_version():
    """Return what is in the stored files."""
    shared = np.arange(20.0).reshape(4, 5)
    return {
        "C": shared,
        "again": shared,
        "F": np.asfortranarray(shared + 1),
        "permuted": np.arange(24, dtype="i4").reshape(2, 3, 4).transpose(1, 0, 2),
        "no axis": np.array(2.5),
        "empty": np.zeros((0, 3), "f4"),
        "large": np.arange(70_000, dtype="u1"),
        "big-endian": np.arange(5, dtype=">i2"),
        "fields": np.array([(1, 2.5)], [("n", "i4"), ("x", "f8")]),
        "dates": np.array(["2020-01-01", "NaT"], "M8[D]"),
        "text": np.array(["a", "bc"]),
        "objects": np.array([1, "two", None], object),
        "masked": np.ma.masked_array(np.arange(4), [0, 1, 0, 0]),
        "matrix": np.arange(4).reshape(2, 2).view(np.matrix),
        "bytearray": bytearray(range(256)) * 300,
        "bytes": bytes(range(256)),
        "plain": [1, 2.5, "three", None, True, {"four": (4,)}, {5}, 1 << 70],
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["version-1.oob", "version-1-checksums.oob"])
def test_files_of_the_first_version_load(name, mode, path):
    path.write_bytes((HERE / name).read_bytes())
    layout = oobpickle.verify(path)
    if layout.checksums and mode == "r+":
        return
    loaded = oobpickle.load(path, mode)

    assert layout.version == 1
    assert described(pickled(first_version())) == described(loaded)
    assert loaded["C"] is loaded["again"]


# --- to a worker


@pytest.mark.skipif(core is None, reason="nothing crosses out of band")
@pytest.mark.parametrize("mode", MODES)
def test_what_was_loaded_crosses(mode, path):
    import multiprocessing

    oobpickle.dump([np.arange(MIB), np.arange(3)], path)
    loaded = oobpickle.load(path, mode)
    with oobpickle.enabled() as arena:
        read, write = multiprocessing.Pipe(duplex=False)
        with read, write:
            write.send([*loaded, loaded[0][::2]])
            arrived = read.recv()

    in_file = mode == "r"
    assert arena.statistics().nbytes_in_files == in_file * loaded[0].nbytes
    assert [one.tolist()[-1] for one in arrived] == [MIB - 1, 2, MIB - 2]
    assert [one.flags.writeable for one in arrived] == [not in_file, True, True]
    if not in_file:
        arrived[0][:] = 0
    assert loaded[0][-1] == MIB - 1


def test_importing_and_using_it_for_what_has_no_arrays_needs_no_numpy(path):
    program = (
        "import sys, oobpickle; oobpickle.dump({'a': [b'x' * 100_000]}, sys.argv[1]); "
        "print(len(oobpickle.load(sys.argv[1], 'r')['a'][0]), 'numpy' in sys.modules)"
    )
    source = str(Path(oobpickle.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, path],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (child.returncode, child.stdout, child.stderr) == (0, "100000 False\n", "")


def test_without_the_extension_module_it_is_the_same(path, monkeypatch):
    from oobpickle import _copying
    from oobpickle._pickling import replaced

    obj = [np.arange(MIB), np.arange(MIB)[::2], bytearray(100_000), np.ones((2, 2)).view(np.matrix)]
    oobpickle.dump(obj, path)
    before = path.read_bytes()
    monkeypatch.setattr(_copying, "core", None)
    monkeypatch.setattr(replaced, "Rebuild", replaced._Rebuild)
    oobpickle.dump(obj, path)

    assert path.read_bytes() == before
    assert described(oobpickle.load(path)) == described(pickled(obj))
    gc.collect()
