"""Kills at fault points: ``at_points.py METHOD N_HITS SEED WITHIN_S POINT...``.

One arena, two busy workers, and one victim after the other, until each point was hit so many times
by each of three signals in turn. Prints one line of JSON for each point, and one for the end.
"""

import functools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.connection import wait

import inside
import victims
from inside import message
from points import OF_OLDER, ONCE
from survivors import Survivors
from victims import Armed

SIGNALS = ("KILL", "TERM", "SEGV")
N_AT_A_TIME = 2
LATE_S = 60


class Victim:
    """A process that is to die, and our ends of its channels."""

    def __init__(self, survivors, point, fault):
        self.point, self.fault = point, fault
        self.expected = -signal.Signals[f"SIG{fault.rpartition(':')[2]}"]
        there, self.to = survivors.pipe()
        self.of, back = survivors.pipe()
        self.clogged, clog = survivors.pipe()
        self.process = survivors.context.Process(
            target=victims.live,
            args=(fault, there, back, clog),
            name=Armed("victim", fault),
            daemon=True,
        )
        with inside.faulty_children(fault):
            self.process.start()
        self.started_s = time.monotonic()
        for end in (there, back, clog):
            end.close()
        self.kept = []

    def send(self, seed):
        try:
            for n in range(3):
                self.to.send(message(seed + n, 250_000))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self, survivors):
        """Take one message; tell whether there may be more."""
        try:
            received = self.of.recv()
        except (EOFError, OSError):  # the rest of it was never written
            return False
        self.kept = [survivors.verify(received), *self.kept[:3]]
        return True

    def is_late(self):
        return time.monotonic() - self.started_s > LATE_S

    def bury(self, survivors):
        """Look at how it ended, and take what it had sent."""
        self.process.join(inside.TOKEN_S)
        found = self.process.exitcode
        assert found == self.expected, f"{self.fault}: the victim ended with {found}"
        while self.receive(survivors):
            pass
        for one in self.kept:
            inside.verify(one)
        self._look_into_the_clogged()
        self.process.close()
        for end in (self.to, self.of, self.clogged):
            end.close()

    def _look_into_the_clogged(self):
        if self.point != "victim.piping":
            return
        assert self.clogged.poll(), "nothing was written"
        try:
            self.clogged.recv()
        except (EOFError, OSError):
            return
        raise AssertionError("all of the message was written")


def kill_at(survivors, point, n_hits, chance, first):
    """Kill so many victims at a point; return how many died by each signal."""
    hits = dict.fromkeys(SIGNALS, 0)
    running, n_started = [], 0
    while sum(hits.values()) < n_hits:
        while len(running) < N_AT_A_TIME and n_started < n_hits:
            name = SIGNALS[(first + n_started) % len(SIGNALS)]
            hit = 1 if point in ONCE else chance.randint(1, 3)
            running.append(Victim(survivors, point, f"{point}:{hit}:{name}"))
            running[-1].send(100 * n_started)
            n_started += 1
        ready = wait([end for v in running for end in (v.of, v.process.sentinel)], timeout=1)
        for victim in list(running):
            if victim.process.sentinel in ready:
                victim.bury(survivors)
                running.remove(victim)
                hits[signal.Signals(-victim.expected).name[3:]] += 1
            elif victim.of in ready:
                victim.receive(survivors)
            elif victim.is_late():
                os.kill(victim.process.pid, signal.SIGUSR1)
                raise AssertionError(f"{victim.fault}: not met within {LATE_S} s")
    return hits


class Nursery:
    """A process older than the arena that forks others; for what only those do."""

    def __init__(self):
        self.read, self._write = multiprocessing.Pipe(duplex=False)
        self._orders, self._order = os.pipe()
        self._answers, self._answer = os.pipe()
        self.pid = inside.fork(self._serve)

    def _serve(self):
        self._write.close()
        while (fault := os.read(self._orders, 200).decode()) != "stop":
            pid = inside.fork(self._receive, fault=fault)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(self._answer, f"{code}\n".encode())

    def _receive(self):
        victims.no_core()
        inside.verify(self.read.recv())
        raise AssertionError("it did not attach")

    def kill_at(self, point, n_hits, chance, first):
        hits = dict.fromkeys(SIGNALS, 0)
        for n in range(n_hits):
            name = SIGNALS[(first + n) % len(SIGNALS)]
            os.write(self._order, f"{point}:1:{name}".encode())
            self._write.send(message(n, chance.choice((100_000, 2_000_000))))
            code = int(os.read(self._answers, 100))
            assert code == -signal.Signals[f"SIG{name}"], f"{point}: {code}"
            hits[name] += 1
        return hits

    def close(self):
        os.write(self._order, b"stop")  # no end of file: the workers have inherited the pipe
        inside.reap(self.pid)
        for fd in (self._order, self._orders, self._answers, self._answer):
            os.close(fd)
        self.read.close()
        self._write.close()


def main(method, n_hits, seed, within_s, *names):
    until = time.monotonic() + float(within_s)
    nursery = Nursery() if method == "fork" else None
    survivors = Survivors(method)
    for place, point in enumerate(names):
        if time.monotonic() > until:
            break
        start_s, chance = time.monotonic(), random.Random(f"{seed} {point}")
        older = nursery if method == "fork" and point in OF_OLDER else None
        kill = older.kill_at if older else functools.partial(kill_at, survivors)
        hits = kill(point, int(n_hits), chance, place)
        survivors.look()
        print(
            json.dumps(
                {"point": point, "hits": hits, "seconds": round(time.monotonic() - start_s, 1)}
            ),
            flush=True,
        )
    if nursery:
        nursery.close()
    statistics = survivors.finish()
    print(json.dumps({"n_verified": survivors.n_verified, **summary(statistics)}), flush=True)


def summary(statistics):
    """Return what the statistics of an arena say of a run, for its last line."""
    return {
        "n_out_of_band": statistics.n_messages_out_of_band,
        "n_reclaimed": statistics.n_reclaimed,
        "fallbacks": {k: v.n_messages for k, v in statistics.fallbacks.items()},
        "nbytes_left": sum(statistics.nbytes.values()) + statistics.nbytes_resident,
    }


if __name__ == "__main__":
    victims.no_core()
    main(*sys.argv[1:])
