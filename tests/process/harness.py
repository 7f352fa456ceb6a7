"""Runs the programs of this folder as real processes and looks at what they leave behind.

**What.** `run_program` starts ``programs/<name>.py`` in a session of its own, and asserts its exit
code, an empty stderr, and that no process of the session outlives it.

**In which process.** In a fork of `starter`, which has NumPy: most of a short program's time is
that import. With an interpreter of its own where flags, another command or ``PYTHON...`` are given,
and where how an interpreter starts or ends is what is tested: ``fresh=True``.

**How it works.** Output goes to files, so an orphan that keeps a pipe open cannot hang the test.
At the deadline every process of the session is asked for its tracebacks (SIGUSR1, see `inside`)
and then killed. The memory of an arena is nameless: when the session is empty, it is gone.

**Lifetime.** Nothing outlives `run_program`, whatever happens in it, but the starter: it ends with
the process that runs the tests.

**When it cannot.** Without ``/proc`` nothing here works, and oobpickle neither.
"""

import ast
import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

import oobpickle
from conftest import eventually

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
CGROUPS = Path("/sys/fs/cgroup/memory")
SOURCE = Path(oobpickle.__file__).parents[1]  # as installed, if it is

#: Warnings are errors, but for the one that CPython gives about what these tests are about, and the
#: one that CPython 3.15 gives when it shows a traceback of a spawned child's main module.
FLAGS = (
    *("-W", "error", "-W", "ignore:This process:DeprecationWarning"),
    *("-W", "ignore:Module globals is missing a __spec__.loader:DeprecationWarning"),
)


def cases_of(name):
    """Return the names of the public functions of a program: its cases."""
    tree = ast.parse((PROGRAMS / f"{name}.py").read_text())
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in found if not name.startswith("_")]


def run_program(
    name,
    *args,
    within_s=60,
    env=None,
    flags=FLAGS,
    exit_code=0,
    stderr="",
    prefix=(),
    folder=PROGRAMS,
    fresh=False,
):
    """Run a program to its end and return its stdout.

    Parameters
    ----------
    name : str
        ``<name>.py``, in `folder`.
    *args : str
        Its arguments.
    within_s : float
        Deadline, seconds.
    env : dict, optional
        Added to the environment.
    flags, prefix : sequence of str
        Options of the interpreter, and a command to run it under.
    exit_code : int
        Expected; negative for a signal.
    stderr : str
        What it may print there, as a whole; "..." for anything.
    fresh : bool
        Whether it needs an interpreter of its own.
    """
    command = [*prefix, sys.executable, *flags, str(folder / f"{name}.py"), *map(str, args)]
    fresh = fresh or prefix or flags != FLAGS or any(n.startswith("PYTHON") for n in env or {})
    start = _start if fresh else _Forked
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = start(command, out, err, environment(env))
        try:
            late = _wait(started, within_s)
            orphans = [] if late else _orphans(started.pid)
        finally:
            kill_session(started.pid)
            started.wait()
        out.seek(0)
        err.seek(0)
        printed, complaints = out.read(), err.read()
    story = f"{' '.join(command)}\n--- stdout\n{printed}\n--- stderr\n{complaints}"
    assert not late, f"not finished within {within_s} s: {story}"
    assert started.returncode == exit_code, f"exit code {started.returncode}: {story}"
    if stderr != "...":
        assert complaints == stderr, f"unexpected stderr: {story}"
    assert not orphans, f"processes left behind: {orphans}: {story}"
    return printed


def _start(command, out, err, environment):
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        env=environment,
        start_new_session=True,
    )


class _Forked:
    """A program in a fork of the starter, with the methods of `subprocess.Popen` that we use."""

    def __init__(self, command, out, err, environment):
        self._answers = _starter()
        program, *arguments = command[1 + len(FLAGS) :]
        request = {"program": program, "arguments": arguments, "environment": environment}
        with open(os.devnull) as nothing:
            fds = [nothing.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(self._answers, [json.dumps(request).encode()], fds)
        self.pid = int(self._answers.recv(32))
        self.returncode = None

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self._answers.recv(32))


@functools.cache
def _starter():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, *FLAGS, str(HERE / "starter.py"), str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment())
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def environment(extra=None):
    """Return the environment of the programs: this tree, and no threads but their own."""
    path = os.pathsep.join([str(SOURCE), str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    for name in ("OOBPICKLE_FAULT", "OOBPICKLE_BACKING"):
        environment.pop(name, None)
    return {**environment, **(extra or {})}


def _wait(started, within_s):
    try:
        started.wait(within_s)
    except subprocess.TimeoutExpired:
        for pid in session_members(started.pid):
            _signal(pid, signal.SIGCONT)
            _signal(pid, signal.SIGUSR1)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and started.poll() is None:
            time.sleep(0.05)
        return True
    return False


def _orphans(session):
    deadline = time.monotonic() + 10
    while (members := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return [f"{pid}: {_command(pid)}" for pid in members]


def session_members(session):
    """Return the pids of the living processes of a session that one of our programs leads."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            fields = _stat_fields(entry)
            if fields and fields[0] != "Z" and int(fields[3]) == session:
                found.append(int(entry))
    return found


def _stat_fields(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "gone"


def kill_session(session):
    """Kill what is left of a session that one of our programs leads."""
    for pid in session_members(session):
        _signal(pid, signal.SIGKILL)


def _signal(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def memory_cgroup(nbytes):
    """Make a memory cgroup of our own; only programs of the test go into it."""
    parent = CGROUPS / _own_cgroup()
    group = parent / f"oobpickle-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup (version 1) can be made below {parent}: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(nbytes))
        yield group
        assert "oom_kill 0" in (group / "memory.oom_control").read_text()
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _own_cgroup():
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            inside = os.path.join(CGROUPS, path.lstrip("/"))
            return path.strip("/") or "." if os.path.isdir(inside) else "."
    return "."


def shared_nbytes():
    """Return how much shared memory is in use, bytes: of our memory cgroup, else of the machine.

    In a cgroup (version 1) of its own a program is not disturbed by others that use shared memory.
    """
    if _own_cgroup() != ".":
        for line in (CGROUPS / _own_cgroup() / "memory.stat").read_text().splitlines():
            if line.startswith("total_shmem "):
                return int(line.split()[1])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    pytest.fail("no Shmem in /proc/meminfo")


def assert_shared_memory_returns(before, slack_nbytes):
    """Poll until no more shared memory is in use than before, but for the slack."""
    eventually(lambda: shared_nbytes() <= before + slack_nbytes)
