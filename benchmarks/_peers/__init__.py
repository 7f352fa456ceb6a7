"""The peers: one file for each way to send a model to another process and back.

What
    `NAMES` lists them in the order of the table; `make` imports one and returns it. All of them
    have the methods of `_peer.Peer`, and nothing else is asked of them.

How it works
    A name maps to a module and a class. The module is imported only in the process that measures
    this peer, so that what one library does on import cannot help or hurt another.

Lifetime
    ``start`` and ``stop`` belong together; everything a peer has, it gets and gives back there.

When it cannot
    A library that is not installed raises `ImportError` from `make`.
"""

from __future__ import annotations

import importlib
from typing import cast

from _peers._peer import Peer

_PEERS = {
    "oobpickle": ("pools", "Oobpickle"),
    "Pool": ("pools", "Plain"),
    "ProcessPoolExecutor": ("executor", "Executor"),
    "joblib": ("joblib_loky", "Joblib"),
    "npshmex": ("npshmex_executor", "Npshmex"),
    "py-sharedmemory": ("sharedmemory_pairs", "Pairs"),
    "Ray": ("ray_actors", "Ray"),
    "Dask": ("dask_cluster", "Dask"),
    "mpi4py pkl5": ("mpi_ranks", "Ranks"),
    "torch": ("torch_pool", "Torch"),
    "SharedMemory (view)": ("segments", "View"),
    "SharedMemory (copy)": ("segments", "Copy"),
    "files": ("files", "Files"),
}
NAMES = tuple(_PEERS)


def make(name: str) -> Peer:
    """Import the peer and return it, not started yet."""
    module, member = _PEERS[name]
    return cast(Peer, getattr(importlib.import_module(f"_peers.{module}"), member)())
