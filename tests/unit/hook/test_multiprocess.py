"""What is replaced in multiprocess: what is given to its connections, and what they bring."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

import oobpickle
from oobpickle._hook import multiprocess as hooked
from oobpickle._hook.processes import is_being_started

if importlib.util.find_spec("multiprocess") is None:
    pytest.skip("multiprocess is not here", allow_module_level=True)

import multiprocess
import multiprocess.connection
import multiprocess.process


@pytest.fixture
def pipe():
    with oobpickle.enabled() as arena:
        reader, writer = multiprocess.Pipe(False)
        with reader, writer:
            yield arena, reader, writer


def test_it_is_not_imported_for_its_own_sake():
    code = "import sys, oobpickle\nwith oobpickle.enabled(): pass\nassert 'dill' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_small_messages_are_what_dill_made(pipe):
    _, reader, writer = pipe
    obj = {"number": 1, "bytes": bytes(1000)}
    plain = multiprocess.reduction.ForkingPickler.dumps(obj)
    writer.send(obj)

    assert reader.recv_bytes() == bytes(plain)


def test_large_messages_are_loaded_by_dill(pipe, monkeypatch):
    arena, reader, writer = pipe
    loaded = []
    loads = multiprocess.reduction.ForkingPickler.loads

    def noted(data, **options):
        loaded.append(len(data))
        return loads(data, **options)

    monkeypatch.setattr(multiprocess.reduction.ForkingPickler, "loads", staticmethod(noted))
    writer.send((lambda: 7, bytes(1 << 20)))
    function, content = reader.recv()

    assert (function(), content) == (7, bytes(1 << 20))
    assert loaded[-1] > 1 << 20
    assert arena.statistics().n_messages_out_of_band == 1


def test_what_travels_in_band_is_what_dill_made():
    obj = bytes(1 << 20)
    with pytest.warns(oobpickle.FallbackWarning, match="1 message"), oobpickle.enabled():
        data = multiprocess.connection._ForkingPickler.dumps(obj)  # nobody says where to

    assert bytes(data) == bytes(multiprocess.reduction.ForkingPickler.dumps(obj))


def test_a_dump_that_fails_changes_nothing(pipe):
    arena, reader, writer = pipe

    class Fails:
        def __reduce__(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        writer.send([bytes(1 << 20), Fails()])
    writer.send(1)

    assert reader.recv() == 1
    assert arena.statistics().n_blocks["leased"] == 0


def test_a_child_of_multiprocess_is_being_started_until_its_parent_is_known(monkeypatch):
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "-c", "from multiprocess.spawn import spawn_main"]
    )
    assert is_being_started()
    monkeypatch.setattr(multiprocess.process, "_parent_process", SimpleNamespace())

    assert not is_being_started()


def test_a_release_without_these_names_is_left_alone(monkeypatch):
    monkeypatch.delattr(multiprocess.connection, "_ForkingPickler")
    monkeypatch.setitem(sys.modules, "multiprocess.queues", SimpleNamespace())
    found = {name for _, name, _ in hooked.replacements()}

    assert "_ForkingPickler" not in found
    assert "_recv" in found
