"""A new file in the place of another: names, permissions, and what a dead writer has left."""

import errno
import fcntl
import os
import stat
import zlib
from pathlib import Path

import numpy as np
import pytest

import oobpickle
from oobpickle._files import placing
from oobpickle._files.placing import NewFile


@pytest.fixture(params=["nameless", "named"], autouse=True)
def kind(request, monkeypatch):
    """With O_TMPFILE, and as if there were none."""
    if request.param == "named":
        monkeypatch.setattr(placing, "_NAMELESS", 0)
    return request.param


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@pytest.fixture
def umask():
    """Set it, and set it back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def hidden_of(path):
    return path.parent / f".oobpickle-{zlib.crc32(path.name.encode()):08x}"


def replace(path, data, *, fsync=False):
    with NewFile(path, fsync=fsync) as file:
        os.write(file.fd, data)
        file.place()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _no_descriptor_is_left():
    before = descriptors()
    yield
    assert descriptors() == before


@pytest.mark.parametrize("fsync", [False, True])
def test_it_is_there_when_it_is_placed_and_not_before(path, fsync, tmp_path, kind):
    for data in (b"one", b"two"):
        with NewFile(path, fsync=fsync) as file:
            os.write(file.fd, data)
            there = path.read_bytes() if path.exists() else None
            names = set(os.listdir(tmp_path)) - {"file"}
            file.place()
        assert there == {b"one": None, b"two": b"one"}[data]
        assert names == ({hidden_of(path).name} if kind == "named" else set())
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]


def test_both_are_on_the_disk_if_that_is_asked_for(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd)), real(fd)))
    oobpickle.dump(1, path)
    assert synced == []
    oobpickle.dump(1, path, fsync=True)

    there, folder = path.stat(), path.parent.stat()
    assert [one.st_ino for one in synced] == [there.st_ino, folder.st_ino]
    assert synced[0].st_size == there.st_size


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_what_is_not_placed_leaves_nothing(error, path, tmp_path):
    path.write_bytes(b"old")
    with pytest.raises(error), NewFile(path, fsync=False) as file:
        os.write(file.fd, b"new")
        raise error

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupt_between_link_and_rename_leaves_nothing(path, tmp_path, monkeypatch):
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "rename", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        replace(path, b"new")

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


# --- as a plain open


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o027])
def test_permissions_of_a_new_file_are_those_of_open(mask, path, umask, tmp_path):
    umask(mask)
    (tmp_path / "plain").write_bytes(b"")
    replace(path, b"new")

    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755, 0o4755])
def test_permissions_of_what_was_there_are_kept(mode, path, umask):
    path.write_bytes(b"old")
    path.chmod(mode)
    umask(0o077)
    replace(path, b"new")

    assert stat.S_IMODE(path.stat().st_mode) == mode & 0o777


def test_nobody_can_read_it_before_who_could_not_read_the_old_one(path):
    path.write_bytes(b"old")
    path.chmod(0o600)
    with NewFile(path, fsync=False) as file:
        assert stat.S_IMODE(os.fstat(file.fd).st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_of_what_was_there_is_kept_if_it_can_be(path):
    path.write_bytes(b"old")
    os.chown(path, 65534, 65534)
    replace(path, b"new")

    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


def write_plainly(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(1))


@pytest.mark.parametrize("target", ["real", "elsewhere/real", "missing"])
@pytest.mark.parametrize("write", [write_plainly, lambda path: oobpickle.dump(1, path)])
def test_symbolic_links_are_followed_as_by_open(write, target, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    if target != "missing":
        (tmp_path / target).write_bytes(b"old")
    link, second = tmp_path / "link", tmp_path / "second"
    link.symlink_to(target)
    second.symlink_to(link)
    write(second)

    assert (os.readlink(link), os.readlink(second)) == (target, str(link))
    assert len((tmp_path / target).read_bytes()) > 50


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("missing/file", errno.ENOENT),
        ("folder", errno.EISDIR),
        ("folder/", errno.EISDIR),
        ("new/", errno.EISDIR),
        ("plain/file", errno.ENOTDIR),
        ("loop", errno.ELOOP),
        ("", errno.ENOENT),
        ("n" * 256, errno.ENAMETOOLONG),
        ("x/" * 3000, errno.ENAMETOOLONG),
    ],
)
def test_where_open_raises_so_does_it(place, number, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    names = sorted(os.listdir(tmp_path))
    path = f"{tmp_path}/{place}" if place else ""
    with pytest.raises(OSError) as expected:
        open(path, "wb")  # noqa: SIM115
    with pytest.raises(OSError) as caught:
        oobpickle.dump(1, path)

    assert (caught.value.errno, type(caught.value)) == (number, type(expected.value))
    assert expected.value.errno == number
    assert caught.value.filename == path
    assert "nothing was written" in caught.value.__notes__[0]
    assert sorted(os.listdir(tmp_path)) == names


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="a FIFO is not replaced by a file"):
        oobpickle.dump(1, tmp_path / "fifo")
    with pytest.raises(OSError, match="a device is not replaced"):
        oobpickle.dump(1, "/dev/null")

    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_the_longest_name_and_the_longest_path(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 3500:
        folder /= "d" * 200
    folder.mkdir(parents=True)
    for name in ("n" * 255, "ü" * 127):
        path = f"{folder}/{name}"
        for _ in range(2):
            oobpickle.dump(5, path)
        assert oobpickle.load(path) == 5
    assert len(os.listdir(folder)) == 2


def test_a_name_that_is_no_text(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    for n in range(2):
        oobpickle.dump(n, path)

    assert oobpickle.load(path) == 1
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\xfe"]


def test_a_name_relative_to_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    oobpickle.dump(1, "file")
    oobpickle.dump(2, Path("file"))

    assert oobpickle.load("file") == 2


def test_a_directory_that_is_renamed_meanwhile_gets_the_file(tmp_path):
    (tmp_path / "one").mkdir()
    with NewFile(tmp_path / "one" / "file", fsync=True) as file:
        (tmp_path / "one").rename(tmp_path / "two")
        file.place()

    assert os.listdir(tmp_path / "two") == ["file"]


def test_a_name_that_is_taken_meanwhile_is_replaced(path, tmp_path):
    with NewFile(path, fsync=False) as file:
        os.write(file.fd, b"new")
        path.write_bytes(b"other")
        file.place()

    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


# --- what others have


def test_what_a_dead_writer_has_left_is_removed(path, tmp_path):
    path.write_bytes(b"old")
    hidden_of(path).write_bytes(b"left")
    replace(path, b"new")

    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_living_writer_has_is_left_alone(path, tmp_path):
    path.write_bytes(b"old")
    with hidden_of(path).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        replace(path, b"new")

        assert path.read_bytes() == b"new"
        assert sorted(os.listdir(tmp_path)) == [hidden_of(path).name, "file"]
        assert os.path.samestat(os.fstat(other.fileno()), hidden_of(path).stat())


def test_what_cannot_be_opened_is_left_alone(path, tmp_path):
    path.write_bytes(b"old")
    hidden_of(path).mkdir()
    replace(path, b"new")

    assert path.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == [hidden_of(path).name, "file"]


def test_where_there_are_no_locks_nothing_is_removed(path, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    path.write_bytes(b"old")
    replace(path, b"new")
    assert os.listdir(tmp_path) == ["file"]
    hidden_of(path).write_bytes(b"of somebody")
    replace(path, b"newer")

    assert path.read_bytes() == b"newer"
    assert hidden_of(path).read_bytes() == b"of somebody"


def test_whose_file_was_removed_before_it_had_its_lock_makes_another(path, monkeypatch, kind):
    """Another one takes it for what a dead writer has left, between open and lock."""
    if kind == "nameless":
        return
    calls = []
    real = placing._lock

    def lock(fd):
        calls.append(fd)
        if len(calls) == 1:
            folder = os.open(path.parent, os.O_PATH)
            assert placing._remove_left(hidden_of(path).name.encode(), folder)
            os.close(folder)
        return real(fd)

    monkeypatch.setattr(placing, "_lock", lock)
    replace(path, b"new")

    assert len(calls) > 2
    assert path.read_bytes() == b"new"


def test_whose_file_another_one_is_removing_leaves_that_to_it(path, monkeypatch, kind):
    """By then its name may be that of a third writer's file."""
    if kind == "nameless":
        return
    others = []
    real = placing._lock

    def lock(fd):
        if not others:
            others.append(os.open(hidden_of(path), os.O_WRONLY))
            assert real(others[0])
        return real(fd)

    monkeypatch.setattr(placing, "_lock", lock)
    replace(path, b"new")

    assert path.read_bytes() == b"new"
    assert os.path.samestat(os.stat(hidden_of(path)), os.fstat(others[0]))
    os.close(others[0])


def test_two_writers_by_turns(path, tmp_path):
    path.write_bytes(b"old")
    with NewFile(path, fsync=False) as one, NewFile(path, fsync=False) as two:
        os.write(one.fd, b"one")
        os.write(two.fd, b"two")
        two.place()
        assert path.read_bytes() == b"two"
        one.place()

    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


def test_where_there_is_no_proc_the_file_has_a_name(path, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda _: False)
    with NewFile(path, fsync=False) as file:
        assert os.listdir(tmp_path) == [hidden_of(path).name]
        file.place()

    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL])
def test_a_file_system_without_nameless_files(number, path, tmp_path, monkeypatch):
    real = os.open

    def opened(name, flags, *args, **kwargs):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", opened)
    replace(path, b"new")

    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
