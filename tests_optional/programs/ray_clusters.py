"""merge on clusters of Ray: two nodes, on this machine."""

import contextlib
import functools
import operator
import os
import sys
import tempfile
import threading

import merging
import ray
from merging import dies_once, model, op_that_dies_once
from ray.cluster_utils import Cluster

import oobpickle


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


def rays_own_pool_is_refused():
    from ray.util.multiprocessing import Pool

    with _two_nodes():
        pool = Pool(1)
        error = merging.raised(TypeError, pool, merging.listed, range(3))
        assert "give the module ray itself" in str(error)
        pool.terminate()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
