"""mpire: a WorkerPool."""

import mpire
from library import double, inputs, show


def use(method):
    with mpire.WorkerPool(n_jobs=2, start_method=method) as pool:
        return pool.map(double, [(array,) for array in inputs()], chunk_size=1)


if __name__ == "__main__":
    show("mpire", use)
