"""The rows of ``scaling.py``: which number is varied, and what is timed at each step.

What
    `ROWS` has one function for each row; it yields the row's `Series`.

How it works
    A row starts the sides that it needs (``_scaling_side.py``), fills them step by step, and times
    batches. Where there is something to compare with, both take turns within a round.

Lifetime
    The sides end with the row.

When it cannot
    Steps for which there is too little memory are left out; the series says so in its facts. What
    goes wrong in a side is a `SideError`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from _growth import Series
from _harness import Driver
from transfer import _available_nbytes

_BUDGET_S = 4.0  # for the batches of one step, once there are two
_TOTAL_NBYTES = 80_000_000
_OUT_OF_BAND_NBYTES = 200_000
_LEASE_NBYTES = 8 << 10  # a page, and the objects that a lease consists of
_COPIES_IN_MEMORY = 7
#: Of what looks at each row of a table once: 8 bytes of each of 100,000 rows lie in the cache of a
#: core, those of a million do not.
_SCAN_BOUND = 3.0
_MOST_OF_PLAIN = 1.2  # what comes from noise between two processes; transfer.py is stricter
_PROCESSES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Options:
    is_quick: bool

    @property
    def n_batches(self) -> int:
        return 3 if self.is_quick else 7

    def decades(self, last: int, quick_last: int | None = None) -> list[int]:
        """1, 10, 100, ... up to the last, or to the quick last of a quick run."""
        last = min(last, quick_last or last) if self.is_quick else last
        return [10**k for k in range(round(math.log10(last)) + 1)]


def _side(name: str) -> Driver:
    return Driver(name, "fork", "scaling.py")


def _batches(options: Options, call: Callable[[], float]) -> list[float]:
    """Call it several times; if that takes long, twice."""
    batches_s: list[float] = []
    start_s = time.monotonic()
    while len(batches_s) < options.n_batches:
        batches_s.append(call())
        if len(batches_s) >= 2 and time.monotonic() - start_s > _BUDGET_S:
            break
    return batches_s


def _in_turn(
    options: Options, ours: Callable[[], float], plain: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Time both in rounds; who goes first takes turns."""
    ours_s: list[float] = []
    plain_s: list[float] = []

    def one_round() -> float:
        order = [(ours, ours_s), (plain, plain_s)]
        for call, batches_s in order if len(ours_s) % 2 else reversed(order):
            batches_s.append(call())
        return ours_s[-1]

    _batches(options, one_round)
    return ours_s, plain_s


# --- the arrays of one message


def _mean_arrival_s(side: Driver, n_messages: int) -> float:
    return sum(arrived_s for arrived_s, _ in side.send(n_messages)) / n_messages


