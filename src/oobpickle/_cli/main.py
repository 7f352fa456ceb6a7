"""The commands: ``doctor``, ``bench``, ``explain`` and ``run``.

**What.** `main` reads the arguments and calls a command, which is imported then.

**How it works.** With `argparse`. Each command returns its exit code. This module needs nothing of
the package, so that ``doctor`` can say what is wrong with it.

**Lifetime.** No state.

**When it cannot.** Bad arguments, files that are missing, names that do not import: one line on
standard error, and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from oobpickle._cli.failure import CommandError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        code = int(given.command(given))
        if given.command is not _run:  # whose program may have closed it
            sys.stdout.flush()  # at the end of the process nobody could catch what this raises
        return code
    except CommandError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of `oobpickle explain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="oobpickle",
        description="Sends the big buffers of multiprocessing objects through shared memory.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    doctor = commands.add_parser("doctor", help="look at this machine, by doing")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.add_argument("--pid", type=int, help="who has what in the arena of a running process")
    doctor.set_defaults(command=_doctor)

    bench = commands.add_parser("bench", help="this machine, plain and with oobpickle")
    bench.add_argument("--full", action="store_true", help="more sizes, and more of each")
    form = bench.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="as a Markdown table")
    bench.set_defaults(command=_bench)

    explain = commands.add_parser("explain", help="where the bytes and seconds of an object go")
    explain.add_argument("what", metavar="FILE.pkl|MODULE:NAME", help="a pickle, or a name")
    explain.set_defaults(command=_explain)

    run = commands.add_parser("run", help="run a program with oobpickle installed")
    run.add_argument("--capacity", help="the most that the arena may occupy: 4GB")
    run.add_argument("--threshold", help="what is smaller travels as ever: 64KB")
    run.add_argument("--spill-dir", metavar="DIR", help="where messages go when memory is full")
    run.add_argument("--report", metavar="FILE.html", type=Path, help="write what was sent")
    run.add_argument("-m", dest="is_module", action="store_true", help="PROGRAM is a module")
    run.add_argument("program", metavar="PROGRAM", help="a script, or with -m a module")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    run.set_defaults(command=_run)
    return parser


def _doctor(given: argparse.Namespace) -> int:
    if given.pid is not None:
        from oobpickle._cli.arenas import look_at

        return look_at(given.pid, as_json=given.json)
    from oobpickle._cli.doctor import doctor

    return doctor(as_json=given.json)


def _bench(given: argparse.Namespace) -> int:
    from oobpickle._cli.bench import bench

    form = "json" if given.json else "markdown" if given.markdown else "text"
    return bench(is_full=given.full, form=form)


def _explain(given: argparse.Namespace) -> int:
    from oobpickle._cli.explaining import explain_named

    return explain_named(given.what)


def _run(given: argparse.Namespace) -> int:
    from oobpickle._cli.run import run

    return run(
        given.program,
        given.arguments,
        is_module=given.is_module,
        options={
            "capacity": given.capacity,
            "threshold": given.threshold,
            "spill_dir": given.spill_dir,
        },
        report=given.report,
    )
