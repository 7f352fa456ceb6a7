"""Participants of an arena within one process, and what they send to each other."""

import os
import struct

from oobpickle._memory.arena import SharedArena
from oobpickle._native import core
from table import Table


def send(arena, *contents, channel=0):
    """Send buffers; return what an envelope would say of them."""
    lease = arena.acquire([len(content) for content in contents])
    for destination, content in zip(lease.destinations, contents, strict=True):
        destination[:] = content
    pairs, needs = lease.pairs, [len(view) for view in lease.destinations]
    lease.seal(channel)
    lease.depart()
    lease.settle()
    return pairs, needs


def first_of(pairs):
    return struct.unpack_from("<2Q", pairs)


def vanish(arena):
    """Take away what the kernel takes away when a process dies."""
    arena.blocks.abandon()
    for fd in arena.descriptors:
        os.close(fd)


def stopped_holder(arena):
    """Let the lock be held by somebody who lives and does nothing."""
    other = SharedArena.attach(*(os.dup(fd) for fd in arena.descriptors))
    table = Table.of(arena)
    table.header("lock", "u4")[0] = other.blocks.slot + 1
    core.wait_for_the_lock(20_000)

    def go_on():
        table.header("lock", "u4")[0] = 0
        core.wait_for_the_lock(2_000_000)
        vanish(other)
        arena.reclaim.reap()

    return go_on


def number_of_mappings():
    with open("/proc/self/maps") as file:
        return sum("oobpickle" in line for line in file)
