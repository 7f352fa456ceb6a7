"""The command ``explain``: an object that is in a file, or that has a name.

**What.** `explain_named`.

**How it works.** ``FILE.pkl`` is loaded with pickle, which can run any code: the file has to be
trusted. ``MODULE:NAME`` is imported, and called if it is a function without arguments.

**Lifetime.** No state.

**When it cannot.** A `CommandError` says what is missing.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from oobpickle._cli.failure import CommandError


def explain_named(what: str) -> int:
    """Print the explanation of an object; return the exit code."""
    obj, name = _found(what)
    from oobpickle._explain.explaining import explain

    print(explain(obj, name=name))
    return 0


def _found(what: str) -> tuple[Any, str]:
    module, colon, name = what.rpartition(":")
    if os.path.exists(what) or not colon:
        return _loaded(Path(what)), "$"
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        obj: Any = import_module(module)
    except Exception as error:
        raise CommandError(f"cannot import {module!r}: {_line(error)}") from error
    for part in name.split("."):
        try:
            obj = getattr(obj, part)
        except AttributeError:
            raise CommandError(f"module {module!r} has no {name!r}") from None
    if inspect.isfunction(obj) and not inspect.signature(obj).parameters:
        obj, name = obj(), f"{name}()"
    return obj, name


def _loaded(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return pickle.load(file)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:
        raise CommandError(f"{path} cannot be unpickled: {_line(error)}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
