"""Files beside what people use for them: ratios of times, by turns.

What
    ``python benchmarks/files.py [--passes 5] [--quick] [--folder DIR] [--check] [--json FILE]``
    writes 1 GB in one array and in 10,000, loads both into memory, and maps files of 1 GB and of
    4 GB. It prints the time of each peer over ours, and our own.

How it works
    All are asked by turns, in an order that changes, in one process. Before a write all files are
    removed: every writer makes a new one, and as few pages as can be wait for the disk. What is
    read was just written, so it is in the page cache. The file of 4 GB is a hole. Medians with
    quartiles, after a warm-up.

Lifetime
    The files are in a temporary folder of DIR, and are deleted.

When it cannot
    A peer that is not installed is left out (joblib, pyarrow, safetensors). ``--check`` ends with 1
    if a row is below what it should be. ``--quick`` takes a tenth of the bytes.
"""

from __future__ import annotations

import argparse
import importlib
import pickle
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _figures
import numpy as np

import oobpickle
from oobpickle._files.layout import header_of, table_of

_NBYTES = 1_000_000_000
_N_PARTS = 10_000
_MAPPED_NBYTES = 4 << 30
_MAPPED_MOST_S = 0.020
#: What each row should reach against this peer, as its time over ours.
_WANTED = {
    ("dump-1", "np.save"): 0.9,
    ("dump-many", "np.save"): 0.9,
    ("load-1", "np.fromfile"): 0.9,
}


class _Peer:
    """A way to write a list of arrays, to read it, and to map it; ``None`` where it has none."""

    name = "oobpickle"

    def write(self, arrays: Any, path: Path) -> None:
        oobpickle.dump(arrays, path)

    def read(self, path: Path) -> Any:
        return oobpickle.load(path)

    def map(self, path: Path) -> Any:
        return oobpickle.load(path, mmap_mode="r")


class _NumPy(_Peer):
    name = "np.save"

    def write(self, arrays: Any, path: Path) -> None:
        with path.open("wb") as file:
            for array in arrays:
                np.save(file, array)

    def read(self, path: Path) -> Any:
        found = []
        with path.open("rb") as file:
            while file.peek(1):
                found.append(np.load(file))
        return found

    def map(self, path: Path) -> Any:
        return [np.load(path, mmap_mode="r")]  # the first only: it knows of no others


class _FromFile(_Peer):
    """The bytes of the first array, from the file that np.save has written."""

    name = "np.fromfile"
    map = None  # type: ignore[assignment]

    def write(self, arrays: Any, path: Path) -> None:
        arrays[0].tofile(path)

    def read(self, path: Path) -> Any:
        return [np.fromfile(path)]


class _SaveZ(_Peer):
    name = "np.savez"
    map = None  # type: ignore[assignment]

    def write(self, arrays: Any, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, *arrays)

    def read(self, path: Path) -> Any:
        with np.load(path) as archive:
            return [archive[name] for name in archive]


class _Pickle(_Peer):
    name = "pickle"
    map = None  # type: ignore[assignment]

    def write(self, arrays: Any, path: Path) -> None:
        with path.open("wb") as file:
            pickle.dump(arrays, file, 5)

    def read(self, path: Path) -> Any:
        with path.open("rb") as file:
            return pickle.load(file)


class _Joblib(_Peer):
    name = "joblib"

    def __init__(self) -> None:
        self._joblib = importlib.import_module("joblib")

    def write(self, arrays: Any, path: Path) -> None:
        self._joblib.dump(arrays, path)

    def read(self, path: Path) -> Any:
        return self._joblib.load(path)

    def map(self, path: Path) -> Any:
        return self._joblib.load(path, mmap_mode="r")


class _Arrow(_Peer):
    """An IPC file with a batch for each array."""

    name = "arrow"

    def __init__(self) -> None:
        self._pa: Any = importlib.import_module("pyarrow")

    def write(self, arrays: Any, path: Path) -> None:
        pa = self._pa
        schema = pa.schema([("array", pa.float64())])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for array in arrays:
                writer.write_batch(pa.record_batch([pa.array(array)], schema=schema))

    def read(self, path: Path) -> Any:
        with self._pa.OSFile(str(path), "rb") as source:
            return self._arrays(source)

    def map(self, path: Path) -> Any:
        return self._arrays(self._pa.memory_map(str(path)))

    def _arrays(self, source: Any) -> Any:
        reader = self._pa.ipc.open_file(source)
        return [reader.get_batch(n).column(0) for n in range(reader.num_record_batches)]


class _SafeTensors(_Peer):
    name = "safetensors"
    map = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self._safetensors: Any = importlib.import_module("safetensors.numpy")

    def write(self, arrays: Any, path: Path) -> None:
        self._safetensors.save_file({str(n): one for n, one in enumerate(arrays)}, path)

    def read(self, path: Path) -> Any:
        return list(self._safetensors.load_file(path).values())


def _peers() -> list[_Peer]:
    found: list[_Peer] = []
    for kind in (_Peer, _NumPy, _FromFile, _SaveZ, _Pickle, _Joblib, _Arrow, _SafeTensors):
        try:
            found.append(kind())
        except ImportError as error:
            print(f"without {kind.name}: {error}")
    return found


