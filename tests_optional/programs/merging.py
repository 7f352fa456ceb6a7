"""What the programs of this folder share: functions, and what has to come out on every cluster."""

import contextlib
import functools
import operator
import os
import signal
import time
from pathlib import Path

import numpy as np

import oobpickle

LARGE = 300_000


def listed(*items):
    return list(items)


def model(seed):
    """Return arrays of a size that every engine sends apart, and one that none does."""
    return {"seeds": [seed], "large": np.full(LARGE, seed), "small": np.full(3, seed)}


def added(left, right):
    """Add in place; whoever relied on the right operand would see it."""
    left["seeds"] += right["seeds"]
    for name in ("large", "small"):
        left[name] += right[name]
    return left


def check_model(total, n):
    assert total["seeds"] == list(range(n)), total["seeds"]
    for name in ("large", "small"):
        assert (total[name] == sum(range(n))).all(), name
        total[name] += 1  # its own


def fails(n):
    if n == 5:
        raise ValueError("five")
    return [n]


def op_that_fails(left, right):
    if len(left) + len(right) > 4:
        raise KeyError("long")
    return left + right


def dies_once(folder, n):
    """Kill the process that comes to piece 7 first."""
    if n == 7:
        try:
            Path(folder, "died").touch(exist_ok=False)
        except FileExistsError:
            return model(n)
        os.kill(os.getpid(), signal.SIGKILL)
    return model(n)


def op_that_dies_once(folder, left, right):
    total = added(left, right)  # changed by then
    if len(total["seeds"]) > 8:
        try:
            Path(folder, "died").touch(exist_ok=False)
        except FileExistsError:
            return total
        os.kill(os.getpid(), signal.SIGKILL)
    return total


def meets(folder, place, n):
    """Wait until pieces were begun at two places."""
    Path(folder, place).touch()
    deadline = time.monotonic() + 60
    while len(os.listdir(folder)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return {place}


def scaled(table, seed):
    assert type(table) is dict, table
    table["factors"] += seed  # its own
    return {**model(seed), "small": table["factors"][:3] * 1}


def check_broadcast(engine):
    """A handle in `func` brings the object, inside a block and without one."""
    for block in (contextlib.nullcontext, oobpickle.enabled):
        with block(), oobpickle.broadcast({"factors": np.zeros(LARGE, int)}) as handle:
            func = functools.partial(scaled, handle)
            check_model(oobpickle.merge(engine, func, range(6), op=added, chunksize=1), 6)


def raised(kind, engine, *args, **kwargs):
    try:
        oobpickle.merge(engine, *args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def check_all(engine):
    """Compare with what comes out of one process, and look at errors."""
    for n in (0, 1, 2, 9):
        for options in ({}, {"chunksize": 1}, {"buffersize": 1}, {"ordered": False}):
            initial = [-1]
            total = oobpickle.merge(
                engine, listed, iter(range(n)), op=operator.iadd, initial=initial, **options
            )
            assert total == [-1, *range(n)] or (sorted(total) == [-1, *range(n)] and options), total
            assert initial == [-1]
    for options in ({}, {"chunksize": 1}):
        check_model(oobpickle.merge(engine, model, range(12), op=added, **options), 12)
    told = []
    oobpickle.merge(engine, listed, range(9), progress=lambda *args: told.append(args))
    assert told[0] == (0, 9)
    assert told[-1] == (9, 9)
    check_errors(engine)


def check_errors(engine):
    error = raised(ValueError, engine, fails, range(20))
    assert type(error) is ValueError
    assert error.args == ("five",)
    assert error.__notes__[-1] == "oobpickle.merge: raised in func, piece 5", error.__notes__
    error = raised(KeyError, engine, listed, range(20), op=op_that_fails, chunksize=2)
    assert type(error) is KeyError
    assert "oobpickle.merge: raised in op, pieces " in error.__notes__[-1], error.__notes__
    assert "returned None" in str(raised(TypeError, engine, listed, range(3), op=list.extend))
    assert "no initial value" in str(raised(TypeError, engine, listed, []))
    assert oobpickle.merge(engine, listed, range(3)) == [0, 1, 2]
