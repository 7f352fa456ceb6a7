/* One arena, as this process has it: attaching, joining, and the steps that make and move blocks.

What. `Blocks` is a process's attachment. `lease` makes blocks to write into, `seal` and `depart`
hand them to a message, `claim` makes those of a message this process's own.

How it works. Each method is C from its first to its last line: no signal handler, finalizer or
other thread comes in between but where it waits for the lock, makes pages or gives them back, or
writes to disk, and then every block that it has is an object already.

Lifetime. The table stays mapped until `end`, or the last reference to this and to every block.

When it cannot. A method returns a shortage (`SHORTAGES`), or raises what is said there. */

#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static PyTypeObject *blocks_type, *reading_type;

u64 lock_patience_us = 2000000;
#define NOW_US 5000 /* while nobody else can run */
#define KEEP_LEAST ((u64)64 << 20)
#define MOST_UNHELD 16 /* published blocks that one step frees */

static struct blocks *of(PyObject *self)
{
    return (struct blocks *)self;
}

static bool has_ended(const struct blocks *blocks)
{
    return blocks->table.shared == NULL;
}

static PyObject *error_ended(void)
{
    PyErr_SetString(PyExc_ValueError, "the arena has ended in this process");
    return NULL;
}

/* How many there are in what must be a list, or -1 with an exception. */
static Py_ssize_t length_of(PyObject *list)
{
    if (PyList_Check(list))
        return PyList_Size(list);
    PyErr_SetString(PyExc_TypeError, "not a list");
    return -1;
}

/* A copy of what must be a list: whoever has it may change it while the GIL is gone. */
PyObject *list_taken(PyObject *list)
{
    return length_of(list) < 0 ? NULL : PyList_GetSlice(list, 0, PyList_Size(list));
}

/* --- steps */

/* Begin a step: 0, a shortage, or -1 with an exception of a signal handler. */
int step_begin(struct blocks *blocks)
{
    if (has_ended(blocks) || !has_joined(blocks))
        return DETACHED;
    /* A stopped holder of the lock is waited for once, not by every message. */
    bool is_hurried = now_us() < blocks->hurried_until;
    u64 bound = is_hurried ? HURRIED_US : lock_patience_us;
    if (blocks->lock.keeps_gil)
        bound = is_hurried ? 0 : NOW_US;
    blocks->n_inside++;
    enum taken taken = lock_take(&blocks->lock, bound, is_alive, blocks);
    if (taken == LOCK_LOST)
        return DETACHED; /* the count is the parent's */
    blocks->n_inside--;
    if (taken == LOCK_ERROR)
        return -1;
    if (taken == LOCK_BUSY) {
        if (!blocks->lock.keeps_gil)
            blocks->hurried_until = now_us() + HURRY_US;
        return BUSY;
    }
    if (taken == TAKEN_DIRTY)
        table_rebuild(&blocks->table, NULL, NULL);
    table_drain(&blocks->table);
    if (get(&blocks->table.shared->participants[blocks->lock.slot].inherits))
        views_take(blocks);
    return ROOM;
}

void step_end(struct blocks *blocks)
{
    u32 taken[MOST_UNHELD], n = 0;
    while (n < MOST_UNHELD && get(&blocks->table.shared->header.unheld)) {
        u32 index = references_take_unheld(&blocks->table, blocks->lock.slot, is_alive, blocks);
        if (index == ROWS)
            break;
        taken[n++] = index;
    }
    lock_give(&blocks->lock);
    while (n-- > 0) { /* leased because nobody refers to it any more: to be released */
        PyObject *block = (PyObject *)block_leased(blocks, taken[n], 0);
        if (block == NULL)
            PyErr_Clear(); /* the step is done all the same */
        Py_XDECREF(block);
    }
}

static PyObject *shortage(int reason, u64 need, u64 room)
{
    return reason < 0 ? NULL : Py_BuildValue("iKK", reason, need, room);
}

/* --- sending */

/* All or none: to take room block by block while others do the same would end by the clock. */
static int lease_all(struct blocks *blocks, const u64 *needs, Py_ssize_t n, u32 where,
                     struct leased *leased, u64 *need, u64 *room)
{
    struct table_view *table = &blocks->table;
    int problem = step_begin(blocks);
    if (problem)
        return problem;
    /* Under the lock: who has had it since the arena was closed sees every lease there will be. */
    if (get(&table->shared->header.closed))
        problem = DETACHED;
    Py_ssize_t n_leased = 0;
    while (n_leased < n && problem == ROOM) {
        *need = needs[n_leased];
        problem = (int)table_lease(table, *need, where, blocks->lock.slot, &leased[n_leased], room);
        n_leased += problem == ROOM;
    }
    if (problem != ROOM)
        for (Py_ssize_t i = n_leased - 1; i >= 0; i--) {
            struct row *row = table_row(table, leased[i].index);
            table_count_pages(table, leased[i].index, row_resident(row, leased[i].index),
                              leased[i].counted);
            if (leased[i].present < leased[i].counted)
                put(&row->channel, INCOMPLETE);
            table_count_idle(table, leased[i].index, (int64_t)leased[i].counted);
            table_free(table, leased[i].index, get(&row->generation), false);
        }
    step_end(blocks);
    return problem;
}

/* Objects for what was leased; `list` was made before, since that may run finalizers. */
static PyObject *fill(PyObject *list, struct blocks *blocks, const u64 *needs, Py_ssize_t n,
                      const struct leased *leased)
{
    for (Py_ssize_t i = 0; list && i < n; i++) {
        struct block *block = block_leased(blocks, leased[i].index, needs[i]);
        if (block == NULL) {
            Py_CLEAR(list);
            break;
        }
        block->reserved = leased[i].present; /* the rest of what is counted is still to be made */
        PyList_SetItem(list, i, (PyObject *)block);
    }
    return list;
}

/* What is on disk is not mapped to be written. */
static bool map_all(struct blocks *blocks, PyObject *list, const u64 *needs)
{
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        struct block *block = (struct block *)PyList_GetItem(list, i);
        if (is_on_disk(&blocks->table, block->index))
            continue;
        if (block_map(block, table_pages(&blocks->table, 0, needs[i])) != 0)
            return false;
        block_enter(block, needs[i] < block->reserved ? needs[i] : block->reserved);
    }
    return true;
}

/* DETACHED if the files cannot be had any more, SPACE if there is none on disk. */
static int problem_of(const struct blocks *blocks, u32 where)
{
    if (has_ended(blocks) || !file_is_ours(&blocks->mapping.data))
        return DETACHED;
    if (where && !blocks->table.disk_nbytes)
        return SPACE;
    return where && !file_is_ours(&blocks->disk.data) ? DETACHED : ROOM;
}

