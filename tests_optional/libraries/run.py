"""Runs every program of this folder under each start method: one line each, see `library`.

``python tests_optional/libraries/run.py [NAME ...]``; the exit code is 0 if all values were right,
and nothing was written to stderr. A library that is not installed is left out, and named.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
START_METHODS = ("fork", "spawn", "forkserver")
WITHIN_S = 120


def main(names):
    programs = [HERE / f"with_{name}.py" for name in names] or sorted(HERE.glob("with_*.py"))
    n_wrong = 0
    for program in programs:
        name = program.stem.removeprefix("with_")
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed", flush=True)
            continue
        n_wrong += sum(not is_right(program, method) for method in START_METHODS)
    return n_wrong


def is_right(program, method):
    """Run one program; print what it says, and what it should not have said."""
    command = [sys.executable, str(program), method]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=WITHIN_S, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{program.stem}, {method}: NOT FINISHED within {WITHIN_S} s", flush=True)
        return False
    print(done.stdout.rstrip() or f"{program.stem}, {method}: FAILED", flush=True)
    if done.stderr:
        print(done.stderr.rstrip(), flush=True)
    return done.returncode == 0 and not done.stderr


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
