/* Copying much memory at once: past the caches, and on two cores where one is idle.

What. `copy(destination, source)`, for contiguous memory of one size; `copy_now` for those who keep
the GIL; `copy_in_pieces` for memory with gaps.

How it works. One core alone cannot move as much as memory can: two reach 1.6 times the rate. So a
large copy is cut into pieces, and a thread takes some of them if it gets a core in time; the caller
takes pieces until none is left, and then waits for the thread. Two cores that share a memory bus
spend more time in sum than one, so there is a thread only while no more threads are runnable than there
are cores: in a pool that is busy, throughput counts.

memcpy writes through the caches: each line of the destination is read before it is written, and what the
caches had is gone, also the code that sends and receives the message. It would write past them above three
quarters of the cache, but in a virtual machine it is told of that of the whole host (384 MiB, where 32 are to
be had). Whoever reads the copy finds it in no cache, as always with so much.

Lifetime. The thread lives for one copy: when `copy` returns, the system has forgotten it, or Python
would warn of a fork in a process with threads.

When it cannot. Without a second core, or a second thread, the caller copies everything. Past the caches only
on x86, where each processor can. */

#include "core.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define LEAST ((size_t)32 << 20)
#define PIECE ((size_t)8 << 20)
#define SMALL ((size_t)32 << 10)
#define TURNS 3
#define YIELDS 3000
#define NAPS 2000 /* of a millisecond */

struct job {
    copy_piece *copy;
    const void *with;
    size_t n, n_each;    /* items: in all, and of a piece */
    _Atomic size_t next; /* where the next piece begins */
    _Atomic int thread;  /* of the helper, as the system knows it */
};

static void copy_pieces(struct job *job)
{
    for (;;) {
        size_t at = atomic_fetch_add_explicit(&job->next, job->n_each, memory_order_relaxed);
        if (at >= job->n)
            return;
        job->copy(job->with, at, job->n - at < job->n_each ? job->n - at : job->n_each);
    }
}

static void *help(void *with)
{
    struct job *job = with;
    atomic_store_explicit(&job->thread, (int)syscall(SYS_gettid), memory_order_relaxed);
    copy_pieces(job);
    return NULL;
}

static bool is_a_core_idle(void)
{
    char text[128]; /* 0.01 0.05 0.01 running/all last-pid */
    int running;
    cpu_set_t cores;
    return read_text("/proc/loadavg", text, sizeof text) &&
           sscanf(text, "%*s %*s %*s %d/", &running) == 1 &&
           sched_getaffinity(0, sizeof cores, &cores) == 0 && running < CPU_COUNT(&cores);
}

/* Whoever is runnable may be queued behind us for a slice of some milliseconds, with little to do, while
   another core is idle: often it is who has woken us. They get their turn first. */
static bool is_a_core_idle_now(void)
{
    for (int turns = TURNS; !is_a_core_idle(); turns--) {
        if (turns == 0)
            return false;
        sched_yield();
    }
    return true;
}

/* Mostly at once. Its core may be taken from a virtual machine just then, for a tenth of a second. A
   debugger may have stopped it: not for ever. */
static void wait_until_gone(int thread)
{
    char path[48];
    snprintf(path, sizeof path, "/proc/self/task/%d", thread);
    for (int i = 0; i < YIELDS + NAPS && access(path, F_OK) == 0; i++) {
        if (i < YIELDS)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

static void copy_with_helper(struct job *job)
{
    pthread_t helper;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* the program's signals are for its own threads */
    bool has_helper = pthread_create(&helper, NULL, help, job) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    copy_pieces(job);
    if (has_helper) {
        pthread_join(helper, NULL);
        wait_until_gone(atomic_load_explicit(&job->thread, memory_order_relaxed));
    }
}

/* Copy `n` items, `nbytes` in all, by calls for some of them at a time. With the GIL or without it: the
   helper needs none. */
void copy_in_pieces(copy_piece *copy, const void *with, size_t n, size_t nbytes)
{
    size_t n_each = nbytes > PIECE ? (size_t)((double)n * PIECE / (double)nbytes) : n;
    struct job job = {.copy = copy, .with = with, .n = n, .n_each = n_each ? n_each : 1};
    if (n > 1 && nbytes >= LEAST && is_a_core_idle_now())
        copy_with_helper(&job);
    else
        copy(with, 0, n);
}

struct contiguous {
    char *to;
    const char *from;
};

static void copy_contiguous(const void *with, size_t at, size_t n)
{
    const struct contiguous *memory = with;
    memcpy(memory->to + at, memory->from + at, n);
}

#ifdef __SSE2__
#define LINE ((size_t)64) /* of a cache */

static void copy_past_caches(const void *with, size_t at, size_t n)
{
    const struct contiguous *memory = with;
    char *to = memory->to + at;
    const char *from = memory->from + at;
    size_t before = -(uintptr_t)to % LINE; /* the next line begins */
    if (before > n)
        before = n;
    memcpy(to, from, before);
    to += before;
    from += before;
    for (n -= before; n >= LINE; n -= LINE, to += LINE, from += LINE) {
        const __m128i_u *read = (const __m128i_u *)(const void *)from;
        __m128i *write = (__m128i *)(void *)to;
        __m128i first = read[0], second = read[1], third = read[2], fourth = read[3];
        _mm_stream_si128(write, first);
        _mm_stream_si128(write + 1, second);
        _mm_stream_si128(write + 2, third);
        _mm_stream_si128(write + 3, fourth);
    }
    memcpy(to, from, n);
    _mm_sfence(); /* else it may be seen after what is written next: that the message is there */
}
#else
#define copy_past_caches copy_contiguous
#endif

void copy_now(char *to, const void *from, size_t nbytes)
{
    copy_piece *copy = nbytes < LEAST ? copy_contiguous : copy_past_caches;
    copy_in_pieces(copy, &(struct contiguous){to, from}, nbytes, nbytes);
}

/* copy(destination, source): contiguous memory of one size */
PyObject *copy_bytes(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer to, from;
    if (!PyArg_ParseTuple(arguments, "w*y*", &to, &from))
        return NULL;
    if (to.len != from.len) {
        PyErr_Format(PyExc_ValueError, "%zd bytes do not fit into %zd", from.len, to.len);
    } else if ((size_t)to.len <= SMALL) {
        memcpy(to.buf, from.buf, (size_t)to.len);
    } else {
        Py_BEGIN_ALLOW_THREADS
        copy_now(to.buf, from.buf, (size_t)to.len);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&to);
    PyBuffer_Release(&from);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}
