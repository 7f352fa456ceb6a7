"""Kills of the parent: ``of_parents.py METHOD N_KILLS SEED WITHIN_S``.

Each parent has a pool of two workers at work and results on their way, and two more processes that
send each other messages. It is killed at a random moment. The pool's workers must end; the other
two must go on without it, find all that it had back in the table, and end well. Prints JSON.
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time

import inside
import victims
from at_points import SIGNALS
from inside import message, verify
from survivors import blocks_of_the_dead

import oobpickle
from oobpickle._hook import installed
from process.harness import kill_session, session_members

CAPACITY = 256 << 20
N_AFTERWARDS = 20
LONGEST_WORK_S = 0.3
COMPLAINTS = ".err"


def double(received):
    verify(received)
    return message(received[0] + 1, 2 * received[1].nbytes)


def partner(get, put, others, begins, path):
    """Exchange messages until the parent is dead, and some more; then say so in a file."""
    for end in others:
        end.close()
    arena, held, n_verified, n_more = installed.current.arena, [], 0, 0
    # Not `is_alive`: a forked process has inherited what would tell its sisters.
    parent = f"/proc/{multiprocessing.parent_process().pid}"
    if begins:
        put.send(message(0))
    while n_more < N_AFTERWARDS and (received := get.recv()) is not None:
        held = [verify(received), *held[:2]]
        n_verified += 1
        n_more += begins and not os.path.exists(parent)
        put.send(message(n_verified, 200_000 + 10_000 * (n_verified % 50)))
    if begins:
        put.send(None)
        with contextlib.suppress(EOFError):
            while True:  # what is in a channel that somebody can read is not given back
                verify(get.recv())
                n_verified += 1
    put.close()
    for one in held:
        verify(one)
    inside.eventually(lambda: not blocks_of_the_dead(arena))
    inside.assert_table_in_order(arena)
    with open(path, "a") as file:
        file.write(f"{n_verified}\n")


def be_parent(method, path, say):
    """Start all, and work until the kill."""
    os.setsid()
    victims.no_core()
    aside = os.open(path + COMPLAINTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(aside, 2)  # a pool's worker that cannot return its result says so, as ever
    context = multiprocessing.get_context(method)
    oobpickle.install(capacity=CAPACITY)
    there, back = context.Pipe(duplex=False), context.Pipe(duplex=False)
    forked = method == "fork"  # those inherit the ends that they are not given
    ends = (there[0], back[1], (there[1], back[0])), (back[0], there[1], (there[0], back[1]))
    for begins, (get, put, others) in zip((True, False), ends, strict=True):
        given = others if forked else ()
        context.Process(target=partner, args=(get, put, given, begins, path)).start()
    for end in (*there, *back):
        end.close()
    with context.Pool(2) as pool:
        while True:
            tasks = [message(seed, 1_000_000 * (1 + seed % 4)) for seed in range(20)]
            for received in pool.imap(double, tasks):
                verify(received)
                os.write(say, b".")


def kill_one(method, path, name, chance):
    """Kill one parent; return how many messages were verified by those that it leaves."""
    said, say = os.pipe()
    pid = inside.fork(be_parent, method, path, say)
    os.close(say)
    for _ in range(chance.randrange(1, 4)):
        assert os.read(said, 1) == b".", "the parent does not work"
    os.set_blocking(said, False)
    until = time.monotonic() + chance.uniform(0, LONGEST_WORK_S)
    while time.monotonic() < until:
        try:
            os.read(said, 1000)
        except BlockingIOError:
            time.sleep(0.001)
    os.kill(pid, signal.Signals[f"SIG{name}"])
    inside.reap(pid, -signal.Signals[f"SIG{name}"])
    os.close(said)
    try:
        inside.eventually(lambda: not session_members(pid), within_s=2 * inside.TOKEN_S)
        with open(path) as file:
            counts = [int(line) for line in file]
        assert len(counts) == 2, f"of two that the parent left, {len(counts)} ended well"
    except BaseException:
        for member in session_members(pid):
            os.kill(member, signal.SIGUSR1)  # see `inside`
        time.sleep(1)
        with open(path + COMPLAINTS) as file:
            print(file.read(), file=sys.stderr)
        raise
    finally:
        kill_session(pid)
    os.unlink(path)
    os.unlink(path + COMPLAINTS)
    return sum(counts)


def main(method, n_kills, seed, within_s):
    until, chance = time.monotonic() + float(within_s), random.Random(seed)
    kills, n_verified = dict.fromkeys(SIGNALS, 0), 0
    with tempfile.TemporaryDirectory() as folder:
        while sum(kills.values()) < int(n_kills) and time.monotonic() < until:
            name = SIGNALS[sum(kills.values()) % len(SIGNALS)]
            path = os.path.join(folder, "said")
            open(path, "w").close()
            n_verified += kill_one(method, path, name, chance)
            kills[name] += 1
    print(json.dumps({"point": "parent", "hits": kills}))
    print(json.dumps({"n_verified": n_verified}))


if __name__ == "__main__":
    main(*sys.argv[1:])
