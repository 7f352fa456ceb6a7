"""CPython's own tests of multiprocessing and concurrent.futures, with oobpickle installed.

    python tests/stdlib/run.py [fork] [spawn] [forkserver] [concurrent_futures]

Every message is forced through the arena (``OOBPICKLE_FORCE=1``), however small. Prints one line
for each suite: how many tests passed, and which share of the messages went through the arena. What
fails is run again without oobpickle; what fails there too is not counted against it. The exit code
is 1 if a test fails only with oobpickle, or less than 99% of the messages went through the arena.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import oobpickle

HERE = Path(__file__).parent
LEAST_SHARE = 0.99
SUITES = {
    "fork": "test_multiprocessing_fork",
    "spawn": "test_multiprocessing_spawn",
    "forkserver": "test_multiprocessing_forkserver",
    "concurrent_futures": "test_concurrent_futures",
}
#: Tests whose outcome differs on purpose: what they end with, and the reason.
DIFFERENT = {
    "test_unpickleable_result": "a lambda as a result: cloudpickle takes it, so nothing fails",
}
#: For Pythons that are installed without these thin modules.
WRAPPER = """\
from test._test_multiprocessing import install_tests_in_module_dict
install_tests_in_module_dict(globals(), {method!r})
"""


def module_of(suite: str, folder: Path) -> str | None:
    """Return the name of the suite's module, which is made if this Python lacks it."""
    name = SUITES[suite]
    if importlib.util.find_spec(f"test.{name}"):
        return f"test.{name}"
    if suite == "concurrent_futures":
        return None
    (folder / f"{name}.py").write_text(WRAPPER.format(method=suite))
    return name


def run(names: list[str], folder: Path, *, plain: bool, log: Path) -> dict[str, str]:
    """Run tests and return how each ended; in `folder` are the modules that were made."""
    report = folder / "outcomes.json"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "STDLIB_REPORTS": str(folder), "OOBPICKLE_FORCE": "1"}
    site = [] if plain else [str(HERE / "site"), str(Path(oobpickle.__file__).parents[1])]
    environment["PYTHONPATH"] = os.pathsep.join([*site, str(folder)])
    command = [sys.executable, str(HERE / "suite.py"), str(report), *names]
    with log.open("w") as output:
        subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    if not report.exists():
        sys.exit(f"{' '.join(command)} did not come to its end:\n{tail_of(log)}")
    outcomes: dict[str, str] = json.loads(report.read_text())
    report.unlink()
    return outcomes


def tail_of(log: Path) -> str:
    return log.read_text(errors="replace")[-20_000:]


def try_suite(suite: str, *, verbose: bool) -> bool:
    """Run one suite, print its line, and tell whether it is as it should be."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        module = module_of(suite, folder)
        if module is None:
            print(f"{suite}: this Python has no test.{SUITES[suite]}", flush=True)
            return True
        outcomes = run([module], folder, plain=False, log=folder / "log")
        log = tail_of(folder / "log")
        if "Error in sitecustomize" in log:
            sys.exit(f"oobpickle could not be installed:\n{log}")
        reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
        meant = [test for test in failed if test.rpartition(".")[2] in DIFFERENT]
        ours = [test for test in failed if test not in meant]
        if ours:
            without = run(ours, folder, plain=True, log=folder / "log")
            ours = [test for test in ours if without.get(test) != "failed"]
    n_without = len(failed) - len(meant) - len(ours)
    n_passed = sum(outcome == "passed" for outcome in outcomes.values())
    n_out_of_band = sum(report["n_out_of_band"] for report in reports)
    fallbacks: dict[str, int] = {}
    for report in reports:
        for reason, one in report["fallbacks"].items():
            fallbacks[reason] = fallbacks.get(reason, 0) + one["n_messages"]
    n_messages = n_out_of_band + sum(fallbacks.values())
    share = n_out_of_band / max(1, n_messages)
    print(
        f"{suite}: {n_passed} passed, {sum(o == 'skipped' for o in outcomes.values())} skipped, "
        f"{len(ours)} failed, {n_without} failed without oobpickle too, "
        f"{len(meant)} differ on purpose; "
        f"{share:.2%} of {n_messages} messages through the arena, in-band {fallbacks or 'none'}; "
        f"{time.monotonic() - start:.0f} s",
        flush=True,
    )
    good = bool(n_passed) and not ours and share >= LEAST_SHARE
    if ours or verbose:
        print(log, *(f"failed with oobpickle: {test}" for test in ours), sep="\n", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--verbose", action="store_true", help="print what the tests print")
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    good = [try_suite(suite, verbose=options.verbose) for suite in options.suites or SUITES]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
