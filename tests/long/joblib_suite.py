"""joblib's own tests of parallel calls and memory maps, with oobpickle installed and without.

    python tests/long/joblib_suite.py [NAME OF A TEST FILE WITHOUT "test_" ...]

Every message is forced through the arena (``OOBPICKLE_FORCE=1``), however small. Prints how many
tests passed each time; the exit code is 1 if a test fails only with oobpickle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).parent
FILES = ("parallel", "memmapping")
SITE = (HERE.parent / "stdlib" / "site", HERE.parents[1] / "src")


def outcomes(names: list[str], folder: Path, *, plain: bool) -> dict[str, str]:
    """Run the tests and return how each ended; in `folder` are the statistics of each process."""
    report = folder / "outcomes.xml"
    environment = {**os.environ, "STDLIB_REPORTS": str(folder), "OOBPICKLE_FORCE": "1"}
    environment["PYTHONPATH"] = "" if plain else os.pathsep.join(map(str, SITE))
    modules = [f"joblib.test.test_{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", *modules]
    subprocess.run([*command, f"--junitxml={report}"], cwd=folder, env=environment, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ended = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}.{case.get('name')}"] = ended[0] if ended else "passed"
    return found


def main(names: list[str]) -> int:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ours = outcomes(names, folder, plain=False)
        reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        plain = outcomes(names, folder, plain=True)
    n_out_of_band = sum(report["n_out_of_band"] for report in reports)
    fallbacks: dict[str, int] = {}
    for report in reports:
        for reason, one in report["fallbacks"].items():
            fallbacks[reason] = fallbacks.get(reason, 0) + one["n_messages"]
    worse = [name for name, ended in ours.items() if ended != plain.get(name, ended)]
    for label, found in (("with oobpickle", ours), ("without", plain)):
        print(f"{label}: {sum(one == 'passed' for one in found.values())} of {len(found)} passed")
    print(f"{n_out_of_band} messages through the arena, in-band {fallbacks or 'none'}")
    for name in worse:
        print(f"differs: {name}: {ours[name]}, without oobpickle {plain[name]}")
    return int(bool(worse) or not ours or not n_out_of_band)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(FILES)))