def _time_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = call()
    taken = time.perf_counter() - start
    del kept
    return taken


class _Table:
    """Times of the peers, and what is printed of them."""

    def __init__(self) -> None:
        self.is_short = False
        self.figures: dict[str, dict[str, float]] = {}

    def add(
        self,
        row: str,
        calls: dict[str, Callable[[], object]],
        n_passes: int,
        before: Callable[[], object] = list,
    ) -> None:
        """Call each by turns, after what is to be done before, and print a line for each."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for n in range(n_passes + 1):
            names = list(calls)[:: 1 if n % 2 else -1]
            shift = n * 3 % len(names)  # nobody is always the first, or behind the same one
            for name in names[shift:] + names[:shift]:
                before()
                taken[name].append(_time_s(calls[name]))
        ours = taken.pop("oobpickle")[1:]
        self.figures[f"{row} oobpickle"] = {"median_s": statistics.median(ours)}
        print(f"{row:18} {'oobpickle':12} {statistics.median(ours) * 1e3:10.2f} ms", flush=True)
        for name, times in taken.items():
            ratios = [theirs / mine for theirs, mine in zip(times[1:], ours, strict=True)]
            first, _, third = statistics.quantiles(ratios, n=4)
            ratio, wanted = statistics.median(ratios), _WANTED.get((row, name))
            self.is_short |= wanted is not None and ratio < wanted
            note = f", {wanted} wanted" if wanted else ""
            self.figures[f"{row} {name}"] = {
                **_figures.quartiles("ratio", ratios),
                "median_s": statistics.median(times[1:]),
            }
            print(
                f"{row:18} {name:12} {statistics.median(times[1:]) * 1e3:10.2f} ms  "
                f"{ratio:8.2f} times ours  ({first:.2f} to {third:.2f}{note})",
                flush=True,
            )
        if row.startswith("map-4G"):
            self.is_short |= statistics.median(ours) > _MAPPED_MOST_S


def _rows_of(table: _Table, arrays: Any, folder: Path, suffix: str, n_passes: int) -> None:
    # What one array is for np.fromfile, many are not.
    peers = [p for p in _peers() if len(arrays) == 1 or not isinstance(p, _FromFile)]
    nbytes = sum(array.nbytes for array in arrays)

    def remove() -> None:
        # All of them, with the pages that wait to be written: else the next one waits for the disk.
        for one in folder.iterdir():
            one.unlink()

    def calls(method: Callable[[_Peer, Path], object]) -> dict[str, Callable[[], object]]:
        return {p.name: partial(method, p, folder / p.name) for p in peers}

    table.add(f"dump-{suffix}", calls(lambda p, path: p.write(arrays, path)), n_passes, remove)
    for peer in peers:
        peer.write(arrays, folder / peer.name)
    arrays.clear()
    table.add(f"load-{suffix}", calls(lambda p, path: p.read(path)), n_passes)
    peers = [p for p in peers if p.map is not None]
    table.add(f"map-{suffix}", calls(lambda p, path: p.map(path)), n_passes)
    assert min(one.stat().st_size for one in folder.iterdir()) >= nbytes
    remove()


def _hole(path: Path, nbytes: int) -> None:
    """Make a file with one array of bytes, which are a hole."""
    stream = b"\x80\x05cnumpy\nndarray\n\x8a\x08%b\x85\x8c\x02u1\x97\x87R." % nbytes.to_bytes(
        8, "little"
    )
    entries = table_of([(4096, nbytes, 0)])
    header = header_of(
        1,
        table_at=4096 + nbytes,
        table_crc=zlib.crc32(entries),
        stream=(len(stream), zlib.crc32(stream)),
        has_checksums=False,
    )
    with path.open("wb") as file:
        file.write(header)
        file.seek(4096 + nbytes)
        file.write(entries + stream)


def _map_row(table: _Table, folder: Path, n_passes: int) -> None:
    ours, theirs = folder / "ours", folder / "theirs"
    _hole(ours, _MAPPED_NBYTES)
    np.lib.format.open_memmap(theirs, "w+", np.uint8, (_MAPPED_NBYTES,))
    calls: dict[str, Callable[[], object]] = {
        "oobpickle": lambda: oobpickle.load(ours, mmap_mode="r")[::4096].nbytes,
        "np.save": lambda: np.load(theirs, mmap_mode="r")[::4096].nbytes,
    }
    table.add("map-4G", calls, n_passes)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--folder")
    _figures.add_option(parser)
    options = parser.parse_args()
    n_items = _NBYTES // 8 // (10 if options.quick else 1)
    table = _Table()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _rows_of(table, [np.ones(n_items)], Path(folder), "1", options.passes)
        parts = [np.ones(n_items // _N_PARTS) for _ in range(_N_PARTS)]
        _rows_of(table, parts, Path(folder), "many", options.passes)
        _map_row(table, Path(folder), options.passes)
    _figures.write(options.json, table.figures, libraries=["joblib", "pyarrow", "safetensors"])
    return int(options.check and table.is_short)


if __name__ == "__main__":
    sys.exit(main())
