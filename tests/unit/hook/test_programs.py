"""What is put under the starting of programs: which ends they inherit, and what the caller gets."""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing import util

import pytest

import oobpickle
from conftest import eventually
from oobpickle._hook import installed
from oobpickle._hook.programs import (
    hooked_exec,
    hooked_execute_child,
    hooked_posix_spawn,
    hooked_spawnv_passfds,
    hooked_spawnvef,
    hooked_system,
)
from oobpickle._memory.pipes import channel_id

TRUE = "/bin/true"


@pytest.fixture
def pipe():
    with oobpickle.enabled():
        reader, writer = multiprocessing.Pipe(duplex=False)
        with reader, writer:
            yield reader, writer


def run(*, pass_fds=(), **options):
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ""], pass_fds=pass_fds, check=True, **options
    )
    assert done.returncode == 0


def is_known(writer):
    return bool(installed.current.channels.known(writer.fileno()))


def test_while_a_program_inherits_an_end_its_channel_stays_in_band(pipe):
    reader, writer = pipe
    known = []

    def execute_child(
        self, args, pass_fds, close_fds, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite
    ):
        known.append(is_known(writer))
        return pass_fds

    hooked = hooked_execute_child(execute_child)
    ends = [-1] * 6
    inherited = hooked("popen", ["program"], iter([reader.fileno()]), True, *ends)
    hooked("popen", ["program"], (), True, *ends)

    assert inherited == (reader.fileno(),)
    assert known == [False, True]


def test_a_program_that_inherits_an_end_and_is_gone_changes_nothing(pipe):
    reader, writer = pipe
    assert is_known(writer)
    run(pass_fds=[reader.fileno()])
    run(stdin=reader)
    run()

    assert is_known(writer)


def test_outside_a_block_it_is_the_original():
    called = []
    hooked_execute_child(lambda *args, **options: called.append((args, options)))("popen", 1, a=2)

    assert called == [(("popen", 1), {"a": 2})]


def passed_by(call):
    """Return how many ends a call passes on."""
    blocks = installed.current.arena.blocks
    before = blocks.n_passed
    call()
    return blocks.n_passed - before


@pytest.mark.parametrize("hooked", [hooked_exec, hooked_system, hooked_posix_spawn])
def test_what_can_be_inherited_and_read_stays_in_band_during_the_call(pipe, hooked):
    reader, writer = pipe
    known = []
    call = hooked(lambda *_, **__: known.append(is_known(writer)))
    call("a program")
    for end in (writer, reader):
        os.set_inheritable(end.fileno(), True)
        call("a program")

    assert known == [True, True, False]
    assert is_known(writer)


def test_what_posix_spawn_duplicates_is_inherited(pipe):
    reader, writer = pipe
    given = []

    def posix_spawn(*_, file_actions):
        given.append((is_known(writer), file_actions))

    actions = [(os.POSIX_SPAWN_CLOSE, 0), (os.POSIX_SPAWN_DUP2, reader.fileno(), 0)]
    hooked_posix_spawn(posix_spawn)(TRUE, ["true"], {}, file_actions=iter(actions))

    assert given == [(False, tuple(actions))]


def test_posix_spawn_by_subprocess_is_seen_there(pipe, monkeypatch):
    reader, _ = pipe
    os.set_inheritable(reader.fileno(), True)
    found = []
    for is_used in (True, False):
        monkeypatch.setattr(subprocess, "_USE_POSIX_SPAWN", is_used)
        found.append(passed_by(lambda: run(close_fds=False)))

    assert found[0] == found[1] >= 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: os.posix_spawn(TRUE, ["true"], {}, file_actions=7),
        lambda: os.posix_spawn(TRUE, ["true"], {}, file_actions=[7]),
        lambda: os.posix_spawn(TRUE, ["true"], {}, file_actions=[()]),
        lambda: os.posix_spawn(TRUE),
        lambda: os.execv(TRUE),
        lambda: os.execve(TRUE, ["true"], 7),
        lambda: os.system(7),
        lambda: os.spawnv(os.P_WAIT, TRUE, 7),
        lambda: util.spawnv_passfds(TRUE, ["true"], [None]),
    ],
)
def test_what_is_wrong_is_refused_as_ever(wrong):
    with pytest.raises((TypeError, ValueError)) as plain:
        wrong()
    with oobpickle.enabled(), pytest.raises(plain.type) as hooked:
        wrong()

    assert str(hooked.value) == str(plain.value)


def test_multiprocessing_says_by_itself_what_it_passes_on(pipe):
    reader, _ = pipe
    fds = [reader.fileno()]
    spawn = hooked_spawnv_passfds(lambda path, args, passfds: (path, args, passfds))
    names = {"__name__": "multiprocessing.popen_spawn_posix", "spawn": spawn, "fds": fds}

    assert 0 == passed_by(lambda: eval("spawn(b'', [], fds)", names))
    assert 2 == passed_by(lambda: spawn(b"", [], iter(fds)))
    assert spawn(b"", [], iter(fds)) == (b"", [], tuple(fds))


def test_an_older_loky_forks_workers_that_join_by_themselves(pipe):
    reader, _ = pipe
    os.set_inheritable(reader.fileno(), True)
    names = {"__name__": "joblib.externals.loky.backend.fork_exec", "call": hooked_exec(print)}

    assert 0 == passed_by(lambda: eval("call()", names))
    assert 2 == passed_by(lambda: eval("call()", {**names, "__name__": "program"}))


def test_a_standard_stream_counts_if_it_is_a_channel_of_the_block(pipe):
    reader, _ = pipe
    stdin = os.dup(0)
    try:
        os.dup2(reader.fileno(), 0)
        assert 2 == passed_by(run)
        assert 2 == passed_by(lambda: os.system("true"))
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
    assert 0 == passed_by(run)


def test_a_standard_stream_that_was_there_before_does_not_count():
    stdin = os.dup(0)
    fd, feed = os.pipe()
    try:
        os.dup2(fd, 0)
        with oobpickle.enabled():
            assert 0 == passed_by(lambda: os.system("true"))
    finally:
        os.dup2(stdin, 0)
        for one in (stdin, fd, feed):
            os.close(one)


def test_a_child_that_was_forked_to_become_a_program_is_waited_for(pipe):
    """By those who send to it, and not by the caller of `os.spawnv`."""
    reader, writer = pipe
    os.set_inheritable(reader.fileno(), True)
    may_exec, let_it = os.pipe()

    def spawnvef(mode, file, args, env, func):
        assert mode == os.P_NOWAIT
        pid = os.fork()
        if not pid:
            try:
                os.close(let_it)
                os.read(may_exec, 1)
                func(file, args)
            finally:
                os._exit(127)
        return pid

    try:
        pid = hooked_spawnvef(spawnvef)(os.P_NOWAIT, TRUE, ["true"], None, os.execv)
        assert not is_known(writer)
        assert not is_known(writer)
        os.write(let_it, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert eventually(lambda: is_known(writer))
    finally:
        os.close(may_exec)
        os.close(let_it)


def test_what_was_named_was_not_asked_for_to_read_there(pipe):
    reader, _ = pipe
    unloaded = installed.current.arena.unloaded
    fd = reader.fileno()
    assert unloaded
    actions = [(os.POSIX_SPAWN_DUP2, fd, 0)]
    os.waitpid(os.posix_spawn(TRUE, ["true"], {}, file_actions=actions), 0)
    assert not unloaded

    assert channel_id(fd)
