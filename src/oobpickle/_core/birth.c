/* A child is a participant from the moment of the fork.

What. Before each fork(3) the parent takes a slot and its proof of life for the child; the child has
them when it begins to run, whether or not it ever runs Python.

How it works. By pthread_atfork, so forks by C libraries are covered, which may not have the GIL. The
slot's byte is locked by a file description of its own. The child inherits that, and the parent
closes it afterwards; neither unlocks, since that would unlock for both. A page of the description is
mapped from before the fork, so that a child that closes all descriptors lives on. One fork at a time,
until the parent has closed: else the next child would inherit the proof of life of the one before.

No lock of the table is needed: a vacant slot belongs to whoever gets its byte, and what is added up
over all (incarnations, the number of slots) is changed atomically. A slot that a dead participant has
left is made vacant under the lock, by the hooks that Python calls (fork.c).

After a fork that ran no hook of Python, what this process holds becomes its own here (fork.c), if the
GIL is held. Nobody may look at it otherwise: then the child does it, where no other thread is, and
its parent waits until the child has a pid in its row.

Lifetime. From before the fork until the child joins, and takes it over, or dies.

When it cannot. Without a descriptor or a slot the child is not known until it joins by itself, as
the child of a clone(2) without handlers is not. */

#include "core.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define COPIED_US 30000000 /* a child that was stopped meanwhile is not waited for any longer */
#define NAP_NS 50000

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* No fork between the two; the list of arenas changes only there. */
void birth_pause(void)
{
    pthread_mutex_lock(&mutex);
}

void birth_go_on(void)
{
    pthread_mutex_unlock(&mutex);
}

static bool prepare(struct blocks *blocks)
{
    struct birth *birth = &blocks->own.birth;
    bool is_closed = get(&blocks->table.shared->header.closed) && !blocks->first_view;
    if (!has_joined(blocks) || blocks->own.retired || (is_closed && !birth->copies))
        return false;
    if (FAILS("birth.open") || life_open(&blocks->own.handle, &birth->life) != 0)
        return false;
    u32 slot = participant_vacant(blocks, &birth->life.file);
    if (slot == SLOTS) {
        life_close(&birth->life);
        return false;
    }
    birth->epoch = 0;
    birth->slot = slot;
    birth->incarnation = participant_write(blocks, slot, 0, 0);
    FAULT("birth.prepared");
    return true;
}

/* A child that is being forked, if there is one, inherits views. Whoever forks may not have the GIL, so
   a view may be added between `before` and the fork: its adder calls this, too. */
void birth_note_views(struct blocks *blocks)
{
    struct table *shared = blocks->table.shared;
    atomic_thread_fence(memory_order_seq_cst);
    u32 preparing = get_half(&blocks->own.birth.preparing);
    if (preparing == UNKNOWN_CHILD)
        put(&shared->header.unborn, 1);
    else if (preparing)
        put(&shared->participants[preparing - 1].inherits, 1);
}

/* The stable ABI has no PyGILState_Check, and that one answers yes where there are subinterpreters. */
static PyThreadState *(*current_thread)(void);

static bool has_gil(void)
{
    PyThreadState *ours = PyGILState_GetThisThreadState();
    return ours && current_thread && current_thread() == ours;
}

static void before(void)
{
    bool is_own = has_gil();
    if (is_own)
        fork_make_own();
    birth_pause();
    for (struct blocks *blocks = fork_arenas(); blocks; blocks = blocks->next_arena) {
        struct birth *birth = &blocks->own.birth;
        birth->copies = !is_own && fork_shares(blocks);
        put_half(&birth->preparing, prepare(blocks) ? birth->slot + 1 : UNKNOWN_CHILD);
        atomic_thread_fence(memory_order_seq_cst);
        if (blocks->first_view)
            birth_note_views(blocks);
    }
}

/* Until the child has copied what we hold, or is dead: what we write and release is not what it gets. */
static void wait_for_copy(struct blocks *blocks, u32 slot)
{
    const struct participant *row = &blocks->table.shared->participants[slot];
    u64 end = now_us() + COPIED_US;
    while (atomic_load_explicit(&row->pid, memory_order_acquire) == 0 && is_alive(blocks, slot) &&
           now_us() < end)
        nanosleep(&(struct timespec){.tv_nsec = NAP_NS}, NULL);
}

static void in_parent(void)
{
    FAULT("birth.in_parent");
    for (struct blocks *blocks = fork_arenas(); blocks; blocks = blocks->next_arena) {
        struct birth *birth = &blocks->own.birth;
        u32 preparing = get_half(&birth->preparing);
        put_half(&birth->preparing, 0);
        if (birth->epoch) /* it is our own, and we have not joined yet */
            continue;
        life_close(&birth->life);
        if (birth->copies && preparing != UNKNOWN_CHILD)
            wait_for_copy(blocks, preparing - 1);
    }
    birth_go_on();
}

/* 0 if the child is in another one than its parent, or nothing tells. */
static u64 pid_namespace(const struct blocks *blocks)
{
    struct stat status;
    u64 parents = blocks->own.pid_namespace;
    return stat("/proc/self/ns/pid", &status) == 0 && status.st_ino == parents ? parents : 0;
}

/* What may be in the middle of a change by a thread that is not here is left to who joins. */
static void in_child(void)
{
    FAULT("birth.in_child");
    for (struct blocks *blocks = fork_arenas(); blocks; blocks = blocks->next_arena) {
        struct birth *birth = &blocks->own.birth;
        put_half(&birth->preparing, 0);
        blocks->own.is_joining = false; /* that thread is not here */
        if (birth->copies)
            fork_make_childs_own(blocks);
        life_of_parent(&blocks->own.life);
        if (birth->epoch) /* that of our parent, which had not joined yet */
            life_of_parent(&birth->life);
        if (birth->life.file.fd < 0)
            continue;
        struct participant *row = &blocks->table.shared->participants[birth->slot];
        birth->epoch = epoch();
        life_own(&birth->life);
        put(&row->pid_namespace, pid_namespace(blocks));
        /* After the last load of what was copied: the parent may change it then. */
        atomic_store_explicit(&row->pid, (u64)getpid(), memory_order_release);
    }
    birth_go_on();
}

/* In the child, when it joins: what was prepared is its own. */
bool birth_take(struct blocks *blocks)
{
    struct participation *own = &blocks->own;
    struct birth *birth = &own->birth;
    if (birth->life.file.fd < 0 || birth->epoch != epoch())
        return false;
    own->life = birth->life;
    own->life_epoch = epoch();
    birth->life = NO_LIFE;
    blocks->lock.slot = birth->slot;
    blocks->lock.epoch = epoch();
    own->incarnation = birth->incarnation;
    return true;
}

/* Once for the process: subinterpreters make the module again. */
int birth_start(void)
{
    static bool is_started;
    void *found = dlsym(RTLD_DEFAULT, "PyThreadState_GetUnchecked");
    if (found == NULL)
        found = dlsym(RTLD_DEFAULT, "_PyThreadState_UncheckedGet"); /* before CPython 3.13 */
    current_thread = (PyThreadState * (*)(void)) found;
    int error = is_started ? 0 : pthread_atfork(before, in_parent, in_child);
    is_started = error == 0;
    return error;
}