/* lease([nbytes], on_disk): [Block], or (shortage, bytes needed, bytes left) */
static PyObject *lease(PyObject *self, PyObject *const *arguments, Py_ssize_t n_arguments)
{
    struct blocks *blocks = of(self);
    PyObject *argument = n_arguments > 0 ? arguments[0] : Py_None;
    u32 where = n_arguments > 1 && arguments[1] == Py_True ? ON_DISK : 0;
    Py_ssize_t n = length_of(argument);
    if (n < 0)
        return NULL;
    u64 *needs = calloc((size_t)n + 1, sizeof *needs), need = 0, room = 0;
    struct leased *leased = calloc((size_t)n + 1, sizeof *leased);
    PyObject *list = PyList_New(n), *result = NULL;
    if (needs == NULL || leased == NULL || list == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        needs[i] = PyLong_AsUnsignedLongLong(PyList_GetItem(argument, i));
        if (PyErr_Occurred())
            goto done;
        if (needs[i] > (where ? blocks->table.disk_nbytes : blocks->table.data_nbytes)) {
            result = shortage(where ? SPACE : FULL, needs[i], where ? 0 : blocks->table.capacity);
            goto done;
        }
    }
    int problem = problem_of(blocks, where);
    if (problem == ROOM)
        problem = lease_all(blocks, needs, n, where, leased, &need, &room);
    if (problem != ROOM) {
        result = shortage(problem, need, room);
        goto done;
    }
    result = fill(list, blocks, needs, n, leased);
    list = NULL;
    if (result && map_all(blocks, result, needs)) {
        leave_others(blocks, result);
    } else if (result) {
        Py_DECREF(result);
        result = shortage(DETACHED, need, 0);
    }
done:
    Py_XDECREF(list);
    free(needs);
    free(leased);
    return result;
}

bool is_blocks(PyObject *object)
{
    return Py_TYPE(object) == blocks_type;
}

/* Lease a block in the middle of a message, with the GIL kept. NULL, without an exception: there is none
   at once; `problem` says why. */
struct block *blocks_lease_now(struct blocks *blocks, u64 nbytes, u32 where, int *problem)
{
    struct leased leased = {0};
    u64 need, left;
    *problem = problem_of(blocks, where);
    if (*problem == ROOM && get(&blocks->table.shared->header.closed))
        *problem = DETACHED;
    else if (*problem == ROOM &&
             nbytes > (where ? blocks->table.disk_nbytes : blocks->table.data_nbytes))
        *problem = where ? SPACE : FULL;
    if (*problem != ROOM)
        return NULL;
    PyObject *list = PyList_New(1); /* before: this may run finalizers */
    struct block *block = NULL;
    const bool was_deaf = blocks->lock.is_deaf; /* the hook of a fork waits without the GIL */
    blocks->lock.keeps_gil = blocks->lock.is_deaf = true;
    if (list)
        *problem = lease_all(blocks, &nbytes, 1, where, &leased, &need, &left);
    if (list && *problem == ROOM) {
        list = fill(list, blocks, &nbytes, 1, &leased);
        if (list && map_all(blocks, list, &nbytes))
            block = (struct block *)Py_NewRef(PyList_GetItem(list, 0));
        else
            *problem = DETACHED;
    }
    blocks->lock.keeps_gil = false;
    blocks->lock.is_deaf = was_deaf;
    if (list == NULL)
        PyErr_Clear();
    Py_XDECREF(list);
    return block;
}

struct block *block_at(PyObject *list, Py_ssize_t i)
{
    PyObject *one = PyList_GetItem(list, i);
    if (one && Py_TYPE(one) != block_type) {
        PyErr_SetString(PyExc_TypeError, "not a list of Block");
        return NULL;
    }
    return (struct block *)one;
}

/* pairs([Block]): bytes, index and generation of each */
static PyObject *pairs_of(PyObject *Py_UNUSED(self), PyObject *list)
{
    Py_ssize_t n = length_of(list);
    PyObject *pairs = n < 0 ? NULL : PyBytes_FromStringAndSize(NULL, 16 * n);
    char *out = pairs ? PyBytes_AsString(pairs) : NULL;
    for (Py_ssize_t i = 0; pairs && i < n; i++) {
        struct block *block = block_at(list, i);
        if (block == NULL) {
            Py_CLEAR(pairs);
            break;
        }
        u64 pair[2] = {block->index, block->generation};
        memcpy(out + 16 * i, pair, sizeof pair);
    }
    return pairs;
}

/* seal([Block], channel): from here on a receiver may claim them; False if they are not ours */
static PyObject *seal(PyObject *Py_UNUSED(self), PyObject *arguments)
{
    PyObject *list;
    unsigned long long channel;
    if (!PyArg_ParseTuple(arguments, "OK", &list, &channel))
        return NULL;
    Py_ssize_t n = length_of(list);
    struct block *head = NULL;
    for (Py_ssize_t i = 0; i < n; i++) {
        struct block *block = block_at(list, i);
        if (block == NULL)
            return NULL;
        if (block->state != LEASED || block->epoch != epoch() ||
            !row_is(&block->blocks->table, block->index, LEASED, block->generation))
            Py_RETURN_FALSE;
        if (head == NULL)
            head = block;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        struct block *block = (struct block *)PyList_GetItem(list, i);
        struct row *row = table_row(&block->blocks->table, block->index);
        put(&row->channel, i ? follows(head->index, head->generation) : channel);
        block->state = IN_FLIGHT;
        atomic_store_explicit(
            &row->commit,
            commit_word(block->index, low_of(IN_FLIGHT, block->blocks->lock.slot), block->generation),
            memory_order_release);
        FAULT("seal.committed");
    }
    return n < 0 ? NULL : Py_NewRef(Py_True);
}

/* depart_all(): nobody will say when what is sealed has left: it is the messages' from now on */
static PyObject *depart_all(PyObject *self, PyObject *Py_UNUSED(none))
{
    for (struct block *block = of(self)->first; block; block = block->after)
        if (block->state == IN_FLIGHT)
            block->state = NONE;
    Py_RETURN_NONE;
}

static PyObject *for_each(PyObject *list, void (*act)(struct block *))
{
    Py_ssize_t n = length_of(list);
    for (Py_ssize_t i = 0; i < n; i++) {
        struct block *block = block_at(list, i);
        if (block == NULL)
            return NULL;
        Py_INCREF((PyObject *)block); /* the list may lose it while pages go back without the GIL */
        act(block);
        Py_DECREF((PyObject *)block);
    }
    return n < 0 ? NULL : Py_NewRef(Py_None);
}

static void depart_one(struct block *block)
{
    if (block->state == IN_FLIGHT) {
        block->state = NONE;
        block->is_sending = true;
    }
}

static void settle_one(struct block *block)
{
    block->is_sending = false;
    if (block->state == IN_FLIGHT)
        block->state = NONE;
}

static void release_one(struct block *block)
{
    if (block->is_sending)
        block->state = IN_FLIGHT;
    block_release(block);
}

