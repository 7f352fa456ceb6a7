"""Files: a writer that dies at any step leaves the old file or the new one."""

import os
import subprocess

import pytest

from conftest import by_start_method
from process.harness import cases_of, run_program
from process.test_kills import load

POINTS = load("points").of_files()
KINDS = ("nameless", "named")  # with O_TMPFILE, and as if there were none
OF_KINDS = ("a_fork_in_the_middle_of_a_dump", "many_write_and_read_one_path")
WITH_ARGUMENTS = {*OF_KINDS, "killed_at", "a_full_disk", "to_a_worker"}
AS_ROOT = {"another_user"}


@pytest.mark.parametrize("case", [c for c in cases_of("files") if c not in WITH_ARGUMENTS])
def test_file(case):
    if case in AS_ROOT and os.geteuid() != 0:
        pytest.skip("only root becomes another user")
    run_program("files", case)


def test_the_source_names_fault_points():
    assert {
        "files.opened",
        "files.buffer_written",
        "files.stream_written",
        "files.header_written",
        "files.linked",
        "files.placed",
    } == set(POINTS)


@pytest.mark.parametrize("named", KINDS)
@pytest.mark.parametrize("there", ["old", "none"])
@pytest.mark.parametrize("point", POINTS)
def test_a_writer_that_is_killed_at(point, there, named):
    if point == "files.linked" and there == "none" and named == "nameless":
        pytest.skip("a free name is taken in one step")
    signal = "KILL" if there == "old" else "TERM"
    run_program("files", "killed_at", point, signal, there, named)


@pytest.mark.parametrize("named", KINDS)
@pytest.mark.parametrize("case", OF_KINDS)
def test_file_with_a_name_and_without(case, named):
    run_program("files", case, named)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
def test_a_full_disk(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "oobpickle-test", tmp_path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file systems can be mounted here")
    try:
        run_program("files", "a_full_disk", tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(("_", "method"), by_start_method([""]))
def test_what_was_loaded_goes_to_a_worker(_, method):
    run_program("files", "to_a_worker", method)
