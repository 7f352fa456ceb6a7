"""emcee: an ensemble sampler with a pool, whose log probability has 1.6 MB of data."""

import multiprocessing

import emcee
import numpy as np
from library import inputs, show

DATA = inputs()[0]


def log_probability(position, data):
    return -0.5 * float(np.sum((position - data[:2]) ** 2))


def chain(pool=None):
    start = np.random.default_rng(1).normal(size=(8, 2))
    sampler = emcee.EnsembleSampler(8, 2, log_probability, args=[DATA], pool=pool)
    sampler.random_state = np.random.RandomState(2).get_state()
    sampler.run_mcmc(start, 5)
    return sampler.get_chain()


def use(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        return [chain(pool)]


if __name__ == "__main__":
    show("emcee", use, [chain()])
