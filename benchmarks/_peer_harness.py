"""The coordinator's side of the comparison: starting sides, and asking them in turn.

What
    `PeerSide` is a handle on a side (``_peer_side.py``); `measure_together` runs rounds in which
    each side gets its turn, `measure_apart` opens one side at a time, in several passes.

How it works
    The last uncounted messages are those during which memory is sampled, since looking costs time.
    The order of the sides changes from round to round. A `Cell` is what one peer did in one row.

Lifetime
    A side and everything that it started is killed when it is left, and files that it forgot in
    ``/dev/shm`` are removed when nobody maps them.

When it cannot
    A side that fails, hangs, or takes more memory than allowed is killed, and its cell says why.
    Damaged data raises `MismatchError`: that ends the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _driver import MISMATCH
from _harness import MismatchError, SideError
from _leftovers import Leftovers
from _peer_memory import TOKEN, Tree, available_nbytes, shared_nbytes
from _peer_rows import Row
from _peer_side import expect

import oobpickle

HERE = Path(__file__).resolve().parent
_SAMPLE_S = 0.02
_WATCH_S = 0.2
_BATCH_S = 0.1  # So much is measured in a round of one peer, at least one message.
_SAMPLED_S = 0.3
_MAX_BATCH = 100
_FEW = 10
_N_WARM, _N_COUNTED = 3, 3  # In a pass.
_TRIED_S = 5.0  # What is held is tried out where a message takes less, else in a smaller row.
_SLOW_S = 2.0  # Of what takes longer there is one in a pass.


@dataclass
class Limits:
    """When to stop: seconds for all of a cell, for one answer, and bytes for one side."""

    cell_s: float
    reply_s: float
    memory_nbytes: int
    n_rounds: int
    n_passes: int


@dataclass
class Cell:
    """What one peer did in one row: seconds by round, then by message; ratios to oobpickle."""

    rounds: dict[int, list[float]] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    peak_nbytes: int = 0
    is_writable: bool | None = None
    is_private: bool | None = None
    failure: str = ""
    facts: dict[str, int] = field(default_factory=dict)
    spent_s: float = 0.0

    def last_s(self) -> float:
        return statistics.median(self.rounds[max(self.rounds)])


class PeerSide:
    """A side in its own process: ``side("send", 3)`` runs a command and returns its value."""

    def __init__(self, name: str, n_workers: int, limits: Limits) -> None:
        self.name = name
        self._limits = limits
        self._token = uuid.uuid4().hex
        self._shared_nbytes = 0  # What this side has of the machine's shared memory.
        self._folder = tempfile.mkdtemp(prefix="peers-")
        environment = os.environ | {
            TOKEN: self._token,
            "TMPDIR": self._folder,
            "RAY_TMPDIR": self._folder,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(Path(oobpickle.__file__).parents[1])]),
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        }
        command = [sys.executable, str(HERE / "peers.py"), "--side", name]
        if name.startswith("mpi4py"):
            mpiexec = str(Path(sys.executable).with_name("mpiexec"))
            command = [mpiexec, "-n", str(1 + n_workers), *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._tree = Tree(self._process.pid, self._token)

    def __enter__(self) -> PeerSide:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15.0)
        self.kill()
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End every process of this side that is still there."""
        for pid in reversed(self._tree.pids()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if pid != self._process.pid or self._process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def __call__(self, command: str, *arguments: object, cell: Cell | None = None) -> Any:
        """Run `command`; with a cell, sample memory meanwhile and keep the peak there."""
        before_nbytes = shared_nbytes()
        try:
            answer = self._ask(command, arguments, before_nbytes, cell)
        finally:
            self._shared_nbytes += shared_nbytes() - before_nbytes
        if "error" in answer:
            if answer["error"].startswith(MISMATCH):
                raise MismatchError(f"{self.name}: {answer['error']}\n{answer['traceback']}")
            raise SideError(f"{answer['error']}\n{answer['traceback']}")
        return answer["ok"]

    def _ask(
        self, command: str, arguments: tuple[object, ...], before_nbytes: int, cell: Cell | None
    ) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SideError(f"ended before {command!r}") from None
        start_s, start_available = time.monotonic(), available_nbytes()
        wait_timeout = _SAMPLE_S if cell else _WATCH_S
        while not select.select([self._process.stdout], [], [], wait_timeout)[0]:
            if cell is not None:
                growth_nbytes = shared_nbytes() - before_nbytes
                taken_nbytes = self._tree.private_nbytes() + self._shared_nbytes + growth_nbytes
                cell.peak_nbytes = max(cell.peak_nbytes, taken_nbytes)
            if time.monotonic() - start_s > self._limits.reply_s:
                self.kill()
                raise SideError(f"time over: more than {self._limits.reply_s:.0f} s")
            if start_available - available_nbytes() > self._limits.memory_nbytes:
                self.kill()
                raise SideError(f"out of memory: over {self._limits.memory_nbytes >> 30} GiB")
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"ended during {command!r}, status {self._process.wait()}")
        return json.loads(line)


