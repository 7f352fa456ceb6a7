"""Files that processes write and read: kills at each step, limits, other users, many at once."""

import errno
import multiprocessing
import os
import resource
import signal
import tempfile
import threading
import zlib
from pathlib import Path

import inside
import numpy as np
from inside import KILLED, fork, reap

import oobpickle
from oobpickle._files import placing
from oobpickle._files.layout import header_of, table_of

MIB = 1 << 20
N = 150_000


def _objects():
    """An old object and a new one, with buffers of each kind."""
    old = {"version": 1, "large": np.full(N, 1), "small": np.full(3, 1)}
    new = {
        "version": 2,
        "large": np.full(N, 2)[::-1],
        "small": np.full(3, 2),
        "n": [np.ones(9)] * 3,
    }
    return old, new


def _version_of(path):
    """Return which of both is in a file, all of it."""
    oobpickle.verify(path)
    loaded = oobpickle.load(path)
    assert (loaded["large"] == loaded["version"]).all()
    assert (loaded["small"] == loaded["version"]).all()
    return loaded["version"]


def _error_of(call, *args):
    """Return the error of the system that a call raises."""
    try:
        call(*args)
    except OSError as error:
        return error
    raise AssertionError("it raised nothing")


def _folder():
    return tempfile.TemporaryDirectory(prefix="files-")


def killed_at(point, signal_name, there, named):
    """A writer dies at a point: the old file or the new, and nothing beside it for long.

    `there` says whether there is an old file, `named` whether there are no files without a name.
    """
    number = signal.Signals[f"SIG{signal_name}"]
    is_there = there == "old"
    if named == "named":
        placing._NAMELESS = 0
    old, new = _objects()
    with _folder() as folder:
        path = Path(folder, "file")
        for hit in range(1, 12):
            if is_there:
                oobpickle.dump(old, path)
            fault = f"{point}:{hit}:{signal_name}"
            pid = fork(oobpickle.dump, new, path, fault=fault)
            found = inside.eventually(lambda pid=pid: inside.exit_of(pid))[0]
            if found == 0:
                assert hit > 1, f"nobody comes to {point}"
                break
            assert found == -number, found
            _look(path, point, is_there)
            oobpickle.dump(new, path)
            assert os.listdir(folder) == ["file"], os.listdir(folder)
            assert _version_of(path) == 2
            if not is_there:
                path.unlink()
        else:
            raise AssertionError(f"{point} is passed again and again")


def _look(path, point, is_there):
    """Look at what a dead writer has left."""
    names = sorted(os.listdir(path.parent))
    hidden = [name for name in names if name.startswith(".oobpickle-")]
    is_named = placing._NAMELESS == 0
    may_be_left = is_named or (is_there and point == "files.linked")
    assert len(hidden) <= may_be_left, names
    assert set(names) - set(hidden) <= {"file"}, names
    if point == "files.placed":
        assert (_version_of(path), hidden) == (2, [])
    elif is_there:
        assert _version_of(path) == 1
    else:
        assert not path.exists()
    if hidden and point == "files.linked":
        assert _version_of(path.parent / hidden[0]) == 2


def killed_at_random():
    """A writer dies at any moment, many times: each time the file is one of both, whole."""
    old, new = _objects()
    with _folder() as folder:
        path = Path(folder, "file")
        oobpickle.dump(old, path)

        def write_for_ever():
            while True:
                oobpickle.dump(old, path)
                oobpickle.dump(new, path)

        n_left = 0
        for n in range(40 * inside.REPEATS):
            pid = fork(write_for_ever)
            inode = path.stat().st_ino
            inside.eventually(lambda inode=inode: path.stat().st_ino != inode)
            for _ in range(n % 5):  # for so long
                _version_of(path)
            os.kill(pid, signal.SIGKILL)
            reap(pid, KILLED)
            assert _version_of(path) in (1, 2)
            n_left += len(os.listdir(folder)) - 1
            oobpickle.dump(old, path)
            assert os.listdir(folder) == ["file"]
        assert n_left < 20, n_left


