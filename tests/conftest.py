"""Fixtures that every test shares: start methods, and the finder of what was left behind."""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, strategies

import exploring  # noqa: F401  (registers hypothesis's profiles)
from oobpickle._native import core, reason

START_METHODS = ("fork", "spawn", "forkserver")
multiprocessing.set_forkserver_preload(["numpy"])  # else each child of it imports it
#: What can be tested without the extension module, where nothing could be compiled; but for files
#: that use an arena for what they show.
WITHOUT_CORE = ("unit/pickling", "unit/files", "unit/test_delegate.py", "unit/test_errors.py")
NEED_CORE = ("test_byte_types.py", "test_numpy_subclasses.py")
HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    """Without the extension module, leave out what needs it."""
    if core is not None or collection_path in (HERE, HERE / "unit"):
        return None
    chosen = [HERE / place for place in WITHOUT_CORE]
    is_chosen = any(collection_path == one or one in collection_path.parents for one in chosen)
    return None if is_chosen and collection_path.name not in NEED_CORE else True


def pytest_report_header(config):
    if core is None:
        return f"only {', '.join(WITHOUT_CORE)}: no extension module ({reason})"
    return None


REPEATS = int(os.environ.get("OOBPICKLE_REPEATS", "1"))  # see `process.inside`


#: What hardly turns on the version of Python, and takes long: each version runs a third of it, so
#: that three in a row do all. `OOBPICKLE_ALL=1` runs all of it, and so do the long runs.
BY_THIRDS = (
    *("unit/merge", "unit/files", "unit/explain", "unit/cli", "unit/test_ecosystem.py"),
    *("process/test_merging.py", "process/test_sharing.py", "process/test_files.py"),
    *("process/test_other_programs.py", "process/test_multiprocess_library.py"),
    *("process/test_loky_and_joblib.py", "process/test_owners.py", "process/test_spilling.py"),
    "process/test_in_files.py",
    # What the core and the kernel do.
    *("process/test_kills.py", "process/test_limits.py", "process/test_recovery.py"),
    *("process/test_broadcast.py", "process/test_memory.py", "process/test_in_band.py"),
    *("project/test_docs.py", "project/test_markov_example.py", "project/test_sharing_examples.py"),
)


def pytest_collection_modifyitems(config, items):
    """Leave two thirds of what is done by thirds to other versions; not of what was asked for."""
    if REPEATS > 1 or os.environ.get("OOBPICKLE_ALL") or len(config.args) != 1:
        return
    if Path(config.args[0]).resolve() not in (HERE, HERE.parent):
        return
    folders = tuple(str(HERE / name) for name in BY_THIRDS)
    by_thirds = [item for item in items if str(item.path).startswith(folders)]
    left = set(by_thirds) - set(by_thirds[sys.version_info.minor % 3 :: 3])
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]


def by_turns(cases):
    """Return every second case; two versions of Python in a row do all, and the long runs each."""
    return cases if REPEATS > 1 else cases[sys.version_info.minor % 2 :: 2]


def by_start_method(cases):
    """Return pairs of a case and a start method, for what does not turn on how a child begins.

    Each case with spawn or forkserver by turns, and every second one with fork, which change with
    the version of Python: so two versions in a row do all of them. The long runs do so with each.
    """
    if REPEATS > 1:
        return [(case, method) for case in cases for method in START_METHODS]
    turn = sys.version_info.minor
    others = [(case, START_METHODS[1 + (n + turn) % 2]) for n, case in enumerate(cases)]
    return sorted(others + [(case, "fork") for case in by_turns(cases)])


def by_turns_of_start_methods(cases):
    """Return pairs of a case and a start method: each case with one, which changes with the version
    of Python, so that three in a row do all of them. The long runs do so with each."""
    if REPEATS > 1:
        return [(case, method) for case in cases for method in START_METHODS]
    turn = sys.version_info.minor
    return [(case, START_METHODS[(n + turn) % 3]) for n, case in enumerate(cases)]