def measure_together(
    row: Row, peers: list[str], sides: dict[str, PeerSide], limits: Limits
) -> dict[str, Cell]:
    """Measure one row with sides that are all there at the same time.

    `sides` are those that are there already. One that fails is removed, and started again here.
    """
    expected = expect(row.nbytes)
    cells = {name: Cell() for name in peers}
    n_messages = {}
    for name in peers:
        if name not in sides:
            sides[name] = PeerSide(name, row.n_workers, limits)
    for name, side in list(sides.items()):
        with _noting(cells[name], sides, name):
            side("open", row.workload, row.nbytes, row.n_workers, expected)
            n_fitting = int(_BATCH_S / _warm(side, cells[name]))
            n_messages[name] = max(1, min(_MAX_BATCH, n_fitting))
    for index in range(limits.n_rounds):
        for name in _turned(n_messages, index):
            cell = cells[name]
            if cell.failure or (index >= 3 and cell.spent_s > limits.cell_s):
                continue
            with _noting(cell, sides, name):
                cell.rounds[index] = _batch(sides[name], n_messages[name])
    for name, side in list(sides.items()):
        with _noting(cells[name], sides, name):
            if not cells[name].rounds:
                raise SideError("no message within the time of this row")
            _finish(side, cells[name])
    return cells


def _batch(side: PeerSide, n_messages: int) -> list[float]:
    """One round's messages; of few, one more is sent first: others' turns let memory go cold."""
    n_uncounted = 1 if n_messages < _FEW else 0
    durations_s: list[float] = side("send", n_uncounted + n_messages)
    return durations_s[n_uncounted:]


def measure_apart(
    row: Row, peers: list[str], limits: Limits, leftovers: Leftovers
) -> dict[str, Cell]:
    """Measure one row in passes, with one side at a time, as not all fit into memory."""
    expected = expect(row.nbytes)
    cells = {name: Cell() for name in peers}
    for index in range(limits.n_passes):
        for name in _turned(cells, index):
            cell = cells[name]
            if cell.failure or cell.spent_s > limits.cell_s:
                continue
            with _noting(cell, name=name), PeerSide(name, row.n_workers, limits) as side:
                _pass(side, row, expected, cell, index)
            leftovers.remove()
    return cells


def _pass(side: PeerSide, row: Row, expected: dict[str, int], cell: Cell, index: int) -> None:
    side("open", row.workload, row.nbytes, row.n_workers, expected)
    once_s = cell.last_s() if cell.rounds else _warm(side, cell)
    if cell.rounds and once_s < _SLOW_S:
        side("send", _N_WARM)
    cell.rounds[index] = side("send", _N_COUNTED if once_s < _SLOW_S else 1)
    if cell.is_writable is None and once_s < _TRIED_S:
        _finish(side, cell)
    else:
        cell.facts = side("facts")


def _warm(side: PeerSide, cell: Cell) -> float:
    """Transfer without counting; return about how long a message takes."""
    [first_s] = side("send", 1, cell=cell)
    # The first one says little: fresh memory may take longer than all the rest.
    start_s = time.monotonic()
    side("verify")
    if first_s > _TRIED_S and time.monotonic() - start_s > _TRIED_S:
        return float(first_s)
    once_s = float(min(side("send", 20 if first_s < _BATCH_S else 1)))
    if once_s < _SLOW_S:
        once_s = float(min(side("send", _N_WARM)))
    if once_s < _SAMPLED_S:
        side("send", int(_SAMPLED_S / once_s), cell=cell)
    return once_s


def _finish(side: PeerSide, cell: Cell) -> None:
    found = side("probe")
    cell.is_writable, cell.is_private = found["is_writable"], found["is_private"]
    cell.facts = side("facts")
    side("close")


@contextlib.contextmanager
def _noting(cell: Cell, sides: dict[str, PeerSide] | None = None, name: str = "") -> Iterator[None]:
    """Make a failure of the cell of what a side raises, and leave that side out from now on."""
    start_s = time.monotonic()
    try:
        yield
    except SideError as error:
        print(f"{name}: {error}", file=sys.stderr)
        cell.failure = str(error).splitlines()[0][:200]
        if sides is not None:
            sides.pop(name).__exit__()
    finally:
        cell.spent_s += time.monotonic() - start_s


def _turned(names: Iterable[str], index: int) -> list[str]:
    """Another one begins in each round, and every second round goes backwards."""
    order = list(names)
    n_turned = index * 5 % max(1, len(order))
    order = order[n_turned:] + order[:n_turned]
    return order[::-1] if index % 2 else order
