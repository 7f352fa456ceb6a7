"""dask: delayed calls and the scheduler of processes."""

import dask
from library import double, inputs, show


def use(method):
    calls = [dask.delayed(double)(array) for array in inputs()]
    with dask.config.set({"multiprocessing.context": method}):
        return dask.compute(*calls, scheduler="processes", num_workers=2)


if __name__ == "__main__":
    show("dask", use)
