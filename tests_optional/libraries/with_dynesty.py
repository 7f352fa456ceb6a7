"""dynesty: a nested sampler with a pool, whose likelihood has 1.6 MB of data."""

import multiprocessing
import warnings

import dynesty
import numpy as np
from library import inputs, show

DATA = inputs()[0]
warnings.filterwarnings("ignore", "The sampling was stopped short", UserWarning)


def log_likelihood(position, data):
    return -0.5 * float(np.sum((position - data[:2]) ** 2))


def prior(cube):
    return 10 * cube - 5


def samples(pool=None):
    more = {} if pool is None else {"pool": pool}
    sampler = dynesty.NestedSampler(
        *(log_likelihood, prior, 2),
        nlive=20,
        logl_args=[DATA],
        rstate=np.random.default_rng(3),
        queue_size=2,
        **more,
    )
    sampler.run_nested(maxiter=20, print_progress=False)
    return sampler.results.samples.copy()


class Serial:
    """A pool of nobody, which the sampler asks for as many points at a time."""

    map = staticmethod(lambda function, arguments: list(map(function, arguments)))
    size = 2


def use(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        return [samples(pool)]


if __name__ == "__main__":
    show("dynesty", use, [samples(Serial)])
