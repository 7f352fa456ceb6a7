"""Arrays in loaded files: when their place is sent, what arrives, and what is said if not."""

import errno
import gc
import mmap
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oobpickle
from conftest import eventually
from exploring import examples
from messages import envelope_of, message_of
from oobpickle import EnvelopeError, _envelope, _in_files
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._native import core
from oobpickle._pickling import in_band

N = 100_000
LEAST = 64 << 10  # as LEAST_REFERRED in _core/core.h


@pytest.fixture
def arena():
    arena = SharedArena.create(Options(capacity=64 << 20))
    _envelope.introduce(arena)
    yield arena
    core.arm(None, 0, 0)
    gc.collect()
    _envelope.forget(arena)
    arena.close()
    arena.detach()
    assert arena.try_destroy(), "something still needs it"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model"
    oobpickle.dump({"a": np.arange(N), "b": [np.ones((300, 400), order="F"), "text"]}, path)
    return path


def sent(arena, obj):
    """Return the bytes of an envelope that has left."""
    envelope = envelope_of(obj, arena)
    envelope.lease.settle()
    return bytes(envelope)


def cross(arena, obj):
    return pickle.loads(sent(arena, obj))


def n_in_files(arena, obj):
    """Return how many buffers of a message with the object would be sent as their place."""
    return len(message_of(obj, arena.blocks).places)


