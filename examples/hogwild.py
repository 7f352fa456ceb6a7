"""Stochastic gradient descent by many processes on one array of weights, without a lock (Hogwild).

What
    ``python examples/hogwild.py [--samples 20000] [--features 50] [--workers 4]
    [--start-method fork]`` fits a linear model, prints the error before and after, and ends with 1
    if it has not become small.

How it works
    All workers write to the same weights through ``unlocked``. Now and then one overwrites what
    another has just added; with steps that touch a few weights each that is noise, and the method
    converges all the same. The samples are one object that nobody writes to, in shared memory, too.

Lifetime
    Both are free when the block is left.

When it cannot
    Needs Linux and the compiled core of oobpickle. Results differ from run to run.

Source
    F. Niu, B. Recht, C. Ré, S. J. Wright, "Hogwild!: A Lock-Free Approach to Parallelizing
    Stochastic Gradient Descent", 2011, https://arxiv.org/abs/1106.5730.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

import oobpickle

N_NONZERO = 5
RATE = 0.05
N_EPOCHS = 3

Array = np.ndarray[Any, Any]


@dataclass
class Problem:
    """Samples with a few features each, what they should give, and the weights to be found."""

    features: Array
    values: Array
    targets: Array
    weights: Array


def make_problem(n_samples: int, n_features: int) -> tuple[Problem, Array]:
    """Return a problem, and the weights that solve it."""
    rng = np.random.default_rng(1)
    solution = rng.normal(size=n_features)
    features = rng.integers(0, n_features, (n_samples, N_NONZERO))
    values = rng.normal(size=(n_samples, N_NONZERO))
    targets = (values * solution[features]).sum(axis=1)
    return Problem(features, values, targets, np.zeros(n_features)), solution


def descend(shared: oobpickle.Shared[Problem], worker: int, n_workers: int) -> None:
    """Take this worker's samples one after the other."""
    problem = shared.unlocked
    rng = np.random.default_rng(worker)
    for _ in range(N_EPOCHS):
        for i in rng.permutation(np.arange(worker, len(problem.targets), n_workers)):
            at, values = problem.features[i], problem.values[i]
            error = values @ problem.weights[at] - problem.targets[i]
            problem.weights[at] -= RATE * error * values


def error_of(weights: Array, solution: Array) -> float:
    """Return how far off the weights are, root mean square."""
    return float(np.sqrt(np.mean((weights - solution) ** 2)))


def main() -> int:
    """Fit it, and print the errors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=50)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--start-method", choices=multiprocessing.get_all_start_methods())
    options = parser.parse_args()
    context = multiprocessing.get_context(options.start_method)
    problem, solution = make_problem(options.samples, options.features)
    with oobpickle.enabled(), oobpickle.share(problem) as shared:
        tasks = [(shared, n, options.workers) for n in range(options.workers)]
        with context.Pool(options.workers) as pool:
            pool.starmap(descend, tasks, chunksize=1)
        before, after = (error_of(p.weights, solution) for p in (problem, shared.unlocked))
    print(f"error of the weights: {before:.3f} before, {after:.3f} after")
    return int(after > before / 10)


if __name__ == "__main__":
    sys.exit(main())
