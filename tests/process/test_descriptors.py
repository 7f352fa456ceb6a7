"""Whoever closes descriptors that he did not open gets what plain multiprocessing gives him."""

import pytest

from process.harness import run_program

KINDS = ("closed", "files", "memfds", "pipes", "sockets", "null")


def test_closed_in_the_parent(start_method):
    run_program("descriptors", "closed_in_the_parent", "files", start_method)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "files"])
def test_closed_in_the_parent_and_others_on_their_numbers(kind):
    run_program("descriptors", "closed_in_the_parent", kind, "fork")


@pytest.mark.parametrize("kind", ["closed", "files"])
def test_daemonized(kind):
    run_program("descriptors", "daemonized", kind)


@pytest.mark.parametrize("kind", ["closed", "memfds"])
def test_closed_in_a_worker(kind):
    run_program("descriptors", "closed_in_a_worker", kind)


@pytest.mark.parametrize("which", range(5))
def test_some_are_closed(which):
    run_program("descriptors", "some_are_closed", which)


@pytest.mark.parametrize("kind", ["closed", "files"])
def test_closed_while_another_thread_sends(kind):
    run_program("descriptors", "closed_while_another_thread_sends", kind)


@pytest.mark.parametrize(
    "case",
    [
        "a_fork_without_descriptors",
        "a_message_in_a_range_that_is_private",
        "closed_before_the_child_has_them",
        "no_strange_file_is_opened",
    ],
)
def test_descriptors(case):
    run_program("descriptors", case)
