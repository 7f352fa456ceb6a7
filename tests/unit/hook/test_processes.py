"""What is put under the starting of processes and programs: `_launch`, `_execute_child`."""

import multiprocessing
import subprocess
import sys
from types import SimpleNamespace

import pytest

import oobpickle
from oobpickle._hook import installed
from oobpickle._hook.processes import _launching, hooked_execute_child, hooked_launch


class _Popen:
    """What is started; `_launching` refers to it weakly."""


@pytest.mark.parametrize("error", [None, OSError("no process"), KeyboardInterrupt()], ids=repr)
def test_the_lease_of_a_process_object_is_settled_when_it_was_launched(error):
    popen, done = _Popen(), []
    envelope = SimpleNamespace(lease=SimpleNamespace(settle=lambda: done.append("settled")))

    def launch(self, process_object):
        _launching[self] = envelope, None
        done.append((self is popen, process_object))
        if error is not None:
            raise error

    caught = None
    try:
        hooked_launch(launch)(popen, "a process")
    except BaseException as raised:
        caught = raised

    assert done == [(True, "a process"), "settled"]
    assert caught is error
    assert popen not in _launching


def test_a_launch_without_an_envelope_has_nothing_to_settle():
    hooked_launch(lambda *_: None)(_Popen(), "a process")

    assert len(_launching) == 0


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
