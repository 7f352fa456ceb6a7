"""Docstrings: every example runs, and every module says the same four things."""

import ast
import doctest
import importlib
import re
import sys
import types
from pathlib import Path

import pytest

import oobpickle

SOURCE = Path(oobpickle.__file__).parent
PRIVATE_PACKAGES = (
    "_pickling",
    "_memory",
    "_hook",
    "_explain",
    "_cli",
    "_files",
    "_merge",
)  # each says what it is in a line
PATHS = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
    if not (path.stem == "__init__" and path.parent.name in PRIVATE_PACKAGES)
}
MODULES = list(PATHS)
HEADINGS = ["**What.**", "**How it works.**", "**Lifetime.**", "**When it cannot.**"]


def load(name):
    return importlib.import_module(f"oobpickle.{name}".removesuffix(".__init__"))


def examples_of(name):
    """Return the doctests of one module, of its private functions too."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    module = load(name)
    return [test for test in finder.find(module, module.__name__) if test.examples]


@pytest.fixture
def main(monkeypatch):
    """A module in which examples can define classes that pickle finds again."""
    module = types.ModuleType("main_of_an_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("name", [name for name in MODULES if examples_of(name)])
def test_the_examples_of_a_module_run(name, main):
    for test in examples_of(name):
        vars(main).clear()
        vars(main)["__name__"] = "main_of_an_example"
        test.globs = vars(main)
        output = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        results = runner.run(test, out=output.append, clear_globs=False)

        assert results.attempted == len(test.examples)
        assert "".join(output) == ""


def test_every_example_in_the_source_is_found():
    written = {name: len(re.findall(r"^\s*>>> ", text_of(name), re.MULTILINE)) for name in MODULES}
    found = {name: sum(len(test.examples) for test in examples_of(name)) for name in MODULES}

    assert written == found
    assert sum(found.values()) > 10


def text_of(name):
    return PATHS[name].read_text()


def docstrings():
    return {name: ast.get_docstring(ast.parse(text_of(name))) for name in MODULES}


def test_every_module_says_what_how_how_long_and_when_not():
    headings = {
        name: re.findall(r"^\*\*.*?\*\*", doc, re.MULTILINE) for name, doc in docstrings().items()
    }

    assert headings == dict.fromkeys(MODULES, HEADINGS)


def test_every_module_docstring_begins_with_a_sentence():
    first = {name: doc.partition("\n\n")[0] for name, doc in docstrings().items()}
    wrong = {n: text for n, text in first.items() if not re.fullmatch(r"(?s)[A-Z].*[.?]", text)}

    assert wrong == {}


def test_no_line_names_a_directory_of_somebody():
    lines = {
        name: re.findall(r"^.*/(?:work|root|home|Users)\b.*$", text_of(name), re.MULTILINE)
        for name in MODULES
    }

    assert lines == {name: [] for name in MODULES}
