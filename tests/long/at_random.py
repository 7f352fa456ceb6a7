"""Kills at random moments: ``at_random.py METHOD N_KILLS SEED WITHIN_S``.

One arena, two busy workers, and pairs of processes of which one sends to the other until one of the
two, or both, are killed. Who is left must find the end of its channel, with nothing wrong in what
came before, and exit with 0. Prints lines of JSON.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time

import inside
import victims
from at_points import SIGNALS, summary
from inside import message, verify
from survivors import Survivors

from oobpickle._hook import installed

N_AT_A_TIME = 2
LONGEST_LIFE_S = 0.04
LOOK_EVERY = 50


def send(report, put, get, seed):
    """Send messages of all sizes until nobody reads them any more."""
    victims.no_core()
    get.close()
    chance, arena = random.Random(seed), installed.current.arena
    report.send(0)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for n in range(1 << 30):
            put.send(_next_message(chance, n))
            if chance.random() < 0.05:
                arena.trim()
            if chance.random() < 0.05:
                pid = os.fork()
                if pid == 0:
                    os._exit(0)
                os.waitpid(pid, 0)
    report.send(0)


def _next_message(chance, n):
    if chance.random() < 0.2:
        return [message(n + k, 3_000) for k in range(60)]
    if chance.random() < 0.1:
        return [message(n, 6_000_000), message(n + 1, 100_000)]
    return [message(n, chance.choice((80_000, 300_000, 1_500_000)))]


def receive(report, get, put, seed):
    """Receive, verify and hold messages until there are no more; say how many there were."""
    victims.no_core()
    put.close()
    chance, held, n_verified = random.Random(seed), [], 0
    report.send(0)
    with contextlib.suppress(EOFError, OSError):  # what was half written when its sender died
        while True:
            parts = get.recv()
            for one in parts:
                verify(one)
            n_verified += len(parts)
            held = [*held[-chance.randrange(1, 5) :], parts]
            for one in held[0]:
                verify(one)
    report.send(n_verified)


class Pair:
    """A sender and a receiver, and when which of them is to die."""

    def __init__(self, survivors, chance):
        read, write = survivors.pipe()
        reports = survivors.pipe(), survivors.pipe()
        self.reports = [ours for ours, _ in reports]
        self.processes = []
        # Each closes the end that it has not got to use: a forked one has inherited it.
        for run, (_, theirs), ends in (
            (send, reports[0], (write, read)),
            (receive, reports[1], (read, write)),
        ):
            self.processes.append(
                survivors.context.Process(
                    target=run, args=(theirs, *ends, chance.random()), daemon=True
                )
            )
            self.processes[-1].start()
            theirs.close()
        read.close()
        write.close()
        self.dying = chance.choice(((0,), (1,), (0,), (1,), (0, 1)))
        self.signals = [chance.choice(SIGNALS) for _ in self.dying]
        # Some while they start.
        self.at_s = None if chance.random() < 0.9 else time.monotonic() + chance.uniform(0, 0.3)
        self.chance = chance

    def is_due(self):
        """Tell whether it is time to kill; both have said that they are at work."""
        if self.at_s is None and all(report.poll() for report in self.reports):
            self.at_s = time.monotonic() + self.chance.uniform(0, LONGEST_LIFE_S)
        return self.at_s is not None and time.monotonic() >= self.at_s

    def kill(self):
        """Kill; return the signals, and how many messages the other one has verified."""
        for at, name in zip(self.dying, self.signals, strict=True):
            os.kill(self.processes[at].pid, signal.Signals[f"SIG{name}"])
        n_verified = 0
        for at, process in enumerate(self.processes):
            process.join(inside.TOKEN_S)
            if at in self.dying:
                expected = -signal.Signals[f"SIG{self.signals[self.dying.index(at)]}"]
            else:
                expected = 0
                n_verified += self._last_report(at)
            assert process.exitcode == expected, (process, expected)
            process.close()
            self.reports[at].close()
        return self.signals, n_verified

    def _last_report(self, at):
        found = 0
        with contextlib.suppress(EOFError):
            while True:
                found = self.reports[at].recv()
        return found


def main(method, n_kills, seed, within_s):
    until, n_kills = time.monotonic() + float(within_s), int(n_kills)
    survivors, chance = Survivors(method), random.Random(seed)
    kills, pairs, n_rounds = dict.fromkeys(SIGNALS, 0), [], 0
    roles = {"sender": 0, "receiver": 0}
    while sum(kills.values()) < n_kills and time.monotonic() < until:
        while len(pairs) < N_AT_A_TIME:
            pairs.append(Pair(survivors, chance))
        for pair in [pair for pair in pairs if pair.is_due()]:
            pairs.remove(pair)
            names, n_verified = pair.kill()
            survivors.n_verified += n_verified
            for at, name in zip(pair.dying, names, strict=True):
                kills[name] += 1
                roles["receiver" if at else "sender"] += 1
            n_rounds += 1
            if n_rounds % LOOK_EVERY == 0:
                for other in pairs:
                    other.kill()
                pairs.clear()
                survivors.look()
        time.sleep(0.0005)
    for pair in pairs:
        pair.kill()
    survivors.look()
    print(json.dumps({"point": "random", "hits": kills, **roles}), flush=True)
    statistics = survivors.finish()
    print(json.dumps({"n_verified": survivors.n_verified, **summary(statistics)}), flush=True)


if __name__ == "__main__":
    victims.no_core()
    main(*sys.argv[1:])
