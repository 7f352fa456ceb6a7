"""Whoever closes descriptors that he did not open gets what plain multiprocessing gives him."""

import pytest

from process.harness import cases_of, run_program

WITH_ARGUMENTS = {"closed_in_the_parent"}


def test_closed_in_the_parent(start_method):
    run_program("descriptors", "closed_in_the_parent", start_method)


@pytest.mark.parametrize("case", [c for c in cases_of("descriptors") if c not in WITH_ARGUMENTS])
def test_descriptors(case):
    run_program("descriptors", case)
