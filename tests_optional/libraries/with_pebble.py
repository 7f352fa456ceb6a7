"""pebble: a ProcessPool whose tasks have a time limit."""

import multiprocessing

import pebble
from library import double, inputs, show


def use(method):
    context = multiprocessing.get_context(method)
    with pebble.ProcessPool(2, context=context) as pool:
        return list(pool.map(double, inputs(), timeout=60).result())


if __name__ == "__main__":
    show("pebble", use)
