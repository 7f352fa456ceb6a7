"""The documentation: every Python block runs, by turns under each start method, and prints it.

The blocks of a file run in order, as one program. A block marked ``python no-run`` does not run. A
``text`` block after ``<!-- output -->`` is what the block before it prints.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import oobpickle
from conftest import by_turns_of_start_methods

PROJECT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
MARKER = "<!-- output -->"
END = "\x01end of block\x01"
#: Languages that are shown and not run; anything else that looks like a block is an error.
SHOWN_ONLY = {"text", "console", "sh", "toml", "ini", "json", "c", "python no-run", "{toctree}"}
PRELUDE = "import multiprocessing as _m; __name__ == '__main__' and _m.set_start_method({method!r})"


@dataclass
class Block:
    """A block of a file: its language, its lines, and what it prints if the file says so."""

    path: Path
    line: int
    language: str
    lines: list = field(default_factory=list)
    marked: bool = False
    output: str | None = None

    def __repr__(self):
        return f"{self.path.name}:{self.line}"


def blocks_of(path, text):
    """Return the blocks of a file, each with its output."""
    blocks, fence, marked = [], None, False
    for number, line in enumerate(text.splitlines(), 1):
        found = FENCE.match(line)
        if fence is None and found:
            fence = found[1], found[2]
            blocks.append(Block(path, number, found[3].strip(), marked=marked))
            marked = False
        elif fence is not None and line.strip() == fence[1]:
            fence = None
        elif fence is not None:
            blocks[-1].lines.append(line.removeprefix(fence[0]))
        elif line.strip():
            marked = line.strip() == MARKER
    assert fence is None, f"{path}: the last block is not closed"
    for before, block in zip([None, *blocks], blocks, strict=False):
        if block.marked:
            assert before is not None, f"{block!r} is the output of nothing"
            assert (before.language, block.language) == ("python", "text"), f"{block!r}: of what?"
            before.output = "\n".join(block.lines) + "\n"
    return blocks


def files():
    """Return all documents, the README first."""
    found = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
    return [path for path in found if path.exists()]


def named(path):
    return path.relative_to(PROJECT).as_posix()


BLOCKS = {named(path): blocks_of(path, path.read_text()) for path in files()}
RUN = {name: [b for b in blocks if b.language == "python"] for name, blocks in BLOCKS.items()}
PROGRAMS = [name for name, blocks in RUN.items() if blocks]


def test_every_document_is_listed():
    written = {named(path) for path in PROJECT.glob("docs/**/*.md")}
    written |= {"README.md"} & set(os.listdir(PROJECT))

    assert written == set(BLOCKS)


def test_every_python_block_is_run_or_marked():
    fences = {
        name: len(re.findall(r"^ *[`~]{3,} *python *$", (PROJECT / name).read_text(), re.MULTILINE))
        for name in BLOCKS
    }

    assert fences == {name: len(blocks) for name, blocks in RUN.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_says_what_it_is(name):
    unknown = [b for b in BLOCKS[name] if b.language not in {"python", *SHOWN_ONLY}]

    assert unknown == []


def program_of(blocks, method):
    """Return one program of several blocks, each line with the number that it has in its file."""
    lines = [PRELUDE.format(method=method)]
    for block in blocks:
        lines += [""] * (block.line - len(lines))
        lines += block.lines
        # In the place of the line that closes the block.
        lines.append(f"if __name__ == '__main__': print({END!r}, flush=True)")
    return "\n".join(lines) + "\n"


def run(tmp_path, blocks, method):
    """Run the blocks as one program and return what each printed."""
    script = tmp_path / blocks[0].path.name.replace(".md", ".py").replace("-", "_")
    script.write_text(program_of(blocks, method))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(oobpickle.__file__).parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    child = subprocess.run(
        # Under fork, CPython 3.12 warns of threads that the standard library itself has started.
        [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", script],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (child.returncode, child.stderr) == (0, "")
    *printed, rest = child.stdout.split(f"{END}\n")
    assert rest == ""
    assert len(printed) == len(blocks)
    return printed


@pytest.mark.parametrize(("name", "method"), by_turns_of_start_methods(PROGRAMS))
def test_every_block_runs_and_prints_what_the_document_says(tmp_path, name, method):
    blocks = RUN[name]
    printed = run(tmp_path, blocks, method)
    expected = [block.output for block in blocks if block.output is not None]

    assert expected == [p for p, b in zip(printed, blocks, strict=True) if b.output is not None]


# --- the reading of blocks itself


EXAMPLE = """\
# Title

```python
x = 1
print(x)
```

<!-- output -->
```text
1
```

1. In a list:

   ```python
   def double(y):
       return 2 * y

   print(double(x))
   ```

````text
```python
not a block
```
````

```python no-run
1 / 0
```
"""


def test_blocks_are_found_with_line_language_and_output():
    blocks = blocks_of(PROJECT / "example.md", EXAMPLE)

    assert [(b.line, b.language, b.output) for b in blocks] == [
        (3, "python", "1\n"),
        (9, "text", None),
        (15, "python", None),
        (22, "text", None),
        (28, "python no-run", None),
    ]
    assert blocks[2].lines == ["def double(y):", "    return 2 * y", "", "print(double(x))"]


def test_blocks_share_one_namespace_and_each_has_its_output(tmp_path):
    blocks = [b for b in blocks_of(PROJECT / "ex.md", EXAMPLE) if b.language == "python"]

    assert run(tmp_path, blocks, "spawn") == ["1\n", "2\n"]


def test_lines_of_a_program_have_the_numbers_of_the_document():
    blocks = [b for b in blocks_of(PROJECT / "ex.md", EXAMPLE) if b.language == "python"]
    program, document = program_of(blocks, "fork").splitlines(), EXAMPLE.splitlines()

    assert [program[3], program[14 + 1]] == [document[3], document[15].strip()]


@pytest.mark.parametrize(
    "code", ["1 / 0", "import sys; print(1, file=sys.stderr)", "raise SystemExit"]
)
def test_a_block_that_fails_is_noticed(tmp_path, code):
    text = EXAMPLE.replace("print(x)", code)
    blocks = [b for b in blocks_of(PROJECT / "ex.md", text) if b.language == "python"]
    with pytest.raises(AssertionError):
        run(tmp_path, blocks, "fork")


@pytest.mark.parametrize(
    "text",
    ["```python\n", f"{MARKER}\n```text\n1\n```\n", f"```sh\nls\n```\n{MARKER}\n```text\n```\n"],
)
def test_a_block_that_makes_no_sense_is_an_error(text):
    with pytest.raises(AssertionError, match="example"):
        blocks_of(PROJECT / "example.md", text)
