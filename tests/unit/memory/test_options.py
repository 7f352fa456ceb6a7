"""Options: refused before anything starts, and the same on both sides of the table."""

import decimal
import gc
import math
import multiprocessing.connection
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import oobpickle
from oobpickle._memory import headroom
from oobpickle._memory.options import DEFAULT_THRESHOLD, Options

MIB = 1 << 20


def written(options):
    """Return what another process reads of resolved options."""
    return Options.read(options.capacity, *options.words())


OUT_OF_RANGE = [
    {"capacity": 0},
    {"capacity": MIB - 1},
    {"capacity": -1},
    {"capacity": (1 << 43) + 1},
    {"capacity": 1 << 100},
    {"threshold": -1},
    {"threshold": 1 << 63},
    {"wait_timeout": -0.001},
    {"wait_timeout": math.nan},
    {"wait_timeout": math.inf},
    {"wait_timeout": -math.inf},
    {"wait_timeout": 1e9},
    {"wait_timeout": 86400 * 365 + 1},
]
OF_THE_WRONG_TYPE = [
    {"capacity": 1.5e9},
    {"capacity": "1G"},
    {"capacity": True},
    {"capacity": np.int64(MIB)},
    {"threshold": 64e3},
    {"threshold": False},
    {"threshold": b"1"},
    {"wait_timeout": "1"},
    {"wait_timeout": True},
    {"wait_timeout": decimal.Decimal(1)},
    {"wait_timeout": 1j},
    {"copy_on_receive": 1},
    {"copy_on_receive": "yes"},
    {"copy_on_receive": 0},
]
WRONG = [(ValueError, said) for said in OUT_OF_RANGE] + [(TypeError, s) for s in OF_THE_WRONG_TYPE]


@pytest.mark.parametrize(("error", "said"), WRONG, ids=repr)
def test_wrong_options_are_refused_with_name_and_value(error, said):
    ((name, value),) = said.items()
    with pytest.raises(error) as caught:
        Options(**said)

    assert name in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "start",
    [lambda said: oobpickle.enabled(**said).__enter__(), lambda said: oobpickle.install(**said)],
    ids=["enabled", "install"],
)
def test_wrong_options_are_refused_before_anything_starts(start):
    gc.collect()
    descriptors, original = os.listdir("/proc/self/fd"), multiprocessing.connection.Pipe
    for error, said in WRONG:
        ((name, value),) = said.items()
        is_understood = name != "wait_timeout" and isinstance(value, float | np.integer)
        if error is ValueError or not is_understood:  # here whole numbers of any type are
            with pytest.raises((TypeError, ValueError)):
                start(said)

    assert len(descriptors) == len(os.listdir("/proc/self/fd"))
    assert multiprocessing.connection.Pipe is original
    with pytest.raises(oobpickle.ArenaError):
        oobpickle.statistics()


RIGHT = [
    {"capacity": MIB},
    {"capacity": 1 << 43},
    {"threshold": 0},
    {"threshold": 1 << 62},
    {"wait_timeout": 0},
    {"wait_timeout": 0.0},
    {"wait_timeout": 86400 * 365},
    {"copy_on_receive": True},
    {"copy_on_receive": False},
]


@pytest.mark.parametrize("said", RIGHT, ids=repr)
def test_the_ends_of_each_range_belong_to_it(said):
    ((name, value),) = said.items()

    assert getattr(Options(**said), name) == value
    assert getattr(written(Options(**said).resolve()), name) == value


@pytest.mark.parametrize("options", [Options(), *(Options(**said) for said in RIGHT)], ids=repr)
def test_what_one_process_writes_another_reads(options):
    resolved = options.resolve()

    assert resolved == written(resolved)


@pytest.mark.parametrize(
    "wait_timeout", [1 / 3, 0.1, 0.29, 0.57, 1e-7, 2.675, 1.1, 86399.999999, 1e-300]
)
def test_any_number_of_seconds_is_read_as_it_was_written(wait_timeout):
    running = written(Options(wait_timeout=wait_timeout).resolve())
    Options(wait_timeout=wait_timeout).check_compatible(running)

    assert running.wait_timeout == wait_timeout


def test_defaults_are_filled_in():
    resolved = Options().resolve()

    assert resolved.capacity == max(MIB, headroom.limit_nbytes() // 2)
    assert resolved.threshold == DEFAULT_THRESHOLD
    assert (resolved.wait_timeout, resolved.copy_on_receive) == (None, None)


def test_what_was_said_is_kept():
    said = Options(capacity=3 * MIB, threshold=0, wait_timeout=0, copy_on_receive=False)

    assert said.resolve() == said


@pytest.mark.parametrize("limit", [0, 1, MIB, 1 << 33, 1 << 45, 1 << 60])
def test_the_default_capacity_is_in_range_on_any_machine(monkeypatch, limit):
    monkeypatch.setattr(headroom, "limit_nbytes", lambda: limit)
    capacity = Options().resolve().capacity

    assert MIB <= capacity <= max(MIB, limit // 2)
    assert Options(capacity=capacity).capacity == capacity


RUNNING = Options(capacity=3 * MIB, threshold=100, wait_timeout=2.5, copy_on_receive=True)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"capacity": 3 * MIB},
        {"threshold": 100},
        {"wait_timeout": 2.5},
        {"copy_on_receive": True},
    ],
    ids=repr,
)
def test_what_was_not_said_agrees_with_everything(said):
    Options(**said).check_compatible(RUNNING)
    Options(**said).check_compatible(written(RUNNING))


@pytest.mark.parametrize(
    "said",
    [{"capacity": 4 * MIB}, {"threshold": 0}, {"wait_timeout": 2}, {"copy_on_receive": False}],
    ids=repr,
)
def test_what_differs_is_refused_with_both_values(said):
    ((name, value),) = said.items()
    with pytest.raises(ValueError, match=name) as caught:
        Options(**said).check_compatible(RUNNING)

    assert f"{name}={value!r}" in str(caught.value)
    assert f"{name}={getattr(RUNNING, name)!r}" in str(caught.value)


def test_options_are_values():

    assert Options(wait_timeout=1) == Options(wait_timeout=1)
    assert hash(Options(wait_timeout=1)) == hash(Options(wait_timeout=1))
    assert pickle.loads(pickle.dumps(RUNNING)) == RUNNING
    with pytest.raises(AttributeError):
        RUNNING.capacity = 1


def test_forced_every_message_goes_through_the_arena(tmp_path):
    """Whatever is said about the threshold: for CPython's own tests, whose messages are small."""
    script = tmp_path / "small.py"
    script.write_text(
        "import multiprocessing, oobpickle\n"
        "with oobpickle.enabled(threshold=1 << 20) as arena:\n"
        "    read, write = multiprocessing.Pipe(duplex=False)\n"
        "    for obj in (None, 'text', [bytes(100)] * 3):\n"
        "        write.send(obj)\n"
        "        assert read.recv() == obj\n"
        "    done = arena.statistics()\n"
        "print(done.n_messages_out_of_band, done.n_messages_loaded, done.n_fallbacks)\n"
    )
    expected = {"0": "0 0 0\n", "1": "3 3 0\n"}

    for value, printed in expected.items():
        environment = {
            **os.environ,
            "OOBPICKLE_FORCE": value,
            "PYTHONPATH": str(Path(oobpickle.__file__).parents[1]),
        }
        output = subprocess.check_output([sys.executable, script], env=environment, text=True)
        assert printed == output