def mappings_of(path):
    """Return the ranges at which a file, also one that was deleted, is mapped."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5)
        if name.strip().removesuffix(" (deleted)") == str(path):
            found.append([int(part, 16) for part in addresses.split("-")])
    return found


def is_mapped(array, path):
    address = array.__array_interface__["data"][0]
    return any(start <= address < end for start, end in mappings_of(path))


def descriptors_of(path):
    return [
        fd
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
        and os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)") == str(path)
    ]


def elsewhere(arena, data, done=lambda _: None, before=lambda: None):
    """Load a message in a forked child that has nothing of the file; return what became of it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            before()
            loaded = pickle.loads(data)
            os.write(write, repr(done(loaded)).encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        story = file.read().decode()
    os.waitpid(pid, 0)
    return story


# --- what is sent so, and what arrives


def test_an_array_of_a_loaded_file_arrives_over_the_file(arena, path):
    loaded = oobpickle.load(path, "r")
    message = message_of(loaded, arena.blocks)
    assert len(message.places) == 2
    assert message.nbytes_in_band - message.nbytes == 1_760_000
    array, (other, text) = cross(arena, loaded).values()

    assert (array == np.arange(N)).all()
    assert (other == 1).all()
    assert (other.flags.f_contiguous, other.shape, text) == (True, (300, 400), "text")
    assert is_mapped(array, path)
    assert is_mapped(other, path)
    assert not array.flags.writeable
    assert not other.flags.writeable


def test_a_file_is_mapped_once_for_all_messages_and_until_the_last_array_is_dropped(arena, path):
    data = [sent(arena, oobpickle.load(path, "r")) for _ in range(2)]
    assert mappings_of(path) == []
    one, two = map(pickle.loads, data)
    part = two["a"][10:]
    assert len(mappings_of(path)) == 1
    assert descriptors_of(path) == []
    del one, two
    assert len(mappings_of(path)) == 1
    del part
    assert mappings_of(path) == []


def test_the_sender_keeps_a_descriptor_from_the_first_message_on(arena, path):
    loaded = oobpickle.load(path, "r")
    assert descriptors_of(path) == []
    for _ in range(3):
        cross(arena, loaded)
        assert len(descriptors_of(path)) == 1
    del loaded
    assert descriptors_of(path) == []


def test_two_arrays_over_the_same_memory_arrive_as_two(arena, path):
    array = oobpickle.load(path, "r")["a"]
    parts = [array, array[: N // 2], array[N // 4 :], array]
    found = cross(arena, parts)

    assert found[3] is found[0]
    assert len({id(part) for part in found}) == 3
    for part, other in zip(parts, found, strict=True):
        np.testing.assert_array_equal(part, other)
        assert is_mapped(other, path)


def test_slices_that_are_contiguous_are_sent_so_and_others_are_copied(arena, path):
    array, square = oobpickle.load(path, "r")["a"], oobpickle.load(path, "r")["b"][0]
    slices = {
        "contiguous": (array[1000:50_000], 1),
        "reshaped": (array[:90_000].reshape(300, 300).T, 1),
        "other dtype": (array.view("u1")[12345:], 1),
        "columns, as they lie": (square[:, 100:], 1),
        "reversed": (array[::-1], 0),
        "with gaps": (array[::2], 0),
        "rows, across": (square[100:], 0),
        "little": (array[: LEAST // 8 - 1], 0),
        "just enough": (array[: LEAST // 8], 1),
        "the end": (array[-LEAST // 8 :], 1),
    }
    parts = {name: part for name, (part, _) in slices.items()}
    found = cross(arena, parts)

    for name, part in parts.items():
        np.testing.assert_array_equal(part, found[name], strict=True)
    assert {name: n_in_files(arena, part) for name, part in parts.items()} == {
        name: n for name, (_, n) in slices.items()
    }


SHAPE = (70, 60, 40)
_slices = st.tuples(*(st.slices(side) for side in SHAPE))


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    arena = SharedArena.create(Options(capacity=64 << 20))
    _envelope.introduce(arena)
    path = tmp_path_factory.mktemp("cube") / "cube"
    values = np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE)
    oobpickle.dump([values, np.asfortranarray(values)], path)
    yield arena, path, oobpickle.load(path, "r")
    gc.collect()
    _envelope.forget(arena)
    arena.close()
    arena.detach()
    assert arena.try_destroy()


@examples(60)
@given(slices=_slices, order=st.permutations(range(3)), is_fortran=st.booleans())
def test_any_slice_arrives_as_it_is(cube, slices, order, is_fortran):
    arena, path, loaded = cube
    part = loaded[is_fortran][slices].transpose(order)
    is_contiguous = part.flags.c_contiguous or part.flags.f_contiguous
    found = cross(arena, {"part": part, "again": [part]})

    np.testing.assert_array_equal(part, found["part"], strict=True)
    assert found["again"][0] is found["part"]
    assert n_in_files(arena, part) == (is_contiguous and part.nbytes >= LEAST)
    if part.nbytes:
        assert is_mapped(found["part"], path) == (n_in_files(arena, part) == 1)
        np.testing.assert_array_equal(part, cross(arena, found["part"]), strict=True)


class Deleter:
    """Deletes a file when it is pickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        self.path.unlink(missing_ok=True)
        return str, ()


def test_a_file_is_looked_for_once_for_each_message(arena, path):
    array = oobpickle.load(path, "r")["a"]
    message = message_of([array[: N // 2], Deleter(path), array[N // 2 :]], arena.blocks)

    assert len(message.places) == 2
    assert n_in_files(arena, array) == 0


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_what_arrives_is_not_over_what_is_mapped_to_be_written(arena, path, mode):
    data = sent(arena, oobpickle.load(path, "r")["a"])
    own = oobpickle.load(path, mode)
    found = pickle.loads(data)

    assert not np.shares_memory(found, own["a"])
    assert len(mappings_of(path)) == 2
    assert not found.flags.writeable


def test_what_has_arrived_is_sent_on_so(arena, path):
    array = oobpickle.load(path, "r")["a"]
    for _ in range(3):
        array = cross(arena, array[1000:])
        assert is_mapped(array, path)

    assert (array == np.arange(3000, N)).all()
    assert n_in_files(arena, array) == 1


def test_a_path_is_absolute_and_without_symbolic_links(arena, path, monkeypatch):
    link = path.parent / "link"
    link.symlink_to(path.name)
    monkeypatch.chdir(path.parent)
    data = sent(arena, oobpickle.load("link", "r"))
    monkeypatch.chdir("/")
    link.unlink()

    assert (pickle.loads(data)["a"] == np.arange(N)).all()


def test_many_arrays_and_arrays_of_other_kinds_in_one_message(arena, path, tmp_path):
    parts = [np.full(LEAST // 8, n) for n in range(500)]  # that does not fit into an envelope
    oobpickle.dump(parts, tmp_path / "parts")
    loaded = oobpickle.load(tmp_path / "parts", "r")
    masked = np.ma.masked_array(oobpickle.load(path, "r")["a"], mask=np.arange(N) % 2 == 0)
    obj = [loaded, np.full(N, 3), oobpickle.load(path, "c"), [np.ones(10)] * 3, b"b" * 200_000]
    obj += [oobpickle.load(path, "r")["a"].view(np.recarray), masked]
    found = cross(arena, obj)

    assert [int(part[-1]) for part in found[0]] == list(range(500))
    assert (found[1] == 3).all()
    assert (found[2]["a"] == np.arange(N)).all()
    assert found[2]["a"].flags.writeable
    assert found[4] == b"b" * 200_000
    assert type(found[5]) is np.recarray
    assert (found[5] == np.arange(N)).all()
    assert found[6].sum() == masked.sum()
    assert n_in_files(arena, loaded) == 500
    assert len(mappings_of(tmp_path / "parts")) == 1  # sender and receiver are one process


def test_frames_and_tables_lie_in_files_too(arena, tmp_path):
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": np.arange(N), "b": np.arange(N) / 3})
    table = pyarrow.table({"x": np.arange(N), "y": np.arange(N) % 7})
    oobpickle.dump([frame, table], tmp_path / "both")
    loaded = oobpickle.load(tmp_path / "both", "r")
    assert n_in_files(arena, loaded) == 4
    found, other = cross(arena, loaded)

    assert found.equals(frame)
    assert other.equals(table)
    found["a"] += 1
    assert (found["a"] == frame["a"] + 1).all()
    assert (loaded[0]["a"] == frame["a"]).all()


def test_many_threads_find_the_same_file(arena, path):
    data = [sent(arena, oobpickle.load(path, "r")["a"]) for _ in range(40)]
    found = []

    def receive(mine):
        found.extend(int(pickle.loads(one)[-1]) for one in mine)

    threads = [threading.Thread(target=receive, args=(data[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [N - 1] * 40


# --- by value


def changed(path):
    """The mode that a file is loaded in, and what becomes of it or of the array then."""
    return {
        "deleted": ("r", lambda array: path.unlink()),
        "moved": ("r", lambda array: path.rename(f"{path}-elsewhere")),
        "replaced": ("r", lambda array: oobpickle.dump({"a": np.zeros(N)}, path)),
        "replaced by a fifo": ("r", lambda array: (path.unlink(), os.mkfifo(path))),
        "replaced by a folder": ("r", lambda array: (path.unlink(), path.mkdir())),
        "written in place": ("r", lambda array: os.utime(path, ns=(1, 1))),
        "grown": ("r", lambda array: os.truncate(path, path.stat().st_size + 1)),
        "cut off a little": ("r", lambda array: os.truncate(path, path.stat().st_size - 1)),
        "cut off in secret": ("r", lambda array: cut_in_secret(path)),
        "about to be written": ("r", lambda array: oobpickle.load(path, "r+")),
        "copied on write": ("c", lambda array: None),
        "to be written": ("r+", lambda array: None),
    }


def cut_in_secret(path):
    before = path.stat()
    os.truncate(path, before.st_size - 1)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("was_sent", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("what", changed(None))
def test_what_cannot_be_found_again_is_copied(arena, path, what, was_sent):
    mode, change = changed(path)[what]
    array = oobpickle.load(path, mode)["a"]
    if was_sent:
        assert n_in_files(arena, array) == (mode == "r")
    kept = change(array)
    expected = array.copy()

    assert n_in_files(arena, array) == 0
    found = cross(arena, array)
    assert (found == expected).all()
    assert found.flags.writeable
    assert not is_mapped(found, path)
    del kept


def test_what_is_written_in_memory_is_a_snapshot(arena, path):
    for mode in ("c", "r+"):
        array = oobpickle.load(path, mode)["a"]
        data = sent(arena, array)
        array[:] = -1
        assert (pickle.loads(data) == np.arange(N)).all()


def test_once_nobody_writes_to_the_file_it_is_sent_so_again(arena, path):
    array, writer = oobpickle.load(path, "r")["a"], oobpickle.load(path, "r+")
    assert n_in_files(arena, array) == 0
    del writer
    assert n_in_files(arena, array) == 1


def test_without_a_descriptor_it_is_copied(arena, path, monkeypatch):
    import resource

    array = oobpickle.load(path, "r")["a"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        n_without = n_in_files(arena, array)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert n_without == 0
    assert n_in_files(arena, array) == 1


def test_other_memory_maps_are_copied(arena, path):
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert n_in_files(arena, np.frombuffer(mapped, "u1")[:N]) == 0
    assert n_in_files(arena, np.memmap(path, "u1", "r")) == 0
    assert n_in_files(arena, oobpickle.load(path)) == 0


@pytest.mark.parametrize("dumps", [pickle.dumps, lambda obj: oobpickle.dumps(obj).to_bytes()])
def test_other_pickles_have_the_bytes(arena, path, dumps):
    loaded = oobpickle.load(path, "r")
    assert n_in_files(arena, loaded) == 2
    data = dumps(loaded)

    assert len(data) > 1_700_000
    assert str(path).encode() not in data


@pytest.mark.parametrize("store", [oobpickle.broadcast, oobpickle.share])
def test_what_is_stored_for_many_is_a_copy(path, store):
    with oobpickle.enabled() as arena:
        handle = store(oobpickle.load(path, "r"))
        path.unlink()
        assert arena.statistics().nbytes_published > 1_700_000
        value = handle.value if store is oobpickle.broadcast else handle.unlocked
        assert (value["a"] == np.arange(N)).all()
        assert not is_mapped(value["a"], path)
        handle.close()


def test_in_an_ordinary_pickle_there_are_the_bytes(arena, path):
    for blocks in (arena.blocks, None):
        loaded = oobpickle.load(path, "r")
        message = core.Message(blocks, 0, _envelope.tables({}), arena.blocks)
        _envelope.take_apart([loaded, np.full(N, 3), loaded["a"][::2]], message)
        assert len(message.places) == 2
        nbytes = message.nbytes_in_band
        del loaded
        gc.collect()
        found, other, third = pickle.loads(bytes(in_band.as_pickle(message)))

        assert (found["a"] == np.arange(N)).all()
        assert (found["b"][0] == 1).all()
        assert (other == 3).all()
        assert third[-1] == N - 2
        assert message.places == []
        assert message.nbytes == message.nbytes_in_band == nbytes > 2_900_000


def test_what_was_in_memory_at_first_is_sent_so_too(arena, path):
    """When room was waited for."""
    loaded = oobpickle.load(path, "r")
    message = core.Message(None, 0, _envelope.tables({}), arena.blocks)
    _envelope.take_apart([loaded, np.full(N, 3)], message)
    envelope = _envelope.pack(message, arena)
    envelope.lease.settle()
    found, other = pickle.loads(bytes(envelope))

    assert is_mapped(found["a"], path)
    assert (other == 3).all()


# --- whatever becomes of the file on the way


def test_a_descriptor_that_somebody_has_closed_is_opened_again(arena, path):
    """Under the same number, as the first that is free."""
    loaded = oobpickle.load(path, "r")
    mapped = message_of(loaded, arena.blocks).places[0][3]
    fd = mapped.name[2]
    os.close(fd)

    assert message_of(loaded, arena.blocks).places
    assert mapped.name[2] == fd
    assert os.fstat(fd).st_ino == path.stat().st_ino


GONE = ("deleted", "moved", "replaced", "replaced by a fifo", "replaced by a folder")


@pytest.mark.parametrize("what", GONE)
def test_a_file_that_is_gone_from_its_path_is_found_through_its_sender(arena, path, what):
    loaded = oobpickle.load(path, "r")
    data = sent(arena, [loaded["a"][N // 2 :], loaded])
    changed(path)[what][1](None)

    def drop():
        nonlocal loaded
        loaded = None
        gc.collect()
        assert mappings_of(path) == []

    story = elsewhere(arena, data, lambda found: (int(found[0][0]), int(found[1]["a"].sum())), drop)
    assert story == repr((N // 2, int(np.arange(N).sum())))
    del loaded


WRITTEN = ("written in place", "grown", "cut off a little", "cut off in secret")


@pytest.mark.parametrize("what", [*GONE, *WRITTEN])
def test_what_cannot_be_had_is_an_error_that_says_why(arena, path, what):
    before = os.stat(path)
    data = sent(arena, oobpickle.load(path, "r"))
    changed(path)[what][1](None)
    gc.collect()
    with pytest.raises(EnvelopeError) as raised:
        pickle.loads(data)
    story = str(raised.value)

    assert story.startswith(f"arrays of this message lie in the file {path}, which process ")
    assert f"expected {before.st_size} bytes, written at {before.st_mtime_ns // 10**9}." in story
    is_there = os.path.exists(path)
    assert ("found No such file or directory" in story) != is_there
    if is_there:
        assert f"found {os.stat(path).st_size} bytes, written at" in story
    assert f"through its sender, /proc/{os.getpid()}/fd/" in story
    assert "send copies: load it without mmap_mode, or copy the arrays." in story
    del raised
    assert cross(arena, np.ones(N)).sum() == N
    assert arena.statistics().n_blocks["held"] == 0


def test_an_error_keeps_no_block(arena, path):
    data = sent(arena, [oobpickle.load(path, "r"), np.ones(N)])
    path.unlink()
    with pytest.raises(EnvelopeError) as raised:
        pickle.loads(data)

    assert raised.value is not None
    assert arena.statistics().n_blocks["held"] == 0
    with pytest.raises(oobpickle.StaleEnvelopeError):
        pickle.loads(data)


def test_another_file_on_the_number_of_the_descriptor_is_left_alone(arena, path, tmp_path):
    loaded = oobpickle.load(path, "r")
    data = sent(arena, loaded)
    (number,) = map(int, descriptors_of(path))
    other = tmp_path / "other"
    other.write_bytes(b"other")
    with other.open("rb") as file:
        os.dup2(file.fileno(), number)
    path.rename(f"{path}-elsewhere")
    story = elsewhere(arena, data, before=loaded.clear)
    assert "through its sender" in story
    assert f"{number}: 5 bytes, written at" in story
    os.rename(f"{path}-elsewhere", path)
    cross(arena, loaded)
    assert len(descriptors_of(path)) == 1  # a new one
    loaded.clear()
    assert descriptors_of(path) == []
    assert os.read(number, 5) == b"other"
    os.close(number)


def test_a_descriptor_of_somebody_else_is_not_closed(arena, path):
    loaded = oobpickle.load(path, "r")
    assert n_in_files(arena, loaded) == 2
    (number,) = map(int, descriptors_of(path))
    with open(os.devnull, "rb") as file:
        os.dup2(file.fileno(), number)
    del loaded
    os.close(number)


@pytest.mark.parametrize("offset", [0, 3])
def test_without_address_space_it_is_read(arena, path, offset):
    data = sent(arena, oobpickle.load(path, "r")["a"][offset:])
    core.arm("file.map", 1, -errno.ENOMEM)
    found = pickle.loads(data)
    core.arm(None, 0, 0)

    assert (found == np.arange(offset, N)).all()
    assert not found.flags.writeable
    assert mappings_of(path) == []


def test_a_file_that_is_not_mapped_says_so(path):
    with path.open("rb") as file:
        for nbytes in (0, path.stat().st_size + 1):
            with pytest.raises(ValueError, match=rf"{path.stat().st_size} bytes, need {nbytes}"):
                core.MappedFile(file.fileno(), nbytes, "r", bytes(path))
        core.arm("file.map", 1, -errno.ENOMEM)
        with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
            core.MappedFile(file.fileno(), 100, "r", bytes(path))
        core.arm(None, 0, 0)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        core.MappedFile(file_number_that_is_closed(), 100, "r", bytes(path))


def test_a_part_of_a_file_is_not_taken_for_all_of_it(path):
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with path.open("rb") as file:
        part = core.MappedFile(file.fileno(), 100, "r", bytes(path))
        assert core.mapped_as(identity) is None
        whole = core.MappedFile(file.fileno(), status.st_size, "r", bytes(path))
        assert core.mapped_as(identity) is whole
    del part


def file_number_that_is_closed():
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    return read


# --- forks


def test_a_forked_child_has_what_its_parent_has(arena, path):
    loaded = cross(arena, oobpickle.load(path, "r"))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            total = int(loaded["a"].sum())
            del loaded
            gc.collect()
            os.write(write, b"%d %d" % (total, len(mappings_of(path))))
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as file:
        assert file.read() == b"%d 0" % np.arange(N).sum()
    assert (loaded["a"] == np.arange(N)).all()
    eventually(lambda: len(mappings_of(path)) == 1)


@pytest.mark.parametrize("change", ["offset", "size", "buffer"])
def test_a_forged_place_is_refused(arena, path, change):
    """Else a buffer would be shorter than its array, whose memory lies behind it then."""
    loaded = oobpickle.load(path, mmap_mode="r")["a"]
    ((number, at, nbytes, file),) = message_of(loaded, arena.blocks).places
    told = {
        "offset": (number, path.stat().st_size - nbytes + 1, nbytes, file),
        "size": (number, at, path.stat().st_size, file),
        "buffer": (number + 1, at, nbytes, file),
    }[change]
    right, wrong = (_in_files.describe([one]) for one in ((number, at, nbytes, file), told))
    buffers = [None]
    _in_files.fill(buffers, memoryview(right))
    assert buffers[0].nbytes == nbytes

    with pytest.raises(EnvelopeError, match="damaged"):
        _in_files.fill([None], memoryview(wrong))
