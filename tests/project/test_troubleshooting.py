"""The pages that are looked things up in: troubleshooting and glossary have all, and are right."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import oobpickle
from oobpickle import _errors
from oobpickle._fallback import REASONS

PROJECT = Path(__file__).parents[2]
SOURCE = Path(oobpickle.__file__).parent
CORE = PROJECT / "src" / "oobpickle" / "_core"
PAGE = (PROJECT / "docs" / "reference" / "troubleshooting.md").read_text()
#: What Python and NumPy say.
OF_OTHERS = "This process (pid="


def section(title):
    """Return what stands under a heading of the page, up to the next one."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title}"
    return found[1]


def quoted(text):
    """Return what is in the blocks of a text, and in the first cells of its tables' rows."""
    blocks = re.findall(r"^```text\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return blocks + [quote for cell in cells for quote in re.findall(r"`(.+?)`", cell)]


def test_every_reason_of_a_fallback_is_there_with_its_words():
    found = {reason: quoted(section(f"`{reason}`")) for reason in REASONS}

    assert found == {reason: [text] for reason, text in REASONS.items()}


def test_every_reason_says_what_to_do():
    without = [reason for reason in REASONS if "\n* " not in section(f"`{reason}`")]

    assert without == []


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, value in vars(_errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    ],
)
def test_every_error_and_warning_has_a_section(name):

    assert len(section(f"`{name}`").split()) > 5


def texts_of(tree):
    """Yield each string of a module; what an f-string fills in is a line of its own."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside |= set(map(id, node.values))
            yield "\n".join(getattr(part, "value", "") or "" for part in map(constant, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield "" if id(node) in inside else node.value


def constant(node):
    return node if isinstance(node, ast.Constant) else ast.Constant("")


def texts_of_c(source):
    """Yield each string of a C file; what a format fills in is a line of its own."""
    literal = r'"((?:[^"\\\n]|\\.)*)"'
    for found in re.finditer(rf"{literal}(?:\s*{literal})*", source):
        yield re.sub(r"%\w+", "\n", "".join(re.findall(literal, found[0])))


def test_the_page_quotes_what_the_library_says():
    said = [t for path in SOURCE.rglob("*.py") for t in texts_of(ast.parse(path.read_text()))]
    said += [t for path in CORE.glob("*.c") for t in texts_of_c(path.read_text())]
    quotes = [quote for quote in quoted(PAGE) if not quote.startswith(OF_OTHERS)]
    parts = [part.strip(" ,;:()") for quote in quotes for part in quote.split("...")]
    wrong = [part for part in parts if part and not any(part in text for text in said)]

    assert wrong == []
    assert len(quotes) > 20


def test_the_page_quotes_every_warning():
    parts = [part.strip(" ,;:()") for quote in quoted(PAGE) for part in quote.split("...")]
    calls = [
        node
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "_Said")
    ]
    texts = [text for call in calls for text in texts_of(call.args[0]) if " " in text]
    missing = [t for t in texts if not any(part in t for part in parts if len(part) > 10)]

    assert missing == []
    assert len(texts) > 5


def test_the_glossary_has_the_words_of_the_design():
    design = (PROJECT / "docs" / "explanation" / "design.md").read_text()
    words = re.findall(
        r"(?:^|· |, )\*([\w -]+)\*", design.partition("\n## Words\n")[2].split("\n## ")[0]
    )
    glossary = (PROJECT / "docs" / "reference" / "glossary.md").read_text()
    listed = re.findall(r"^\| (.*?) \|", glossary, re.MULTILINE)[1:]

    assert {word for word in words if word not in listed} == set()
    assert len(words) > 12
    assert sorted(listed, key=str.lower) == listed
