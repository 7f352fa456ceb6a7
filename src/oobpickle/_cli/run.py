"""The command ``run``: a program as Python runs it, with oobpickle installed.

**What.** `run` runs a script, or with ``-m`` a module, unchanged; at its end it writes a report, if
one was asked for.

**How it works.** In this process, with a new ``__main__``: so functions and classes of the program
are found under their names, and processes that are spawned import it as they would. ``sys.argv``
and ``sys.path[0]`` are those of ``python PROGRAM``. A traceback has no frame of this file.

**Lifetime.** Installed until the interpreter ends, as processes of the program may live so long.

**When it cannot.** Where the system offers no arena a warning says so, and the program runs. Code
that looks at ``sys.orig_argv`` sees this command."""

from __future__ import annotations

import atexit
import builtins
import contextlib
import importlib.util
import os
import signal
import sys
import types
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, Final

from oobpickle._api import install
from oobpickle._cli.failure import CommandError
from oobpickle._cli.report import Recorder
from oobpickle._errors import ArenaError, FallbackWarning

_MAIN: Final = "__main__"
_MP_MAIN: Final = "__mp_main__"  # the name of what spawned children have of it


def run(
    program: str,
    arguments: Sequence[str],
    *,
    is_module: bool,
    options: dict[str, Any],
    report: Path | None,
) -> int:
    """Run a program; return its exit code, or raise what ends it."""
    main, code = _module(program) if is_module else _script(program)
    if report is not None and not report.parent.is_dir():
        raise CommandError(f"there is no folder {report.parent} for the report")
    arena = None
    try:
        arena = install(**options)
    except ArenaError as error:
        warnings.warn(f"oobpickle is not in use: {error}", FallbackWarning, stacklevel=1)
    except (TypeError, ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    sys.argv[:] = [str(main.__file__) if is_module else program, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(program))
    sys.modules[_MAIN] = sys.modules[_MP_MAIN] = main
    recorder = Recorder(arena) if report is not None and arena is not None else None
    with recorder or contextlib.nullcontext():
        code_of_exit = _run(main, code)
    if recorder is not None and report is not None:
        recorder.write(report, sys.argv)
    if isinstance(code_of_exit, SystemExit):
        raise code_of_exit
    return code_of_exit


def _new_main(path: str, spec: ModuleSpec | None) -> types.ModuleType:
    main = types.ModuleType(_MAIN)
    ours = vars(sys.modules[_MAIN])  # which of these there are turns on the version of Python
    vars(main).update({name: None for name in ("__cached__",) if name in ours})
    vars(main).update({name: {} for name in ("__annotations__",) if name in ours})
    main.__file__ = path
    main.__spec__ = spec
    main.__builtins__ = builtins  # type: ignore[attr-defined]
    return main


def _script(path: str) -> tuple[types.ModuleType, CodeType]:
    if os.path.isdir(path):
        raise CommandError(f"{path} is a folder; run a script, or with -m a module")
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    path = os.path.abspath(path)
    main = _new_main(path, None)
    main.__loader__ = SourceFileLoader(_MAIN, path)
    main.__package__ = None
    return main, _compiled(source, path)


def _compiled(source: bytes, path: str) -> CodeType:
    try:
        return compile(source, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        _show(error.with_traceback(None))
        raise SystemExit(1) from None


def _module(name: str) -> tuple[types.ModuleType, CodeType]:
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
        loader: Any = None if spec is None else spec.loader
        code = None if spec is None or loader is None else loader.get_code(spec.name)
    except (ImportError, ValueError, AttributeError) as error:
        raise CommandError(f"cannot find module {name!r}: {error}") from error
    if spec is None or code is None:
        raise CommandError(f"there is no module {name!r} that can be run")
    main = _new_main(str(spec.origin), spec)
    main.__loader__ = spec.loader
    main.__package__ = spec.parent
    if "__cached__" in vars(main):
        main.__cached__ = spec.cached  # type: ignore[attr-defined]
    return main, code


def _run(main: types.ModuleType, code: CodeType) -> int | SystemExit:
    """Execute the program; return its exit code, or what it has raised to say it."""
    try:
        exec(code, vars(main))
    except SystemExit as error:
        error.__traceback__ = None  # it refers to the program's frames
        return error
    except KeyboardInterrupt as error:
        _show(error)
        atexit.register(_die_by_interrupt)
        return 130
    except BaseException as error:
        _show(error)
        return 1
    return 0


def _show(error: BaseException) -> None:
    """Show an exception as the interpreter would, without what is above the program."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace
    sys.excepthook(type(error), error, trace)


def _die_by_interrupt() -> None:
    """End as the interpreter does after a Ctrl-C: whoever waits sees the signal."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