static void prepare_one(struct block *block)
{
    if (block->state == LEASED && block->epoch == epoch()) {
        put(&table_row(&block->blocks->table, block->index)->channel, PREPARED);
        block->is_kept = true;
    }
}

/* depart([Block]): the envelope is about to be written: the blocks are the message's from now on */
static PyObject *depart(PyObject *Py_UNUSED(self), PyObject *list)
{
    return for_each(list, depart_one);
}

/* settle([Block]): it has left, or may have */
static PyObject *settle(PyObject *self, PyObject *list)
{
    list = list_taken(list);
    PyObject *done = list ? for_each(list, settle_one) : NULL;
    if (done && !has_ended(of(self)))
        leave_others(of(self), list);
    Py_XDECREF(list);
    return done;
}

/* release([Block]): it has not left; what is in flight comes back although it has departed */
static PyObject *release(PyObject *Py_UNUSED(self), PyObject *list)
{
    return for_each(list, release_one);
}

/* prepare([Block]): the pages of these leased blocks are kept for a message */
static PyObject *prepare(PyObject *Py_UNUSED(self), PyObject *list)
{
    return for_each(list, prepare_one);
}

/* --- receiving */

/* In flight with that generation, and as large as the envelope says; of a reference it says 0. */
static bool is_claimable(struct blocks *blocks, u64 index, u64 generation, u64 nbytes)
{
    if (index >= ROWS || !row_is(&blocks->table, (u32)index, IN_FLIGHT, generation))
        return false;
    if (is_name(get(&table_row(&blocks->table, (u32)index)->used)))
        return nbytes == 0 && references_named(&blocks->table, (u32)index) != ROWS;
    return get(&table_row(&blocks->table, (u32)index)->used) == nbytes &&
           nbytes <= blocks->table.known[index].place.nbytes;
}

static void forget_adopted(struct blocks *blocks, u32 index, u64 generation)
{
    struct known *known = &blocks->table.known[index];
    if (generation && known->adopted == generation) {
        known->adopted = 0;
        blocks->own.n_adopted--;
    }
}

/* IN FLIGHT to HELD, by whoever comes first. Without a slot the block is read where it is. */
static bool claim_one(struct block *block)
{
    struct blocks *blocks = block->blocks;
    struct row *row = table_row(&blocks->table, block->index);
    if (!has_joined(blocks)) {
        block->state = IN_FLIGHT;
        return true;
    }
    u64 seen = atomic_load_explicit(&row->commit, memory_order_acquire);
    /* Of this very lease: another reader may have claimed it a moment ago, and it was sent again. */
    if (seen != commit_word(block->index, low_of(IN_FLIGHT, owner_of(seen)), block->generation) ||
        !row_change(row, block->index, seen, low_of(HELD, blocks->lock.slot)))
        return false;
    FAULT("claim.committed");
    block->state = HELD;
    blocks->n_held++;
    if (!block->is_reference && !is_on_disk(&blocks->table, block->index))
        atomic_fetch_add_explicit(&blocks->table.shared->header.held, block->nbytes,
                                  memory_order_relaxed);
    forget_adopted(blocks, block->index, block->generation);
    return true;
}

