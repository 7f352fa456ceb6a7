"""The coordinator's tools: starting sides, timing them in turn, and comparing what they took.

What
    `Driver` is a handle on a side (see ``_driver.py``); `Reference` is ``np.copyto`` between two
    warm buffers of this process; `compare` runs plain, oobpickle and reference in turn.

How it works
    One *round* is one batch of messages on each of the three, one after another, never at the same
    time. Each batch gives a median, each round a ratio, and the answer is the median of those
    ratios: what slows the machine down for a while slows all three of a round.

Lifetime
    A driver is a subprocess that ends with its ``with`` block, killed if need be.

When it cannot
    A side that fails raises `SideError`, one that delivers other bytes than were sent raises
    `MismatchError`; one that hangs is killed after `REPLY_TIMEOUT_S`.
"""

from __future__ import annotations

import json
import os
import re
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _driver import MISMATCH

REPLY_TIMEOUT_S = 180.0
_SAMPLE_S = 0.001

Times = list[tuple[float, float]]  # Per message: seconds until it arrived, and until it was read.


class SideError(Exception):
    """A side could not do what it was asked."""


class MismatchError(Exception):
    """What arrived is not what was sent."""


class Driver:
    """A side in its own process: ``driver("send", 3)`` runs a command and returns its value."""

    def __init__(self, name: str, start_method: str, script: str = "transfer.py") -> None:
        path = Path(__file__).with_name(script)
        self._process = subprocess.Popen(
            [sys.executable, str(path), "--side", name, "--start-method", start_method],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __call__(
        self, command: str, *arguments: object, sample: Callable[[], None] | None = None
    ) -> Any:
        """Run `command`; meanwhile call `sample` about every millisecond."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        self._process.stdin.flush()
        deadline_s = time.monotonic() + REPLY_TIMEOUT_S
        while not select.select([self._process.stdout], [], [], _SAMPLE_S if sample else 1.0)[0]:
            if sample is not None:
                sample()
            if time.monotonic() > deadline_s:
                self._process.kill()
                raise SideError(f"no answer to {command!r} within {REPLY_TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise SideError(f"ended during {command!r}, exit status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            error = MismatchError if answer["error"].startswith(MISMATCH) else SideError
            raise error(answer["error"])
        return answer["ok"]

    def send(self, n_messages: int) -> Times:
        """Let the side send its model so often."""
        times: Times = self("send", n_messages)
        return times


class Reference:
    """``np.copyto`` between two buffers of this process that are in memory already."""

    def __init__(self, nbytes: int, step: int = 1) -> None:
        n_words = step * nbytes // 8
        words = np.random.default_rng(0).integers(0, 1 << 64, n_words, dtype=np.uint64)
        self._source = words[::step]
        self._destination = self._source.copy()
        self.send(3)

    def send(self, n_messages: int) -> Times:
        times = []
        for _ in range(n_messages):
            start_s = time.perf_counter()
            np.copyto(self._destination, self._source)
            arrived_s = time.perf_counter()
            np.bitwise_xor.reduce(self._destination)
            times.append((arrived_s - start_s, time.perf_counter() - start_s))
        return times


@dataclass(frozen=True)
class Ratio:
    """How many times faster oobpickle is than something else."""

    of_rounds: float  # The median over rounds of the ratio within a round.
    of_medians: float  # The ratio of the medians over all rounds.


@dataclass
class Comparison:
    """Batch medians in seconds, one per round."""

    plain_s: list[float] = field(default_factory=list)
    ours_s: list[float] = field(default_factory=list)
    copy_s: list[float] = field(default_factory=list)

    def times_plain(self) -> Ratio:
        return _ratio(self.plain_s, self.ours_s)

    def of_copy(self) -> Ratio | None:
        return _ratio(self.copy_s, self.ours_s) if self.copy_s else None


def _ratio(theirs_s: Sequence[float], ours_s: Sequence[float]) -> Ratio:
    rounds = [theirs / ours for theirs, ours in zip(theirs_s, ours_s, strict=True)]
    medians = statistics.median(theirs_s) / statistics.median(ours_s)
    return Ratio(of_rounds=statistics.median(rounds), of_medians=medians)


@dataclass(frozen=True)
class Plan:
    """How often: `n_rounds` batches of `n_messages`, after messages that are not counted.

    With `is_first`, nothing comes before what is counted. With `is_rewarmed`, a batch of ours or of
    the reference has one message that is not counted, then three times `n_messages`: while plain
    takes seconds, what the others had warm does not stay so.
    """

    n_rounds: int
    n_messages: int
    n_warm_plain: int
    n_warm_ours: int
    is_first: bool
    is_rewarmed: bool
    budget_s: float  # No further round after this long, once there are three.


@dataclass
class Outcome:
    """The two comparisons of one row, and what oobpickle says it did."""

    arrives: Comparison = field(default_factory=Comparison)
    read: Comparison = field(default_factory=Comparison)
    n_sent: int = 0
    n_out_of_band: int = 0
    n_fallbacks: int = 0

    def add(self, plain: Times, ours: Times, copy: Times) -> None:
        for index, comparison in enumerate((self.arrives, self.read)):
            comparison.plain_s.append(statistics.median(time[index] for time in plain))
            comparison.ours_s.append(statistics.median(time[index] for time in ours))
            if copy:
                comparison.copy_s.append(statistics.median(time[index] for time in copy))


def compare(
    plain: Driver, ours: Driver, plan: Plan, reference: Reference | None, outcome: Outcome
) -> None:
    """Warm both sides, add the rounds to `outcome`, and verify one message of ours in full.

    What arrived with it is overwritten; the checksums of other messages show that it was a copy.
    """
    if not plan.is_first:
        ours("verify")
        plain.send(plan.n_warm_plain)
        ours.send(plan.n_warm_ours)
    first_counts = ours("counts")
    start_s = time.monotonic()
    for index in range(plan.n_rounds):
        if index >= 3 and time.monotonic() - start_s > plan.budget_s:
            break
        # Taking turns at going first: what comes second was seen to be 1 % slower at 64 KiB.
        first, second = (plain, ours) if index % 2 == 0 else (ours, plain)
        times = {side: _batch(side.send, plan, side is ours) for side in (first, second)}
        copy_times = _batch(reference.send, plan, True) if reference else []
        outcome.add(times[plain], times[ours], copy_times)
        outcome.n_sent += 1 + 3 * plan.n_messages if plan.is_rewarmed else plan.n_messages
    counts = ours("counts")
    outcome.n_out_of_band += counts[0] - first_counts[0]
    outcome.n_fallbacks += counts[1] - first_counts[1]
    if plan.is_first:
        ours("verify")
        ours.send(1)


def _batch(send: Callable[[int], Times], plan: Plan, is_fast: bool) -> Times:
    if not (is_fast and plan.is_rewarmed):
        return send(plan.n_messages)
    return send(1 + 3 * plan.n_messages)[1:]


class OtherWork:
    """How many cores other processes kept busy, on average, since this object was made."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._busy_s = _machine_busy_s() - _own_busy_s()

    def n_cores(self) -> float:
        """Call it when all sides have ended: only then is their work known to be ours."""
        others_s = _machine_busy_s() - _own_busy_s() - self._busy_s
        return max(0.0, others_s / (time.monotonic() - self._start_s))


def _machine_busy_s() -> float:
    # proc_stat(5): user nice system idle iowait irq softirq steal, in ticks over all cores.
    ticks = [int(word) for word in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own_busy_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class PrivateMemory:
    """The most private memory (``RssAnon``) that some processes had, above where they began."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._first = {who: _rss_anon(pid) for who, pid in pids.items()}
        self.growth_nbytes = dict.fromkeys(pids, 0)
        self.n_samples = 0

    def sample(self) -> None:
        for who, pid in self._pids.items():
            growth_nbytes = _rss_anon(pid) - self._first[who]
            self.growth_nbytes[who] = max(self.growth_nbytes[who], growth_nbytes)
        self.n_samples += 1


def _rss_anon(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
