"""The site: every page is found, every link of what is not in it leads somewhere.

What Sphinx finds itself (links and anchors between the pages) is looked at when it is built, with
warnings as errors: see CONTRIBUTING.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import oobpickle
from project.test_docs import blocks_of

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def toctree_of(page):
    """Return the lines of the directive that lists other pages."""
    found = [b for b in blocks_of(page, page.read_text()) if b.language == "{toctree}"]
    assert len(found) == 1, page
    return found[0].lines


def folders():
    return sorted({path.parent for path in DOCS.glob("*/*.md")})


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_a_page_that_is_added_is_found(folder):
    lines = toctree_of(folder / "index.md")

    assert {":glob:", "*"} <= set(lines)


@pytest.mark.parametrize("page", [DOCS / "index.md", *sorted(DOCS.glob("*/index.md"))], ids=str)
def test_what_is_listed_is_there(page):
    names = [re.sub(r".*<(.*)>", r"\1", line) for line in toctree_of(page)]
    names = [name for name in names if re.fullmatch(r"[\w./-]+", name)]
    files = {name: [page.parent / f"{name}{end}" for end in (".md", ".rst")] for name in names}

    assert [name for name, paths in files.items() if not any(p.exists() for p in paths)] == []


def anchor_of(heading):
    """Return what GitHub and the site make of a heading."""
    text = re.sub(r"[`*]", "", heading.strip().lower())
    return re.sub(r"[^\w -]", "", text).replace(" ", "-")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_the_first_pages_lead_somewhere(name):
    page = PROJECT / name
    wrong = []
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if "://" in link:
            continue
        anchors = map(anchor_of, HEADING.findall(target.read_text())) if target.is_file() else ()
        if not target.exists() or (anchor and anchor not in anchors):
            wrong.append(link)

    assert wrong == []


def test_the_tests_on_the_page_about_tests_pass(tmp_path):
    page = DOCS / "how-to" / "use-in-tests.md"
    source = str(Path(oobpickle.__file__).parents[1])
    program, shown = blocks_of(page, page.read_text())[:2]
    (tmp_path / "test_model.py").write_text("\n".join(program.lines) + "\n")
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_model.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": source, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert (child.returncode, child.stderr) == (0, ""), child.stdout
    assert child.stdout.splitlines()[0] == shown.lines[1]
    assert child.stdout.splitlines()[-1].startswith(shown.lines[2])
