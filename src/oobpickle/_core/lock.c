/* The lock around every step on the table, between all processes.

What. A 32-bit word in the table's header: 0, or the slot of the holder + 1, with a bit for waiters.

How it works. Taken by one compare-and-swap; who finds it taken sleeps on it (futex(2)), for 2 ms at
a time, and then looks whether the holder lives (participant.c). If not, the lock is taken over, and
the table is rebuilt. There are no thread ids and no pointers in shared memory, so neither pid
namespaces nor stray writes can do more than make somebody wait.

The GIL is held from taking to giving: threads of one process cannot meet inside, and no Python code
can run there. It is released while waiting, unless a message is in the middle of being taken apart:
then nobody waits longer than `bound_us` in all. So whoever finds its own slot in the word has inherited
that from a dead process.

Lifetime. That of the table. A holder that dies leaves the word; the next waiter takes over.

When it cannot. LOCK_BUSY after `bound_us` in which neither the holder nor its step counter changed:
it is stopped, and the caller does without. LOCK_LOST: a signal handler has forked while we waited,
and this is the child. LOCK_ERROR: a signal handler has raised. */

#include "core.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WAITERS 0x80000000u
#define SLOT_MASK 0x7FFFFFFFu
#define LOOK_NS 2000000
#define SPINS 100

static long futex(half *address, int operation, u32 value, const struct timespec *timeout)
{
    return syscall(SYS_futex, address, operation, value, timeout, NULL, 0);
}

u64 now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (u64)now.tv_sec * 1000000 + (u64)now.tv_nsec / 1000;
}

static bool try_take(half *address, u32 seen, u32 mine)
{
    return atomic_compare_exchange_strong_explicit(address, &seen, mine, memory_order_acquire,
                                                   memory_order_relaxed);
}

/* Sleep until the word changes, or it is time to look at the holder. */
static int sleep_on(half *address, u32 seen, bool keeps_gil)
{
    const struct timespec look = {.tv_nsec = LOOK_NS};
    int error;
    if (keeps_gil)
        return futex(address, FUTEX_WAIT, seen, &look) == 0 ? 0 : errno;
    Py_BEGIN_ALLOW_THREADS
    error = futex(address, FUTEX_WAIT, seen, &look) == 0 ? 0 : errno;
    Py_END_ALLOW_THREADS
    return error;
}

static u64 steps_of(const struct table *shared, u32 holder)
{
    if (holder == 0 || holder > SLOTS)
        return 0;
    return get(&shared->participants[holder - 1].steps);
}

static enum taken entered(struct lock *lock)
{
    word *steps = &lock->shared->participants[lock->slot].steps;
    put(steps, get(steps) + 1);
    FAULT("lock.taken");
    bool was_dirty = get(&lock->shared->header.dirty) != 0;
    put(&lock->shared->header.dirty, 1);
    atomic_signal_fence(memory_order_seq_cst);
    return was_dirty ? TAKEN_DIRTY : TAKEN;
}

enum taken lock_take(struct lock *lock, u64 bound_us, bool (*is_alive)(void *, u32), void *with)
{
    half *address = &lock->shared->header.lock;
    const u32 mine = lock->slot + 1;
    const u64 begun = lock->epoch, until = lock->keeps_gil ? now_us() + bound_us : UINT64_MAX;
    u32 watched = 0;
    u64 steps = 0, since = 0;

    for (int i = 0; i < SPINS; i++)
        if (try_take(address, 0, mine))
            return entered(lock);
    for (;;) {
        u32 seen = get_half(address), holder = seen & SLOT_MASK;
        if (holder == 0) {
            /* Others may be asleep: whoever gives it back wakes one, needed or not. */
            if (try_take(address, seen, mine | WAITERS))
                return entered(lock);
            continue;
        }
        bool is_dead = holder == mine;
        if (!is_dead) {
            u64 moved = steps_of(lock->shared, holder), now = now_us();
            if (holder != watched || moved != steps) {
                watched = holder;
                steps = moved;
                since = now;
            } else if (now - since >= bound_us) {
                return LOCK_BUSY;
            }
            if (now >= until)
                return LOCK_BUSY;
            if (!(seen & WAITERS) && !try_take(address, seen, seen | WAITERS))
                continue;
            seen |= WAITERS;
            int error = sleep_on(address, seen, lock->keeps_gil);
            /* Whatever has ended the sleep: a signal may come between two of them, and interrupts none. */
            if (error && !lock->is_deaf && PyErr_CheckSignals() < 0)
                return LOCK_ERROR;
            is_dead = error == ETIMEDOUT && !is_alive(with, holder - 1);
        }
        /* Also if the child that a handler has made has joined meanwhile, with a slot of its own. */
        if (epoch() != begun || lock->epoch != begun || lock->slot + 1 != mine)
            return LOCK_LOST;
        if (is_dead && try_take(address, seen, mine | WAITERS)) {
            put(&lock->shared->header.dirty, 1);
            return entered(lock);
        }
    }
}

void lock_give(struct lock *lock)
{
    half *address = &lock->shared->header.lock;
    atomic_signal_fence(memory_order_seq_cst);
    put(&lock->shared->header.dirty, 0);
    FAULT("lock.clean");
    u32 old = atomic_exchange_explicit(address, 0, memory_order_release);
    if (old & WAITERS)
        futex(address, FUTEX_WAKE, 1, NULL);
}
