"""multiprocess (pathos): a pool of dill's copy of multiprocessing, and a lambda."""

import multiprocess
from library import inputs, show


def use(method):
    with multiprocess.get_context(method).Pool(2) as pool:
        return pool.map(lambda array: 2 * array, inputs(), chunksize=1)


if __name__ == "__main__":
    show("multiprocess", use)
