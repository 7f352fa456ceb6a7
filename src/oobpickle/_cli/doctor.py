"""The command ``doctor``: what this machine can do, found out by doing it.

**What.** `doctor` prints a line for each check; exit code 0 if all is well, 1 if something is worth
a look, 2 if oobpickle cannot work here.

**How it works.** Each check is a function that returns a `Finding`. One that raises is broken, and
the others go on. A message is sent from process to process in a program of its own.

**Lifetime.** What a check opens it closes; the program ends with it, or is killed.

**When it cannot.** Nothing of the package is imported outside of the checks, so a package that is
broken is a finding.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from oobpickle._cli.output import Progress, table_lines

OK, WARNING, BROKEN = range(3)
_WORDS: Final = ("ok", "look", "BROKEN")
_FEW_MAPS: Final = 65_530
_FEW_DESCRIPTORS: Final = 256
_LIMIT_S: Final = 60
_MIB: Final = 1 << 20


class Finding(NamedTuple):
    """What a check has found: how bad it is, and a line that says so."""

    level: int
    text: str


def doctor(*, as_json: bool = False) -> int:
    """Print what was found; return the exit code."""
    findings = {}
    with Progress() as progress:
        for name, check in CHECKS.items():
            progress.say(name)
            findings[name] = _done(check)
    worst = max(finding.level for finding in findings.values())
    if as_json:
        checks = {
            name: {"level": _WORDS[level], "text": text} for name, (level, text) in findings.items()
        }
        print(json.dumps({"verdict": _WORDS[worst], "checks": checks}, indent=1))
        return worst
    rows = [(name, _WORDS[level], text) for name, (level, text) in findings.items()]
    print("\n".join(table_lines(("check", "", "found"), rows, n_left=3)))
    print(("all is well", "it works; see the lines with `look`", "it cannot work here")[worst])
    return worst


def _done(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return Finding(BROKEN, f"{type(error).__name__}: {error}".splitlines()[0][:300])


def _python() -> Finding:
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    text = f"{platform.python_implementation()} {platform.python_version()}, {sys.platform}"
    if "t" in getattr(sys, "abiflags", "") or not has_gil:
        return Finding(BROKEN, f"{text}: a free-threaded build; use the ordinary one")
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return Finding(BROKEN, f"{text}: this needs 64-bit Linux")
    return Finding(OK, text)


def _modules() -> list[str]:
    folder = Path(__file__).parents[1]
    paths = sorted(folder.rglob("*.py"))
    names = [".".join(path.relative_to(folder.parent).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def _package() -> Finding:
    problems = []
    for name in _modules():
        try:
            importlib.import_module(name)
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Finding(BROKEN, f"{problems[0]}{more}; install it again")
    version = sys.modules["oobpickle"].__dict__.get("__version__", "unknown")
    return Finding(
        OK, f"oobpickle {version}, {len(_modules())} modules, {Path(__file__).parents[1]}"
    )


def _core() -> Finding:
    from oobpickle import _native

    if _native.core is None:
        return Finding(BROKEN, f"oobpickle._core is not here ({_native.reason}); install a wheel")
    return Finding(OK, str(_native.core.__file__))


def _dependencies() -> Finding:
    import cloudpickle  # type: ignore[import-untyped]
    import numpy

    return Finding(OK, f"numpy {numpy.__version__}, cloudpickle {cloudpickle.__version__}")


def _files() -> Finding:
    import mmap

    from oobpickle._memory.backing import BACKING_VARIABLE, open_nameless, seal

    fd = open_nameless("doctor")
    try:
        os.ftruncate(fd, _MIB)
        with mmap.mmap(fd, _MIB) as memory:
            memory[:5] = b"hello"
            is_same = os.pread(fd, 5, 0) == b"hello"
        kind = os.readlink(f"/proc/self/fd/{fd}")
        is_sealed = seal(fd)
    finally:
        os.close(fd)
    chosen = os.environ.get(BACKING_VARIABLE)
    text = f"{kind}{', sealed' if is_sealed else ''}"
    if not is_same:
        return Finding(BROKEN, f"{text}: what is written to the mapping is not in the file")
    if chosen or not is_sealed:
        return Finding(
            WARNING, f"{text}; no memfd{f' ({BACKING_VARIABLE}={chosen})' * bool(chosen)}"
        )
    return Finding(OK, text)


def _dev_shm() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding(WARNING, "there is no /dev/shm; multiprocessing's locks need it")
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    text = f"{_size(free)} free of {_size(status.f_blocks * status.f_frsize)}"
    if not os.access("/dev/shm", os.W_OK):
        return Finding(WARNING, f"{text}, not writable; multiprocessing's locks need it")
    if free < _MIB:
        return Finding(WARNING, f"{text}; multiprocessing's locks need some KiB of it")
    return Finding(OK, f"{text} (for multiprocessing's locks; the arena is not there)")


def _memory() -> Finding:
    from oobpickle._memory import headroom

    available, limit = headroom.available_nbytes(), headroom.limit_nbytes()
    groups = len(headroom.limits())
    text = f"{_size(available)} available of {_size(limit)}, {groups} cgroups with a limit"
    if available < 512 * _MIB:
        return Finding(WARNING, f"{text}: large messages will travel in-band (reason memory)")
    return Finding(OK, text)


def _huge_pages() -> Finding:
    from oobpickle._memory import huge_pages

    words = ("never", "on a page fault", "always")
    policy = huge_pages.policy()
    more = "; see docs/how-to/tune-memory.md" if policy == huge_pages.NEVER else ""
    return Finding(OK, f"{words[policy]}{more}")


def _maps() -> Finding:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    used = len(Path("/proc/self/maps").read_text().splitlines())
    text = f"{used:,} mappings of at most {most:,}"
    return Finding(WARNING if most < _FEW_MAPS else OK, text)


def _limits() -> Finding:
    import resource

    found, level = [], OK
    for name, which, least in (
        ("ulimit -n", resource.RLIMIT_NOFILE, _FEW_DESCRIPTORS),
        ("ulimit -v", resource.RLIMIT_AS, 1 << 40),
        ("ulimit -f", resource.RLIMIT_FSIZE, 1 << 40),
    ):
        limit = resource.getrlimit(which)[0]
        is_unlimited = limit == resource.RLIM_INFINITY
        found.append(f"{name} {'unlimited' if is_unlimited else f'{limit:,}'}")
        if not is_unlimited and limit < least:
            level = WARNING
    return Finding(level, ", ".join(found))


def _locks() -> Finding:
    """Take the kind of lock by which a participant is known to be alive."""
    import fcntl
    import struct

    fds = [os.memfd_create("oobpickle-doctor")]
    try:
        fds.append(os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR))
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        fcntl.fcntl(fds[0], 37, wanted)  # F_OFD_SETLK, of fcntl(2)
        try:
            fcntl.fcntl(fds[1], 37, wanted)
        except BlockingIOError:
            return Finding(OK, "locks of open file descriptions keep others out")
        return Finding(BROKEN, "a lock was given twice")
    finally:
        for fd in fds:
            os.close(fd)


def _start_method() -> Finding:
    import multiprocessing

    methods = multiprocessing.get_all_start_methods()
    chosen = multiprocessing.get_start_method(allow_none=True) or f"{methods[0]} (the default)"
    return Finding(OK, f"{chosen}; {', '.join(methods)} are there")


_PROGRAM: Final = """
import multiprocessing, numpy, oobpickle, sys, time
if __name__ == "__main__":
    times = []
    with oobpickle.enabled() as arena:
        with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:
            for _ in range(3):
                start = time.perf_counter()
                assert pool.apply(numpy.ones, (1 << 20,)).sum() == 1 << 20
                times.append(time.perf_counter() - start)
        done = arena.statistics()
    print(done.n_messages_out_of_band, done.n_fallbacks, *done.fallbacks, min(times))
