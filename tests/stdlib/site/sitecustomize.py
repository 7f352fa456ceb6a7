"""Installs oobpickle at the start of every Python of a run of CPython's own tests.

Each that is not one of multiprocessing's children has an arena of its own, and leaves its
statistics in the directory that ``STDLIB_REPORTS`` names.
"""

import atexit
import json
import os
from dataclasses import asdict

import oobpickle


def _report(arena, pid):
    if os.getpid() == pid:
        done = arena.statistics()
        numbers = {
            "n_out_of_band": done.n_messages_out_of_band,
            "nbytes_out_of_band": done.nbytes_out_of_band,
            "fallbacks": {reason: asdict(one) for reason, one in done.fallbacks.items()},
            "nbytes_left": {state: n for state, n in done.nbytes.items() if n},
        }
        path = os.path.join(os.environ["STDLIB_REPORTS"], f"{pid}.json")
        with open(f"{path}.part", "w") as file:
            json.dump(numbers, file)
        os.rename(f"{path}.part", path)  # another process may be reading them already


_arena = oobpickle.install()
if _arena.options.capacity and os.environ.get("STDLIB_REPORTS"):
    atexit.register(_report, _arena, os.getpid())
