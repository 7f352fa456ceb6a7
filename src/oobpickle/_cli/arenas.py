"""The command ``doctor --pid``: the arenas of a running process, without disturbing it.

**What.** `look_at` prints who has joined, what each process has, which messages nobody has read
yet, and the statistics. Exit code 0, or 1 if something is worth a look.

**How it works.** `_memory.onlooker` reads the files; what a process is and whether it is stopped is
asked of ``/proc``. Nothing is joined, locked or written.

**Lifetime.** One look. The processes go on meanwhile.

**When it cannot.** A `CommandError`: no such process, one that may not be looked into, or one
without an arena.
"""

from __future__ import annotations

import dataclasses
import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from oobpickle import _native
from oobpickle._cli.failure import CommandError
from oobpickle._cli.output import table_lines
from oobpickle._errors import ArenaError, format_nbytes
from oobpickle._explain.text import WIDTH, cut
from oobpickle._memory import onlooker, pipes
from oobpickle._memory.reclaim import pid_namespace

_MOST_ROWS: Final = 30
_MOST_CHANNELS: Final = 5
_HEAD: Final = ("process", "state", "writes", "has read", "holds", "refs", "command")


def look_at(pid: int, *, as_json: bool = False) -> int:
    """Print what is seen of the arenas of a process; return the exit code."""
    shown = [_Shown(one, pid) for one in _seen(pid)]
    if as_json:
        print(json.dumps({"pid": pid, "arenas": [one.as_json() for one in shown]}, indent=1))
    else:
        print("\n\n".join("\n".join(one.lines()) for one in shown))
    return int(any(one.worth_a_look for one in shown))


