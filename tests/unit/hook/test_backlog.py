"""The backlog: how much of one's own is unread, and who waits for it."""

import multiprocessing
import os
import stat
import threading
import time

import pytest

from kernel import needs_kernel
from oobpickle._hook.backlog import Backlog
from oobpickle._memory.arena import SharedArena
from oobpickle._memory.options import Options
from oobpickle._memory.pipes import reading_end

MIB = 1 << 20
ENVELOPE = bytes(300)


@pytest.fixture
def arena():
    arena = SharedArena.create(Options(capacity=64 * MIB))
    yield arena
    arena.close()
    arena.detach()
    assert arena.try_destroy()


@pytest.fixture
def backlog(arena):
    return Backlog(arena)


@pytest.fixture(
    params=[
        pytest.param(False, id="pipe"),
        pytest.param(True, id="socket pair", marks=needs_kernel("sock_diag")),
    ]
)
def ends(request):
    reader, writer = multiprocessing.Pipe(request.param)
    with reader, writer:
        yield reader, writer


def send(arena, backlog, writer, nbytes):
    channel = reading_end(writer.fileno())
    lease = arena.acquire([nbytes])
    lease.seal(channel)
    lease.settle()
    backlog.note(channel, block_of(lease), nbytes, len(ENVELOPE))
    os.write(writer.fileno(), ENVELOPE)
    return lease


def wait(backlog, writer, nbytes):
    fd = writer.fileno()
    thread = threading.Thread(target=backlog.wait, args=(fd, reading_end(fd), nbytes))
    thread.start()
    return thread


def block_of(lease):
    return lease.blocks[0].index, lease.blocks[0].generation


def n_noted(backlog, writer):
    return len(backlog._sent[reading_end(writer.fileno())])


def claim(arena, lease):
    arena.receiving.claim(lease.pairs, [len(view) for view in lease.destinations])


def test_within_the_budget_nobody_waits(arena, backlog, ends):
    _, writer = ends
    first = send(arena, backlog, writer, 4 * MIB)

    thread = wait(backlog, writer, 4 * MIB)
    thread.join(20)

    assert not thread.is_alive()
    claim(arena, first)


def test_over_the_budget_a_sender_waits_until_its_own_is_loaded(arena, backlog, ends):
    _, writer = ends
    first, second = (send(arena, backlog, writer, 5 * MIB) for _ in range(2))

    thread = wait(backlog, writer, 5 * MIB)
    thread.join(0.1)
    assert thread.is_alive()
    claim(arena, first)
    thread.join(20)

    assert not thread.is_alive()
    claim(arena, second)


def test_a_sender_does_not_wait_for_what_a_participant_has_read(arena, backlog, ends):
    _, writer = ends
    leases = [send(arena, backlog, writer, 5 * MIB) for _ in range(2)]

    thread = wait(backlog, writer, 5 * MIB)
    arena.blocks.adopt(*block_of(leases[0]))
    thread.join(20)

    assert not thread.is_alive()
    for lease in leases:
        claim(arena, lease)


def test_channels_whose_messages_were_loaded_are_not_remembered(arena, backlog):
    for number in range(1000):
        lease = arena.acquire([100])
        backlog.note(number, block_of(lease), 100, 300)
        lease.release()

    assert len(backlog) < 200


def test_a_sender_does_not_wait_for_what_was_read(arena, backlog, ends):
    """Not even if something is still unread: what was sent first has left first. Of a socket the
    kernel counts more than its bytes, and all of it has to be read here."""
    reader, writer = ends
    leases = [send(arena, backlog, writer, 5 * MIB) for _ in range(2)]

    thread = wait(backlog, writer, 5 * MIB)
    is_socket = stat.S_ISSOCK(os.fstat(reader.fileno()).st_mode)
    os.read(reader.fileno(), len(ENVELOPE) * (2 if is_socket else 1))
    thread.join(20)

    assert not thread.is_alive()
    for lease in leases:
        claim(arena, lease)


def test_a_sender_does_not_wait_for_readers_that_are_gone(arena, backlog, ends):
    reader, writer = ends
    leases = [send(arena, backlog, writer, 5 * MIB) for _ in range(2)]

    thread = wait(backlog, writer, 5 * MIB)
    reader.close()
    thread.join(20)

    assert not thread.is_alive()
    for lease in leases:
        claim(arena, lease)


@pytest.mark.parametrize("is_first_only", [True, False])
def test_messages_that_nobody_loads_are_not_remembered(arena, backlog, ends, is_first_only):
    reader, writer = ends
    arena.unloaded.note(reading_end(writer.fileno()))
    leases, most = [], 0
    for number in range(500):
        lease = send(arena, backlog, writer, 1000)
        wait(backlog, writer, 1000).join(20)
        os.read(reader.fileno(), len(ENVELOPE))
        most = max(most, n_noted(backlog, writer))
        if number and is_first_only:
            claim(arena, lease)
        else:
            leases.append(lease)

    assert most < 100, most
    for lease in leases:
        claim(arena, lease)


def test_a_channel_that_was_closed_is_not_waited_for(arena, backlog, ends):
    _, writer = ends
    leases = [send(arena, backlog, writer, 5 * MIB) for _ in range(2)]
    fd, channel = os.dup(writer.fileno()), reading_end(writer.fileno())
    os.close(fd)
    before = time.monotonic()

    backlog.wait(fd, channel, 5 * MIB)

    assert time.monotonic() - before < 20
    for lease in leases:
        claim(arena, lease)
