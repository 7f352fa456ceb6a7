"""The example programs about shared objects, at small size."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import by_turns_of_start_methods

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = {
    "price_buffer": (
        ["--updates=300", "--symbols=200"],
        r"300 updates of 200 prices in [\d.]+ s\n"
        r"(reader: \d+ reads, \d+ different updates, 0 torn\n){3}",
    ),
    "disjoint_slices": (
        ["--size=120", "--workers=2"],
        r"120 x 120 points in 8 parts: \d{4} inside\nthe same as in one process\n",
    ),
    "hogwild": (
        ["--samples=6000", "--features=20", "--workers=3"],
        r"error of the weights: [01]\.\d+ before, 0\.0\d\d after\n",
    ),
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by its name
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.mark.parametrize(("name", "start_method"), by_turns_of_start_methods(PROGRAMS))
def test_program_ends_well(name, start_method):
    arguments, expected = PROGRAMS[name]
    command = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    command += [str(EXAMPLES / f"{name}.py"), *arguments, "--start-method", start_method]
    child = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)

    assert (child.returncode, child.stderr) == (0, "")
    assert re.fullmatch(expected, child.stdout)


def test_torn_prices_are_noticed():
    example = load("price_buffer")
    prices = example.make_prices(5)
    assert example.is_whole(prices)
    prices.bid[2] = 1
    assert not example.is_whole(prices)
    prices.bid[2], prices.update[0] = 0, 1
    assert not example.is_whole(prices)


def test_rows_do_not_depend_on_the_parts():
    example = load("disjoint_slices")
    parts = [example.compute(30, first, first + 10) for first in (0, 10, 20)]

    assert np.array_equal(np.concatenate(parts), example.compute(30, 0, 30))


def test_the_weights_that_solve_the_problem_have_no_error():
    example = load("hogwild")
    problem, solution = example.make_problem(100, 10)

    found = (problem.values * solution[problem.features]).sum(axis=1)
    assert np.allclose(found, problem.targets)
    assert example.error_of(solution, solution) == 0
    assert example.error_of(problem.weights, solution) > 0.3
