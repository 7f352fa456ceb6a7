"""merge on two workers of Dask in network namespaces of their own: all they share is a network.

Needs root and ``ip netns``. The scheduler is on a bridge, each worker behind a pair of veth.
"""

import contextlib
import functools
import operator
import os
import subprocess
import sys
import tempfile

import merging
from distributed import Client, LocalCluster

import oobpickle

_NETWORK = "10.231.77"


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def _namespace(bridge, n):
    name, outside = f"{bridge}n{n}", f"{bridge}v{n}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", outside, "master", bridge, "up")
        inside = ("-n", name)
        _ip(*inside, "addr", "add", f"{_NETWORK}.{n + 2}/24", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        _ip(*inside, "link", "set", "lo", "up")
        yield name
    finally:
        _ip("netns", "del", name)


@contextlib.contextmanager
def _bridge():
    name = f"oob{os.getpid()}"
    _ip("link", "add", name, "type", "bridge")
    try:
        _ip("addr", "add", f"{_NETWORK}.1/24", "dev", name)
        _ip("link", "set", name, "up")
        yield name
    finally:
        _ip("link", "del", name)


@contextlib.contextmanager
def _worker(namespace, address, folder):
    module = [sys.executable, "-m", "distributed.cli.dask_worker", address]
    options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", folder]
    # The modules beside this program are found where it was started only.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["ip", "netns", "exec", namespace, *module, *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def _place(folder, n):
    return merging.meets(folder, os.readlink("/proc/self/ns/net"), n)  # such as net:[4026531840]


def two_namespaces():
    with contextlib.ExitStack() as stack:
        bridge = stack.enter_context(_bridge())
        options = {"host": f"{_NETWORK}.1", "dashboard_address": None}
        cluster = stack.enter_context(LocalCluster(n_workers=0, **options))
        client = stack.enter_context(Client(cluster))
        for n in range(2):
            namespace = stack.enter_context(_namespace(bridge, n))
            folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            stack.enter_context(_worker(namespace, cluster.scheduler_address, folder))
        client.wait_for_workers(2, timeout=60)
        hosts = {address.rpartition(":")[0] for address in client.nthreads()}
        assert hosts == {f"tcp://{_NETWORK}.{n + 2}" for n in range(2)}, hosts
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        func = functools.partial(_place, folder)
        places = oobpickle.merge(client, func, range(4), op=operator.ior, chunksize=1)
        assert len(places - {os.readlink("/proc/self/ns/net")}) == 2, places
        merging.check_all(client)
        merging.check_broadcast(client)
        func = functools.partial(merging.dies_once, folder)
        total = oobpickle.merge(client, func, range(12), op=merging.added, chunksize=1)
        merging.check_model(total, 12)
        assert len(client.nthreads()) == 1, client.nthreads()  # the other has done its part, too


if __name__ == "__main__":
    globals()[sys.argv[1]]()
