"""The layers of the design: imports point down, and pickle meets memory in one place only."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import oobpickle

SOURCE = Path(oobpickle.__file__).parent
DESIGN = Path(__file__).parents[2] / "docs" / "explanation" / "design.md"

#: The level of each module; a new one gets its place here, and in the table of the design.
LEVELS = {
    0: {
        "_errors",
        "_foreign",
        "_faults",
        "_system",
        "_interrupts",
        "_huge_pages",
        "_statistics",
        "_delegate",
    },
    1: {
        "_copying",
        "_functions",
        "_classes",
        "_large_globals",
        "_reducers",
        "_arrow",
        "_byte_types",
        "_locating",
        "_rebuild",
        "_resizable",
        "_snapshot",
        "_stream",
        "_subclasses",
        "_access",
        "_segment",
        "_backing",
        "_descriptors",
        "_remap",
        "_file_words",
        "_headroom",
        "_layout",
        "_pipes",
    },
    2: {
        "_locks",
        "_payload",
        "_into",
        "_by_value",
        "_table",
        "_ledger",
        "_rows",
        "_mutex",
        "_participants",
        "_unloaded",
        "_options",
    },
    3: {
        "_serializer",
        "_straight",
        "_membership",
        "_lease",
        "_watch",
        "_holdings",
        "_room",
        "_retention",
        "_fork",
        "_intake",
        "_arena",
        "_absent",
        "_files",
        "_handed",
    },
    4: {"_envelope"},
    5: {
        "_backlog",
        "_channels",
        "_fileno",
        "_hook",
        "_offers",
        "_readers",
        "_main_module",
        "_loading",
        "_connections",
        "_processes",
        "_reduction",
    },
    6: {"__init__", "testing", "_calls", "_comparison"},
}
LEVEL_OF = {module: level for level, modules in LEVELS.items() for module in modules}
#: The column that knows pickle; all else below the seam knows memory, but for what serves both.
COMMON = {"_errors", "_foreign", "_copying", "_delegate"}
PICKLE = {
    "_arrow",
    "_reducers",
    "_rebuild",
    "_resizable",
    "_snapshot",
    "_stream",
    "_subclasses",
    "_byte_types",
    "_locating",
    "_comparison",
    "_calls",
    "_payload",
    "_into",
    "_functions",
    "_classes",
    "_large_globals",
    "_by_value",
    "_serializer",
    "_straight",
}
SEAM = 4
MEMORY = {m for m, level in LEVEL_OF.items() if level < SEAM} - PICKLE - COMMON
PICKLERS = {"pickle", "_pickle", "copyreg", "cloudpickle", "pickletools", "marshal", "shelve"}


def imports_of(tree):
    """Return the absolute names that a module imports when it runs, or a function of it."""
    found = set()
    for node in _nodes_that_run(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "oobpickle" if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            if module == "oobpickle":
                found |= {f"oobpickle.{alias.name}" for alias in node.names}
            else:
                found.add(module)
    return found


def _nodes_that_run(node):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _nodes_that_run(other)
        else:
            yield child
            yield from _nodes_that_run(child)


def parse(module):
    return ast.parse((SOURCE / f"{module}.py").read_text())


def modules():
    return {path.stem for path in SOURCE.glob("*.py")}


def ours(module):
    """Return the modules of oobpickle that a module imports."""
    found = set()
    for name in imports_of(parse(module)):
        package, _, rest = name.partition(".")
        if package == "oobpickle" and rest:
            found.add(rest if rest in modules() else "__init__")
        elif package == "oobpickle" and module != "__init__":
            found.add("__init__")
    return found


MODULES = sorted(modules())


def test_every_module_has_a_level():

    assert set(LEVEL_OF) == modules()


def layers_in_the_design():
    """Return level and column of each module that the table of the design names, or the text."""
    text = DESIGN.read_text().partition("## Layers")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \d", line)]
    places = [
        (module, (int(level), column))
        for level, *cells in rows
        for column, cell in zip(("pickle", "both", "memory"), cells, strict=True)
        for module in re.findall(r"`(_\w+)`", cell)
    ]
    on_top = next(line for line in text.splitlines() if line.startswith("On top"))
    places += [(module, (6, "on top")) for module in re.findall(r"`(_?[a-z]+)`", on_top)]
    assert len(dict(places)) == len(places), "a module is named twice"
    return dict(places)


def test_the_table_of_the_design_is_the_same():
    places = layers_in_the_design()
    levels = {module: level for module, level in LEVEL_OF.items() if module != "__init__"}
    pickle = {module for module, (_, column) in places.items() if column == "pickle"}

    assert levels == {module: level for module, (level, _) in places.items()}
    assert PICKLE - LEVELS[6] == pickle
    assert {places[module][1] for module in COMMON} == {"both"}


def test_the_source_is_one_flat_folder():

    assert [path for path in SOURCE.rglob("*.py") if path.parent != SOURCE] == []


def test_imports_point_down():
    upwards = {m: {name for name in ours(m) if LEVEL_OF[name] > LEVEL_OF[m]} for m in MODULES}

    assert upwards == {module: set() for module in MODULES}


def test_imports_make_no_circle():
    sorter = graphlib.TopologicalSorter({module: ours(module) for module in MODULES})

    assert set(sorter.static_order()) == set(MODULES)


@pytest.mark.parametrize("module", sorted(PICKLE))
def test_the_side_of_pickle_knows_nothing_of_memory(module):
    top = {name.split(".")[0] for name in imports_of(parse(module))}

    assert ours(module) <= PICKLE | COMMON
    assert not top & {"multiprocessing", "ctypes", "fcntl", "resource"}


def test_the_side_of_memory_knows_nothing_of_pickle():
    top = {m: {name.split(".")[0] for name in imports_of(parse(m))} & PICKLERS for m in MEMORY}

    assert {m: ours(m) & PICKLE for m in MEMORY} == {m: set() for m in MEMORY}
    assert top == {m: set() for m in MEMORY}


def test_both_sides_are_imported_from_the_seam_on_only():
    both = {module for module in MODULES if ours(module) & PICKLE and ours(module) & MEMORY}

    assert {module for module in both if LEVEL_OF[module] < SEAM} == set()
    assert "_envelope" in both


def test_no_module_is_imported_by_its_name_in_a_string():
    calls = {
        module: {
            ast.unparse(node.func)
            for node in ast.walk(parse(module))
            if isinstance(node, ast.Call) and "import" in ast.unparse(node.func)
        }
        for module in MODULES
    }

    assert calls == {module: set() for module in MODULES}


# --- the reading of imports itself


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import oobpickle._a", {"oobpickle._a"}),
        ("from oobpickle import _a, _b", {"oobpickle._a", "oobpickle._b"}),
        ("from oobpickle._a import x", {"oobpickle._a"}),
        ("from . import _a", {"oobpickle._a"}),
        ("from ._a import x", {"oobpickle._a"}),
        ("def f():\n  if x:\n    from oobpickle._a import y", {"oobpickle._a"}),
        ("try:\n  import a\nexcept ImportError:\n  import b", {"a", "b"}),
        ("if TYPE_CHECKING:\n  import a\nelse:\n  import b", {"b"}),
        ("if typing.TYPE_CHECKING:\n  import a", set()),
        ("class C:\n  import a.b as c", {"a.b"}),
    ],
)
def test_every_form_of_import_is_seen(code, expected):

    assert imports_of(ast.parse(code)) == expected
