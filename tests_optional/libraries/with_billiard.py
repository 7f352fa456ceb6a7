"""billiard (Celery): its own pool."""

import billiard
from library import double, inputs, show


def use(method):
    pool = billiard.get_context(method).Pool(2)
    try:
        return pool.map(double, inputs(), chunksize=1)
    finally:
        pool.close()
        pool.join()


if __name__ == "__main__":
    show("billiard", use)
