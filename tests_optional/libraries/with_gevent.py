"""gevent: a pool, and greenlets that wait for its results.

What pools need is not patched: where everything is, they hang without oobpickle too.
"""

import gevent.monkey

gevent.monkey.patch_all(
    os=False, signal=False, thread=False, socket=False, select=False, queue=False
)

import multiprocessing  # noqa: E402

import gevent  # noqa: E402
from library import double, inputs, show  # noqa: E402


def use(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        waiting = [pool.apply_async(double, (array,)) for array in inputs()]
        greenlets = [gevent.spawn(result.get, 60) for result in waiting]
        gevent.joinall(greenlets, raise_error=True)
        return [greenlet.value for greenlet in greenlets]


if __name__ == "__main__":
    show("gevent", use)