def many_write_and_read_one_path(named):
    """Whoever opens the file finds all of one object, and at the end nothing is beside it."""
    if named == "named":
        placing._NAMELESS = 0
    with _folder() as folder:
        path = Path(folder, "file")
        obj = [np.full(N // 3, 0)] * 2
        oobpickle.dump(obj, path)

        def write(number):
            for n in range(40):
                oobpickle.dump([np.full(N // 3, number * 1000 + n), np.full(5, number)], path)

        def read():
            for n in range(100):
                large, small = oobpickle.load(path, (None, "r", "c")[n % 3])
                assert (large == large[0]).all()
                assert small[0] == large[0] // 1000

        pids = [fork(write, number) for number in (1, 2)] + [fork(read)]
        threads = [threading.Thread(target=write, args=(number,)) for number in (3, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for pid in pids:
            reap(pid)
        assert os.listdir(folder) == ["file"], os.listdir(folder)
        read()


def a_fork_in_the_middle_of_a_dump(named):
    """The child has the file too; it neither writes, places nor removes it."""
    if named == "named":
        placing._NAMELESS = 0
    parent = os.getpid()

    class Forking:
        def __reduce__(self):
            pids.append(os.fork())
            if pids[-1]:
                reap(pids[-1], 3)
            return int, ()

    with _folder() as folder:
        path = Path(folder, "file")
        oobpickle.dump("old", path)
        pids, data = [], np.arange(N)
        try:
            oobpickle.dump([data, Forking(), data + 1], path)
        except oobpickle.OobPickleError as error:
            os._exit(3 if f"forked from {parent} in the middle" in str(error) else 1)
        except BaseException:
            os._exit(1)
        if os.getpid() != parent:
            os._exit(2)
        first, _, second = oobpickle.load(path)
        assert (first == data).all()
        assert (second == data + 1).all()
        assert os.listdir(folder) == ["file"]


def a_file_that_must_not_be_so_large():
    """RLIMIT_FSIZE: what was there is unchanged."""
    old, new = _objects()
    with _folder() as folder:
        path = Path(folder, "file")
        oobpickle.dump(old, path)
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        for n in range(2):
            error = _error_of(oobpickle.dump, [new, n], path)
            assert (error.errno, error.filename) == (errno.EFBIG, str(path)), error
            assert "nothing was written" in error.__notes__[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert path.read_bytes() == before
        assert os.listdir(folder) == ["file"]


def a_full_disk(folder):
    """`folder` has room for 8 MiB: what was there is unchanged, and the room is there again."""
    path = Path(folder, "file")
    oobpickle.dump(np.zeros(3 * MIB, "u1"), path)
    calls = []

    class Counted:
        def __reduce__(self):
            calls.append(1)
            return int, ()

    for large in (
        [Counted(), np.ones(9 * MIB, "u1")],
        [Counted(), *[np.ones(999)] * 2000, b"x" * 9 * MIB],
    ):
        for _ in range(2):
            error = _error_of(oobpickle.dump, large, path)
            assert (error.errno, error.filename) == (errno.ENOSPC, str(path)), error
    assert len(calls) == 4, "reducers ran again"
    assert os.listdir(folder) == ["file"]
    oobpickle.dump(np.ones(4 * MIB, "u1"), path)
    assert oobpickle.load(path, "r").all()


def another_user():
    """Who may read loads in the modes that read; who may not write the file does not replace it."""
    with _folder() as folder:
        os.chmod(folder, 0o777)
        path, ours = Path(folder, "file"), Path(folder, "ours")
        for one, mode in ((path, 0o644), (ours, 0o600)):
            oobpickle.dump(np.arange(N), one)
            one.chmod(mode)

        def stranger():
            os.setgid(65534)
            os.setuid(65534)
            for mode in (None, "r", "c"):
                assert oobpickle.load(path, mode)[-1] == N - 1
            calls = [
                lambda: oobpickle.load(path, "r+"),
                lambda: oobpickle.load(ours),
                lambda: oobpickle.verify(ours),
                lambda: oobpickle.dump(1, path),
                lambda: oobpickle.dump(1, ours),
            ]
            for call in calls:
                error = _error_of(call)
                assert isinstance(error, PermissionError)
                assert error.filename in (str(path), str(ours)), error
            oobpickle.dump(1, Path(folder, "theirs"))
            assert oobpickle.load(Path(folder, "theirs")) == 1

        reap(fork(stranger))
        assert sorted(os.listdir(folder)) == ["file", "ours", "theirs"]
        oobpickle.dump(2, Path(folder, "theirs"))
        assert Path(folder, "theirs").stat().st_uid == 65534

        os.chmod(folder, 0o755)
        path.chmod(0o666)

        def without_the_folder():
            os.setgid(65534)
            os.setuid(65534)
            error = _error_of(oobpickle.dump, 1, path)
            assert isinstance(error, PermissionError)
            assert error.filename == str(path)

        reap(fork(without_the_folder))
        assert oobpickle.load(path)[-1] == N - 1


def little_address_space():
    """A mapping that has no room is an error, and one larger than memory is none."""
    with _folder() as folder:
        path = Path(folder, "file")
        oobpickle.dump(np.zeros(64 * MIB, "u1"), path)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 32 * MIB, limit[1]))
        for mode in ("r", "c", "r+"):
            error = _error_of(oobpickle.load, path, mode)
            assert (error.errno, error.filename) == (errno.ENOMEM, str(path)), error
        resource.setrlimit(resource.RLIMIT_AS, limit)


def larger_than_memory():
    """A private mapping takes memory for what is written only."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    nbytes = (memory * 3) // 4096 * 4096
    stream = (
        b"\x80\x05cnumpy\nndarray\n\x8a\x08"
        + nbytes.to_bytes(8, "little")
        + b"\x85\x8c\x02u1\x97\x87R."
    )
    table = table_of([(4096, nbytes, 0)])
    header = header_of(
        1,
        table_at=4096 + nbytes,
        table_crc=zlib.crc32(table),
        stream=(len(stream), zlib.crc32(stream)),
        has_checksums=False,
    )
    with _folder() as folder:
        path = Path(folder, "file")
        with path.open("wb") as file:
            file.write(header)
            file.seek(4096 + nbytes)
            file.write(table + stream)
        for mode in ("r", "c", "r+"):
            loaded = oobpickle.load(path, mode)
            assert loaded.nbytes == nbytes
            assert loaded[-1] == 0
            if mode == "c":
                loaded[:: nbytes // 100] = 1
                assert loaded[0] == 1
        assert path.stat().st_blocks * 512 < 10 * MIB


def to_a_worker(method):
    """What was mapped crosses, in each mode, and a worker can load the file itself."""
    context = multiprocessing.get_context(method)
    with _folder() as folder, oobpickle.enabled() as arena, context.Pool(1) as pool:
        path = Path(folder, "file")
        oobpickle.dump([np.arange(N), np.arange(3)], path)
        for mode in (None, "r", "c", "r+"):
            loaded = oobpickle.load(path, mode)
            sums = pool.apply(_sums, (loaded, loaded[0][::3]))
            assert sums == [*(int(one.sum()) for one in (*loaded, loaded[0][::3])), mode != "r"]
            assert pool.apply(_last, (str(path), mode)) == N - 1
            arrived = pool.apply(oobpickle.load, (str(path), mode))
            assert arrived[0][-1] == N - 1
            assert arrived[0].flags.writeable == (mode != "r")
            if mode != "r":
                arrived[0][:] = 0
            assert oobpickle.load(path)[0][-1] == N - 1
        assert arena.statistics().n_messages_out_of_band > 0
        assert arena.statistics().n_fallbacks == 0


def _sums(loaded, part):
    sums = [int(one.sum()) for one in (*loaded, part)]
    if loaded[0].flags.writeable:
        loaded[0][:] = 7
    return [*sums, loaded[0].flags.writeable]


def _last(path, mode):
    return int(oobpickle.load(path, mode)[0][-1])


if __name__ == "__main__":
    inside.main()
