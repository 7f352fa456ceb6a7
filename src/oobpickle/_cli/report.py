"""The report of a run: one HTML page, with what was sent over time.

**What.** `Recorder` looks at an arena's statistics again and again, and writes the page.

**How it works.** A thread looks ten times a second, later less often, so that a long run has as
many points as a short one. It is never within a look while the process forks. Plots are SVG. What
each process has sent is in its row of the arena's table, where it is counted anyway: to look at it
costs messages nothing.

**Lifetime.** The thread ends with the block.

**When it cannot.** What is between two looks is seen only in the sums. Messages are not counted by
channel, only by who has sent them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from oobpickle._arena import Arena
from oobpickle._cli.failure import CommandError
from oobpickle._errors import format_nbytes, format_seconds
from oobpickle._fallback import REASONS, fallbacks_of
from oobpickle._foreign import ignoring
from oobpickle._hook import installed
from oobpickle._memory.table import Table
from oobpickle._statistics import N_LOADED, N_MESSAGES, NBYTES, Statistics

_PAUSE_S: Final = 0.1
_MOST_POINTS: Final = 1000
_WIDTH: Final = 640
_HEIGHT: Final = 160
_MARGIN: Final = 8
_MOST_ROWS: Final = 40
Point = tuple[float, Statistics]
#: By incarnation: pid, and what `_sent` returned when the process was looked at last.
Processes = dict[int, tuple[int, list[int]]]


class Recorder:
    """Takes the statistics of an arena while its block is open.

    Parameters
    ----------
    arena : Arena
        What to look at.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._looking = threading.Lock()
        self._ended = threading.Event()
        self._start = time.monotonic()
        self._pause_s = _PAUSE_S
        self.points: list[Point] = []
        self.processes: Processes = {}
        self._thread = threading.Thread(target=self._look_again, daemon=True, name="oobpickle run")
        self._pid = os.getpid()
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork,
            after_in_child=self._after_fork,
        )

    def __enter__(self) -> Recorder:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() != self._pid:  # a child that the program has forked, at its end
            return
        self._ended.set()
        self._thread.join()
        self._look()

    def _before_fork(self) -> None:
        self._looking.acquire()

    def _after_fork(self) -> None:
        self._looking.release()

    def _look(self) -> None:
        with self._looking:
            self.points.append((time.monotonic() - self._start, self._arena.statistics()))
            self._look_at_processes()

    def _look_at_processes(self) -> None:
        hook = installed.current
        if hook is None or hook.arena.identity != self._arena.identity:
            return  # uninstalled meanwhile
        with ignoring(OSError):  # the program has closed its descriptor
            joined = Table(hook.arena.descriptors[1]).joined
            found = {one.incarnation: (one.pid, _sent(one.counters)) for one in joined}
            self.processes.update(found)

    def _look_again(self) -> None:
        while not self._ended.wait(self._pause_s):
            self._look()
            if len(self.points) > _MOST_POINTS:
                del self.points[1::2]
                self._pause_s *= 2

    def write(self, path: Path, arguments: Sequence[str]) -> None:
        """Write the page; in a child that the program has forked nothing.

        Raises
        ------
        CommandError
            If it cannot be written.
        """
        if os.getpid() != self._pid:
            return
        try:
            text = page(self.points, arguments, self.processes)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"cannot write {path}: {error.strerror}") from error


def page(
    points: Sequence[Point], arguments: Sequence[str], processes: Processes | None = None
) -> str:
    """Return the page as one piece of HTML that needs nothing else."""
    took_s, last = points[-1]
    title = escape(" ".join(arguments))
    plots = "".join(
        _plot(name, [(at, value(one)) for at, one in points], form) for name, value, form in _PLOTS
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{format_seconds(took_s)} with oobpickle installed</p><pre>{escape(str(last))}</pre>"
        f"{plots}{_ways(last)}{_senders(last, processes or {})}{_fallbacks(last)}</body></html>\n"
    )