def _seen(pid: int) -> list[onlooker.Seen]:
    if _native.core is None:
        raise CommandError(f"oobpickle._core is not here ({_native.reason}); install a wheel")
    try:
        found = onlooker.arenas_of(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise CommandError(f"there is no process {pid}") from None
    except PermissionError:
        raise CommandError(
            f"process {pid} may not be looked into: it is user {_user_of(pid)}'s, this is user "
            f"{os.geteuid()}; run this as that user, or as root (the right is that of ptrace(2))"
        ) from None
    except ArenaError as error:
        raise CommandError(f"the arena of process {pid} cannot be read: {error}") from error
    if not found:
        raise CommandError(
            f"process {pid} has ended, and its parent has not waited for it"
            if _state_of(pid) == "Z"
            else f"process {pid} has no arena: it has not come to its block yet or has left it, "
            "was started by another program, or has closed descriptors that are not its own"
        )
    return found


def _user_of(pid: int) -> str:
    try:
        return str(os.stat(f"/proc/{pid}").st_uid)
    except OSError:
        return "?"


def _state_of(pid: int) -> str:
    """Return the letter of proc(5); empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _command_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    words[0] = os.path.basename(words[0])
    text = " ".join(words).strip()
    return "".join(one if one.isprintable() else "?" for one in text)


class _Process:
    """A participant, and what /proc says of it."""

    def __init__(self, seen: onlooker.Participant) -> None:
        self.seen = seen
        is_here = seen.pid_namespace == pid_namespace()
        self.command = "(in another pid namespace)" if seen.pid else "(forked a moment ago)"
        if is_here:
            self.command = "" if seen.is_alive is False else _command_of(seen.pid)
        is_stopped = is_here and _state_of(seen.pid) in ("T", "t")
        self.state = {None: "unknown", False: "DEAD", True: "alive"}[seen.is_alive]
        if seen.is_alive and is_stopped:
            self.state = "STOPPED"

    def cells(self) -> tuple[str, ...]:
        one = self.seen
        sizes = [format_nbytes(n) if n else "-" for _, n in (one.leased, one.read, one.held)]
        return str(one.pid), self.state, *sizes, f"{one.n_references:,}"

    def as_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.seen)
        fields.pop("is_alive")
        for name in ("leased", "read", "held"):
            n, nbytes = fields[name]
            fields[name] = {"n_blocks": n, "nbytes": nbytes}
        return {**fields, "state": self.state.lower(), "command": self.command}


class _Shown:
    """An arena, with what is to be said about it."""

    def __init__(self, seen: onlooker.Seen, pid: int) -> None:
        self._seen, self._pid = seen, pid
        self._processes = [_Process(one) for one in seen.participants]
        unread = sorted(seen.unread.items(), key=lambda one: -one[1][1])
        self._unread = [(channel, *amount, _readers(channel)) for channel, amount in unread]
        self.worth_a_look = list(self._worth_a_look())

    def _worth_a_look(self) -> Iterator[str]:
        for one in self._processes:
            pid, had = one.seen.pid, format_nbytes(one.seen.nbytes)
            if one.state == "STOPPED":
                has_it = (
                    " It has the lock of the table: the others wait two seconds for it, and send "
                    "in-band." * one.seen.has_the_lock
                )
                yield f"process {pid} is stopped; kill -CONT {pid} lets it go on.{has_it}"
            if one.state == "DEAD" and one.seen.nbytes:
                yield (
                    f"process {pid} has ended and had {had}, which come back when somebody needs "
                    "room."
                )
        for channel, n, nbytes, readers in self._unread:
            if channel and readers == []:
                yield (
                    f"{_messages(n, nbytes)} in {pipes.channel_name(channel)}: no process can read "
                    "there any more."
                )
        if self._seen.statistics.n_quarantined:
            yield "blocks are damaged: some process writes where it should not."

    def lines(self) -> Iterator[str]:
        """Yield the lines for a terminal."""
        seen, n = self._seen, len(self._processes)
        n_dead = sum(one.state == "DEAD" for one in self._processes)
        yield (
            f"arena {seen.identity.hex()[:8]}: {n} process{'es' * (n != 1)}"
            + f", {n_dead} of them dead" * bool(n_dead)
            + "; its block was left" * seen.is_closed
        )
        if self._pid not in [one.seen.pid for one in self._processes if one.command]:
            yield f"process {self._pid} has its files, and has not joined under this number"
        yield ""
        yield from self._rows()
        yield ""
        verdict, *others = str(seen.statistics).splitlines()
        for line in (verdict, *self._ended(n_dead), *self._waiting(), *others):
            yield from _wrapped(line)
        for text in self.worth_a_look:
            yield ""
            yield from textwrap.wrap(f"look: {text}", WIDTH, subsequent_indent="  ")

    def _ended(self, n_dead: int) -> Iterator[str]:
        if n := self._seen.n_gone + n_dead:
            yield (
                f"  ended    {n:,} process{'es' * (n != 1)} that had joined. A Pool replaces a "
                "worker that was killed, and waits for its result for ever; an executor of "
                "concurrent.futures raises BrokenProcessPool"
            )

    def _waiting(self) -> Iterator[str]:
        for channel, n, nbytes, readers in self._unread[:_MOST_CHANNELS]:
            yield f"  unread   {_messages(n, nbytes)} in {_where(channel, readers)}"
        if n_more := len(self._unread[_MOST_CHANNELS:]):
            yield f"  unread   and in {n_more} more channels"

    def _rows(self) -> list[str]:
        first = sorted(self._processes, key=lambda one: -one.seen.nbytes)[:_MOST_ROWS]
        rows = [one.cells() for one in first]
        lines = table_lines(_HEAD[:-1], rows, n_left=2)
        texts = [_HEAD[-1], *(one.command for one in first)]
        width = max(map(len, lines))
        shown = [
            f"{line:{width}}  {cut(text, WIDTH - width - 2)}".rstrip()
            for line, text in zip(lines, texts, strict=True)
        ]
        n_more = len(self._processes) - len(first)
        return [*shown, f"{n_more} more, which have less"] if n_more else shown

    def as_json(self) -> dict[str, Any]:
        """Return everything, for `json`."""
        seen = self._seen
        return {
            "identity": seen.identity.hex(),
            "is_closed": seen.is_closed,
            "n_gone": seen.n_gone,
            "participants": [one.as_json() for one in self._processes],
            "unread": [
                {
                    "channel": pipes.channel_name(channel) if channel else None,
                    "n_messages": n,
                    "nbytes": nbytes,
                    "readers": readers,
                }
                for channel, n, nbytes, readers in self._unread
            ],
            "statistics": dataclasses.asdict(seen.statistics),
            "look": self.worth_a_look,
        }


def _readers(channel: int) -> list[int] | None:
    """Return the processes that can read from a channel; ``None`` if some are hidden."""
    if not channel:
        return None
    try:
        found, hidden = pipes.readers(channel)
    except OSError:
        return None
    return sorted(found) if found or not hidden else None


def _where(channel: int, readers: list[int] | None) -> str:
    if not channel:
        return "a channel that is not known"
    pids = ", ".join(map(str, readers or ()))
    return pipes.channel_name(channel) + f", which can be read by {pids}" * bool(pids)


def _messages(n: int, nbytes: int) -> str:
    return f"{n:,} message{'s' * (n != 1)} ({format_nbytes(nbytes)})"


def _wrapped(line: str) -> list[str]:
    """Return a line of `Statistics` in several, if it is too long."""
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * 11) or [""]
