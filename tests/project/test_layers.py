"""The layers of the design: imports point down, and pickle meets memory in one place only."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import oobpickle

SOURCE = Path(oobpickle.__file__).parent
DESIGN = Path(__file__).parents[2] / "docs" / "explanation" / "design.md"

#: Each package, and each module beside them. A later line imports from earlier ones only, and what
#: is in one line nothing from the rest of it.
LAYERS = (
    ("_errors", "_native", "_delegate"),
    ("_foreign", "_fallback", "_faults", "_nbytes", "_system"),
    ("_statistics", "_copying", "_handle"),
    ("_pickling", "_memory"),
    ("_in_files",),
    ("_envelope", "_arena", "_files", "_structure"),
    ("_published", "_shared"),
    ("_hook", "_merge"),
    ("_broadcast", "_share"),
    ("_api", "_explain"),
    ("testing", "_cli"),
    ("__init__",),
    ("__main__",),
)
LEVEL_OF = {place: level for level, places in enumerate(LAYERS) for place in places}
#: What serves both sides; nothing else below the seam is imported by that of pickle.
COMMON = {"_errors", "_foreign", "_copying", "_delegate", "_native"}
PICKLERS = {"pickle", "_pickle", "copyreg", "cloudpickle", "pickletools", "marshal", "shelve"}
SYSTEM = {"multiprocessing", "ctypes", "fcntl", "resource"}


def imports_of(tree, *, in_types=False):
    """Return the absolute names that a module imports when it runs, or a function of it.

    With `in_types` also those that only a type checker imports.
    """
    found = set()
    for node in ast.walk(tree) if in_types else _nodes_that_run(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "oobpickle" if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            inside = module.partition(".")[0] == "oobpickle"
            found |= {f"{module}.{alias.name}" for alias in node.names} if inside else {module}
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
    return ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text())


def modules():
    return {".".join(p.relative_to(SOURCE).with_suffix("").parts) for p in SOURCE.rglob("*.py")}


def place_of(module):
    """Return the package of a module, or the module itself if it stands beside them."""
    return module.partition(".")[0]


def _module_of(name):
    """Return the module of oobpickle that a dotted name leads to, without what is in it."""
    for module in (name, f"{name}.__init__", name.rpartition(".")[0], "__init__"):
        if module in MODULES:
            return module
    raise AssertionError(name)


def ours(module, *, in_types=False):
    """Return the modules of oobpickle that a module imports."""
    found = set()
    for name in imports_of(parse(module), in_types=in_types):
        package, _, rest = name.partition(".")
        if package == "oobpickle" and (rest or module != "__init__") and rest != "_core":
            found.add(_module_of(rest) if rest else "__init__")
    return found - {module}


MODULES = sorted(modules())


def test_everything_has_its_place():
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    beside = {path.stem for path in SOURCE.glob("*.py")}

    assert set(LEVEL_OF) == folders | beside
    assert {module.count(".") for module in MODULES} == {0, 1}


def test_the_design_names_every_module_once():
    text = DESIGN.read_text().partition("## Where everything is")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
    there = [m for m in MODULES if not m.endswith("__init__")] + ["__init__", "testing"]

    assert sorted(named) == sorted(there)


def test_imports_point_down():
    upwards = {
        m: {
            name
            for name in ours(m)
            if place_of(name) != place_of(m) and LEVEL_OF[place_of(name)] >= LEVEL_OF[place_of(m)]
        }
        for m in MODULES
    }

    assert upwards == {module: set() for module in MODULES}


def test_imports_make_no_circle():
    """Nor those that are for type checkers."""
    sorter = graphlib.TopologicalSorter({m: ours(m, in_types=True) for m in MODULES})

    assert set(sorter.static_order()) == set(MODULES)


def of_package(package):
    found = [module for module in MODULES if place_of(module) == package]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("module", of_package("_pickling"))
def test_the_side_of_pickle_knows_nothing_of_memory(module):
    top = {name.split(".")[0] for name in imports_of(parse(module))}

    assert {place_of(name) for name in ours(module)} <= {"_pickling", *COMMON}
    assert not top & SYSTEM


def test_the_side_of_memory_knows_nothing_of_pickle():
    top = {
        module: {name.split(".")[0] for name in imports_of(parse(module))} & PICKLERS
        for module in of_package("_memory")
    }

    assert top == {module: set() for module in top}


def test_no_module_is_imported_by_its_name_in_a_string():
    calls = {
        module: {
            ast.unparse(node.func)
            for node in ast.walk(parse(module))
            if isinstance(node, ast.Call) and "import" in ast.unparse(node.func)
        }
        for module in MODULES
    }

    assert calls.pop("_native") == {"importlib.import_module"}  # the extension module
    # What the user has named, and all modules, to see whether they can be imported.
    assert calls.pop("_hook.multiprocess") == {"importlib.import_module"}  # of that library
    assert calls.pop("_cli.explaining") == {"import_module"}
    assert calls.pop("_cli.run") == {"importlib.util.find_spec"}
    assert calls.pop("_cli.doctor") == {"importlib.import_module"}
    assert calls == {module: set() for module in calls}


# --- the reading of imports itself


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import oobpickle._a", {"oobpickle._a"}),
        ("from oobpickle import _a, _b", {"oobpickle._a", "oobpickle._b"}),
        ("from oobpickle._a import x", {"oobpickle._a.x"}),
        ("from . import _a", {"oobpickle._a"}),
        ("from ._a import x", {"oobpickle._a.x"}),
        ("def f():\n  if x:\n    from oobpickle._a import y", {"oobpickle._a.y"}),
        ("try:\n  import a\nexcept ImportError:\n  import b", {"a", "b"}),
        ("if TYPE_CHECKING:\n  import a\nelse:\n  import b", {"b"}),
        ("if typing.TYPE_CHECKING:\n  import a", set()),
        ("class C:\n  import a.b as c", {"a.b"}),
    ],
)
def test_every_form_of_import_is_seen(code, expected):

    assert imports_of(ast.parse(code)) == expected
