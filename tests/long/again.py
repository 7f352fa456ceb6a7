"""The same tests again and again: what goes wrong once in a hundred runs shows here.

    python tests/long/again.py [--times 10] [FILE OR TEST ...]

Without names it runs the programs that went wrong where plain multiprocessing is right, each in all
of its ways (`FAULTS`). Every round is a new run of pytest in a new process. Prints a line for each
round, and a table of what has failed; the exit code is 1 if anything has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
FAULTS = (
    *("descriptors", "loading", "lost_main", "snapshots", "copying", "raw", "memory"),
    *("fork", "interrupts", "signals"),
)
#: What only repeats is repeated three times as often as in the suite: see `inside`.
REPEATING = {"OOBPICKLE_REPEATS": "3", **os.environ}
ROUND_S = 600


def one_round(names):
    """Run the tests once; return how many passed, and the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-rf", "--no-header", *names]
    done = subprocess.run(
        command,
        cwd=TESTS.parent,
        env=REPEATING,
        capture_output=True,
        text=True,
        timeout=ROUND_S,
        check=False,
    )
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    passed = re.search(r"(\d+) passed", done.stdout)
    if passed is None or done.returncode not in (0, 1):
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return int(passed[1]), failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="as pytest takes them")
    parser.add_argument("--times", type=int, default=10)
    options = parser.parse_args()
    names = options.names or [str(TESTS / "process" / f"test_{fault}.py") for fault in FAULTS]
    all_failed = Counter()
    for i in range(options.times):
        start_s = time.monotonic()
        passed, failed = one_round(names)
        all_failed.update(failed)
        took_s = time.monotonic() - start_s
        print(f"round {i + 1}: {passed} passed, {len(failed)} failed, {took_s:.0f} s", flush=True)
    for name, n in all_failed.most_common():
        print(f"{n} of {options.times}: {name}")
    return 1 if all_failed else 0


if __name__ == "__main__":
    sys.exit(main())
