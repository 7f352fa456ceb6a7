"""mpire: a WorkerPool."""

import mpire
from library import double, inputs, show


def use(method):
    with mpire.WorkerPool(n_jobs=2, start_method=method) as pool:
        arguments = [(array,) for array in inputs()]
        return pool.map(double, arguments, chunk_size=1, concatenate_numpy_output=False)


if __name__ == "__main__":
    show("mpire", use)
