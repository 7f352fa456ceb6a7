"""How oobpickle compares with other ways to send a large model to another process.

What
    ``python benchmarks/peers.py`` makes an environment with all of them, measures each in the same
    run, and prints a table for each row with oobpickle's place. ``README.md`` next to this file
    says what the rows and columns mean.

How it works
    This process is the coordinator (``_peer_harness.py``). Each peer is measured in a side of its
    own (``_peer_side.py``) by one file in ``_peers/``.

Lifetime
    ``--json`` writes the figures. ``--batches`` stores all times, and ``--from`` prints and draws
    stored ones, of several runs too.

When it cannot
    A peer that fails has a row with the reason. Exit 2: a model arrived damaged.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import _environment


def _enter() -> tuple[list[str], dict[str, str]]:
    """Be in the environment; return the other words, and what could not be installed there."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--environment", type=Path, default=_environment.default_folder())
    parser.add_argument("--side")
    known, words = parser.parse_known_args()
    if known.side:
        return ["--side", known.side], {}
    folder = Path(os.path.abspath(known.environment))
    return words, _environment.enter(folder, Path(__file__).resolve(), sys.argv[1:])


def main() -> int:
    words, failures = _enter()
    import _peer_run  # Only now: it needs what the environment has.

    return _peer_run.main(words, (__doc__ or "").splitlines()[0], failures)


if __name__ == "__main__":
    sys.exit(main())
