"""An environment for the peers: made once, found again.

What
    `enter` makes a venv with the requirements of ``peers-requirements.txt`` and runs the program
    again in it.

How it works
    All requirements are installed at once; if that fails, one by one, so that one which has no
    build for this Python does not keep the others away. What failed, and why, is written into the
    environment. It is made again when the requirements change.

Lifetime
    It stays in the cache directory, and is anybody's to delete.

When it cannot
    Without a package index nothing is installed, and every peer that needs a library says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("peers-requirements.txt")
_STATE = "peers.json"
_ONE_S, _ALL_S = 600, 1200


def default_folder() -> Path:
    """Where the environment is if nothing else is said."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "oobpickle" / f"peers-{platform.python_version()}"


def enter(folder: Path, script: Path, arguments: list[str]) -> dict[str, str]:
    """Return what could not be installed, in the environment; outside of it, run again there."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    python = folder / "bin" / "python"
    state = folder / _STATE
    if not state.exists() or json.loads(state.read_text())["requirements"] != wanted:
        failures = _make(folder, python)
        state.write_text(json.dumps({"requirements": wanted, "failures": failures}, indent=1))
    if Path(sys.prefix) != folder.resolve():
        os.execv(python, [str(python), str(script), *arguments])
    found: dict[str, str] = json.loads(state.read_text())["failures"]
    return found


def _make(folder: Path, python: Path) -> dict[str, str]:
    print(f"making an environment in {folder}; some minutes, some GB", file=sys.stderr)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if not _install(python, ["-r", str(REQUIREMENTS)], _ALL_S):
        return {}
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    failures = {}
    for requirement in filter(None, lines):
        reason = _install(python, [requirement], _ONE_S)
        if reason:
            failures[requirement] = reason
            print(f"not installed: {requirement}: {reason}", file=sys.stderr)
    return failures


def _install(python: Path, what: list[str], limit_s: float) -> str:
    """Return why it failed, or nothing."""
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *what]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"not done in {limit_s:.0f} s"
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (errors or ["pip failed"])[-1][:200]