def eventually(condition, *, within_s=20.0):
    """Poll until `condition()` is true; fail with its last value at the deadline."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s} s: {condition} is still {value!r}")
        time.sleep(0.005)
    return value


@pytest.fixture(params=START_METHODS)
def start_method(request):
    """Each start method in turn."""
    return request.param


@pytest.fixture
def context(start_method):
    """The multiprocessing context of each start method in turn."""
    return multiprocessing.get_context(start_method)


def _shared_files():
    # What Python or we could have made; browsers and databases have files there too.
    prefixes = ("sem.mp-", "psm_", "oobpickle", "tmp")
    return {path.name for path in Path("/dev/shm").glob("*") if path.name.startswith(prefixes)}


def _our_descriptors():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if "oobpickle" in target:
            found.append(target)
    return sorted(found)


def _are_open(descriptors):
    if _our_descriptors() == descriptors:
        return True
    gc.collect()  # an arena may be part of a cycle
    return False


def _children():
    own = {process.pid for process in multiprocessing.active_children()}
    found = set()
    for task in os.listdir("/proc/self/task"):
        try:
            text = Path(f"/proc/self/task/{task}/children").read_text()
        except OSError:
            continue
        found |= {int(pid) for pid in text.split()}
    return found | own


_HELPERS = ("resource_tracker", "forkserver", "starter.py")


def _unexpected_children(before):
    # The standard library's own helper processes live until the interpreter exits; so does ours.
    left = set()
    for pid in _children() - before:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if state != "Z" and not any(helper in command for helper in _HELPERS):
            left.add(f"{pid}: {command!r}")
    return left


@given(strategies.none())
def _use_hypothesis(_):
    pass


def pytest_collection_finish():
    """Take what pytest made out of the collector's sight: each test has it look twice."""
    _use_hypothesis()  # it asks the collector who has its random numbers, when it first needs them
    gc.collect()
    gc.freeze()


# Beside other workers of pytest-xdist a file may be that of another worker's test: whether one is
# left is seen when all have ended.
_seen_files = {}  # name -> the tests during which it appeared
_files_at_start = _shared_files()


def pytest_testnodedown(node):
    """Take what a worker of pytest-xdist has seen."""
    for name, tests in getattr(node, "workeroutput", {}).get("files", {}).items():
        _seen_files.setdefault(name, []).extend(tests)


def _left_files():
    return {n: _seen_files.get(n, []) for n in _shared_files() - _files_at_start}


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Fail if a file is left when the last test has ended."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["files"] = _seen_files
        return
    deadline = time.monotonic() + 20
    while _left_files() and time.monotonic() < deadline:
        time.sleep(0.005)
    if _left_files():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Name the files that are left, and the tests that may have left them."""
    for name, tests in _left_files().items():
        terminalreporter.write_line(f"LEFT in /dev/shm: {name}, seen after {tests}", red=True)


@pytest.fixture(autouse=True)
def _nothing_is_left(request):
    """No test leaves files, descriptors of ours, children or threads behind."""
    import oobpickle
    from oobpickle._hook import installed

    files, descriptors = _shared_files(), _our_descriptors()
    children, threads = _children(), set(threading.enumerate())
    yield
    assert not is_installed(), "the test left oobpickle installed"
    if installed.lingering:
        gc.collect()
        installed.sweep()  # what the next enabled() would do
    if hasattr(request.config, "workeroutput"):
        for name in _shared_files() - files:
            _seen_files.setdefault(name, []).append(request.node.nodeid)
    else:
        eventually(lambda: not (_shared_files() - files))
    eventually(lambda: _are_open(descriptors))
    eventually(lambda: not _unexpected_children(children))
    eventually(lambda: not [t for t in set(threading.enumerate()) - threads if t.is_alive()])
    assert oobpickle.__version__


@pytest.fixture
def disk_folder(tmp_path):
    """A folder on a disk, in which nothing may be left."""
    for parent in (tmp_path, Path("/var/tmp"), HERE):
        kind = subprocess.run(
            ["stat", "-f", "-c", "%T", parent], capture_output=True, text=True, check=False
        ).stdout.strip()
        if kind not in ("tmpfs", "ramfs", ""):
            folder = Path(tempfile.mkdtemp(dir=parent))
            yield folder
            folder.rmdir()
            return
    pytest.skip("no folder on a disk")


@contextmanager
def process_with(*fds):
    """A process that has the descriptors open, and does nothing until the block is left."""
    command = [sys.executable, "-I", "-S", "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(
        command, pass_fds=fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout.readline() == b"\n"
        yield child.pid
        child.stdin.close()
        child.wait()


def is_installed():
    """Whether this process has the hook in place."""
    from oobpickle._hook import installed

    return installed.current is not None
