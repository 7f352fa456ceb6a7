"""``oobpickle doctor --pid``: what it says of a process that goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import oobpickle
from conftest import by_turns_of_start_methods, eventually
from oobpickle._cli import arenas
from oobpickle._cli.failure import CommandError
from oobpickle._cli.main import main

SOURCE = Path(oobpickle.__file__).parents[1]
PROGRAM = """
    import multiprocessing, os, signal, sys
    import numpy as np
    import oobpickle

    def make(n):
        return np.full(100_000, n)

    def keep(connection):
        kept = connection.recv()
        connection.send(os.getpid())
        signal.pause()

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        with oobpickle.enabled():
            ours, theirs = context.Pipe()
            process = context.Process(target=keep, args=(theirs,))
            process.start()
            with context.Pool(1) as pool:
                kept = pool.map(make, range(2), chunksize=1)
                read, write = context.Pipe(duplex=False)
                write.send(np.ones(50_000))
                ours.send(np.ones(200_000))
                os.kill(ours.recv(), signal.SIGKILL)
                process.join()
                theirs.close()
                print(process.pid, flush=True)
                sys.stdin.readline()
                del kept
                read.recv()
                print(pool.apply(make, (3,))[0])
"""


@contextlib.contextmanager
def running(tmp_path, *arguments):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    with subprocess.Popen(
        [sys.executable, str(path), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        text=True,
    ) as child:
        yield child
        assert child.wait(20) == 0


@pytest.mark.parametrize(("case", "start_method"), by_turns_of_start_methods(["a pool"]))
def test_a_pool_with_results_and_one_that_died(tmp_path, command, case, start_method):
    with running(tmp_path, start_method) as child:
        dead = int(child.stdout.readline())
        text = command("doctor", "--pid", child.pid)
        found = command("doctor", "--json", "--pid", child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.read() == "3\n"  # it goes on as if nobody had looked

    assert (text.stderr, text.returncode) == (found.stderr, found.returncode) == ("", 1)
    (arena,) = json.loads(found.stdout)["arenas"]
    by_pid = {one["pid"]: one for one in arena["participants"]}
    assert (by_pid[dead]["state"], by_pid[dead]["held"]["nbytes"]) == ("dead", 1_600_000)
    own = by_pid[child.pid]
    assert (own["state"], own["held"]) == ("alive", {"n_blocks": 2, "nbytes": 1_600_000})
    assert own["command"].endswith(f"program.py {start_method}")
    assert [(one["n_messages"], one["nbytes"]) for one in arena["unread"]] == [(1, 400_000)]
    assert child.pid in arena["unread"][0]["readers"]
    assert arena["statistics"]["n_messages_out_of_band"] == 4
    assert len(arena["look"]) == 1
    assert f"look: process {dead} has ended and had 1.5 MiB" in text.stdout
    assert "\n  ended    1 process that had joined. A Pool replaces" in text.stdout
    assert "\n  unread   1 message (391 KiB) in pipe:[" in text.stdout
    assert max(map(len, text.stdout.splitlines())) <= 80
    assert "all 4 large messages out of band" in text.stdout
    assert f"\n{child.pid:<7}  alive" in text.stdout


@contextlib.contextmanager
def paused():
    """Fork a process that waits, and kill it at the end."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_one_that_is_stopped(capsys):
    with oobpickle.enabled():
        with paused() as pid:
            # It is known before it runs, by its number when it does.
            eventually(lambda: pid in [one.pid for one in arenas._seen(pid)[0].participants])
            os.kill(pid, signal.SIGSTOP)
            eventually(lambda: arenas._state_of(pid) == "T")
            assert arenas.look_at(pid) == 1
        assert arenas.look_at(os.getpid()) == 0
    printed = capsys.readouterr().out

    assert f"look: process {pid} is stopped; kill -CONT {pid} lets it go on." in printed
    assert "1 of them dead" in printed


def error_of(pid):
    with pytest.raises(CommandError) as caught:
        arenas.look_at(pid)
    return str(caught.value)


def test_no_arena_and_no_process(capsys):
    with paused() as pid:
        assert error_of(pid).startswith(f"process {pid} has no arena: ")
    assert error_of(1 << 30) == f"there is no process {1 << 30}"
    assert main(["doctor", "--pid", str(1 << 30)]) == 2
    assert capsys.readouterr().err == f"oobpickle: error: there is no process {1 << 30}\n"


def test_one_that_has_ended_and_is_not_waited_for():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    eventually(lambda: arenas._state_of(pid) == "Z")
    says = error_of(pid)
    os.waitpid(pid, 0)

    assert says == f"process {pid} has ended, and its parent has not waited for it"


def test_one_of_another_user():
    if os.geteuid():
        if os.stat("/proc/1").st_uid == os.geteuid():
            pytest.skip("there is no process of another user")
        assert "process 1 may not be looked into" in error_of(1)
        return
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        os.setresuid(65534, 65534, 65534)
        os._exit("may not be looked into: it is user 0's" not in error_of(parent))

    assert os.waitpid(pid, 0)[1] == 0


def test_without_the_core(monkeypatch):
    monkeypatch.setattr("oobpickle._native.core", None)
    monkeypatch.setattr("oobpickle._native.reason", "not built")

    assert error_of(os.getpid()) == "oobpickle._core is not here (not built); install a wheel"
