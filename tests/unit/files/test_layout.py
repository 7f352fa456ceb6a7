"""The header and the table of a file: nothing in them is believed before it is compared."""

import os
import struct
import zlib

import numpy as np
import pytest

import oobpickle
from oobpickle import FileFormatError
from oobpickle._files import layout as layout_module
from oobpickle._files.layout import HEADER_NBYTES, header_of, table_of

HEADER = struct.Struct("<8sIIQQQQQII")
FIELDS = ("magic", "version", "crc", "flags", "nbytes", "n_buffers", "stream_at", "stream_nbytes")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


@pytest.fixture
def small(path):
    """The bytes of a small file with two buffers."""
    oobpickle.dump([np.arange(5), np.arange(9.0)], path)
    return path.read_bytes()


def with_header(data, **changes):
    """Return a file with other fields in its header, whose checksum is right."""
    fields = dict(zip((*FIELDS, "stream_crc", "table_crc"), HEADER.unpack_from(data), strict=True))
    fields |= changes
    if "crc" not in changes:
        fields["crc"] = 0
        fields["crc"] = zlib.crc32(HEADER.pack(*fields.values()))
    return HEADER.pack(*fields.values()) + data[HEADER_NBYTES:]


def with_table(data, *entries):
    """Return a file with another table of as many entries, whose checksum is right."""
    *_, stream_at, _, _, _ = HEADER.unpack_from(data)
    table = b"".join(struct.pack("<QQII", *entry) for entry in entries)
    at = stream_at - len(table)
    changed = data[:at] + table + data[stream_at:]
    return with_header(changed, table_crc=zlib.crc32(table))


def both_calls(path):
    for mode in (None, "r", "c", "r+"):
        with pytest.raises(FileFormatError) as caught:
            oobpickle.load(path, mode)
    with pytest.raises(FileFormatError) as of_verify:
        oobpickle.verify(path)
    assert str(caught.value) == str(of_verify.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_bytes_are_those_of_the_document(small):
    magic, version, crc, flags, nbytes, n, stream_at, n_stream, stream_crc, table_crc = (
        HEADER.unpack_from(small)
    )
    table = small[stream_at - 24 * n : stream_at]
    stream = small[stream_at:]

    assert (magic, version, flags) == (b"\x89OOB\r\n\x1a\n", 1, 0)
    assert crc == zlib.crc32(small[:12] + bytes(4) + small[16:64])
    assert (nbytes, n, stream_at + n_stream) == (len(small), 2, len(small))
    assert (table_crc, stream_crc) == (zlib.crc32(table), zlib.crc32(stream))
    assert list(struct.iter_unpack("<QQII", table)) == [(64, 40, 0, 0), (128, 72, 0, 0)]
    assert small[64:104] == np.arange(5).tobytes()
    assert small[128:200] == np.arange(9.0).tobytes()


def test_large_buffers_begin_at_a_page_and_small_ones_at_64(path):
    sizes = [5, 65_535, 65_536, 3, 100_000, 64]
    oobpickle.dump([np.zeros(n, "u1") for n in sizes], path)
    layout = oobpickle.verify(path)

    assert layout.sizes == sizes
    assert [offset % 64 for offset in layout.offsets] == [0] * 6
    assert [layout.offsets[n] % 4096 for n in (2, 4)] == [0, 0]
    assert layout.offsets[3] - layout.offsets[2] == 65_536
    assert (layout.nbytes, layout.stream_nbytes) == (path.stat().st_size, layout.stream_nbytes)
    assert layout.checksums is None


def test_what_is_between_the_parts_is_zeros(path):
    """And not what was there when the memory was used before."""
    oobpickle.dump([np.full(n % 3000 + 1, 255, "u1") for n in range(0, 90_000, 7)], path)
    layout, data = oobpickle.verify(path), path.read_bytes()
    ends = [at + n for at, n in zip(layout.offsets, layout.sizes, strict=True)]
    table_at = len(data) - layout.stream_nbytes - 24 * len(ends)
    between = zip([64, *ends], [*layout.offsets, table_at], strict=True)

    assert len(data) > 3 << 20
    assert b"".join(data[end:start] for end, start in between).strip(b"\0") == b""


def test_an_object_without_buffers_has_a_header_and_a_stream(path):
    oobpickle.dump({"a": 1}, path)

    assert oobpickle.verify(path).sizes == []
    assert path.stat().st_size == 64 + oobpickle.verify(path).stream_nbytes
    assert [oobpickle.load(path, mode) for mode in (None, "r", "c", "r+")] == [{"a": 1}] * 4


def test_a_file_that_is_truncated_at_any_byte_is_refused(small, path):
    for n in range(len(small)):
        path.write_bytes(small[:n])
        with pytest.raises(FileFormatError, match="truncated" if n else "it is empty"):
            oobpickle.verify(path)
    for n in (0, 1, 63, 64, 65, len(small) - 1):
        path.write_bytes(small[:n])
        both_calls(path)


def test_a_byte_that_is_altered_anywhere_but_in_the_data_is_found(small, path):
    padding = {*range(104, 128), *range(200, 256)}
    data = {*range(64, 104), *range(128, 200)}
    for at in range(len(small)):
        altered = bytearray(small)
        altered[at] ^= 0x40
        path.write_bytes(altered)
        if at in data | padding:
            oobpickle.verify(path)
        else:
            with pytest.raises(FileFormatError):
                oobpickle.verify(path)


def test_a_table_that_makes_sense_but_is_another_is_found(small, path):
    changed = bytearray(with_table(small, (64, 41, 0, 0), (128, 72, 0, 0)))
    path.write_bytes(changed)
    assert oobpickle.verify(path).sizes == [41, 72]
    path.write_bytes(with_header(changed, table_crc=0))

    assert "checksum of the table" in both_calls(path)


def test_a_longer_file_is_refused(small, path):
    path.write_bytes(small + b"\0")

    assert f"{len(small) + 1} bytes, expected {len(small)}" in both_calls(path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x93NUMPY\x01\x00" + bytes(100), "np.load"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x80\x05K\x01.", "a pickle"),
        (b"ARROW1\0\0" + bytes(100), "pyarrow"),
        (b"PAR1" + bytes(100), "Parquet"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "h5py"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "it begins with b'\\x89PNG"),
        (b"\x89OOB\n\x1a\n" + bytes(100), "it begins with"),
        (b"x", "it begins with b'x'"),
        (bytes(200), "it begins with"),
        (b"", "it is empty"),
    ],
)
def test_a_foreign_file_is_refused_with_what_it_is(data, what, path):
    path.write_bytes(data)

    assert what in both_calls(path)


