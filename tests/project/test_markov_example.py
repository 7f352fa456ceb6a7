"""The example program, ``examples/markov_model.py``: its model, and runs of the whole."""

from __future__ import annotations

import array
import importlib.util
import io
import itertools
import multiprocessing
import os
import re
import string
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "markov_model.py"
SYMBOLS = "\n " + string.ascii_lowercase + string.digits + "\"#%&'()*+,-./:<=>@[\\]_{|}"
TEXTS = {
    "all_bytes.py": bytes(range(256)) * 3,
    "empty.py": b"",
    "shorter_than_the_order.py": b"x",
    "plain.py": b"def double(x):\n    return 2 * x\n" * 20,
    "package/upper.py": b"ABC abc AbC\r\n\tfin",
    "package/deeper/last.py": b"".join(b"%d: %d\n" % (i, i * i) for i in range(200)),
}
ROWS = [
    "wall time",
    "transfer of a model, median",
    "transfer of a model, sum",
    "bytes moved",
    "bytes moved out of band",
    "fallbacks",
    "peak memory",
    "crc32 of the table",
]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """Return the program as a module."""
    spec = importlib.util.spec_from_file_location("markov_model", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules["markov_model"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["markov_model"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Make a directory with a text, and with files that are not part of it."""
    others = {"notes.txt": b"not this", "site-packages/installed.py": b"nor this"}
    for name, content in (TEXTS | others).items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "text"


def count_slowly(order: int) -> array.array[int]:
    """Count the text without NumPy and without the program."""
    counts = array.array("I", bytes(4 * 64 ** (order + 1)))
    assert counts.itemsize == 4
    for content in TEXTS.values():
        symbols = [1 + SYMBOLS.find(chr(byte).lower() if byte < 128 else "?") for byte in content]
        for start in range(len(symbols) - order):
            cell = 0
            for symbol in symbols[start : start + order + 1]:
                cell = cell * 64 + symbol
            counts[cell] += 1
    return counts


def model_of(example: ModuleType, order: int, *contents: bytes) -> Any:
    """Return the model of some texts."""
    model = example.MarkovModel(order)
    for content in contents:
        model.add_text(io.BytesIO(content))
    return model


def run_example(*arguments: object) -> str:
    """Run the program, with warnings as errors, and return what it printed."""
    process = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert process.stderr == ""
    assert process.returncode == 0
    return process.stdout


def table_of(output: str) -> dict[str, list[str]]:
    """Return the columns of each row of a printed table."""
    lines = {
        row: [line for line in output.splitlines() if line.startswith(f"{row}  ")] for row in ROWS
    }
    assert {row: len(found) for row, found in lines.items()} == dict.fromkeys(ROWS, 1)
    return {row: re.split(r"  +", found[0])[1:] for row, found in lines.items()}


# ------------------------------------------------------------------------------ the model


def test_alphabet_has_64_symbols_with_the_one_for_other_bytes(example: ModuleType) -> None:
    table = example.SYMBOL_OF_BYTE
    assert sorted(set(table.tolist())) == list(range(64))
    assert table[ord("q")] == table[ord("Q")] != table[ord("r")]
    assert table[0] == table[255] == table[ord("~")] == 0


@pytest.mark.parametrize("order", [1, 2])
def test_counts_equal_a_slow_count(example: ModuleType, order: int) -> None:
    model = model_of(example, order, *TEXTS.values())
    assert model.order == order
    assert model.counts.dtype == np.uint32
    assert model.counts.shape == (64,) * (order + 1)
    assert model.counts.tobytes() == count_slowly(order).tobytes()


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100, 767, 768, 769])
def test_counts_do_not_depend_on_the_chunks(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, chunk_size: int
) -> None:
    monkeypatch.setattr(example, "CHUNK_SIZE", chunk_size)
    model = model_of(example, 2, *TEXTS.values())
    assert model.counts.tobytes() == count_slowly(2).tobytes()


def test_add_returns_a_new_model(example: ModuleType) -> None:
    left, right = model_of(example, 1, b"abab"), model_of(example, 1, b"ab", b"bc")
    before = left.counts.copy(), right.counts.copy()
    total = left + right
    assert np.array_equal(total.counts, model_of(example, 1, b"abab", b"ab", b"bc").counts)
    assert np.array_equal(left.counts, before[0])
    assert np.array_equal(right.counts, before[1])
    assert not np.shares_memory(total.counts, left.counts)


def test_iadd_adds_in_place(example: ModuleType) -> None:
    total, other = model_of(example, 1, b"abab"), model_of(example, 1, b"ab")
    model, counts = total, total.counts
    total += other
    assert total is model
    assert total.counts is counts
    assert np.array_equal(counts, model_of(example, 1, b"abab", b"ab").counts)
    assert other.counts.sum() == 1


def test_models_of_different_orders_do_not_add_up(example: ModuleType) -> None:
    total, other = example.MarkovModel(1), example.MarkovModel(2)
    with pytest.raises(TypeError):
        total + other
    with pytest.raises(TypeError):
        total += other
    with pytest.raises(TypeError):
        total + 1


# ------------------------------------------------------------------------------ the pieces


def test_find_texts_is_sorted_and_leaves_installed_packages_out(
    example: ModuleType, text: Path
) -> None:
    assert example.find_texts(text, "*.py") == sorted(text / name for name in TEXTS)
    assert example.find_texts(text, "*.txt") == [text / "notes.txt"]
    installed = text / "site-packages"
    assert example.find_texts(installed, "*.py") == [installed / "installed.py"]


@pytest.mark.parametrize("n_pieces", [1, 2, 3, 6, 50])
def test_total_does_not_depend_on_the_pieces(
    example: ModuleType, text: Path, n_pieces: int
) -> None:
    paths = example.find_texts(text, "*.py")
    pieces = example.split_texts(paths, n_pieces)
    assert len(pieces) == min(n_pieces, len(paths))
    assert sorted(itertools.chain(*pieces)) == paths
    total = example.MarkovModel(2)
    for piece in pieces:
        total += example.count_files(2, piece)
    assert total.counts.tobytes() == count_slowly(2).tobytes()


def test_pieces_are_of_about_the_same_size(example: ModuleType, tmp_path: Path) -> None:
    paths = [tmp_path / f"{size}.py" for size in range(100)]
    for size, path in enumerate(paths):
        path.write_bytes(bytes(size))
    pieces = example.split_texts(paths, 7)
    sizes = [sum(path.stat().st_size for path in piece) for piece in pieces]
    assert max(sizes) - min(sizes) <= 10


# ------------------------------------------------------------------------------- the check


def test_recounted_cells_are_those_of_the_table(example: ModuleType, text: Path) -> None:
    paths = example.find_texts(text, "*.py")
    cells = example.pick_cells(2, paths, 100)
    counts = example.count_cells(2, paths, cells)
    assert np.all(np.diff(cells) > 0)
    assert np.array_equal(counts, np.frombuffer(count_slowly(2), np.uint32)[cells])
    assert np.count_nonzero(counts) >= 50


def test_reference_finds_a_wrong_cell(example: ModuleType, text: Path) -> None:
    paths = example.find_texts(text, "*.py")
    total = example.count_files(2, paths)
    crc32 = zlib.crc32(total.counts)
    whole = example.make_reference(2, paths)
    cells = example.pick_cells(2, paths, 100)
    some = example.Reference(None, cells, example.count_cells(2, paths, cells))
    assert whole.find_problem(total, crc32) is None
    assert some.find_problem(total, crc32) is None
    total.counts.reshape(-1)[cells[0]] += 1
    assert "serial count" in whole.find_problem(total, zlib.crc32(total.counts))
    assert "1 of" in some.find_problem(total, crc32)


def test_a_wrong_table_is_an_error(
    example: ModuleType,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measurement = example.Measurement(1.0, [0.5], 10, None, None, None, 0, "it is all wrong")
    monkeypatch.setattr(example, "run", lambda *_: measurement)
    monkeypatch.setattr(sys, "argv", ["markov_model.py", str(text), "--only=plain", "--order=1"])
    assert example.main() == 1
    output = capsys.readouterr()
    assert output.err == "The table is wrong:\nplain: it is all wrong\n"
    assert table_of(output.out)["peak memory"] == ["n/a"]


# -------------------------------------------------------------- the memory and the progress


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="it reads /proc")
def test_process_tree_has_the_descendants_but_no_others(example: ModuleType) -> None:
    # The shell waits for its child, which waits for its input to end.
    command = ["sh", "-c", "cat; :"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"here\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"here\n"
        tree = example.find_process_tree(os.getpid())
        parents = example.read_all_parents()
        assert tree[0] == os.getpid()
        assert child.pid in tree
        assert parents[child.pid] == tree[tree.index(child.pid) + 1 :][-1:]
        assert os.getppid() not in tree
        child.stdin.close()


def test_memory_is_not_known_without_proc(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert example.read_kilobytes("/proc/none", "Shmem") is None
    monkeypatch.setattr(example, "read_kilobytes", lambda *_: None)
    with example.PeakMemory() as memory:
        pass
    assert memory.peak is None


def test_progress_bar_is_for_terminals(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    example.show_progress("plain", 1, 2)
    assert stderr.getvalue() == ""
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    example.show_progress("plain", 1, 2)
    assert "plain [" + 15 * "#" + 15 * " " + "] 1/2" in stderr.getvalue()
    example.show_progress("plain", 2, 2)
    assert stderr.getvalue().endswith("\r\x1b[K")


# ------------------------------------------------------------------------------ the program


@pytest.mark.parametrize("start_method", multiprocessing.get_all_start_methods())
@pytest.mark.parametrize("only", [None, "plain", "oobpickle"])
def test_program_counts_right(text: Path, only: str | None, start_method: str) -> None:
    which = ["--only", only] if only else []
    output = run_example(
        text, "--order=2", "--pieces=3", "--workers=2", "--start-method", start_method, *which
    )
    columns = ["plain", "oobpickle", "ratio"] if only is None else [only]
    assert any(line.split() == columns for line in output.splitlines())
    assert f"$ python {EXAMPLE} {text} --order=2" in output
    table = table_of(output)
    n_runs = 2 if only is None else 1
    crc32 = zlib.crc32(count_slowly(2))
    assert table["crc32 of the table"] == n_runs * [f"{crc32:08x}"]
    assert table["bytes moved"] == n_runs * ["3.1 MB"]
    assert output.endswith(f"The table is right: crc32 {crc32:08x} by a serial count.\n")
    if only != "plain":
        # The models are big enough for it, and nothing else is.
        assert table["bytes moved out of band"][-1] == "3.1 MB"
        assert table["fallbacks"][-1] == "0"


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("start_method", multiprocessing.get_all_start_methods())
def test_program_merges_at_the_workers(text: Path, start_method: str, order: int) -> None:
    if order == 3 and start_method != "fork":
        pytest.skip("the same with more bytes")
    output = run_example(
        text,
        f"--order={order}",
        "--pieces=5",
        "--workers=2",
        "--merge",
        "--start-method",
        start_method,
    )
    assert any(line.split() == ["oobpickle", "merge", "ratio"] for line in output.splitlines())
    table = table_of(output)
    crc32 = f"{zlib.crc32(count_slowly(order)):08x}"
    assert table["crc32 of the table"] == [crc32, crc32]
    assert table["fallbacks"] == ["0", "0"]
    assert table["transfer of a model, sum"][1] == table["bytes moved"][1] == "n/a"
    # Five models are sent by one, and a sum of each worker by the other; one more if a worker was
    # so slow that it gave pieces back.
    sent = [f"{n * 4 * 64 ** (order + 1) / 1e6:.1f} MB" for n in (2, 3, 5)]
    assert table["bytes moved out of band"][0] == sent[2]
    assert table["bytes moved out of band"][1] in sent[:2]
    assert output.endswith(f"The table is right: crc32 {crc32} by a serial count.\n")


def test_program_counts_right_in_one_piece(text: Path) -> None:
    output = run_example(text, "--order=1", "--pieces=1", "--workers=4", "--only=plain")
    assert table_of(output)["crc32 of the table"] == [f"{zlib.crc32(count_slowly(1)):08x}"]
    assert "workers: 1," in output


def test_program_says_that_there_is_no_text(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path, "--only=plain"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert process.returncode == 2
    assert f"there are no files *.py in {tmp_path}" in process.stderr