def _arrays(name: str, nbytes: int, last: int, options: Options) -> Iterator[Series]:
    """A result of n arrays, of `nbytes` each, or of 80 MB together if that is 0."""
    series = Series(name, "arrays", "plain", is_each=True)
    for n in options.decades(last, 10_000):
        total = n * nbytes or _TOTAL_NBYTES
        if _available_nbytes() < _COPIES_IN_MEMORY * total:
            series.facts["left out"] = f"{n} arrays and more: too little memory"
            break
        k = max(1, min(30, 1000 // n, 100_000_000 // total))
        with _side("plain") as plain, _side("oobpickle") as ours:
            for side in (plain, ours):
                side("open", "result", total, n, False)
                side("verify")
                side.send(2 + k // 5)
            calls = [partial(_mean_arrival_s, side, k) for side in (ours, plain)]
            series.add(n, *_in_turn(options, *calls))
            if ours("counts")[1]:
                raise ValueError(f"{name}: messages of {n} arrays fell back")
    yield series


# --- the blocks of the arena


def _most_blocks(options: Options) -> int:
    """A million blocks; ten times fewer where there is too little memory, or time."""
    room = max(1, _available_nbytes() // _LEASE_NBYTES)
    return int(10 ** min(5 if options.is_quick else 6, int(math.log10(room))))


_BESIDE = {  # operation: how many in a batch
    "acquire": 200,
    "message": 50,
    "statistics": 10,
    "look": 5,
    "fork": 16,  # every 16th participant looks for dead ones
}


def _leased(options: Options) -> Iterator[Series]:
    """Operations beside n leased blocks."""
    beside = {name: Series(f"leased-{name}", "leased blocks") for name in _BESIDE}
    beside["fork"].reference = "bare fork"
    for name in ("statistics", "look", "fork"):
        beside[name].is_each = True
    for name in ("statistics", "look"):
        beside[name].bound = _SCAN_BOUND
    lease = Series("leased-lease", "leased blocks", "pages alone", is_each=True)
    release = Series("leased-release", "leased blocks", is_each=True)
    with _side("oobpickle") as side:
        n_before = 0
        for n in options.decades(_most_blocks(options)):
            with _side("oobpickle") as other:
                pages_s = n * other("pages", n)
            lease.add(n, [n * side("lease", n)], [pages_s])
            for name, k in _BESIDE.items():
                ours_s = _batches(options, partial(side, "time", name, k))
                bare_s = [side("time", "bare fork", 8)] if name == "fork" else []
                beside[name].add(n, ours_s, bare_s)
            n_before = n
        release.add(n_before, [n_before * side("free")])
    yield from (lease, *beside.values(), release)


def _unread(options: Options) -> Iterator[Series]:
    """Messages in flight that nobody can read any more; then their blocks, free."""
    each = {
        name: Series(f"unread-{name}", "messages in flight", is_each=True)
        for name in ("send", "reclaim", "trim")
    }
    flat = {
        (state, name): Series(f"{state}-{name}", f"{state} blocks")
        for state in ("unread", "free")
        for name in ("acquire", "message")
    }
    room = Series("free-make-room", "free blocks", is_each=True, bound=_SCAN_BOUND)
    with _side("oobpickle") as side:
        for n in options.decades(min(_most_blocks(options), 100_000)):
            each["send"].add(n, [n * side("send_unread", n)])
            for name in ("acquire", "message"):
                flat["unread", name].add(n, _batches(options, partial(side, "time", name, 50)))
            each["reclaim"].add(n, [side("reclaim", n)])
            for name in ("acquire", "message"):
                flat["free", name].add(n, _batches(options, partial(side, "time", name, 50)))
            room.add(n, _batches(options, partial(side, "make_room")))
            each["trim"].add(n, [side("trim")])
    yield from (*each.values(), *flat.values(), room)


def _held(options: Options) -> Iterator[Series]:
    """Received arrays that are kept, and a fork that makes them ordinary memory."""
    names = ("receive", "drop", "fork", "drop-after-fork")
    each = {name: Series(f"held-{name}", "held arrays", is_each=True) for name in names}
    message = Series("held-message", "held arrays")
    with _side("page") as side:
        # Beyond a quarter of vm.max_map_count what is received is copied, and no block is held.
        for n in options.decades(10_000):
            for _ in range(2):
                receive_s = n * side("receive", n)
                side("drop")
            each["receive"].add(n, [receive_s])
            side("receive", n)
            message.add(n, _batches(options, partial(side, "time", "message", 50)))
            each["drop"].add(n, [n * side("drop")])
            fork_s, drop_s = [], []
            for _ in range(2 if n > 1000 else options.n_batches):
                side("receive", n)
                fork_s.append(side("time", "fork", 1))
                drop_s.append(n * side("drop"))
            each["fork"].add(n, fork_s)
            each["drop-after-fork"].add(n, drop_s)
    yield from (*each.values(), message)


def _dead(options: Options) -> Iterator[Series]:
    """Processes that were killed: the blocks of one, and many of them beside many blocks."""
    blocks = Series("dead-blocks", "blocks of a dead process", is_each=True)
    with _side("oobpickle") as side:
        for n in options.decades(100_000, 10_000):
            repeats = 1 if n > 1000 else options.n_batches
            blocks.add(n, [side("bury", 1, n) for _ in range(repeats)])
    yield blocks
    n_live = 10_000 if options.is_quick else 100_000
    processes = Series("dead-processes", f"dead processes, {n_live} blocks", is_each=True)
    with _side("oobpickle") as side:
        side("lease", n_live)
        for n in (1, 2, 4, 8, 15):  # whoever joins as the 17th reaps before we do
            processes.add(n, _batches(options, partial(side, "bury", n, 10)))
    yield processes


# --- many processes


def _crowd(options: Options) -> Iterator[Series]:
    """What asks every process: looking for messages that nobody can read, and the statistics."""
    look, statistics = (
        Series(f"crowd-{name}", "idle processes", is_each=True) for name in ("look", "statistics")
    )
    for n in (1, 4, 16, 64) if options.is_quick else (1, 4, 16, 64, 256):
        with _side("oobpickle") as side:
            side("crowd", n)
            look.add(n, _batches(options, partial(side, "time", "look", 2)))
            statistics.add(n, _batches(options, partial(side, "time", "statistics", 10)))
    yield from (look, statistics)


def _workers(options: Options) -> Iterator[Series]:
    """Messages between n processes in pairs; and steps on the table with nothing else to do."""
    messages = Series("workers-messages", "processes", "plain")
    steps = Series("workers-steps", "processes")
    seconds, rounds = (0.3, 1) if options.is_quick else (1.0, 2)
    for n in _PROCESSES:
        with _side("oobpickle") as ours, _side("plain") as plain:
            ours_s: list[float] = []
            plain_s: list[float] = []
            for _ in range(rounds):
                load = ours("ping_pong", n, _OUT_OF_BAND_NBYTES, seconds)
                ours_s.append(load["each_s"])
                if n > 1:  # alone it could not send what does not fit into the pipe
                    plain_s.append(plain("ping_pong", n, _OUT_OF_BAND_NBYTES, seconds)["each_s"])
            messages.add(n, ours_s, plain_s)
            loads = [ours("take_blocks", n, seconds) for _ in range(rounds)]
            steps.add(n, [load["each_s"] for load in loads])
    yield from (messages, steps)


# --- the rate of messages


def _rate(channel: str, options: Options) -> Iterator[Series]:
    """One message after another in one direction."""
    series = Series(f"rate-{channel}", "bytes of a message", "plain", is_each=True)
    series.most_of_reference = _MOST_OF_PLAIN
    with _side("plain") as plain, _side("oobpickle") as ours:
        for nbytes in (1_000, 10_000, 100_000, 200_000, 1_000_000):
            k = 200 if nbytes >= 100_000 else 500
            calls = [partial(side, "stream", channel, nbytes, k) for side in (ours, plain)]
            series.add(nbytes, *_in_turn(options, *calls))
    yield series


ROWS: dict[str, Callable[[Options], Iterator[Series]]] = {
    "arrays-80MB": partial(_arrays, "arrays-80MB", 0, 100_000),
    "arrays-1KB": partial(_arrays, "arrays-1KB", 1_000, 100_000),
    "arrays-64KB": partial(_arrays, "arrays-64KB", 65_536, 10_000),
    "leased": _leased,
    "unread": _unread,
    "held": _held,
    "dead": _dead,
    "crowd": _crowd,
    "workers": _workers,
    **{f"rate-{channel}": partial(_rate, channel) for channel in ("pipe", "queue", "pool")},
}
