"""Soak: eight workers, all channels, mixed messages, kills and forks, for minutes or hours.

What
    ``python benchmarks/soak.py --minutes 10`` keeps eight workers busy through pools, executors,
    queues, pipes and arguments, kills some of them and forks all the time, verifies every message,
    and prints what it did. It exits 1 if anything was wrong, lost, hung, or grew.

How it works
    Four kinds of channels, a thread for each (``_soak_drivers.py``); this thread kills and forks.
    Now and then everybody *rests*: nothing is held or on its way. Then no block may be in use, no
    page of shared memory be left, and there must be as many descriptors and as much memory as at
    the first rest, which ends the warm-up (`Measure`).

Lifetime
    One arena from the first message to the last. At the end no process and no descriptor is left.

When it cannot
    Linux only. What hangs for 90 s is shown by tracebacks of all processes, and then killed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import _figures
import numpy as np
from _soak_drivers import SIGNALS, Driver, ExecutorDriver, PipeDriver, PoolDriver, QueueDriver
from _soak_messages import KINDS, PLAIN_VARIABLE, Parcel
from _soak_workers import Forks, Rest, largest_mappings, own_rest, prepare_process
from numpy.random import SFC64, Generator

import oobpickle

_CAPACITY: Final = 768 << 20
_HUNG_S: Final = 90.0
_SETTLE_S: Final = 20.0
_LEAST_WORK_S: Final = 2.0
_LONGEST_PAUSE_S: Final = 0.5
_MOST_FORKS: Final = 3
#: What one process may have more than at the first rest; the README says why so much.
GROWTH_NBYTES: Final = 32 << 20
#: Large arrays go back to the system when they die; else malloc keeps what it likes of them.
_MALLOC: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
    "OPENBLAS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Measure:
    """What there is at a rest."""

    n_blocks: int  # in use: leased, in flight, held
    shared_nbytes: int  # pages of the arena
    processes: dict[str, Rest]  # by name, with the worker's number: this process is "parent"

    def excess(self, first: Measure) -> list[str]:
        """Say what is more than it may be."""
        found = []
        if self.n_blocks or self.shared_nbytes:
            found.append(f"{self.n_blocks} blocks, {self.shared_nbytes} bytes of the arena in use")
        for name, now in self.processes.items():
            before = first.processes.get(name)
            if before is None:
                continue  # a worker that was started anew
            if now.n_descriptors > before.n_descriptors:
                found.append(f"{name}: {before.n_descriptors} -> {now.n_descriptors} descriptors")
            if now.rss_nbytes > before.rss_nbytes + GROWTH_NBYTES:
                found.append(f"{name}: {_mb(before.rss_nbytes)} -> {_mb(now.rss_nbytes)} MB")
        return found


class Soak:
    """One run."""

    def __init__(self, seed: int, *, plain: bool) -> None:
        self.chance = Generator(SFC64(seed))
        self.arena = None if plain else oobpickle.install(capacity=_CAPACITY)
        self.drivers: list[Driver] = [
            PoolDriver("pool", 1000 * seed + 1),
            ExecutorDriver("executor", 1000 * seed + 2),
            PipeDriver("pipe a", 1000 * seed + 3, "forkserver"),
            PipeDriver("pipe b", 1000 * seed + 4, "spawn"),
            QueueDriver("queue a", 1000 * seed + 5, "forkserver"),
            QueueDriver("queue b", 1000 * seed + 6, "spawn"),
        ]
        # The others live from beginning to end, so that it is seen whether they grow.
        self._mortal = [self.drivers[i] for i in (0, 1, 2, 4)]
        self.forks = Forks()
        self.n_forks = 0
        self.struck: dict[str, int] = {}
        self.problems: list[str] = []
        self.measures: list[Measure] = []
        self._start_s = time.monotonic()

    def run(self, seconds: float) -> None:
        """Work and rest in turn."""
        for driver in self.drivers:
            driver.start()
        period_s = min(30.0, max(3.0, seconds / 8))
        left_s = seconds
        while True:
            self._work(min(period_s, max(_LEAST_WORK_S, left_s)))
            self._rest()
            left_s = seconds - (time.monotonic() - self._start_s)
            if self.problems or (left_s <= 0 and len(self.measures) > 1):
                break
            for driver in self.drivers:
                driver.go_on()
        self._end()

    # --- faults

    def _work(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s and not self._is_stuck():
            time.sleep(self.chance.uniform(0, _LONGEST_PAUSE_S))
            if self.chance.random() < 0.5:
                self._strike()
            else:
                self._fork()
            self.forks.reap()

    def _strike(self) -> None:
        driver = self._mortal[int(self.chance.integers(len(self._mortal)))]
        number = SIGNALS[int(self.chance.integers(len(SIGNALS)))]
        if driver.n_struck == driver.n_survived and driver.strike(number):
            name = f"{number.name} in {driver.name}"
            self.struck[name] = self.struck.get(name, 0) + 1

    def _fork(self) -> None:
        held = [parcel for driver in self.drivers for parcel in list(driver.shelf.parcels)]
        if held:
            self.n_forks += 1
            self.forks.fork(held[:: max(1, len(held) // 8)], int(self.chance.integers(1 << 40)))

    def _is_stuck(self) -> bool:
        now = time.monotonic()
        for driver in self.drivers:
            if driver.failure:
                self.problems.append(f"{driver.name}: {driver.failure}")
            elif now - driver.progress_at > _HUNG_S and not driver.resting.is_set():
                self.problems.append(f"{driver.name}: hung for {_HUNG_S:.0f} s")
        return bool(self.problems)

    # --- rests

    def _rest(self) -> None:
        if self.problems:
            return
        for driver in self.drivers:
            driver.ask_to_rest()
        while not all(driver.resting.is_set() for driver in self.drivers):
            if self._is_stuck():
                return
            time.sleep(0.01)
        if self._is_stuck():
            return
        self.forks.reap(wait=True)
        deadline_s = time.monotonic() + _SETTLE_S
        # The dead of a pool are reaped a moment later, and so is what was on its way to them.
        while True:
            measure = self._measure()
            excess = measure.excess(self.measures[0] if self.measures else measure)
            if not excess or time.monotonic() > deadline_s:
                break
            time.sleep(0.05)
        self.problems += excess
        if excess:
            self.problems.append(f"largest private mappings: {', '.join(largest_mappings())}")
        self.measures.append(measure)
        self._print_line(measure)

    def _measure(self) -> Measure:
        processes = {"parent": own_rest()}
        for driver in self.drivers:
            if driver not in self._mortal and driver.rests:
                processes[driver.name] = driver.rests[0]
        if self.arena is None:
            return Measure(0, 0, processes)
        self.arena.trim()
        statistics = self.arena.statistics()
        n_blocks = sum(n for state, n in statistics.n_blocks.items() if state != "free")
        return Measure(n_blocks, statistics.nbytes_resident, processes)

    # --- the end

    def _end(self) -> None:
        if self.problems:
            return
        for driver in self.drivers:
            driver.go_on(until_end=True)
        for driver in self.drivers:
            driver.join(_HUNG_S)
            if driver.is_alive():
                self.problems.append(f"{driver.name}: did not end")
        self._is_stuck()
        n_survived = sum(driver.n_survived for driver in self.drivers)
        n_struck = sum(driver.n_struck for driver in self.drivers)
        if n_survived != n_struck:
            self.problems.append(f"{n_struck} kills, {n_survived} survived")

    # --- printing

    def _print_line(self, measure: Measure) -> None:
        total = self._totals()
        parent = measure.processes["parent"]
        print(
            f"{time.monotonic() - self._start_s:6.0f} s  {total['messages']:8,} messages  "
            f"{total['GB']:8.1f} GB  {total['kills']:5} kills  {self.n_forks:5} forks  "
            f"parent {_mb(parent.rss_nbytes)} MB, {parent.n_descriptors} descriptors  "
            f"{measure.n_blocks} blocks",
            flush=True,
        )

    def _totals(self) -> dict[str, float]:
        return {
            "messages": sum(driver.n_messages for driver in self.drivers),
            "GB": sum(driver.nbytes for driver in self.drivers) / 1e9,
            "lost": sum(driver.n_lost for driver in self.drivers),
            "kills": sum(driver.n_struck for driver in self.drivers),
            "survived": sum(driver.n_survived for driver in self.drivers),
        }

    def report(self) -> None:
        """Print the figures."""
        total = self._totals()
        print(f"\nmessages verified      {total['messages']:,}")
        for driver in self.drivers:
            print(f"  {driver.name:20} {driver.n_messages:,}, {driver.nbytes / 1e9:.1f} GB")
        print(f"bytes verified         {total['GB']:.1f} GB")
        print(f"kills                  {total['kills']}, survived {total['survived']}")
        for name in sorted(self.struck):
            print(f"  {name:20} {self.struck[name]}")
        print(f"with the killed        {total['lost']} messages on their way to or from them")
        print(f"forks of the parent    {self.n_forks}, and those of workers and of children")
        self._report_arena()
        self._report_growth()

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the figures for ``--json``."""
        total = self._totals()
        found: dict[str, dict[str, float]] = {
            "messages": {
                "n": total["messages"],
                "nbytes": total["GB"] * 1e9,
                "n_lost": total["lost"],
            },
            "kills": {"n": total["kills"], "n_survived": total["survived"]},
            "forks": {"n": float(self.n_forks)},
        }
        if self.arena is not None:
            counts = self.arena.statistics()
            found["forks"]["n_private"] = counts.n_copied_at_fork
            found["forks"]["n_shared"] = counts.n_shared_after_fork
            found["reclaimed"] = {"n": counts.n_reclaimed}
            found["fallbacks"] = {
                "n": counts.n_fallbacks,
                **{f"n_{reason}": one.n_messages for reason, one in counts.fallbacks.items()},
            }
        if len(self.measures) > 1:
            first, last = self.measures[0], self.measures[-1]
            before, now = first.processes["parent"], last.processes["parent"]
            found["growth"] = {
                "n_blocks": last.n_blocks - first.n_blocks,
                "arena_nbytes": last.shared_nbytes - first.shared_nbytes,
                "n_descriptors": now.n_descriptors - before.n_descriptors,
                "parent_nbytes": now.rss_nbytes - before.rss_nbytes,
            }
        return found

    def forget(self) -> None:
        """Drop the drivers: a pool keeps its pipes open until it is collected."""
        self.drivers.clear()
        self._mortal.clear()

    def _report_arena(self) -> None:
        if self.arena is None:
            return
        statistics = self.arena.statistics()
        print(f"out of band            {statistics.n_messages_out_of_band:,} messages")
        for reason, fallback in sorted(statistics.fallbacks.items()):
            print(f"  in-band: {reason:11} {fallback.n_messages:,}, {_mb(fallback.nbytes)} MB")
        print(f"made private by forks  {statistics.n_copied_at_fork:,} blocks")
        print(f"left shared by forks   {statistics.n_shared_after_fork}")
        print(f"copied out             {statistics.n_copied_on_receive:,} blocks")
        print(f"reclaimed unread       {statistics.n_reclaimed:,} blocks")
        if statistics.n_shared_after_fork:
            self.problems.append(f"{statistics.n_shared_after_fork} blocks were left shared")

    def _report_growth(self) -> None:
        if len(self.measures) < 2:
            return  # something was wrong before
        first, last = self.measures[0], self.measures[-1]
        print(f"growth since the first of {len(self.measures)} rests")
        print(f"  blocks in use        {last.n_blocks - first.n_blocks}")
        print(f"  pages of the arena   {last.shared_nbytes - first.shared_nbytes}")
        for name, now in last.processes.items():
            before = first.processes[name]
            grown = now.rss_nbytes - before.rss_nbytes
            n_more = now.n_descriptors - before.n_descriptors
            print(f"  {name:20} {grown / 1e6:+.1f} MB, {n_more:+} descriptors")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f}"


