"""What this system offers."""

import subprocess
import sys

import pytest

import oobpickle
from oobpickle import _native, _system


def test_this_system_is_supported():
    assert _system.SUPPORTED
    assert _system.lacking() is None
    assert _native.reason == ""


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("SUPPORTED", False, "64-bit Linux"),
        ("FREE_THREADED", True, "free-threaded"),
        ("_has_gil", lambda: False, "free-threaded"),
        ("core", None, "extension module"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, name, value, text):
    monkeypatch.setattr(_system, name, value)

    assert text in _system.lacking()


def test_a_kernel_with_larger_pages_has_no_arena(monkeypatch):
    monkeypatch.setattr(_system.os, "sysconf", {"SC_PAGE_SIZE": 16384}.__getitem__)

    assert "this kernel have 16384 bytes" in _system.lacking()
    with pytest.warns(oobpickle.FallbackWarning, match="16384"), oobpickle.enabled() as arena:
        assert arena.statistics().nbytes_resident == 0


WITHOUT = """
import importlib, multiprocessing, sys, warnings
import_module = importlib.import_module
def refuse(name, *args):
    if name == "oobpickle._core":
        raise ImportError("no such module")
    return import_module(name, *args)
importlib.import_module = refuse
import numpy as np
import oobpickle
if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with oobpickle.enabled() as arena:
            with multiprocessing.get_context("fork").Pool(1) as pool:
                assert pool.map(np.sum, [np.ones(100_000)] * 3) == [100_000] * 3
            assert arena.statistics() == oobpickle.statistics()
            assert arena.statistics().n_messages_out_of_band == 0
    texts = [str(one.message) for one in caught if one.category is oobpickle.FallbackWarning]
    assert len(texts) == 1, texts
    assert "no such module" in texts[0] and "C compiler" in texts[0], texts
    payload = oobpickle.dumps(np.arange(100_000))
    assert (oobpickle.loads(payload) == np.arange(100_000)).all()
    print("in-band")
"""


def test_without_the_extension_module_everything_works_in_band(tmp_path):
    program = tmp_path / "without.py"
    program.write_text(WITHOUT)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)

    assert (done.stdout, done.stderr, done.returncode) == ("in-band\n", "", 0)


def test_the_names_of_the_module_are_typed():
    """And nothing else is there."""
    stub = (_native.__spec__.origin).replace("_native.py", "_core.pyi")
    with open(stub) as file:
        text = file.read()
    for owner in (_native.core, _native.core.Blocks, _native.core.Block):
        names = [name for name in vars(owner) if not name.startswith("_")]
        assert [name for name in names if f"{name}:" not in text and f"{name}(" not in text] == []
    assert oobpickle.__version__
