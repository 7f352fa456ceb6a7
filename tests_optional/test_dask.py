"""merge on Dask, with a cluster on this machine. Needs an environment of its own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from process.harness import run_program
from project.test_docs import PROJECT, blocks_of

pytest.importorskip("distributed")
FOLDER = Path(__file__).parent / "programs"
CASES = (
    "processes",
    "threads_of_one_process",
    "executor",
    "one_object_for_all_calls",
    "futures_are_pieces_and_stay_as_they_are",
    "a_worker_dies_in_func",
    "a_worker_dies_in_op",
    "nothing_is_left_on_the_cluster",
)


@pytest.mark.parametrize("case", CASES)
def test_dask(case):
    run_program("dask_clusters", case, folder=FOLDER, flags=(), stderr="...", within_s=120)


def _has_namespaces():
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"oob{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=True)
    return made.returncode == 0


def test_workers_that_share_only_a_network():
    if not _has_namespaces():
        pytest.skip("needs root and ip netns")
    options = {"folder": FOLDER, "flags": (), "stderr": "...", "within_s": 120}
    run_program("dask_namespaces", "two_namespaces", **options)


def test_the_block_of_the_document(tmp_path):
    path = PROJECT / "docs" / "how-to" / "more-than-one-machine.md"
    blocks = blocks_of(path, path.read_text())
    (block,) = (b for b in blocks if b.language == "python no-run" and "distributed" in b.lines[0])
    program = tmp_path / "document_dask.py"
    program.write_text("\n".join([*blocks[0].lines, *block.lines]))

    output = run_program("document_dask", folder=tmp_path, flags=(), stderr="...", within_s=120)
    assert output.splitlines() == ["20000", "20000"]
