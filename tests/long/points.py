"""The names of all fault points, those of the library and those of the victims."""

import re
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "oobpickle"

#: In the middle of the bytes of a copy; with part of an envelope in the pipe; within the loading
#: of an object; with arrays in hand; in a finalizer that has arrays; in what runs at the exit.
OF_VICTIMS = (
    "victim.copying",
    "victim.piping",
    "victim.loading",
    "victim.holding",
    "victim.finalizing",
    "victim.exiting",
)
#: A process comes there once in its life.
ONCE = {
    "arena.mapped",
    "birth.in_child",
    "fork.after_in_child",
    "participant.born",
    "participant.held",
    "participant.joined",
    "victim.copying",
    "victim.exiting",
    "victim.piping",
}
#: A forked process attaches only if it is older than the arena; else it is born a participant.
OF_OLDER = {"arena.mapped", "participant.held", "participant.joined"}


def of_library():
    """Return the arguments of all calls of ``_faults.reach``, and of ``FAULT`` in C.

    But those of files, where nothing is shared: ``tests/process/programs/files.py`` comes there.
    """
    return [name for name in _named() if not name.startswith("files.")]


def of_files():
    """Return the points in the writing of a file."""
    return [name for name in _named() if name.startswith("files.")]


def _named():
    called = re.compile(r'\b(?:_faults\.reach|FAULT)\("([^"]+)"\)')
    files = [*SOURCE.rglob("*.py"), *SOURCE.rglob("*.c")]
    names = {name for path in files for name in called.findall(path.read_text())}
    return sorted(names - {"name"})


def all_points():
    return [*of_library(), *OF_VICTIMS]