_STYLE: Final = (
    "body{font-family:sans-serif;max-width:45em;margin:2em auto}table{border-collapse:collapse}"
    "td,th{padding:.2em 1em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{display:block}"
    "polyline{fill:none;stroke:#1f5fa8;stroke-width:2}rect{fill:none;stroke:#ccc}"
)
_PLOTS: Final[tuple[tuple[str, Callable[[Statistics], int], Callable[[int], str]], ...]] = (
    ("messages out of band", lambda one: one.n_messages_out_of_band, "{:,}".format),
    ("bytes out of band", lambda one: one.nbytes_out_of_band, format_nbytes),
    ("messages in-band", lambda one: one.n_fallbacks, "{:,}".format),
    ("memory with pages", lambda one: one.nbytes_resident, format_nbytes),
    ("bytes on disk", lambda one: one.nbytes_on_disk, format_nbytes),
)


def _plot(name: str, points: Sequence[tuple[float, int]], form: Callable[[int], str]) -> str:
    most, end = max(value for _, value in points), max(points[-1][0], 1e-9)
    if most == 0:
        return ""
    width, height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    line = " ".join(
        f"{_MARGIN + width * at / end:.1f},{_HEIGHT - _MARGIN - height * value / most:.1f}"
        for at, value in points
    )
    return (
        f"<h2>{escape(name)}</h2><p>up to {form(most)} in {format_seconds(end)}</p>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(name)}">'
        f'<rect x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}"/>'
        f'<polyline points="{line}"/></svg>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _ways(last: Statistics) -> str:
    rows = [
        ("buffers, out of band", f"{last.n_buffers_out_of_band:,}", last.nbytes_buffers),
        ("pickle streams, out of band", f"{last.n_messages_out_of_band:,}", last.nbytes_stream),
        ("large messages, through the pipe", f"{last.n_fallbacks:,}", last.nbytes_fallbacks),
    ]
    cells = [(what, n, format_nbytes(nbytes)) for what, n, nbytes in rows]
    return f"<h2>what went which way</h2>{_table(('what', 'number', 'bytes'), cells)}"


def _senders(last: Statistics, processes: Processes) -> str:
    """Return who has sent how much; what was counted after the last look at who has ended, too."""
    found = [(str(pid), sent) for pid, sent in processes.values()]
    found.sort(key=lambda one: -one[1][1] - one[1][3])
    sums = [sum(column) for column in zip(*(sent for _, sent in found), strict=True)]
    if not any(sums):
        return ""
    shown, others = found[:_MOST_ROWS], found[_MOST_ROWS:]
    if others:
        rest = [sum(column) for column in zip(*(sent for _, sent in others), strict=True)]
        shown.append((f"{len(others)} others", rest))
    total = [
        *(last.n_messages_out_of_band, last.nbytes_out_of_band),
        *(last.n_fallbacks, last.nbytes_fallbacks, last.n_messages_loaded),
    ]
    unseen = [max(0, a - b) for a, b in zip(total, sums, strict=True)]
    if any(unseen):
        shown.append(("ended before a look", unseen))
    head = ("process", "sent out of band", "bytes", "large, in-band", "bytes", "loaded")
    rows = [
        (who, f"{n:,}", format_nbytes(nbytes), f"{k:,}", format_nbytes(more), f"{loaded:,}")
        for who, (n, nbytes, k, more, loaded) in shown
    ]
    return f"<h2>messages by process</h2>{_table(head, rows)}"


def _sent(counters: Sequence[int]) -> list[int]:
    """Return messages and bytes out of band, large ones in-band, and messages that were loaded."""
    fallbacks = fallbacks_of(counters).values()
    in_band = sum(one.n_messages for one in fallbacks), sum(one.nbytes for one in fallbacks)
    return [counters[N_MESSAGES], counters[NBYTES], *in_band, counters[N_LOADED]]


def _fallbacks(last: Statistics) -> str:
    if not last.fallbacks:
        return ""
    rows = [
        (reason, f"{one.n_messages:,}", format_nbytes(one.nbytes), REASONS[reason])
        for reason, one in last.fallbacks.items()
    ]
    return f"<h2>fallbacks</h2>{_table(('reason', 'messages', 'bytes', 'what to do'), rows)}"
