"""Kills of senders, receivers and parents, thousands of them, and what they leave.

    python tests/long/kills.py [points|random|parents|pools|thousand ...] [--json FILE]

* ``points``: at every fault point, by SIGKILL, SIGTERM and SIGSEGV in turn (`at_points.py`)
* ``random``: at random moments, senders and receivers (`at_random.py`)
* ``parents``: the parent, with messages on their way and workers that live on (`of_parents.py`)
* ``pools``: ``Pool.terminate()`` with unread results (`of_pools.py`)
* ``thousand``: how soon 1,000 blocks of a dead process are back (`of_a_thousand.py`)

The first three run under each start method (``--methods``). After each program there must be no
process, file, semaphore or shared memory that was not there before. Prints a table; the exit code
is 1 if a survivor hangs, reads a wrong byte, ends otherwise than it should, or something is left.

With ``--json FILE`` what was done is added to the file, and is not done again; ``--seconds N``
stops after about so long, so that a long run can be made in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "process")]

import points  # noqa: E402

from process import harness  # noqa: E402

METHODS = ("fork", "spawn", "forkserver")
KINDS = ("points", "random", "parents", "pools", "thousand")
SLACK_NBYTES = 4 << 20  # others use shared memory, too
LONGEST_S = 140.0
POINTS_AT_A_TIME = 6
#: What takes a while to end after the last kill.
GRACE_S = 60


class Leftovers:
    """What is there before a program runs; afterwards there must be nothing more."""

    def __init__(self, folder):
        self._folder = folder
        self._files = set(os.listdir("/dev/shm"))
        self._nbytes = harness.shared_nbytes()

    def assert_none(self):
        harness.assert_shared_memory_returns(self._nbytes, SLACK_NBYTES)
        harness.eventually(lambda: not set(os.listdir("/dev/shm")) - self._files)
        strange = [path for path in Path(self._folder).iterdir() if not _is_of_fork_server(path)]
        assert not strange, strange


def _is_of_fork_server(path):
    """The socket at which CPython's fork server listens outlives a parent that is killed."""
    return path.name.startswith("pymp-") and all(
        inner.is_socket() and inner.name.startswith("listener-") for inner in path.iterdir()
    )


def run(program, *args, within_s):
    """Run a program, look at what it leaves, and return its lines."""
    with tempfile.TemporaryDirectory() as folder:
        leftovers = Leftovers(folder)
        path = os.pathsep.join(map(str, (harness.SOURCE, HERE, HERE.parent, harness.HERE)))
        printed = harness.run_program(
            program,
            *args,
            within_s=within_s + GRACE_S,
            env={"PYTHONPATH": path, "TMPDIR": folder},
            folder=HERE,
        )
        leftovers.assert_none()
    return [json.loads(line) for line in printed.splitlines()]


class Record:
    """What was done so far, in this run and in those before that are in the file.

    Attributes
    ----------
    hits : dict
        By kind and start method, e.g. ``"table.punched fork"``: kills by signal.
    sums : dict
        What adds up over all programs.
    figures : dict
        Of `of_pools` and `of_a_thousand`.
    """

    def __init__(self, path):
        self._path = path
        found = json.loads(path.read_text()) if path and path.exists() else {}
        self.hits = {name: Counter(hits) for name, hits in found.get("hits", {}).items()}
        self.sums = Counter(found.get("sums", {}))
        self.figures = found.get("figures", {})

    def n_hits(self, point, method):
        return sum(self.hits.get(f"{point} {method}", Counter()).values())

    def add(self, method, lines):
        for line in lines:
            if "point" in line:
                name = f"{line['point']} {method}"
                self.hits.setdefault(name, Counter()).update(line["hits"])
                for role in ("sender", "receiver"):
                    self.sums[f"{role}s killed at random"] += line.get(role, 0)
            else:
                for name in ("n_verified", "n_out_of_band", "n_reclaimed", "nbytes_left"):
                    self.sums[name] += line.get(name, 0)
                for reason, n in line.get("fallbacks", {}).items():
                    self.sums[f"in-band: {reason}"] += n
        self.sums["programs after which nothing was left"] += 1
        self.store()

    def store(self):
        if self._path:
            found = {"hits": self.hits, "sums": self.sums, "figures": self.figures}
            self._path.write_text(json.dumps(found, indent=1))

    def print(self):
        rows = sorted({name.split()[0] for name in self.hits})
        print(f"{'killed at':28}", *(f"{method:>12}" for method in METHODS))
        for row in rows:
            print(f"{row:28}", *(f"{self.n_hits(row, method):12}" for method in METHODS))
        by_signal = sum(self.hits.values(), Counter())
        print(f"{'all':28} {sum(by_signal.values()):12}", dict(by_signal))
        for name, number in {**self.sums, **self.figures}.items():
            print(f"{name:40} {number}")


class Run:
    """One call of this command."""

    def __init__(self, options, record):
        self.options, self.record = options, record
        self._until = time.monotonic() + options.seconds

    def left_s(self):
        return min(LONGEST_S, self._until - time.monotonic())

    def do(self, kind):
        getattr(self, kind)()

    def points(self):
        for method in self.options.methods:
            while self.left_s() > 0:
                missing = [
                    point
                    for point in self.options.points or points.all_points()
                    if self.record.n_hits(point, method) < self.options.hits
                ]
                if not missing:
                    break
                some = missing[:POINTS_AT_A_TIME]
                self._add(method, "at_points", method, self.options.hits, self._seed(), some)

    def random(self):
        self._until_there_are("random", "at_random", self.options.kills)

    def parents(self):
        self._until_there_are("parent", "of_parents", self.options.parents)

    def _until_there_are(self, point, program, n_wanted):
        for method in self.options.methods:
            n_more = n_wanted - self.record.n_hits(point, method)
            if n_more > 0 and self.left_s() > 0:
                self._add(method, program, method, n_more, self._seed(), ())

    def _add(self, method, program, *args):
        *args, points = args
        within_s = self.left_s()
        try:
            lines = run(program, *args, within_s, *points, within_s=within_s)
        except BaseException:
            print(program, *args, *points, file=sys.stderr)  # with the seed
            raise
        self.record.add(method, lines)

    def _seed(self):
        return random.randrange(1 << 30)

    def pools(self):
        if "pools" not in self.record.figures and self.left_s() > 0:
            (found,) = run("of_pools", self.options.rounds, self.left_s(), within_s=self.left_s())
            self.record.figures["pools"] = found
            self.record.store()

    def thousand(self):
        if "thousand" not in self.record.figures and self.left_s() > 0:
            (found,) = run("of_a_thousand", 20, within_s=LONGEST_S)
            self.record.figures["thousand"] = found
            self.record.store()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--points", nargs="+", metavar="POINT", help="only these")
    parser.add_argument("--hits", type=int, default=51, help="of each point and method")
    parser.add_argument("--kills", type=int, default=700, help="at random, for each method")
    parser.add_argument("--parents", type=int, default=30, help="for each method")
    parser.add_argument("--rounds", type=int, default=1000, help="of pools")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about")
    parser.add_argument("--json", type=Path, metavar="FILE", help="go on from there, and add to it")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"no such kind: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what was started
    record = Record(options.json)
    chosen = Run(options, record)
    for kind in options.kinds or KINDS:
        chosen.do(kind)
    record.print()


if __name__ == "__main__":
    main()
