"""merge on clusters of Ray: two nodes, on this machine."""

import contextlib
import functools
import operator
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import merging
import numpy as np
import ray
from merging import dies_once, model, op_that_dies_once
from ray.cluster_utils import Cluster
from ray.experimental import internal_kv

import oobpickle
from conftest import eventually


@contextlib.contextmanager
def _two_nodes():
    options = {"num_cpus": 1, "object_store_memory": 150_000_000}
    head = {**options, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**options)
        # The modules beside this program are found where it was started only.
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
        ray.init(cluster.address, log_to_driver=False, runtime_env=environment)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def same_as_here():
    with _two_nodes():
        merging.check_all(ray)


def both_nodes_work():
    with _two_nodes(), tempfile.TemporaryDirectory() as folder:
        func = functools.partial(_meets, folder)
        places = oobpickle.merge(ray, func, range(4), op=operator.ior, chunksize=2)
        assert len(places) == 2


def _meets(folder, n):
    return merging.meets(folder, ray.get_runtime_context().get_node_id(), n)


def one_object_for_all_calls():
    with _two_nodes():
        merging.check_broadcast(ray)


def references_are_pieces_and_stay_as_they_are():
    with _two_nodes():
        models = [ray.put(model(n)) for n in range(12)]
        total = oobpickle.merge(ray, dict, models, op=merging.added, chunksize=3)
        merging.check_model(total, 12)
        for n, kept in enumerate(ray.get(models)):
            assert kept["large"].max() == kept["small"].max() == n
            assert not kept["large"].flags.writeable
            assert oobpickle.writable(kept)["large"].flags.writeable


def a_worker_dies_in_func():
    with _two_nodes(), tempfile.TemporaryDirectory() as folder:
        func = functools.partial(dies_once, folder)
        total = oobpickle.merge(ray, func, range(12), op=merging.added, chunksize=1)
        merging.check_model(total, 12)
        assert os.listdir(folder) == ["died"]


def a_worker_dies_in_op():
    with _two_nodes(), tempfile.TemporaryDirectory() as folder:
        op = functools.partial(op_that_dies_once, folder)
        total = oobpickle.merge(ray, model, range(12), op=op, chunksize=1)
        merging.check_model(total, 12)
        assert os.listdir(folder) == ["died"]


def a_node_goes():
    """With all that lies on it, which is made again."""
    with _two_nodes() as cluster:
        worker = next(node for node in cluster.list_all_nodes() if not node.head)
        removals = []

        def tell(n_done, _):
            if n_done >= 6 and not removals:
                removals.append(threading.Thread(target=cluster.remove_node, args=(worker,)))
                removals[0].start()

        total = oobpickle.merge(ray, model, range(30), op=merging.added, chunksize=1, progress=tell)
        removals[0].join()
        merging.check_model(total, 30)


def _ends_now(n):
    time.sleep(np.random.default_rng(n).random() / 300)
    return merging.fails(n % 12)


def errors_where_other_tasks_end_just_then():
    """To cancel one of those with Ray's own means would end this process."""
    with _two_nodes():
        for _ in range(150):
            merging.raised(ValueError, ray, _ends_now, range(24), chunksize=1)


def _begins(folder, n):
    Path(folder, str(n)).touch()
    if n == 0:
        eventually(lambda: len(os.listdir(folder)) > 1)
        raise ValueError("none")
    time.sleep(0.05)
    return [n]


def the_rest_is_called_off_and_nothing_is_left():
    """What is queued, and the call under way, which has ten seconds to go."""
    with _two_nodes(), tempfile.TemporaryDirectory() as folder:
        func = functools.partial(_begins, folder)
        merging.raised(ValueError, ray, func, range(800), chunksize=200)
        eventually(lambda: ray.available_resources().get("CPU") == 2)
        assert len(os.listdir(folder)) < 100
        assert oobpickle.merge(ray, merging.listed, range(4)) == [*range(4)]
        assert internal_kv._internal_kv_list(b"oobpickle-merge") == []


def rays_own_pool_is_refused():
    from ray.util.multiprocessing import Pool

    with _two_nodes():
        pool = Pool(1)
        error = merging.raised(TypeError, pool, merging.listed, range(3))
        assert "give the module ray itself" in str(error)
        pool.terminate()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