/* Read a block into ordinary memory; of what a reference names, what the message has of it. */
static int copy_out(struct block *block, bool keep)
{
    struct blocks *blocks = block->blocks;
    u32 index = block->is_reference ? block->named : block->index;
    u64 offset = blocks->table.known[index].place.offset;
    u64 at = block->is_reference ? block->part_at : 0;
    u64 n = block->is_reference ? block->part_nbytes : block->nbytes;
    char *copy = malloc(n ? n : 1);
    if (copy == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (block->address)
        memcpy(copy, block->address + at, n);
    else if (mapping_read(mapping_of(blocks, index), offset + at, copy, n) != 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        free(copy);
        return -1;
    }
    if (block->state == IN_FLIGHT) { /* not ours: somebody else who has the bytes may have loaded it */
        atomic_thread_fence(memory_order_acquire);
        if (!row_is(&blocks->table, block->index, IN_FLIGHT, block->generation)) {
            free(copy);
            PyErr_SetString(PyExc_ValueError, "it was loaded elsewhere meanwhile");
            return -1;
        }
    }
    block_become_copy(block, copy, n);
    block->is_given_up = true;
    if (!keep)
        block_release(block);
    return 0;
}

static int receive_one(struct block *block, bool keep)
{
    if (block->address == NULL || block->state != HELD)
        return copy_out(block, keep);
    if (block->is_reference) /* what is mapped privately a child may inherit as it is */
        return 0;
    if (block->blocks->n_forking)
        return copy_out(block, keep);
    block_enter(block, block->nbytes);
    return 0;
}

/* Each reference has the part that the sizes say, in their order. */
static bool narrow_all(PyObject *list, const Py_buffer *sizes)
{
    Py_ssize_t i = 0;
    for (Py_ssize_t k = 0; k < PyList_Size(list); k++) {
        struct block *block = (struct block *)PyList_GetItem(list, k);
        u64 at, nbytes;
        if (block->is_reference &&
            (!plan_next_reference(sizes, &i, &at, &nbytes) || !reference_narrow(block, at, nbytes)))
            return false;
    }
    return true;
}

/* claim(pairs, [nbytes], keep, sizes): [Block] of the message whose blocks are given as index and
   generation, or the position of the first one that is not in flight like that. `keep`: further
   blocks of the same message are claimed before these are dropped. `sizes`, those of its buffers: of
   what a reference names no more is copied, if it has to be. */
static PyObject *claim(PyObject *self, PyObject *arguments)
{
    struct blocks *blocks = of(self);
    Py_buffer pairs, sizes = {0};
    PyObject *needs, *list = NULL;
    int keep;
    if (!PyArg_ParseTuple(arguments, "y*O!p|y*", &pairs, &PyList_Type, &needs, &keep, &sizes))
        return NULL;
    Py_ssize_t n = pairs.len / 16;
    list = PyList_New(n); /* before a look at the arena: this may run finalizers, which may end it */
    if (list == NULL)
        goto done;
    if (n != PyList_Size(needs) || has_ended(blocks) || epoch() == 0) {
        PyErr_SetString(PyExc_ValueError, epoch() ? "not as many sizes as blocks, or ended"
                                                  : "this process was forked without any handler");
        Py_CLEAR(list);
        goto done;
    }
    if (has_joined(blocks))
        tails_cut(blocks);
    for (Py_ssize_t i = 0; list && i < n; i++) {
        u64 pair[2], nbytes = PyLong_AsUnsignedLongLong(PyList_GetItem(needs, i));
        memcpy(pair, (const char *)pairs.buf + 16 * i, sizeof pair);
        if (PyErr_Occurred()) {
            Py_CLEAR(list);
            break;
        }
        struct block *block = NULL;
        if (is_claimable(blocks, pair[0], pair[1], nbytes)) {
            block = block_new(blocks, (u32)pair[0], pair[1], nbytes);
            if (block == NULL)
                Py_CLEAR(list);
            else if (nbytes == 0)
                reference_look(block);
        }
        if (block == NULL || !claim_one(block)) {
            Py_XDECREF((PyObject *)block);
            Py_XDECREF(list); /* what was claimed is released: nobody else can load the message */
            list = PyErr_Occurred() ? NULL : PyLong_FromSsize_t(i);
            goto done;
        }
        PyList_SetItem(list, i, (PyObject *)block);
    }
    if (list && sizes.len && !narrow_all(list, &sizes)) {
        PyErr_SetString(PyExc_ValueError, "a published block is smaller than what lies in it");
        Py_CLEAR(list);
    }
    /* All have an address before the GIL can go: a fork in another thread makes them private then. */
    for (Py_ssize_t i = 0; list && i < n; i++) {
        struct block *block = (struct block *)PyList_GetItem(list, i);
        if (block->is_reference)
            view_map(block);
        else
            block_map(block, block->nbytes);
    }
    for (Py_ssize_t i = 0; list && i < n; i++)
        if (receive_one((struct block *)PyList_GetItem(list, i), keep) != 0)
            Py_CLEAR(list);
    for (Py_ssize_t i = 0; list && i < n; i++)
        tail_note((struct block *)PyList_GetItem(list, i));
    if (list)
        leave_others(blocks, list);
done:
    PyBuffer_Release(&pairs);
    if (sizes.obj)
        PyBuffer_Release(&sizes);
    return list;
}

static bool parse_block(struct blocks *blocks, PyObject *arguments, u32 *index, u64 *generation)
{
    unsigned long long wide, counted;
    if (!PyArg_ParseTuple(arguments, "KK", &wide, &counted))
        return false;
    *index = wide < ROWS ? (u32)wide : ROWS;
    *generation = counted;
    return !has_ended(blocks);
}

/* The row of a block in one of two states, or NULL. */
static const struct row *row_in(PyObject *self, PyObject *arguments, enum state one, enum state other)
{
    struct blocks *blocks = of(self);
    u32 index;
    u64 generation;
    if (!parse_block(blocks, arguments, &index, &generation) ||
        (!row_is(&blocks->table, index, one, generation) && !row_is(&blocks->table, index, other, generation)))
        return NULL;
    return table_row(&blocks->table, index);
}

/* is_unread(index, generation): in flight, and nobody is known to have read it */
static PyObject *is_unread(PyObject *self, PyObject *arguments)
{
    const struct row *row = row_in(self, arguments, IN_FLIGHT, IN_FLIGHT);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(row != NULL && !(get(&row->channel) & ADOPTED));
}

/* is_in_use(index, generation): in flight, or held by who has loaded it, or is about to */
static PyObject *is_in_use(PyObject *self, PyObject *arguments)
{
    const struct row *row = row_in(self, arguments, IN_FLIGHT, HELD);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(row != NULL);
}

/* is_damaged(index): quarantine it if so */
static PyObject *is_damaged(PyObject *self, PyObject *argument)
{
    struct blocks *blocks = of(self);
    u64 index = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    if (has_ended(blocks) || index >= table_n_rows(&blocks->table) ||
        !row_is_damaged(&blocks->table, (u32)index))
        Py_RETURN_FALSE;
    if (state_of(get(&table_row(&blocks->table, (u32)index)->commit)) != QUARANTINED)
        row_quarantine(&blocks->table, (u32)index);
    Py_RETURN_TRUE;
}

/* adopt(index, generation): this process has read a message that has left its channel. The commit
   word stays as it is: somebody else who was sent the same bytes may be claiming the block. */
static PyObject *adopt(PyObject *self, PyObject *arguments)
{
    struct blocks *blocks = of(self);
    u32 index;
    u64 generation;
    bool is_block = parse_block(blocks, arguments, &index, &generation);
    if (PyErr_Occurred())
        return NULL;
    if (is_block && has_joined(blocks) && row_is(&blocks->table, index, IN_FLIGHT, generation)) {
        struct known *known = &blocks->table.known[index];
        blocks->own.n_adopted += known->adopted == 0;
        known->adopted = generation;
        put(&table_row(&blocks->table, index)->channel,
            adopted_by(blocks->own.incarnation, generation));
    }
    Py_RETURN_NONE;
}

/* discard(index, generation): this process has read it, and will never load it */
static PyObject *discard(PyObject *self, PyObject *arguments)
{
    struct blocks *blocks = of(self);
    u32 index;
    u64 generation;
    bool is_block = parse_block(blocks, arguments, &index, &generation);
    if (PyErr_Occurred())
        return NULL;
    if (!is_block || !has_joined(blocks) || !table_knows(&blocks->table, index) ||
        generation == 0 || blocks->table.known[index].adopted != generation)
        Py_RETURN_NONE;
    forget_adopted(blocks, index, generation);
    struct block *block = block_new(blocks, index, generation, 0);
    if (block == NULL)
        return NULL;
    if (row_is(&blocks->table, index, IN_FLIGHT, generation)) {
        block->state = IN_FLIGHT;
        block->is_given_up = true;
    }
    Py_DECREF((PyObject *)block);
    Py_RETURN_NONE;
}

/* send_on(index, generation, channel): [Block] to settle, of a message that is sent on unloaded */
static PyObject *send_on(PyObject *self, PyObject *arguments)
{
    struct blocks *blocks = of(self);
    unsigned long long wide, generation, channel;
    if (!PyArg_ParseTuple(arguments, "KKK", &wide, &generation, &channel))
        return NULL;
    PyObject *list = PyList_New(0);
    u32 index = wide < ROWS ? (u32)wide : ROWS;
    if (list == NULL || has_ended(blocks) || !has_joined(blocks) ||
        !row_is(&blocks->table, index, IN_FLIGHT, generation))
        return list;
    struct block *block = block_new(blocks, index, generation, 0);
    struct row *row = table_row(&blocks->table, index);
    if (block == NULL) {
        Py_DECREF(list);
        return NULL;
    }
    u64 seen = get(&row->commit);
    block->is_sending = true; /* it is in no channel yet, and must not be taken for lost */
    if (state_of(seen) == IN_FLIGHT &&
        row_change(row, index, seen, low_of(IN_FLIGHT, blocks->lock.slot)))
        put(&row->channel, channel);
    forget_adopted(blocks, index, generation);
    list_add(&list, (PyObject *)block);
    return list;
}

/* --- reading: a message may be between its channel and us */

struct reading {
    PyObject_HEAD
    struct blocks *blocks;
    u64 epoch;
};

static word *reading_of(struct blocks *blocks)
{
    return &blocks->table.shared->participants[blocks->lock.slot].reading;
}

/* reading(): an object; while it lives, this process says that it reads. None if it has not joined */
static PyObject *begin_reading(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    if (has_ended(blocks))
        return error_ended();
    if (!has_joined(blocks)) {
        put(&blocks->table.shared->header.strangers, 1); /* nothing is reclaimed, for its sake */
        Py_RETURN_NONE;
    }
    struct reading *reading = PyObject_New(struct reading, reading_type);
    if (reading == NULL)
        return NULL;
    Py_INCREF(self);
    reading->blocks = blocks;
    reading->epoch = epoch();
    atomic_fetch_add_explicit(reading_of(blocks), 1, memory_order_seq_cst);
    return (PyObject *)reading;
}

static void reading_dealloc(PyObject *self)
{
    struct reading *reading = (struct reading *)self;
    PyTypeObject *type = Py_TYPE(self);
    if (reading->epoch == epoch() && !has_ended(reading->blocks))
        atomic_fetch_sub_explicit(reading_of(reading->blocks), 1, memory_order_release);
    Py_DECREF((PyObject *)reading->blocks);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static PyType_Slot reading_slots[] = {{Py_tp_dealloc, reading_dealloc}, {0, NULL}};

static PyType_Spec reading_spec = {
    .name = "oobpickle._core.Reading",
    .basicsize = sizeof(struct reading),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = reading_slots,
};

/* read_for_ever(): from now on this process, and what it forks, reads without saying when */
static PyObject *read_for_ever(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    if (has_ended(blocks) || blocks->own.reads_for_ever)
        Py_RETURN_NONE;
    blocks->own.reads_for_ever = true;
    if (has_joined(blocks))
        atomic_fetch_add_explicit(reading_of(blocks), 1, memory_order_seq_cst);
    else
        put(&blocks->table.shared->header.strangers, 1);
    Py_RETURN_NONE;
}

/* --- participants */

/* join(pid namespace): 0, or a shortage */
static PyObject *join(PyObject *self, PyObject *argument)
{
    struct blocks *blocks = of(self);
    u64 namespace = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    blocks->own.pid_namespace = namespace;
    int problem = has_ended(blocks) ? DETACHED : participant_join(blocks);
    return problem < 0 ? NULL : PyLong_FromLong(problem);
}

/* say_that_it_reads(): it cannot join, and may have what nobody knows */
static PyObject *say_that_it_reads(PyObject *self, PyObject *Py_UNUSED(none))
{
    if (!has_ended(of(self)))
        put(&of(self)->table.shared->header.strangers, 1);
    Py_RETURN_NONE;
}

/* keep(source): nothing that comes from there is to be reclaimed; False if there are too many */
static PyObject *keep_source(PyObject *self, PyObject *argument)
{
    u64 source = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(has_ended(of(self)) || participant_keep(of(self), source));
}

/* forget(source): it is kept no more */
static PyObject *forget_source(PyObject *self, PyObject *argument)
{
    struct blocks *blocks = of(self);
    u64 source = PyLong_AsUnsignedLongLong(argument);
    bool others[KEPT];
    if (PyErr_Occurred())
        return NULL;
    for (u32 k = 0; k < KEPT; k++)
        others[k] = blocks->own.kept[k] != source;
    if (!has_ended(blocks))
        participant_retain(blocks, others);
    Py_RETURN_NONE;
}

/* keep_all(): more than can be listed */
static PyObject *keep_all(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    blocks->own.keeps_all = true;
    if (!has_ended(blocks) && has_joined(blocks))
        put(&blocks->table.shared->participants[blocks->lock.slot].keeps_all, 1);
    Py_RETURN_NONE;
}

/* retain([source]): keep none but these */
static PyObject *retain(PyObject *self, PyObject *list)
{
    bool needed[KEPT] = {0};
    Py_ssize_t n = length_of(list);
    for (Py_ssize_t i = 0; i < n; i++) {
        u64 source = PyLong_AsUnsignedLongLong(PyList_GetItem(list, i));
        for (u32 k = 0; k < KEPT; k++)
            needed[k] |= of(self)->own.kept[k] == source;
    }
    if (PyErr_Occurred())
        return NULL;
    if (!has_ended(of(self)))
        participant_retain(of(self), needed);
    Py_RETURN_NONE;
}

/* reap(): recover what dead participants had; how many there were, or minus a shortage */
static PyObject *reap(PyObject *self, PyObject *Py_UNUSED(none))
{
    int problem = step_begin(of(self));
    if (problem)
        return problem < 0 ? NULL : PyLong_FromLong(-problem);
    u32 n_dead = participant_reap(of(self));
    step_end(of(self));
    return PyLong_FromUnsignedLong(n_dead);
}

/* participants(): [(slot, pid, pid namespace)] of all that have joined and were not reaped */
static PyObject *participants(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    if (has_ended(blocks))
        return PyList_New(0);
    PyObject *list = PyList_New(0);
    if (list == NULL || has_ended(blocks)) /* by a finalizer that ran just now */
        return list;
    blocks->n_inside++; /* and no other one ends it */
    for (u32 slot = 0; list && slot < n_slots(blocks); slot++) {
        const struct participant *row = &blocks->table.shared->participants[slot];
        if (get(&row->state) != JOINED)
            continue;
        list_add(&list, Py_BuildValue("IKK", slot, get(&row->pid), get(&row->pid_namespace)));
    }
    blocks->n_inside--;
    return list;
}

static PyObject *lives(PyObject *self, PyObject *argument)
{
    unsigned long slot = PyLong_AsUnsignedLong(argument);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(!has_ended(of(self)) && is_alive(of(self), slot < SLOTS ? (u32)slot : SLOTS));
}

/* --- counting */

/* count(counter, amount, ...): only this process writes there */
static PyObject *count(PyObject *self, PyObject *const *arguments, Py_ssize_t n)
{
    struct blocks *blocks = of(self);
    for (Py_ssize_t i = 0; i + 1 < n; i += 2) {
        u64 counter = PyLong_AsUnsignedLongLong(arguments[i]);
        u64 amount = PyLong_AsUnsignedLongLong(arguments[i + 1]);
        if (PyErr_Occurred())
            return NULL;
        if (counter < COUNTERS)
            count_in(blocks, (u32)counter, amount);
    }
    Py_RETURN_NONE;
}

/* counters(): the sums over all participants, living and dead; without the lock about right */
static PyObject *counters(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    if (has_ended(blocks))
        return error_ended();
    u64 sums[COUNTERS];
    int problem = step_begin(blocks);
    if (problem < 0)
        return NULL;
    const struct header *header = &blocks->table.shared->header;
    const word *bank = header->totals[get(&header->bank) & 1];
    for (u32 k = 0; k < COUNTERS; k++)
        sums[k] = get(&bank[k]);
    for (u32 slot = 0; slot < n_slots(blocks); slot++) {
        const struct participant *row = &blocks->table.shared->participants[slot];
        if (get(&row->state) == JOINED && get(&row->incarnation) != get(&bank[COUNTERS]))
            for (u32 k = 0; k < COUNTERS; k++)
                sums[k] += get(&row->counters[k]);
    }
    if (problem == ROOM)
        step_end(blocks);
    return list_of(sums, COUNTERS);
}

/* census(): blocks, and bytes in them in memory: free, leased, in flight, held, published (on disk too),
   and references; and how many are damaged */
static PyObject *census(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    unsigned long long n[6] = {0}, nbytes[6] = {0}, n_damaged = 0;
    if (has_ended(blocks))
        return error_ended();
    u32 n_rows = table_n_rows(&blocks->table);
    for (u32 i = 0; i < n_rows; i++) {
        struct row *row = table_row(&blocks->table, i);
        if (row_is_damaged(&blocks->table, i)) {
            n_damaged++;
            continue;
        }
        enum state state = state_of(get(&row->commit));
        bool is_free = state == FREE || state == RELEASED || state == EMPTIED;
        u32 kind = is_free ? 0 : state == PUBLISHED ? 4 : (u32)state - (u32)FREE;
        if (kind > 4)
            continue;
        n[kind]++;
        n[5] += !is_free && is_name(get(&row->used));
        if (kind < 4 && is_on_disk(&blocks->table, i))
            continue;
        nbytes[kind] += is_free ? (state == EMPTIED ? 0 : row_resident(row, i)) : row_nbytes(row);
    }
    return Py_BuildValue("(KKKKKK)(KKKKKK)K", n[0], n[1], n[2], n[3], n[4], n[5], nbytes[0],
                         nbytes[1], nbytes[2], nbytes[3], nbytes[4], nbytes[5], n_damaged);
}

/* --- pages */

/* [Block] leased, of free ones that have pages: those on disk, where nothing is kept, and others whose
   pages add up to so many bytes, the largest first. */
static PyObject *take_idle_blocks(struct blocks *blocks, u64 wanted)
{
    u64 taken = 0;
    PyObject *list = PyList_New(0);
    if (list == NULL)
        return NULL;
    int problem = step_begin(blocks);
    if (problem) {
        if (problem < 0)
            Py_CLEAR(list);
        return list;
    }
    for (u32 size_class = LISTS; size_class-- > 0 && (size_class & ON_DISK || taken < wanted);) {
        u32 index = table_take_warm(&blocks->table, size_class, blocks->lock.slot);
        if (index == ROWS)
            continue;
        struct block *block = block_leased(blocks, index, 0);
        if (block == NULL)
            break;
        taken += size_class & ON_DISK ? 0 : block->reserved;
        int result = PyList_Append(list, (PyObject *)block);
        Py_DECREF((PyObject *)block);
        if (result < 0)
            break;
        size_class++; /* there may be more of it */
    }
    step_end(blocks);
    if (PyErr_Occurred())
        Py_CLEAR(list);
    return list;
}

/* take_idle(nbytes) */
static PyObject *take_idle(PyObject *self, PyObject *argument)
{
    u64 wanted = PyLong_AsUnsignedLongLong(argument);
    return PyErr_Occurred() ? NULL : take_idle_blocks(of(self), wanted);
}

/* In the middle of a message: give pages of free blocks back to the system, if that leaves room for one
   of `nbytes` bytes. */
bool blocks_make_room_now(struct blocks *blocks, u64 nbytes)
{
    if (has_ended(blocks))
        return false;
    const struct header *header = &blocks->table.shared->header;
    u64 resident = get(&header->resident), capacity = blocks->table.capacity;
    u64 room = resident < capacity ? capacity - resident : 0, need = table_pages(&blocks->table, 0, nbytes);
    int64_t idle = (int64_t)get(&header->idle);
    if (idle <= 0 || need > room + (u64)idle)
        return false;
    const bool was_deaf = blocks->lock.is_deaf;
    blocks->lock.keeps_gil = blocks->lock.is_deaf = true;
    PyObject *taken = take_idle_blocks(blocks, need > room ? need - room : 0);
    blocks->lock.keeps_gil = false;
    blocks->lock.is_deaf = was_deaf;
    if (taken == NULL)
        PyErr_Clear();
    Py_ssize_t n = taken ? PyList_Size(taken) : 0;
    for (Py_ssize_t i = 0; i < n; i++)
        block_empty_now((struct block *)PyList_GetItem(taken, i));
    Py_XDECREF(taken);
    return n > 0;
}

/* punch_uncounted(): give back pages that no block has counted, if nothing is in use and none is
   counted: after a process was killed in the middle of a punch a count says more than there is, a
   huge page reaches into other blocks, and mlockall(2) makes pages of what it can touch */
static PyObject *punch_uncounted(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    int problem = step_begin(blocks);
    if (problem)
        return problem < 0 ? NULL : Py_NewRef(Py_None);
    bool is_free = true;
    for (u32 i = 0; is_free && i < table_n_rows(&blocks->table); i++) {
        const struct row *row = table_row(&blocks->table, i);
        is_free = state_of(get(&row->commit)) == FREE && !row_resident(row, i);
    }
    if (is_free && file_is_ours(&blocks->mapping.data))
        mapping_punch(&blocks->mapping, 0, NULL, blocks->table.data_nbytes);
    if (is_free && blocks->table.disk_nbytes && file_is_ours(&blocks->disk.data))
        mapping_punch(&blocks->disk, 0, NULL, blocks->table.disk_nbytes);
    step_end(blocks);
    Py_RETURN_NONE;
}

/* unmap(): let go of windows that nobody uses */
static PyObject *unmap(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    mapping_unmap_unused(&blocks->mapping);
    mapping_unmap_unused(&blocks->disk);
    for (u32 i = 0; i < blocks->table.n_known; i++) {
        struct known *known = &blocks->table.known[i];
        const struct window *windows = mapping_of(blocks, i)->windows;
        if (known->place.nbytes && !windows[known->place.offset / WINDOW].address) {
            blocks->entered_nbytes -= known->entered;
            if (!known->n_users)
                blocks->unused_nbytes -= known->entered;
            known->entered = 0;
            known->is_private = false; /* it was, and went with the window */
        }
    }
    Py_RETURN_NONE;
}

/* --- which ends of channels were passed on: what is known of those is out of date */

/* pass_on([end]): False if the lock could not be had; then it counts as more than are listed */
static PyObject *pass_on(PyObject *self, PyObject *ends)
{
    struct blocks *blocks = of(self);
    Py_ssize_t n = length_of(ends);
    if (n < 0 || has_ended(blocks))
        return n < 0 ? NULL : Py_NewRef(Py_False);
    struct header *header = &blocks->table.shared->header;
    int problem = step_begin(blocks);
    if (problem) {
        atomic_fetch_add_explicit(&header->n_passed, 2 * PASSED, memory_order_release);
        return problem < 0 ? NULL : Py_NewRef(Py_False);
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        u64 end = PyLong_AsUnsignedLongLong(PyList_GetItem(ends, i)), at = get(&header->n_passed);
        atomic_thread_fence(memory_order_release);
        put(&header->passed[at % PASSED], end);
        /* Added: somebody without the lock may count at the same time. */
        atomic_fetch_add_explicit(&header->n_passed, 1, memory_order_release);
    }
    step_end(blocks);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_True);
}

/* passed_since(n): those that were passed on since there were n; None: more than are listed */
static PyObject *passed_since(PyObject *self, PyObject *argument)
{
    struct blocks *blocks = of(self);
    u64 seen = PyLong_AsUnsignedLongLong(argument), ends[PASSED];
    if (PyErr_Occurred())
        return NULL;
    if (has_ended(blocks))
        return PyList_New(0);
    struct header *header = &blocks->table.shared->header;
    u64 n = atomic_load_explicit(&header->n_passed, memory_order_acquire);
    for (u64 i = seen; n - seen < PASSED && i < n; i++)
        ends[i - seen] = get(&header->passed[i % PASSED]);
    /* Read first, then looked whether they were overwritten meanwhile. */
    atomic_thread_fence(memory_order_acquire);
    if (n - seen >= PASSED || get(&header->n_passed) - seen >= PASSED) /* the oldest is the next to go */
        Py_RETURN_NONE;
    return list_of(ends, n - seen);
}

/* --- beginning and end */

/* abandon(): as if this process had died: its slot is free, and nothing that it has is released */
static PyObject *abandon(PyObject *self, PyObject *Py_UNUSED(none))
{
    participant_leave(of(self));
    for (struct block *block = of(self)->first; block; block = block->after)
        block->epoch = 0;
    Py_RETURN_NONE;
}

static void let_go(struct blocks *blocks)
{
    fork_unwatch(blocks);
    if (blocks->own.life.file.fd >= 0 || blocks->own.birth.life.file.fd >= 0)
        participant_leave(blocks);
    mapping_end(&blocks->mapping);
    mapping_end(&blocks->disk);
    free(blocks->table.known);
    blocks->table.known = NULL;
    blocks->table.n_known = blocks->table.n_room = 0;
    for (u32 i = 0; i < ROWS / CHUNK; i++) {
        if (blocks->table.chunks[i])
            munmap(blocks->table.chunks[i], CHUNK * sizeof(struct row));
        blocks->table.chunks[i] = NULL;
    }
    if (blocks->table.shared)
        munmap(blocks->table.shared, sizeof *blocks->table.shared);
    blocks->table.shared = NULL;
}

/* Whether all objects are what this process holds, and how many bytes that is. */
static bool are_held(const struct blocks *blocks, size_t *n, u64 *nbytes)
{
    for (const struct block *block = blocks->first; block; block = block->after) {
        bool is_held = block->state == HELD && (block->is_private || block->epoch == epoch());
        if (block->is_reference || block->address == NULL || !(is_held || block->is_copy) ||
            is_on_disk(&blocks->table, block->index)) /* to copy it may take more memory than there is */
            return false;
        *n += 1;
        *nbytes += block->nbytes;
    }
    return true;
}

/* part(most): if what this process has of a closed arena is nothing, or up to so many bytes of arrays and
   nothing else, make these its own, so that the arena can end; else False */
static PyObject *part(PyObject *self, PyObject *argument)
{
    struct blocks *blocks = of(self);
    u64 most = PyLong_AsUnsignedLongLong(argument), nbytes = 0;
    size_t n = 0;
    if (PyErr_Occurred())
        return NULL;
    if (has_ended(blocks) || !get(&blocks->table.shared->header.closed) || blocks->n_inside ||
        !are_held(blocks, &n, &nbytes) || nbytes > most)
        Py_RETURN_FALSE;
    struct range *kept = calloc(n + 1, sizeof *kept);
    if (kept == NULL)
        return PyErr_NoMemory();
    bool are_private = true;
    for (struct block *block = blocks->first; block; block = block->after)
        are_private = block_privatize(block) && are_private;
    if (are_private) {
        size_t i = 0;
        for (struct block *block = blocks->first, *after; block; block = after) {
            after = block->after;
            block_detach(block);
            if (!block->is_copy)
                kept[i++] = (struct range){block->address, block->mapped};
        }
        blocks->first = NULL;
        mapping_unmap_but(&blocks->mapping, kept, i);
    }
    free(kept);
    return PyBool_FromLong(are_private);
}

/* end(): unmap everything; False while an object or a thread needs it */
static PyObject *end(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = of(self);
    if (blocks->first || blocks->n_inside)
        Py_RETURN_FALSE;
    let_go(blocks);
    Py_RETURN_TRUE;
}

static void blocks_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    let_go(of(self));
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

/* Blocks(data, table, locks, disk): descriptors of an arena's files, whose header was checked; the last
   one may be missing */
static PyObject *blocks_new(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    int data, table, locks, disk = -1;
    if (!PyArg_ParseTuple(arguments, "iii|i", &data, &table, &locks, &disk))
        return NULL;
    struct blocks *blocks = (struct blocks *)PyType_GenericAlloc(type, 0); /* zeroed */
    if (blocks == NULL)
        return NULL;
    blocks->keep_nbytes = KEEP_LEAST;
    blocks->entered_limit = ENTERED_LIMIT;
    blocks->own.handle.fd = -1;
    blocks->own.life = blocks->own.birth.life = NO_LIFE;
    blocks->disk.data.fd = -1;
    if (file_note(&blocks->own.handle, locks) != 0 ||
        mapping_start(&blocks->mapping, data, false) != 0 ||
        (disk >= 0 && mapping_start(&blocks->disk, disk, true) != 0) ||
        file_note(&blocks->table.file, table) != 0)
        goto error;
    blocks->table.shared = (struct table *)(void *)map_quietly(
        table, 0, sizeof(struct table), MAP_SHARED, PROT_READ | PROT_WRITE, true);
    if (blocks->table.shared == NULL)
        goto error;
    const struct header *header = &blocks->table.shared->header;
    blocks->table.data_nbytes = blocks->mapping.data_nbytes;
    blocks->table.disk_nbytes = blocks->disk.data_nbytes;
    blocks->table.capacity = header->capacity;
    blocks->table.huge = header->huge != 0;
    blocks->table.by_fault = header->huge == 1;
    blocks->lock.shared = blocks->table.shared;
    fork_watch(blocks);
    return (PyObject *)blocks;
error:
    PyErr_SetFromErrno(PyExc_OSError);
    Py_DECREF((PyObject *)blocks);
    return NULL;
}

/* --- what Python sees */

void count_in(struct blocks *blocks, u32 counter, u64 amount)
{
    if (amount == 0 || has_ended(blocks) || !has_joined(blocks))
        return;
    word *counted = &blocks->table.shared->participants[blocks->lock.slot].counters[counter];
    put(counted, get(counted) + amount);
}

/* A word of the header: `offset` is that of its attribute. */
static u64 word_of(PyObject *self, void *offset)
{
    char *shared = (char *)of(self)->table.shared;
    return shared ? get((word *)(void *)(shared + (uintptr_t)offset)) : 0;
}

static PyObject *get_word(PyObject *self, void *offset)
{
    return PyLong_FromUnsignedLongLong(word_of(self, offset));
}

/* A sum that others change: about right, and after a rebuild perhaps below 0 for a while. */
static PyObject *get_sum(PyObject *self, void *offset)
{
    int64_t sum = (int64_t)word_of(self, offset);
    return PyLong_FromLongLong(sum > 0 ? sum : 0);
}

static PyObject *get_closed(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(has_ended(of(self)) || get(&of(self)->table.shared->header.closed));
}

static PyObject *get_joined(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(!has_ended(of(self)) && has_joined(of(self)));
}

static PyObject *get_ended(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(has_ended(of(self)));
}

static PyObject *get_has_disk(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(of(self)->table.disk_nbytes != 0);
}

static PyObject *get_entered_limit(PyObject *self, void *Py_UNUSED(closure))
{
    u64 nbytes = of(self)->entered_limit;
    return nbytes == UINT64_MAX ? Py_NewRef(Py_None) : PyLong_FromUnsignedLongLong(nbytes);
}

/* How many bytes of blocks that nobody uses may stay in our page tables; None: any number. */
static int set_entered_limit(PyObject *self, PyObject *value, void *Py_UNUSED(closure))
{
    u64 nbytes = value == Py_None ? UINT64_MAX : value ? PyLong_AsUnsignedLongLong(value) : 0;
    if (PyErr_Occurred())
        return -1;
    of(self)->entered_limit = nbytes;
    return 0;
}

/* close(): nothing new is sent; what is released from now on goes back to the system */
static PyObject *close_arena(PyObject *self, PyObject *Py_UNUSED(none))
{
    if (!has_ended(of(self)))
        put(&of(self)->table.shared->header.closed, 1);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"lease", (PyCFunction)(void (*)(void))lease, METH_FASTCALL, NULL},
    {"pairs", pairs_of, METH_O, NULL},
    {"depart_all", depart_all, METH_NOARGS, NULL},
    {"seal", seal, METH_VARARGS, NULL},
    {"depart", depart, METH_O, NULL},
    {"settle", settle, METH_O, NULL},
    {"release", release, METH_O, NULL},
    {"prepare", prepare, METH_O, NULL},
    {"publish", publish, METH_O, NULL},
    {"repeated", repeated, METH_NOARGS, NULL},
    {"claim", claim, METH_VARARGS, NULL},
    {"is_unread", is_unread, METH_VARARGS, NULL},
    {"is_in_use", is_in_use, METH_VARARGS, NULL},
    {"is_damaged", is_damaged, METH_O, NULL},
    {"adopt", adopt, METH_VARARGS, NULL},
    {"discard", discard, METH_VARARGS, NULL},
    {"send_on", send_on, METH_VARARGS, NULL},
    {"reading", begin_reading, METH_NOARGS, NULL},
    {"read_for_ever", read_for_ever, METH_NOARGS, NULL},
    {"join", join, METH_O, NULL},
    {"say_that_it_reads", say_that_it_reads, METH_NOARGS, NULL},
    {"keep", keep_source, METH_O, NULL},
    {"forget", forget_source, METH_O, NULL},
    {"keep_all", keep_all, METH_NOARGS, NULL},
    {"retain", retain, METH_O, NULL},
    {"reap", reap, METH_NOARGS, NULL},
    {"participants", participants, METH_NOARGS, NULL},
    {"is_alive", lives, METH_O, NULL},
    {"unowned", lost_unowned, METH_NOARGS, NULL},
    {"sources", lost_sources, METH_NOARGS, NULL},
    {"has_abandoned", lost_has_abandoned, METH_NOARGS, NULL},
    {"free_lost", lost_free, METH_O, NULL},
    {"count", (PyCFunction)(void (*)(void))count, METH_FASTCALL, NULL},
    {"counters", counters, METH_NOARGS, NULL},
    {"census", census, METH_NOARGS, NULL},
    {"take_idle", take_idle, METH_O, NULL},
    {"punch_uncounted", punch_uncounted, METH_NOARGS, NULL},
    {"unmap", unmap, METH_NOARGS, NULL},
    {"pass_on", pass_on, METH_O, NULL},
    {"passed_since", passed_since, METH_O, NULL},
    {"abandon", abandon, METH_NOARGS, NULL},
    {"close", close_arena, METH_NOARGS, NULL},
    {"part", part, METH_O, NULL},
    {"end", end, METH_NOARGS, NULL},
    {0},
};

