/* The lock of a shared object: one at a time writes to it, in all processes.

What. `SharedLock` is the lock in the first page of a shared block (published.c); `Holding` is what
a `with` statement enters: one turn with the object. The page also counts the turns that wrote.

How it works. ::

    holder      WAITERS, slot + 1 and incarnation of the participant that has it, or 0
    thread      of that process; it may take the lock again, `depth` times
    writing     it may be in the middle of a change
    died        a holder died in the middle of one, and nobody has written since
    waiting     somebody has waited for a version
    version     how many turns have ended that wrote

Who finds it taken sleeps on the low half of `holder` (futex(2)), for 2 ms at a time, and then looks
whether that participant lives (participant.c): its slot is held, and has the same incarnation. If not,
the lock is taken over with one compare-and-swap. Only a holder writes the other words, and it reads and
writes them with the GIL, so threads of one process meet outside.

Once somebody has waited for a version, it changes with the very call that wakes who does
(FUTEX_WAKE_OP): there is no moment at which a process can die and leave somebody asleep who ought to
have seen it. That he waits he says under the lock, so no change is under way.

Entering and leaving are C, so no signal handler comes between having the lock and the block that gives
it back. What must be told (`tell`) and looked at (`look`) is Python, and the lock is given back
whatever that raises.

Lifetime. That of the block, which the lock refers to. A child that is forked in the middle of a turn does
not have the lock: it has an incarnation of its own, and its leaving is none.

When it cannot. A process that is no participant cannot have it; nor is a process that is stopped (and
lives) ever taken for dead: a `timeout` ends the wait for it. */

#include "core.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define WAITERS ((u64)1 << 31)
#define SLOT_BITS 13
#define INCARNATION_BITS 18 /* of the low half, which is what one sleeps on; 32 more are above */
#define LOOK_US 2000
#define SIGNALS_US 1000000
#define SPINS 100
#define FOR_EVER UINT64_MAX

_Static_assert(SLOTS < 1 << SLOT_BITS, "slot + 1 has room");

struct control { /* the first page of the block */
    word holder;
    word thread;
    half depth, writing, died, waiting;
    _Alignas(64) word version;
};

struct shared_lock {
    PyObject_HEAD
    struct block *block; /* a reference */
    struct control *control;
};

struct holding {
    PyObject_HEAD
    struct shared_lock *lock; /* a reference */
    PyObject *object, *tell, *look;
    u64 timeout_us, epoch;
    bool is_writing, is_entered;
    bool begins; /* the outermost that writes */
};

static PyTypeObject *lock_type, *holding_type;

static struct shared_lock *of(PyObject *self)
{
    return (struct shared_lock *)self;
}

/* --- words that one sleeps on */

static u32 *low_half(word *address)
{
    return (u32 *)(void *)address + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
}

/* 0, or the error: ETIMEDOUT, EAGAIN or EINTR. */
static int sleep_on(word *address, u64 seen, u64 us)
{
    const struct timespec time = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
    long result;
    int error;
    Py_BEGIN_ALLOW_THREADS
    result = syscall(SYS_futex, low_half(address), FUTEX_WAIT, (u32)seen, us == FOR_EVER ? NULL : &time,
                     NULL, 0);
    error = result == 0 ? 0 : errno;
    Py_END_ALLOW_THREADS
    return error;
}

static void wake(word *address, int n)
{
    syscall(SYS_futex, low_half(address), FUTEX_WAKE, n, NULL, NULL, 0);
}

static void next_version(struct control *control)
{
    word *version = &control->version;
    u32 *low = low_half(version);
    u64 next = get(version) + 1;
    const int add_one = FUTEX_OP(FUTEX_OP_ADD, 1, FUTEX_OP_CMP_EQ, 0);
    if (!get_half(&control->waiting)) {
        atomic_store_explicit(version, next, memory_order_release);
        return;
    }
    /* The carry, once in 2^32, and a system that has no such call. */
    if ((u32)next == 0 || syscall(SYS_futex, low, FUTEX_WAKE_OP, INT_MAX, NULL, low, add_one) < 0) {
        atomic_store_explicit(version, next, memory_order_release);
        wake(version, INT_MAX);
    }
}

/* --- who has it */

static u64 word_of(u32 slot, u64 incarnation)
{
    u64 low = incarnation & (((u64)1 << INCARNATION_BITS) - 1);
    return (incarnation >> INCARNATION_BITS) << 32 | low << SLOT_BITS | (slot + 1);
}

static u32 slot_of(u64 holder)
{
    return (u32)(holder & (((u64)1 << SLOT_BITS) - 1)) - 1;
}

/* This process, or 0: it is no participant. */
static u64 myself(const struct shared_lock *lock)
{
    struct blocks *blocks = lock->block->blocks;
    if (blocks->table.shared == NULL || !has_joined(blocks))
        return 0;
    return word_of(blocks->lock.slot, blocks->own.incarnation);
}

