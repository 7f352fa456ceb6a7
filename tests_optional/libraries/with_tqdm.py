"""tqdm: process_map."""

from library import double, inputs, show
from tqdm.contrib.concurrent import process_map


def use(_method):
    return process_map(double, inputs(), max_workers=2, chunksize=1, disable=True)


if __name__ == "__main__":
    show("tqdm", use)
