/* Whose it is after a fork: each process has an epoch, and every object that owns something has the
one it was made in.

What. `epoch` differs between a process and whatever was forked from it, in every way.

How it works. It lies in a page that the kernel wipes in a forked child (MADV_WIPEONFORK), so a
child of raw clone(2) sees 0 there, at the cost of one load. pthread_atfork gives the children of
fork(3) a new one; it runs also for forks by C libraries, without the GIL.

Lifetime. Of the process.

When it cannot. 0: a fork that ran no handler. Nothing may be released, sent or changed then. */

#include "core.h"

#include <pthread.h>
#include <sys/mman.h>

static volatile u64 *page;
static u64 counted = 1;

u64 epoch(void)
{
    return *page;
}

static void in_child(void)
{
    *page = ++counted;
}

int epoch_start(void)
{
    if (page)
        return 0;
    u64 *fresh = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED)
        return -1;
    if (madvise(fresh, PAGE, MADV_WIPEONFORK) != 0 || pthread_atfork(NULL, NULL, in_child) != 0) {
        munmap(fresh, PAGE);
        return -1;
    }
    *fresh = counted;
    page = fresh;
    return 0;
}
