"""Results larger than memory, held on disk: the rate beside that of plain writes there.

What
    ``python benchmarks/spilling.py [--folder DIR] [--nbytes 6e9] [--memory 2e9] [--each 64e6]
    [--passes 3] [--check]`` makes a memory cgroup without swap, and in it, by turns, (1) writes so
    many bytes to a nameless file with ``os.write``, and (2) holds as many in results of a pool of
    two workers, with ``enabled(spill_dir=DIR)``. Every byte of the results is compared, and once
    more in a child that is forked. It prints both rates of what went to the disk, the same with all
    of it synced, their ratio, and how long that fork took.

How it works
    A result is made by one addition over an array that the worker has. Each pass is a process of
    its own in the cgroup; what is left in the page cache goes with its file. The rate of (2)
    counts what was spilled, from the moment when the first result goes to disk until the last has
    arrived.

Lifetime
    The file has no name, and the cgroup is removed.

When it cannot
    Without root, or a memory cgroup to write to, it says so and measures without a limit; DIR must
    have room. ``--check`` ends with 1 if the ratio is below 0.7, a result was wrong, one travelled
    in-band, or the kernel has killed a process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import _figures
import numpy as np
import numpy.typing as npt

import oobpickle

_WANTED = 0.7
_CHUNK_NBYTES = 16 << 20
_base: npt.NDArray[np.uint8]
Row = dict[str, float]


def _prepare(nbytes: int) -> None:
    global _base
    _base = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)


def _make(seed: int) -> npt.NDArray[np.uint8]:
    return _base + np.uint8(seed % 251)


def _is_right(result: npt.NDArray[np.uint8], seed: int) -> bool:
    return all(
        np.array_equal(
            result[at : at + _CHUNK_NBYTES], _base[at : at + _CHUNK_NBYTES] + np.uint8(seed % 251)
        )
        for at in range(0, len(_base), _CHUNK_NBYTES)
    )


# --- what a pass does, in a process of its own


def _written(folder: str, n: int) -> Row:
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    results = [_make(seed) for seed in range(2)]
    start_s = time.perf_counter()
    for seed in range(n):
        view = memoryview(results[seed % 2])
        while view:
            view = view[os.write(fd, view) :]
    written_s = time.perf_counter() - start_s
    os.fdatasync(fd)
    synced_s = time.perf_counter() - start_s
    os.close(fd)
    nbytes = n * len(_base)
    return {"rate": nbytes / written_s, "synced": nbytes / synced_s, "nbytes": nbytes}


def _spilled(folder: str, n: int) -> Row:
    first = None
    with oobpickle.enabled(spill_dir=folder) as arena:
        context = multiprocessing.get_context("fork")
        with context.Pool(2, _prepare, (len(_base),)) as pool:
            pool.map(abs, range(2), chunksize=1)
            held = []
            for result in pool.imap(_make, range(n)):
                held.append(result)
                if first is None and arena.statistics().n_spilled:
                    first = time.perf_counter(), arena.statistics().nbytes_spilled
            arrived_s = time.perf_counter()
            pool.close()
            pool.join()
        os.fdatasync(arena._memory.descriptors[3])
        synced_s = time.perf_counter()
        assert first is not None, "memory was never full: less --memory, or more --nbytes"
        now = arena.statistics()
        nbytes = now.nbytes_spilled - first[1]
        start_s = time.perf_counter()
        n_right = sum(_is_right(result, seed) for seed, result in enumerate(held))
        compared_s = time.perf_counter() - start_s
        fork_s, n_right_in_child = _forked(held)
        del held, result
        left = arena.statistics().nbytes_on_disk
    return {
        "rate": nbytes / (arrived_s - first[0]),
        "synced": nbytes / (synced_s - first[0]),
        "nbytes": nbytes,
        "compared": n * len(_base) / compared_s,
        "wrong": 2 * n - n_right - n_right_in_child,
        "fork": fork_s,
        "fallbacks": now.n_fallbacks,
        "left": left,
        "held": n * len(_base),
    }


def _forked(held: list[npt.NDArray[np.uint8]]) -> tuple[float, int]:
    """Fork with all of it in hand; return how long it took, and how many the child found right."""
    read, write = os.pipe()
    start_s = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        n_right = sum(_is_right(result, seed) for seed, result in enumerate(held))
        os.write(write, str(n_right).encode())
        os._exit(0)
    fork_s = time.perf_counter() - start_s
    os.waitpid(pid, 0)
    os.close(write)
    n_right = int(os.read(read, 100) or 0)
    os.close(read)
    return fork_s, n_right


# --- the cgroup


@contextmanager
def _cgroup(nbytes: int) -> Iterator[tuple[Path, str] | None]:
    """Yield a memory cgroup of so many bytes without swap, and its file of kills."""
    for parent, limit, kills in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.oom_control"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.events"),
    ):
        group = parent / f"oobpickle-spilling-{uuid.uuid4().hex[:8]}"
        try:
            group.mkdir()
            (group / limit).write_text(str(nbytes))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        for name, value in (
            ("memory.swappiness", "0"),
            ("memory.memsw.limit_in_bytes", str(nbytes)),
            ("memory.swap.max", "0"),
        ):
            if (group / name).exists():
                (group / name).write_text(value)
        try:
            yield group, kills
        finally:
            group.rmdir()
        return
    print("no memory cgroup can be made here: measured without a limit")
    yield None


def _kills(cgroup: tuple[Path, str]) -> int:
    lines = (cgroup[0] / cgroup[1]).read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _pass(which: str, arguments: argparse.Namespace, cgroup: tuple[Path, str] | None) -> Row:
    command = [sys.executable, __file__, "--folder", arguments.folder, "--pass", which]
    command += ["--nbytes", str(arguments.nbytes), "--each", str(arguments.each)]
    command += ["--cgroup", str(cgroup[0])] if cgroup else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{which} ended with {done.returncode}")
    found: Row = json.loads(done.stdout)
    return found


def _spread(rates: list[float], synced: list[float]) -> Row:
    return {**_figures.quartiles("rate", rates), **_figures.quartiles("synced", synced)}


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--nbytes", type=float, default=6e9)
    parser.add_argument("--memory", type=float, default=2e9)
    parser.add_argument("--each", type=float, default=64e6)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pass", dest="which", choices=["written", "spilled"])
    parser.add_argument("--cgroup", type=Path)
    _figures.add_option(parser)
    return parser.parse_args()


def main() -> int:
    arguments = _parsed()
    if arguments.which:
        if arguments.cgroup:
            (arguments.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        _prepare(int(arguments.each))
        measure = {"written": _written, "spilled": _spilled}[arguments.which]
        found = measure(arguments.folder, int(arguments.nbytes // arguments.each))
        print(json.dumps(found))
        return 0
    rows: dict[str, list[Row]] = {"written": [], "spilled": []}
    with _cgroup(int(arguments.memory)) as cgroup:
        for _ in range(arguments.passes):
            for which in rows:
                rows[which].append(_pass(which, arguments, cgroup))
        killed = _kills(cgroup) if cgroup else 0
    for which, title in (("written", "os.write"), ("spilled", "enabled(spill_dir=)")):
        shown = "  ".join(
            f"{one['rate'] / 1e6:.0f} ({one['synced'] / 1e6:.0f})" for one in rows[which]
        )
        print(f"{title:20} {shown}  MB/s, and with fdatasync")
    ratios = [s["rate"] / w["rate"] for s, w in zip(rows["spilled"], rows["written"], strict=True)]
    synced = [s["synced"] / w["synced"] for s, w in zip(*reversed(rows.values()), strict=True)]
    ratio, with_sync = statistics.median(ratios), statistics.median(synced)
    last = rows["spilled"][-1]
    print(f"ratio                {ratio:.2f}, with fdatasync {with_sync:.2f} (medians)")
    print(
        f"{last['held'] / 1e9:.1f} GB held at once with {arguments.memory / 1e9:.1f} GB of memory, "
        f"{last['nbytes'] / 1e9:.1f} GB on disk; compared at {last['compared'] / 1e6:.0f} MB/s; "
        f"a fork took {1000 * last['fork']:.0f} ms"
    )
    wrong, fallbacks, left = (
        sum(one[name] for one in rows["spilled"]) for name in ("wrong", "fallbacks", "left")
    )
    print(f"{wrong} wrong, {fallbacks} in-band, {left} bytes left on disk, {killed} killed")
    if arguments.json:
        figures = {
            which: _spread([one["rate"] for one in found], [one["synced"] for one in found])
            for which, found in rows.items()
        }
        _figures.write(arguments.json, {**figures, "ratio": _spread(ratios, synced)})
    is_bad = wrong or fallbacks or left or killed or max(ratio, with_sync) < _WANTED
    return int(bool(arguments.check and is_bad))


if __name__ == "__main__":
    sys.exit(main())
