"""Programs whose main module spawned children cannot import."""

import pytest

from process.harness import FLAGS, run_program

COMMAND = (
    "import pathlib, sys; del sys.argv[0]; "
    "exec(compile(pathlib.Path(sys.argv[0]).read_text(), '<cell>', 'exec'))"
)
NOTEBOOK = f"""\
import sys, types
module = sys.modules["__main__"] = types.ModuleType("__main__")
exec({COMMAND!r}, vars(module))
"""
STANDARD_INPUT = 'python=$1 file=$2; shift 2; exec "$python" {flags} - "$@" < "$file"'
FLAGS_QUOTED = " ".join(f'"{flag}"' for flag in FLAGS)

WAYS = {
    "command": {"flags": (*FLAGS, "-c", COMMAND)},
    "notebook": {"flags": (*FLAGS, "-c", NOTEBOOK)},
    "standard input": {
        "flags": (),
        "prefix": ("sh", "-c", STANDARD_INPUT.format(flags=FLAGS_QUOTED), "sh"),
    },
}


@pytest.mark.parametrize(
    ("way", "method"),
    [("notebook", "spawn"), ("command", "forkserver"), ("standard input", "spawn")],
)
def test_everything_works(way, method):
    run_program("lost_main", "everything", method, **WAYS[way])


@pytest.mark.parametrize("case", ["to_both_at_once", "large_globals_are_warned_of"])
def test_lost_main_with(case):
    run_program("lost_main", case, "forkserver", **WAYS["standard input"])


@pytest.mark.parametrize("way", ["notebook", "standard input"])
def test_forked_children_have_it(way):
    run_program("lost_main", "by_name_to_forked_children", **WAYS[way])


def test_nothing_is_different_for_a_file():
    run_program("lost_main", "by_name_if_it_is_a_file", "spawn", fresh=True)