@pytest.mark.parametrize("version", [2, 1 << 31])
def test_a_newer_version_says_so_whatever_the_rest_is(version, small, path):
    path.write_bytes(small[:8] + struct.pack("<I", version))

    assert f"version {version} of the format, this one reads 1" in both_calls(path)


LIES = {
    "flags": 2,
    "nbytes": 1 << 62,
    "n_buffers": (1 << 64) - 1,
    "stream_at": (1 << 64) - 1,
    "stream_nbytes": 1 << 63,
}


@pytest.mark.parametrize("field", LIES)
def test_a_header_that_lies_is_refused(field, small, path):
    path.write_bytes(with_header(small, **{field: LIES[field]}))
    both_calls(path)
    for value in (0, 1, 3, 64, 1 << 32):
        path.write_bytes(changed := with_header(small, **{field: value}))
        if changed != small and (field, value) != ("flags", 1):
            both_calls(path)


def test_checksums_that_are_not_there_are_wrong_ones(small, path):
    path.write_bytes(with_header(small, flags=1))
    with pytest.raises(FileFormatError, match="checksum of buffer 0"):
        oobpickle.verify(path)


@pytest.mark.parametrize(
    "entries",
    [
        [(64, 41 << 40, 0, 0), (128, 72, 0, 0)],
        [(64, 40, 0, 0), (128, 129, 0, 0)],
        [(64, 40, 0, 0), (96, 72, 0, 0)],
        [(64, 80, 0, 0), (128, 72, 0, 0)],
        [(128, 40, 0, 0), (64, 40, 0, 0)],
        [(0, 40, 0, 0), (128, 72, 0, 0)],
        [(64, 40, 1, 0), (128, 72, 0, 0)],
        [(64, 40, 0, 1), (128, 72, 0, 0)],
        [(64, (1 << 64) - 1, 0, 0), (128, 72, 0, 0)],
        [((1 << 64) - 64, 40, 0, 0), (128, 72, 0, 0)],
    ],
)
def test_a_table_that_lies_is_refused(entries, small, path):
    path.write_bytes(with_table(small, *entries))

    assert "altered: buffer" in both_calls(path)


def test_no_memory_is_taken_for_what_the_file_does_not_have(small, path):
    import tracemalloc

    path.write_bytes(with_header(small, stream_nbytes=1 << 40, nbytes=(1 << 40) + 300))
    tracemalloc.start()
    try:
        both_calls(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1 << 20


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(small, path, monkeypatch):
    """Also if that is after its size was looked at: by reading, and by mapping."""
    real = os.fstat

    def fstat(fd):
        found = real(fd)
        os.truncate(path, 100)
        return found

    for mode in (None, "r"):
        path.write_bytes(small)
        monkeypatch.setattr(layout_module.os, "fstat", fstat)
        with pytest.raises(FileFormatError, match="truncated while it was read"):
            oobpickle.load(path, mode)
        monkeypatch.undo()


def test_a_file_that_is_cut_after_its_layout_was_read_is_not_mapped(small, path, monkeypatch):
    from oobpickle._files import storing

    def read_and_cut(fd, name):
        found = layout_module.read(fd, name)
        os.truncate(path, 100)
        return found

    monkeypatch.setattr(storing, "read", read_and_cut)
    for mode in (None, "r", "c", "r+"):
        path.write_bytes(small)
        with pytest.raises(FileFormatError, match="truncated while it was read"):
            oobpickle.load(path, mode)


def test_what_is_packed_is_what_is_read(path):
    table = table_of([(64, 3, 0), (128, 0, 0), (128, 5, 0)])
    stream = b"\x80\x05N."
    header = header_of(
        3,
        table_at=192,
        table_crc=zlib.crc32(table),
        stream=(len(stream), zlib.crc32(stream)),
        has_checksums=False,
    )
    path.write_bytes(header + bytes(128) + table + stream)
    layout = oobpickle.verify(path)

    assert (layout.offsets, layout.sizes) == ([64, 128, 128], [3, 0, 5])
    assert oobpickle.load(path) is None
