"""torch: a pool of torch.multiprocessing, with a tensor and an array in each message."""

import torch.multiprocessing
from library import inputs, show


def work(given):
    tensor, array = given
    return [2 * tensor, 2 * array]


def use(method):
    with torch.multiprocessing.get_context(method).Pool(2) as pool:
        given = [(torch.from_numpy(array), array) for array in inputs()]
        return [one for both in pool.map(work, given, chunksize=1) for one in map(_array, both)]


def _array(one):
    return one.numpy() if isinstance(one, torch.Tensor) else one


if __name__ == "__main__":
    show("torch", use, [2 * array for array in inputs() for _ in range(2)])
