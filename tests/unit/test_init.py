"""The package: its names are the whole of the public API."""

import subprocess
import sys
import types

import numpy as np

import oobpickle


def test_star_gives_what_all_says():
    namespace = {}
    exec("from oobpickle import *", namespace)
    del namespace["__builtins__"]

    assert set(oobpickle.__all__) == set(namespace)


def test_every_other_name_is_private_or_a_module():
    others = {name for name in vars(oobpickle) if not name.startswith("_")} - set(oobpickle.__all__)

    assert {n for n in others if not isinstance(getattr(oobpickle, n), types.ModuleType)} == set()


def test_the_version_is_a_version():
    major, minor, *_ = oobpickle.__version__.split(".")

    assert (major, minor) == (str(int(major)), str(int(minor)))


def test_the_parts_work_together():
    obj = {"weights": np.arange(1000.0), "name": "a"}
    payload = oobpickle.Payload.from_bytes(oobpickle.dumps(obj).to_bytes())
    arrived = oobpickle.loads(payload)

    assert arrived["name"] == "a"
    assert np.array_equal(arrived["weights"], obj["weights"])


def test_testing_is_reached_without_an_import_and_costs_none():
    program = (
        "import sys, oobpickle; a = 'oobpickle.testing' in sys.modules; "
        "oobpickle.testing.check_roundtrip; print(a, hasattr(oobpickle, 'nothing'))"
    )
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )

    assert (child.stdout, child.stderr) == ("False False\n", "")
