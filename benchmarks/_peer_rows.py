"""The rows of the comparison against peers: a workload and a size each.

What
    `ROWS` lists them.

How it works
    ``n_transfers`` is how many models cross in one timed message, for GB/s.

Lifetime
    Data only.

When it cannot
    ``is_apart`` marks the rows in which not all peers fit into memory at once.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
JUDGED_ABOVE_NBYTES = MIB
SIZES = {"10K": 10 * KIB, "1M": MIB, "64M": 64 * MIB, "500M": 500 * MIB, "1G": GIB}
_COMMON = ("10K", "1M", "64M", "1G")
# Workload: workers, models that cross in one message, sizes.
_WORKLOADS = {
    "result": (1, 1, _COMMON),
    "argument": (1, 1, _COMMON),
    "roundtrip": (1, 2, _COMMON),
    "broadcast": (4, 4, _COMMON),
    "map": (2, 8, ("500M",)),
    # Eight models of 1 GiB that arrive faster than they are added are 12 GiB with the workers'.
    "merge": (2, 8, ("10K", "1M", "64M", "500M")),
}
WORKLOADS = tuple(_WORKLOADS)


@dataclass(frozen=True)
class Row:
    """One line of the comparison."""

    workload: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.size}"

    @property
    def nbytes(self) -> int:
        return SIZES[self.size]

    @property
    def n_workers(self) -> int:
        return _WORKLOADS[self.workload][0]

    @property
    def n_transfers(self) -> int:
        return _WORKLOADS[self.workload][1]

    @property
    def is_apart(self) -> bool:
        return self.nbytes > 64 * MIB

    @property
    def is_judged(self) -> bool:
        return self.nbytes > JUDGED_ABOVE_NBYTES


ROWS = tuple(
    Row(workload, size) for workload, (_, _, sizes) in _WORKLOADS.items() for size in sizes
)