"""


def _message(method: str) -> Finding:
    source = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-c", _PROGRAM, method],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if child.returncode != 0:
        return Finding(BROKEN, (child.stderr.strip().splitlines() or ["it failed"])[-1][:300])
    n_out, n_fallbacks, *reasons, best = child.stdout.split()
    text = f"8 MiB from a pool in {float(best) * 1e3:.1f} ms"
    if int(n_out) != 3 or n_fallbacks != "0":
        return Finding(WARNING, f"{text}; {n_fallbacks} of 3 in-band {' '.join(reasons)}")
    return Finding(OK, f"{text}, out of band")


def _libraries() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("joblib", "loky", "multiprocess", "billiard"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = f"{name} {version(name)}"
    not_served = found.pop("billiard", "")
    if "multiprocess" in found:
        found["multiprocess"] += " (if it is imported before the block)"
    text = ", ".join(["served: multiprocessing", "concurrent.futures", *found.values()])
    return Finding(OK, text + f"; not served: {not_served}" * bool(not_served))


def _environment() -> Finding:
    found = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("OOBPICKLE_")]
    if found:
        return Finding(WARNING, f"{' '.join(found)}: these are for tests")
    return Finding(OK, "no variable of oobpickle's is set")


def _size(nbytes: int) -> str:
    from oobpickle._errors import format_nbytes

    return format_nbytes(nbytes)


CHECKS: Final[dict[str, Callable[[], Finding]]] = {
    "python": _python,
    "package": _package,
    "core": _core,
    "dependencies": _dependencies,
    "memory files": _files,
    "/dev/shm": _dev_shm,
    "memory": _memory,
    "huge pages": _huge_pages,
    "mappings": _maps,
    "limits": _limits,
    "locks": _locks,
    "start method": _start_method,
    "a message, fork": lambda: _message("fork"),
    "a message, spawn": lambda: _message("spawn"),
    "libraries": _libraries,
    "environment": _environment,
}
