"""What is put under the starting of processes: `_launch`."""

from types import SimpleNamespace

import pytest

from oobpickle._hook.processes import _launching, hooked_launch


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