static bool lives(const struct shared_lock *lock, u64 holder)
{
    struct blocks *blocks = lock->block->blocks;
    u32 slot = slot_of(holder);
    if (slot >= SLOTS)
        return false;
    const struct participant *row = &blocks->table.shared->participants[slot];
    return word_of(slot, get(&row->incarnation)) == holder && is_alive(blocks, slot);
}

static bool is_mine(const struct shared_lock *lock)
{
    u64 holder = get(&lock->control->holder) & ~WAITERS;
    return holder && holder == myself(lock) &&
           get(&lock->control->thread) == (u64)PyThread_get_thread_ident();
}

static bool swap(word *address, u64 seen, u64 next)
{
    return atomic_compare_exchange_strong_explicit(address, &seen, next, memory_order_acquire,
                                                   memory_order_relaxed);
}

enum got { GOT, GOT_AGAIN, LATE, NOBODY, RAISED };

/* We have it: after `is_left`, from a holder that died. */
static enum got have(struct control *control, bool is_left)
{
    FAULT("shared_lock.taken");
    if (is_left && get_half(&control->writing)) {
        put_half(&control->died, 1);
        FAULT("shared_lock.inherited");
        put_half(&control->writing, 0); /* not before it is known */
    }
    put(&control->thread, (u64)PyThread_get_thread_ident());
    put_half(&control->depth, 1);
    return GOT;
}

/* Try without sleeping: the turns of others are short. */
static bool take_at_once(struct shared_lock *lock, u64 mine)
{
    word *holder = &lock->control->holder;
    for (int i = 0; i < SPINS; i++)
        if (get(holder) == 0 && swap(holder, 0, mine))
            return true;
    return false;
}

static enum got take(struct shared_lock *lock, u64 timeout_us)
{
    struct control *control = lock->control;
    u64 mine = myself(lock), until = FOR_EVER, waiters = 0;
    if (mine && is_mine(lock)) {
        put_half(&control->depth, get_half(&control->depth) + 1);
        return GOT_AGAIN;
    }
    if (mine && take_at_once(lock, mine))
        return have(control, false);
    if (timeout_us != FOR_EVER)
        until = now_us() + timeout_us;
    for (;;) {
        u64 seen = get(&control->holder), holder = seen & ~WAITERS;
        mine = myself(lock); /* again: a signal handler may have forked, and this is the child */
        if (mine == 0)
            return NOBODY;
        if (holder == 0) {
            /* Others may be asleep: whoever gives it back wakes one, needed or not. */
            if (swap(&control->holder, seen, mine | waiters))
                return have(control, false);
            continue;
        }
        u64 now = until == FOR_EVER ? 0 : now_us();
        if (now >= until)
            return LATE;
        if (!(seen & WAITERS) && !swap(&control->holder, seen, seen | WAITERS))
            continue;
        seen |= WAITERS;
        waiters = WAITERS;
        int error = sleep_on(&control->holder, seen, until - now < LOOK_US ? until - now : LOOK_US);
        if (error && PyErr_CheckSignals() < 0)
            return RAISED;
        if (error == ETIMEDOUT && holder != myself(lock) && !lives(lock, holder) &&
            (mine = myself(lock)) != 0 && swap(&control->holder, seen, mine | WAITERS))
            return have(control, true);
    }
}

/* This turn has changed what is shared, and that is whole again if it `is_clean`. */
static void end_writing(struct control *control, bool is_clean)
{
    if (is_clean)
        put_half(&control->died, 0);
    atomic_signal_fence(memory_order_seq_cst);
    next_version(control);
    FAULT("shared_lock.counted");
    put_half(&control->writing, 0);
}

static void give(struct shared_lock *lock)
{
    struct control *control = lock->control;
    u32 depth = get_half(&control->depth);
    if (depth > 1) {
        put_half(&control->depth, depth - 1);
        return;
    }
    put(&control->thread, 0);
    put_half(&control->depth, 0);
    FAULT("shared_lock.ended");
    u64 old = atomic_exchange_explicit(&control->holder, 0, memory_order_release);
    FAULT("shared_lock.given");
    if (old & WAITERS)
        wake(&control->holder, 1);
}

/* --- a turn */

/* Seconds, or None for ever; -1 with an exception. */
static int timeout_of(PyObject *seconds, u64 *us)
{
    *us = FOR_EVER;
    if (seconds == Py_None)
        return 0;
    double value = PyFloat_AsDouble(seconds);
    if (value == -1.0 && PyErr_Occurred())
        return -1;
    if (isnan(value) || value < 0) {
        PyErr_Format(PyExc_ValueError, "timeout is %R, expected seconds from 0 on, or None", seconds);
        return -1;
    }
    if (value < 1e12)
        *us = (u64)(value * 1e6);
    return 0;
}

