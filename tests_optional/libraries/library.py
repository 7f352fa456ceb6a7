"""What the programs of this folder share: the work, and the line that each of them prints.

A program calls ``show(name, use)``. `use` is given the start method and returns what it has
received; `show` runs it inside a block, compares every value with what the same calls give without
a pool, and prints the version and what went through the arena::

    pebble 5.2.3, spawn: values right; 8 out of band, 12.8 MB; in-band nothing

The exit code is 0 if all values are right.
"""

import importlib.metadata
import multiprocessing
import sys
import warnings

import numpy as np

import oobpickle

N = 4
LENGTH = 200_000


def inputs():
    """Return arrays of 1.6 MB."""
    return [np.arange(LENGTH, dtype=float) + n for n in range(N)]


def double(array):
    """Return another array, in a worker."""
    return 2 * array


def are_equal(found, expected):
    """Tell whether all values are the same, and arrays can be written to."""
    found = list(found)
    return len(found) == len(expected) and all(
        np.array_equal(one, other) and (not isinstance(one, np.ndarray) or one.flags.writeable)
        for one, other in zip(found, expected, strict=True)
    )


def show(name, use, expected=None):
    """Run it inside a block and say what happened.

    Parameters
    ----------
    name : str
        Of the distribution.
    use : callable
        ``use(method)`` returns a list.
    expected : list, optional
        Default: the inputs, doubled.
    """
    method = sys.argv[1] if len(sys.argv) > 1 else "fork"
    multiprocessing.set_start_method(method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with oobpickle.enabled() as arena:
            found = use(method)
            is_right = are_equal(found, expected or [double(array) for array in inputs()])
    done = arena.statistics()
    in_band = ", ".join(f"{n.n_messages} ({reason})" for reason, n in done.fallbacks.items())
    said = [one.category.__name__ for one in caught if "oobpickle" in str(one.category)]
    print(
        f"{name} {importlib.metadata.version(name)}, {method}: "
        f"values {'right' if is_right else 'WRONG'}; {done.n_messages_out_of_band} out of band, "
        f"{done.nbytes_out_of_band / 1e6:.1f} MB; in-band {in_band or 'nothing'}"
        + "".join(f"; {one}" for one in said),
        flush=True,
    )
    sys.exit(not is_right)
