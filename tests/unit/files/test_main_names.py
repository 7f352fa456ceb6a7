"""Names of the main module: refused, however they come into the stream."""

import enum
import functools
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest

import oobpickle
from oobpickle._files.main_names import refuse_main


class Colour(enum.Enum):
    RED = 1


@pytest.fixture(params=["__main__", "__mp_main__"])
def main(request, monkeypatch):
    module = types.ModuleType(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    exec(
        "import enum\nclass Model: pass\ndef function(): pass\nclass Outer:\n class Inner: pass\n"
        "class Colour(enum.Enum):\n  RED = 1",
        vars(module),
    )
    return module


REFERENCES = {
    "an instance": lambda m: m.Model(),
    "the class": lambda m: [m.Model],
    "a function": lambda m: {"f": m.function},
    "a class in a class": lambda m: m.Outer.Inner(),
    "an item of an enumeration": lambda m: m.Colour.RED,
    "a part of something": lambda m: functools.partial(print, m.Model),
    "after the name as a text": lambda m: [m.__name__, "Model", 1, m.Model],
    "after its own name": lambda m: ["Model", ("x",), m.Model],
    "two of them": lambda m: [m.Model(), m.Outer(), m.Model()],
    "in more than a frame": lambda m: [*map(str, range(50_000)), m.Model],
    "behind large bytes": lambda m: [b"x" * 100_000, m.Model, b"y" * 100_000],
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_is_refused_by_its_name(name, main):
    stream = pickle.dumps(REFERENCES[name](main), 5)
    with pytest.raises(pickle.PicklingError, match="of the main module: only this program") as e:
        refuse_main([stream])

    expected = {"two of them": "Model, Outer", "a class in a class": "Outer.Inner"}
    others = {"a function": "function", "an item of an enumeration": "Colour"}
    assert f"dump: {(expected | others).get(name, 'Model')} of" in str(e.value)


@pytest.mark.parametrize("name", ["__main__", "__mp_main__"])
def test_the_name_as_a_text_is_none(name):
    texts = [name, {name: "x"}, [name, "Model"], (name, "Model", Colour.RED, name, int)]
    for text in texts:
        refuse_main([pickle.dumps(text, 5)])


def test_the_pieces_of_a_stream_are_read_as_one(main):
    stream = pickle.dumps([b"x" * 100, main.Model], 5)
    at = stream.index(b"\x8c" + bytes([len(main.__name__)]))
    with pytest.raises(pickle.PicklingError):
        refuse_main([stream[:20], stream[20:at], stream[at:]])


def test_a_stream_without_it_is_not_read(monkeypatch):
    import pickletools

    monkeypatch.setattr(pickletools, "genops", None)
    refuse_main([pickle.dumps([Colour.RED, "main", 5], 5)])


PROGRAM = """
import sys, oobpickle
class Model: pass
oobpickle.dump("old", sys.argv[1])
try:
    oobpickle.dump(Model(), sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
print(oobpickle.load(sys.argv[1]))
"""


def test_a_program_is_told_and_keeps_its_old_file(tmp_path):
    source = str(Path(oobpickle.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, tmp_path / "file"],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith("PicklingError oobpickle.dump: Model of the main module")
    assert child.stdout.endswith("\nold\n")