static u64 pid_of_holder(const struct shared_lock *lock)
{
    u32 slot = slot_of(get(&lock->control->holder) & ~WAITERS);
    const struct table *shared = lock->block->blocks->table.shared;
    return slot < SLOTS && shared ? get(&shared->participants[slot].pid) : 0;
}

/* Have Python say it: a warning, or the error itself. 0: it has not raised. */
static int tell(const struct shared_lock *lock, PyObject *teller, const char *what, u64 timeout_us)
{
    unsigned long long pid = pid_of_holder(lock);
    PyObject *result = PyObject_CallFunction(teller, "sKd", what, pid, (double)timeout_us / 1e6);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static PyObject *say(const struct shared_lock *lock, PyObject *teller, const char *what, u64 timeout_us)
{
    if (tell(lock, teller, what, timeout_us) == 0)
        PyErr_SetString(PyExc_SystemError, "nothing was raised");
    return NULL;
}

static PyObject *enter(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct holding *holding = (struct holding *)self;
    struct control *control = holding->lock->control;
    if (holding->is_entered) {
        PyErr_SetString(PyExc_RuntimeError, "it was entered already: call writing() or reading() anew");
        return NULL;
    }
    enum got got = take(holding->lock, holding->timeout_us);
    if (got == RAISED)
        return NULL;
    if (got == LATE || got == NOBODY)
        return say(holding->lock, holding->tell, got == LATE ? "late" : "detached", holding->timeout_us);
    holding->epoch = epoch();
    if (got == GOT && get_half(&control->died) && tell(holding->lock, holding->tell, "died", 0) != 0) {
        if (holding->epoch == epoch())
            give(holding->lock);
        return NULL;
    }
    holding->is_entered = true;
    holding->begins = holding->is_writing && get_half(&control->writing) == 0;
    if (holding->begins)
        put_half(&control->writing, 1);
    atomic_signal_fence(memory_order_seq_cst);
    FAULT("shared_lock.entered");
    return Py_NewRef(holding->object);
}

/* Whether the object is what it was but for its memory; an exception says that it is not. */
static bool looks_right(const struct holding *holding, PyObject *error)
{
    PyObject *result = PyObject_CallFunctionObjArgs(holding->look, error, NULL);
    Py_XDECREF(result);
    return result != NULL;
}

static PyObject *leave(PyObject *self, PyObject *arguments)
{
    struct holding *holding = (struct holding *)self;
    PyObject *type, *error, *traceback;
    if (!PyArg_ParseTuple(arguments, "OOO", &type, &error, &traceback))
        return NULL;
    if (holding->is_entered && holding->epoch != epoch()) { /* the turn is our parent's */
        holding->is_entered = false;
        Py_RETURN_FALSE;
    }
    if (!holding->is_entered || !is_mine(holding->lock)) {
        PyErr_SetString(PyExc_RuntimeError, "a thread leaves what it has not entered");
        return NULL;
    }
    holding->is_entered = false;
    const bool begins = holding->begins; /* who looks may use it again */
    bool is_right = !begins || looks_right(holding, error);
    if (holding->epoch != epoch()) /* a signal handler has forked */
        return is_right ? Py_NewRef(Py_False) : NULL;
    if (begins)
        end_writing(holding->lock->control, is_right && error == Py_None);
    give(holding->lock);
    return is_right ? Py_NewRef(Py_False) : NULL;
}

/* A `with` statement that was interrupted right after it had entered drops the turn and does not leave it:
   from Python 3.14 on it may be. */
static void give_up(struct holding *holding)
{
    if (!holding->is_entered || holding->epoch != epoch() || !is_mine(holding->lock))
        return;
    if (holding->begins)
        end_writing(holding->lock->control, false);
    give(holding->lock);
}

static void holding_dealloc(PyObject *self)
{
    struct holding *holding = (struct holding *)self;
    PyTypeObject *type = Py_TYPE(self);
    give_up(holding);
    Py_DECREF((PyObject *)holding->lock);
    Py_DECREF(holding->object);
    Py_DECREF(holding->tell);
    Py_DECREF(holding->look);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

/* holding(object, is_writing, timeout, tell, look): what `with` enters */
static PyObject *new_holding(PyObject *self, PyObject *arguments)
{
    PyObject *object, *seconds, *teller, *looker;
    int is_writing;
    u64 timeout_us;
    if (!PyArg_ParseTuple(arguments, "OpOOO", &object, &is_writing, &seconds, &teller, &looker) ||
        timeout_of(seconds, &timeout_us) != 0)
        return NULL;
    struct holding *holding = (struct holding *)PyType_GenericAlloc(holding_type, 0); /* zeroed */
    if (holding == NULL)
        return NULL;
    holding->timeout_us = timeout_us;
    holding->is_writing = is_writing;
    holding->lock = of(Py_NewRef(self));
    holding->object = Py_NewRef(object);
    holding->tell = Py_NewRef(teller);
    holding->look = Py_NewRef(looker);
    return (PyObject *)holding;
}

/* --- versions */

static PyObject *get_version(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(
        atomic_load_explicit(&of(self)->control->version, memory_order_acquire));
}

static PyObject *get_owner_died(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(get_half(&of(self)->control->died));
}

static PyObject *get_is_held(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(is_mine(of(self)));
}

/* Say that somebody waits. It stays said: a call more for each turn that writes. */
static enum got say_waiting(struct shared_lock *lock, u64 timeout_us)
{
    if (get_half(&lock->control->waiting))
        return GOT;
    enum got got = take(lock, timeout_us);
    if (got == GOT || got == GOT_AGAIN) {
        put_half(&lock->control->waiting, 1);
        give(lock);
    }
    return got;
}

/* wait(version, timeout, tell): the first version that is larger; None: not in time */
static PyObject *wait_for(PyObject *self, PyObject *arguments)
{
    unsigned long long known;
    PyObject *seconds, *teller;
    u64 timeout_us;
    if (!PyArg_ParseTuple(arguments, "KOO", &known, &seconds, &teller) ||
        timeout_of(seconds, &timeout_us) != 0)
        return NULL;
    word *version = &of(self)->control->version;
    u64 until = timeout_us == FOR_EVER ? FOR_EVER : now_us() + timeout_us;
    for (;;) {
        u64 seen = atomic_load_explicit(version, memory_order_acquire);
        if (seen > known)
            return PyLong_FromUnsignedLongLong(seen);
        u64 now = until == FOR_EVER ? 0 : now_us(), left = until == FOR_EVER ? FOR_EVER : until - now;
        if (now >= until)
            Py_RETURN_NONE;
        enum got got = say_waiting(of(self), left);
        if (got == NOBODY)
            return say(of(self), teller, "detached", 0);
        if (got == RAISED)
            return NULL;
        if (got == LATE)
            continue;
        /* A signal that comes just before the sleep does not interrupt it. */
        int error = sleep_on(version, seen, left < SIGNALS_US ? left : SIGNALS_US);
        if (error && PyErr_CheckSignals() < 0)
            return NULL;
    }
}

/* --- the types */

static void lock_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF((PyObject *)of(self)->block);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

/* SharedLock(block): that of a shared view, whose first page was zeroed before it was published */
static PyObject *new_lock(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    PyObject *object;
    if (!PyArg_ParseTuple(arguments, "O!", block_type, &object))
        return NULL;
    struct block *block = (struct block *)object;
    if (!block->is_shared || block->address == NULL || block->nbytes < PAGE) {
        PyErr_SetString(PyExc_ValueError, "the lock of a shared object lies in a shared view");
        return NULL;
    }
    struct shared_lock *lock = PyObject_New(struct shared_lock, type);
    if (lock == NULL)
        return NULL;
    lock->block = (struct block *)Py_NewRef(object);
    lock->control = (struct control *)(void *)block->address;
    return (PyObject *)lock;
}

static PyMethodDef lock_methods[] = {
    {"holding", new_holding, METH_VARARGS, NULL},
    {"wait", wait_for, METH_VARARGS, NULL},
    {0},
};

static PyGetSetDef lock_attributes[] = {
    {"version", get_version, NULL, NULL, NULL},
    {"owner_died", get_owner_died, NULL, NULL, NULL},
    {"is_held", get_is_held, NULL, NULL, NULL},
    {0},
};

static PyType_Slot lock_slots[] = {
    {Py_tp_new, new_lock},
    {Py_tp_dealloc, lock_dealloc},
    {Py_tp_methods, lock_methods},
    {Py_tp_getset, lock_attributes},
    {0, NULL},
};

static PyType_Spec lock_spec = {
    .name = "oobpickle._core.SharedLock",
    .basicsize = sizeof(struct shared_lock),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = lock_slots,
};

static PyMethodDef holding_methods[] = {
    {"__enter__", enter, METH_NOARGS, NULL},
    {"__exit__", leave, METH_VARARGS, NULL},
    {0},
};

static PyType_Slot holding_slots[] = {
    {Py_tp_dealloc, holding_dealloc},
    {Py_tp_methods, holding_methods},
    {0, NULL},
};

static PyType_Spec holding_spec = {
    .name = "oobpickle._core.Holding",
    .basicsize = sizeof(struct holding),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = holding_slots,
};

int shared_lock_type_make(PyObject *module)
{
    return type_make(module, &lock_type, &lock_spec) || type_make(module, &holding_type, &holding_spec);
}
