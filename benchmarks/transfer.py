"""How fast objects cross a ``Pool``: plain, with oobpickle, and ``np.copyto`` as the speed limit.

What
    ``python benchmarks/transfer.py`` prints a table of ratios measured in this run; with
    ``--check`` it exits 1 and names each row that falls short of its bound. ``README.md`` next to
    this file says what the rows and columns mean.

How it works
    This process is the coordinator: it starts a plain side and an oobpickle side (``_driver.py``),
    tells them in turn to send messages and runs the reference itself (``_harness.py``).

Lifetime
    Each row has sides of its own, so none inherits memory, blocks or luck from the row before.

When it cannot
    A row that needs more memory than there is, or whose side fails, counts as falling short.
    Exit 2: an object arrived damaged; no figure of such a library matters.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _driver
import _figures
import numpy as np
from _harness import (
    Driver,
    MismatchError,
    OtherWork,
    Outcome,
    Plan,
    PrivateMemory,
    Ratio,
    Reference,
    SideError,
    compare,
)

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

SIZES = {
    **{f"{n}K": n * KIB for n in (1, 4, 16, 32, 64, 96, 128, 160, 192, 256, 512)},
    **{f"{n}M": n * MIB for n in (1, 4, 16, 64, 256)},
    **{f"{n}G": n * GIB for n in (1, 2)},
}
NEVER_SLOWER = 1 / 1.05
TIMES_PLAIN = {"1M": 6.0, "64M": 30.0, "256M": 40.0, "1G": 40.0}
OF_COPY = {"64M": 0.7, "256M": 0.85, "1G": 0.85}
OF_PREPARED = 0.3
ACQUIRE_S = {10: 30e-6, 50_000: 60e-6}
PRIVATE_NBYTES = 4 * MIB
PICKLING = 1 / 1.05
# Kind of object (_kinds.py), bytes, least times plain, least share of np.copyto.
KINDS = {
    "strided-256M": ("strided", 256 * MIB, NEVER_SLOWER, 0.6),
    "masked-256M": ("masked", 256 * MIB, NEVER_SLOWER, 0.6),
    "bytes-256M": ("bytes", 256 * MIB, 4.0, None),
    "frame-800M": ("frame", 800 * MIB, NEVER_SLOWER, 0.5),
    "frame-objects": ("objects", 64 * MIB, NEVER_SLOWER, None),
    "integers-5e6": ("integers", 40_000_000, 1.2, None),
}
# How many bytes np.copyto copies beside those of the name: a mask of one byte an item.
REFERENCE_NBYTES = {"masked": lambda nbytes: nbytes * 9 // 8}

# Up to this size: pairs of sides, rounds, messages a round, uncounted messages of plain, of ours
# (besides one of ours that is verified).
# The scheduler and malloc settle differently for each process (README.md), hence several pairs.
PLANS = {
    128 * KIB: (2, 50, 50, 100, 100),
    256 * KIB: (2, 20, 30, 30, 30),
    MIB: (8, 4, 20, 20, 20),
    16 * MIB: (1, 15, 5, 5, 5),
    128 * MIB: (1, 15, 1, 3, 5),
    256 * MIB: (1, 9, 1, 3, 5),
    GIB: (1, 5, 1, 1, 3),
    2 * GIB: (1, 3, 1, 0, 3),
}
# So small, a message takes twice as long from core to core as within one, and the scheduler
# decides which: pinned, both sides are measured from core to core.
PINNED_NBYTES = 256 * KIB
FIRST_PLAN = (3, 1, 1, 0, 0)  # New sides for each message: nothing is warm.
QUICK_PARTS = 5  # A quick run has half the pairs, one round in so many, and no row above 1 GiB.
PAIR_BUDGET_S = 30.0
COPIES_IN_MEMORY = 7  # What plain pickling takes at its peak, and the model on each side.


@dataclass
class Result:
    """One finished row: cells as text, figures, all values, and why it falls short if so."""

    cells: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    shortfalls: list[str] = field(default_factory=list)

    def need(self, is_enough: bool, text: str) -> None:
        if not is_enough:
            self.shortfalls.append(text)


@dataclass(frozen=True)
class Options:
    start_method: str
    is_quick: bool
    ours: str  # The side that is compared with "plain".


@dataclass(frozen=True)
class TransferRow:
    """A model that crosses as a result or as an argument."""

    name: str
    way: str
    nbytes: int
    times_plain: float
    of_copy: float | None = None
    n_arrays: int = 1
    is_first: bool = False
    is_prepared: bool = False
    kind: str = ""

    def run(self, options: Options) -> Result:
        available_nbytes = _available_nbytes()
        if available_nbytes < COPIES_IN_MEMORY * self.nbytes:
            return Result(shortfalls=[f"not run: {available_nbytes // MIB} MiB of memory left"])
        # Below 1 MiB np.copyto says nothing; beside 2 GiB of plain there is no room for it.
        is_compared = self.n_arrays == 1 and (self.is_prepared or not self.is_first)
        has_reference = is_compared and MIB <= self.nbytes <= GIB
        reference = self._reference() if has_reference else None
        n_pairs, plan = _plan(self.nbytes, self.is_first, options.is_quick)
        outcome = Outcome()
        for _ in range(n_pairs):
            with (
                Driver("plain", options.start_method) as plain,
                Driver(options.ours, options.start_method) as ours,
            ):
                for side in (plain, ours):
                    is_pinned = self.nbytes <= PINNED_NBYTES
                    side("open", self.way, self.nbytes, self.n_arrays, is_pinned, self.kind)
                    if self.is_prepared:
                        side("prepare")
                compare(plain, ours, plan, reference, outcome)
        return self._judge(outcome, options)

    def _reference(self) -> Reference:
        nbytes = REFERENCE_NBYTES.get(self.kind, int)(self.nbytes)
        return Reference(nbytes, 2 if self.kind == "strided" else 1)

    def _judge(self, outcome: Outcome, options: Options) -> Result:
        arrives, read = outcome.arrives, outcome.read
        result = Result(values=dataclasses.asdict(outcome))
        result.cells = [
            _seconds(arrives.plain_s),
            _seconds(arrives.ours_s),
            _seconds(arrives.copy_s),
            *_ratios(arrives.times_plain(), read.times_plain()),
            *_ratios(arrives.of_copy(), read.of_copy()),
            f"{outcome.n_out_of_band}/{outcome.n_sent}",
        ]
        result.figures = {
            "plain_s": _median(arrives.plain_s),
            "ours_s": _median(arrives.ours_s),
            **({"copy_s": _median(arrives.copy_s)} if arrives.copy_s else {}),
            **_named("times_plain", arrives.times_plain(), read.times_plain()),
            **_named("of_copy", arrives.of_copy(), read.of_copy()),
            "n_out_of_band": outcome.n_out_of_band,
            "n_sent": outcome.n_sent,
            "wanted": ", ".join(self._wanted()),
        }
        self._need_plain(result, "arrives", arrives.times_plain(), self.times_plain)
        # Reading takes both sides the same, so only that it does not take ours longer is checked.
        self._need_plain(result, "read", read.times_plain(), min(self.times_plain, NEVER_SLOWER))
        copied = [("arrives", arrives.of_copy()), ("read", read.of_copy())]
        if self.kind:
            copied.pop()  # reading a frame or a mask is other work than reading the reference
        for what, ratio in copied:
            if self.of_copy is not None and ratio is not None:
                is_enough = ratio.of_rounds >= self.of_copy
                text = f"{what}: {ratio.of_rounds:.3f} of np.copyto, bound {self.of_copy:g}"
                result.need(is_enough, text)
        result.need(outcome.n_fallbacks == 0, f"{outcome.n_fallbacks} fallbacks")
        if self.times_plain > 1 and options.ours != "plain":
            is_enough = outcome.n_out_of_band >= outcome.n_sent
            result.need(is_enough, f"only {outcome.n_out_of_band} messages out of band")
        return result

    def _wanted(self) -> Iterator[str]:
        if self.of_copy is not None:
            yield f"{self.of_copy:g} of `np.copyto`"
        if self.times_plain > 1:
            yield f"{self.times_plain:g} times plain"

    def _need_plain(self, result: Result, what: str, ratio: Ratio, bound: float) -> None:
        text = f"{what}: {ratio.of_rounds:.3f} times plain, bound {bound:.3g}"
        result.need(ratio.of_rounds >= bound, text)


@dataclass(frozen=True)
class AcquireRow:
    """Taking a block and giving it back, while others live."""

    name: str
    n_live: int

    def run(self, options: Options) -> Result:
        with Driver("oobpickle", options.start_method) as side:
            median_s = side("time_acquire", self.n_live, 500 if options.is_quick else 2000)
        bound_s = ACQUIRE_S[self.n_live]
        result = Result(["", _seconds([median_s])], {"ours_s": median_s, "wanted_s": bound_s})
        result.need(median_s <= bound_s, f"{median_s * 1e6:.1f} us, bound {bound_s * 1e6:g} us")
        return result


@dataclass(frozen=True)
class PicklingRow:
    """Pickling very many small objects, without sending them."""

    name: str
    n_objects: int

    def run(self, options: Options) -> Result:
        with Driver("oobpickle", options.start_method) as side:
            times = side("time_pickling", self.n_objects, 9 if options.is_quick else 41)
        plain_s, ours_s = ([time[i] for time in times[1:]] for i in (0, 1))
        ratio = float(np.median([plain / ours for plain, ours in times[1:]]))
        cells = [_seconds(plain_s), _seconds(ours_s), "", f"{ratio:.3g}"]
        result = Result(cells, values={"plain_s": plain_s, "ours_s": ours_s})
        result.figures = {
            "plain_s": _median(plain_s),
            "ours_s": _median(ours_s),
            "times_plain": ratio,
        }
        result.need(ratio >= PICKLING, f"{ratio:.3f} times plain, bound {PICKLING:.3g}")
        return result


@dataclass(frozen=True)
class MemoryRow:
    """Private memory of both processes while the first and some more messages cross."""

    name: str
    way: str
    nbytes: int

    def run(self, options: Options) -> Result:
        plain, ours = self._measure("plain", options), self._measure(options.ours, options)
        result = Result(values={"plain_nbytes": plain.growth_nbytes, "n_samples": ours.n_samples})
        result.values["ours_nbytes"] = ours.growth_nbytes
        grown = {
            name: max(side.growth_nbytes.values())
            for name, side in (("plain_nbytes", plain), ("ours_nbytes", ours))
        }
        result.figures = dict(grown)
        result.cells = ["+" + _mebibytes(nbytes) for nbytes in grown.values()]
        for who, growth_nbytes in ours.growth_nbytes.items():
            is_enough = growth_nbytes < PRIVATE_NBYTES
            text = f"{who} grew by {_mebibytes(growth_nbytes)}, bound {_mebibytes(PRIVATE_NBYTES)}"
            result.need(is_enough, text)
        return result

    def _measure(self, name: str, options: Options) -> PrivateMemory:
        with Driver(name, options.start_method) as side:
            memory = PrivateMemory(side("open", self.way, self.nbytes, 1, False))
            side("send", 2 if name == "plain" else 10, sample=memory.sample)
            return memory


Row = TransferRow | AcquireRow | PicklingRow | MemoryRow


def all_rows() -> Iterator[Row]:
    for way in ("result", "argument"):
        for size, nbytes in SIZES.items():
            times_plain = TIMES_PLAIN.get(size, NEVER_SLOWER)
            yield TransferRow(f"{way}-{size}", way, nbytes, times_plain, OF_COPY.get(size))
        yield TransferRow(f"{way}-first-1G", way, GIB, 3.0, is_first=True)
        yield TransferRow(
            f"{way}-prepared-1G", way, GIB, 3.0, OF_PREPARED, is_first=True, is_prepared=True
        )
        yield TransferRow(f"{way}-10000x8K", way, 10_000 * 8 * KIB, 3.0, n_arrays=10_000)
        yield MemoryRow(f"{way}-private-256M", way, 256 * MIB)
    for name, (kind, nbytes, times_plain, of_copy) in KINDS.items():
        yield TransferRow(f"kind-{name}", "result", nbytes, times_plain, of_copy, kind=kind)
    yield PicklingRow("pickling-100000", 100_000)
    for n_live in ACQUIRE_S:
        yield AcquireRow(f"acquire-{n_live}", n_live)


def _plan(nbytes: int, is_first: bool, is_quick: bool) -> tuple[int, Plan]:
    plans = (plan for up_to_nbytes, plan in PLANS.items() if nbytes <= up_to_nbytes)
    numbers = FIRST_PLAN if is_first else next(plans)
    n_pairs, n_rounds, n_messages, n_warm_plain, n_warm_ours = numbers
    if is_quick:
        n_pairs, n_rounds = -(-n_pairs // 2), -(-n_rounds // QUICK_PARTS)
        n_warm_plain = n_warm_plain if nbytes < 256 * MIB else 0
    is_rewarmed = n_messages == 1 and not is_first
    plan = Plan(
        n_rounds, n_messages, n_warm_plain, n_warm_ours, is_first, is_rewarmed, PAIR_BUDGET_S
    )
    return n_pairs, plan


def _available_nbytes() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * KIB if found else 0


def _seconds(batches_s: list[float]) -> str:
    if not batches_s:
        return ""
    median_s = _median(batches_s)
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if median_s * factor >= 1:
            return f"{median_s * factor:.2f} {unit}"
    return f"{median_s * 1e6:.1f} us"


def _median(batches_s: list[float]) -> float:
    return float(np.median(batches_s))


def _named(name: str, arrives: Ratio | None, read: Ratio | None) -> dict[str, float]:
    if arrives is None or read is None:
        return {}
    return {
        name: arrives.of_rounds,
        f"{name}_of_medians": arrives.of_medians,
        f"{name}_read": read.of_rounds,
        f"{name}_read_of_medians": read.of_medians,
    }


def _ratios(arrives: Ratio | None, read: Ratio | None) -> list[str]:
    if arrives is None or read is None:
        return ["", ""]
    return [f"{ratio.of_rounds:.3g} ({ratio.of_medians:.3g})" for ratio in (arrives, read)]


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB"


def _facts() -> dict[str, object]:
    shmem_thp = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}",
        "python": f"{platform.python_version()}, NumPy {np.__version__}",
        "memory": f"{_available_nbytes() // MIB} MiB available",
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "huge pages for shared memory": (
            shmem_thp.read_text().strip() if shmem_thp.exists() else "unknown"
        ),
    }


def _print_line(name: str, cells: list[str], verdict: str) -> None:
    widths = (11, 11, 11, 15, 15, 15, 15, 10)
    padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=False)]
    print(f"{name:21}{' '.join(padded):111}{verdict}", flush=True)


def _run_row(row: Row, options: Options) -> Result:
    other_work, start_s = OtherWork(), time.monotonic()
    try:
        result = row.run(options)
    except SideError as error:
        print(error, file=sys.stderr)
        result = Result(shortfalls=[f"failed: {str(error).splitlines()[0]}"])
    result.values["seconds"] = time.monotonic() - start_s
    result.values["busy_with_others"] = n_cores = other_work.n_cores()
    result.figures |= {
        "n_cores_others": n_cores,
        "verdict": "; ".join(result.shortfalls) or "ok",
    }
    return result


def _run_rows(rows: list[Row], options: Options) -> dict[str, Result]:
    _print_line("", ["", "", "", "times plain:", "", "of np.copyto:", "", "out of"], " cores,")
    columns = ["plain", "oobpickle", "np.copyto", "arrives", "and read", "arrives", "and read"]
    _print_line("row", [*columns, "band"], " others  verdict")
    results: dict[str, Result] = {}
    for row in rows:
        results[row.name] = result = _run_row(row, options)
        others = f"{result.values['busy_with_others']:7.2f}  "
        verdict = "" if options.ours == "plain" else "; ".join(result.shortfalls) or "ok"
        _print_line(row.name, result.cells, others + verdict)
    return results


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a row falls short")
    parser.add_argument("--rows", default="*", help="only the rows that match, as result-*M")
    parser.add_argument("--start-method", default="fork", help="fork, spawn or forkserver")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, no 2 GiB rows")
    parser.add_argument("--batches", type=Path, metavar="FILE", help="write all medians there")
    _figures.add_option(parser)
    parser.add_argument("--null", action="store_true", help="plain against plain: the noise alone")
    parser.add_argument("--side", choices=["plain", "oobpickle"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.null and arguments.check:
        parser.error("--null has nothing to check")
    return arguments


def main() -> int:
    arguments = _parse()
    if arguments.side:
        _driver.main(arguments.side, arguments.start_method)
        return 0
    ours = "plain" if arguments.null else "oobpickle"
    options = Options(arguments.start_method, arguments.quick, ours)
    rows = [row for row in all_rows() if fnmatch.fnmatch(row.name, arguments.rows)]
    if arguments.null:
        rows = [row for row in rows if isinstance(row, TransferRow)]
    if arguments.quick:
        rows = [row for row in rows if getattr(row, "nbytes", 0) <= GIB]
    facts = _facts()
    print(*(f"{name}: {fact}" for name, fact in facts.items()), "", sep="\n")
    start_s = time.monotonic()
    try:
        results = _run_rows(rows, options)
    except MismatchError as error:
        print(error, file=sys.stderr)
        return 2
    short = [name for name, result in results.items() if result.shortfalls]
    print(f"\n{len(rows)} rows in {time.monotonic() - start_s:.0f} s")
    if arguments.batches:
        stored = {name: dataclasses.asdict(result) for name, result in results.items()}
        arguments.batches.write_text(json.dumps({"facts": facts, "rows": stored}, indent=1))
    figures = {name: result.figures for name, result in results.items()}
    _figures.write(arguments.json, figures, libraries=["pandas", "pyarrow"])
    if not arguments.null:
        print(f"{len(short)} short of their bound: {', '.join(short) or 'none'}")
    return 1 if arguments.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
