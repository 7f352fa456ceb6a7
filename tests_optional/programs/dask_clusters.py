"""merge on clusters of Dask, on this machine."""

import contextlib
import functools
import gc
import operator
import os
import sys
import tempfile

import merging
from distributed import Client, LocalCluster, wait
from merging import dies_once, listed, model, op_that_dies_once

import oobpickle
from conftest import eventually


@contextlib.contextmanager
def _client(n_workers=2, **options):
    options = {"threads_per_worker": 1, "dashboard_address": ":0", **options}
    with LocalCluster(n_workers=n_workers, **options) as cluster, Client(cluster) as client:
        yield client


def processes():
    with _client() as client:
        merging.check_all(client)


def threads_of_one_process():
    with _client(processes=False, threads_per_worker=2) as client:
        merging.check_all(client)


def executor():
    with _client() as client:
        merging.check_all(client.get_executor())


def one_object_for_all_calls():
    with _client() as client:
        merging.check_broadcast(client)


def futures_are_pieces_and_stay_as_they_are():
    with _client() as client:
        models = client.map(model, range(12))
        wait(models)
        total = oobpickle.merge(client, dict, models, op=merging.added, chunksize=3)
        merging.check_model(total, 12)
        for n, future in enumerate(models):
            kept = future.result()
            assert kept["large"].max() == kept["small"].max() == n
            assert kept["seeds"] == [n]


def a_worker_dies_in_func():
    with _client() as client, tempfile.TemporaryDirectory() as folder:
        func = functools.partial(dies_once, folder)
        total = oobpickle.merge(client, func, range(12), op=merging.added, chunksize=1)
        merging.check_model(total, 12)
        assert os.listdir(folder) == ["died"]


def a_worker_dies_in_op():
    with _client() as client, tempfile.TemporaryDirectory() as folder:
        op = functools.partial(op_that_dies_once, folder)
        total = oobpickle.merge(client, model, range(12), op=op, chunksize=1)
        merging.check_model(total, 12)
        assert os.listdir(folder) == ["died"]


def nothing_is_left_on_the_cluster():
    with _client() as client:
        total = oobpickle.merge(client, listed, range(9), op=operator.iadd)
        assert total == [*range(9)]
        merging.raised(ValueError, client, merging.fails, range(90), chunksize=1)
        # The error and the future that has it refer to each other.
        eventually(lambda: gc.collect() is not None and not client.futures)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