def _descendants() -> list[int]:
    """Return the pids of all processes that this one has brought about."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(entry)] = int(fields[1])
    found, new = set[int](), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return sorted(found)


def _kill_all(*, show: bool) -> None:
    """Kill what was started, after tracebacks of all threads if they are to be shown."""
    if show:
        faulthandler.dump_traceback(all_threads=True)
    for number in (signal.SIGUSR1, signal.SIGKILL) if show else (signal.SIGKILL,):
        for pid in _descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(1)


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def _started_anew(*, plain: bool) -> None:
    """Run again with an allocator that gives back what is freed; see `_MALLOC`."""
    wanted = {**_MALLOC, **({PLAIN_VARIABLE: "1"} if plain else {})}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long; fractions are fine")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="without oobpickle, to compare")
    _figures.add_option(parser)
    return parser.parse_args()


def main() -> int:
    arguments = _parse()
    _started_anew(plain=arguments.plain)
    prepare_process()
    warnings.simplefilter("ignore", oobpickle.FallbackWarning)  # they are printed
    multiprocessing.set_forkserver_preload(["numpy", "pandas"])
    multiprocessing.forkserver.ensure_running()
    multiprocessing.resource_tracker.ensure_running()
    Parcel(0)
    descriptors, processes = _descriptors(), _descendants()
    print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}, {os.cpu_count()} cores")
    print(f"seed {arguments.seed}, {len(KINDS)} kinds of objects, 8 workers", flush=True)
    soak = Soak(arguments.seed, plain=arguments.plain)
    soak.run(60 * arguments.minutes)
    soak.report()
    figures = soak.figures()
    if soak.arena is not None and not soak.problems:
        soak.forget()
        oobpickle.uninstall()
        gc.collect()
        soak.problems += _left_behind(descriptors, processes)
    for problem in soak.problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    print("wrong, lost, hung, grown: " + (f"{len(soak.problems)}" if soak.problems else "nothing"))
    sys.stdout.flush()
    _figures.write(arguments.json, {**figures, "problems": {"n": len(soak.problems)}})
    if soak.problems:
        _kill_all(show=any("hung" in problem for problem in soak.problems))
        os._exit(1)  # a driver may be stuck for ever
    return 0


def _left_behind(descriptors: set[str], processes: list[int]) -> list[str]:
    deadline_s = time.monotonic() + _SETTLE_S
    while True:
        more = len(_descriptors()) - len(descriptors)
        left = set(_descendants()) - set(processes)
        if (more <= 0 and not left) or time.monotonic() > deadline_s:
            break
        time.sleep(0.05)
    found = [f"{more} descriptors more than before"] if more > 0 else []
    return found + ([f"processes left: {sorted(left)}"] if left else [])


if __name__ == "__main__":
    sys.exit(main())