static PyMemberDef members[] = {
    {"slot", T_UINT, offsetof(struct blocks, lock.slot), READONLY, NULL},
    {"n_held", T_UINT, offsetof(struct blocks, n_held), READONLY, NULL},
    {"keep_nbytes", T_ULONGLONG, offsetof(struct blocks, keep_nbytes), 0, NULL},
    {"spills", T_BOOL, offsetof(struct blocks, spills), 0, NULL},
    {"disk_is_memory", T_BOOL, offsetof(struct blocks, disk.is_memory), READONLY, NULL},
    {0},
};

static PyGetSetDef attributes[] = {
    {"closed", get_closed, NULL, NULL, NULL},
    {"ended", get_ended, NULL, NULL, NULL},
    {"joined", get_joined, NULL, NULL, NULL},
    {"held", get_sum, NULL, NULL, (void *)offsetof(struct header, held)},
    {"resident", get_word, NULL, NULL, (void *)offsetof(struct header, resident)},
    {"idle", get_sum, NULL, NULL, (void *)offsetof(struct header, idle)}, /* pages of free blocks, bytes */
    {"on_disk", get_word, NULL, NULL, (void *)offsetof(struct header, on_disk)},
    {"has_disk", get_has_disk, NULL, NULL, NULL},
    {"n_passed", get_word, NULL, NULL, (void *)offsetof(struct header, n_passed)},
    {"entered_limit", get_entered_limit, set_entered_limit, NULL, NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_new, blocks_new},
    {Py_tp_dealloc, blocks_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, attributes},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "oobpickle._core.Blocks",
    .basicsize = sizeof(struct blocks),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int blocks_type_make(PyObject *module)
{
    return type_make(module, &blocks_type, &spec) || type_make(module, &reading_type, &reading_spec) ||
           block_type_make(module);
}
