/* A block that this process owns: an object whose deallocation is the release.

What. `Block` is memory of one block: a sender writes into it (LEASED), hands it to a message
(IN_FLIGHT); a receiver's arrays are built on it (HELD).

How it works. Whoever exports the memory keeps the object; when nobody refers to it any more, in a
garbage collection, a signal handler, at the interpreter's exit, in any thread, the block is
released: one compare-and-swap of its commit word, and a push on a stack. That takes no lock. If free
blocks have more than they may keep, or the arena is closed, the pages go back to the system first.
Only the release of a reference then asks for the lock, for milliseconds at most, since what it named
may be free. ::

    state       LEASED -seal-> IN_FLIGHT -depart-> NONE (the message's)      HELD
    dropped     released       released            nothing                   released

Lifetime. An object remembers the epoch it was made in: in a forked child it releases nothing. Its
range of the window, which a fork has made private, is mapped from the file again.

When it cannot. A range that could not be mapped shared again stays private here: what comes in
that block then is mapped elsewhere (`is_apart`). Without address space it is copied. */

#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

PyTypeObject *block_type;

#define PAGE_FAULTS_SUFFICE ((u64)16 << 10)
#define LONG ((u64)1 << 20)

struct block *block_new(struct blocks *blocks, u32 index, u64 generation, u64 nbytes)
{
    struct block *block = (struct block *)PyType_GenericAlloc(block_type, 0); /* zeroed */
    if (block == NULL)
        return NULL;
    block->index = index;
    block->generation = generation;
    block->nbytes = nbytes;
    block->epoch = epoch();
    block->blocks = (struct blocks *)Py_NewRef((PyObject *)blocks);
    block->after = blocks->first;
    if (blocks->first)
        blocks->first->before = block;
    blocks->first = block;
    struct known *known = &blocks->table.known[index];
    if (known->n_users++ == 0)
        blocks->unused_nbytes -= known->entered;
    return block;
}

/* An object for what this process has just leased. NULL: it is lost until the process ends. */
struct block *block_leased(struct blocks *blocks, u32 index, u64 nbytes)
{
    const struct row *row = table_row(&blocks->table, index);
    struct block *block = block_new(blocks, index, get(&row->generation), nbytes);
    if (block) {
        block->state = LEASED;
        block->reserved = table_resident(&blocks->table, index);
    }
    return block;
}

struct mapping *mapping_of(struct blocks *blocks, u32 index)
{
    return is_on_disk(&blocks->table, index) ? &blocks->disk : &blocks->mapping;
}

static struct known *known_of(const struct block *block)
{
    return &block->blocks->table.known[block->index];
}

/* --- where it is */

/* Give the block an address, its first `nbytes` bytes accessible. -1: it cannot be mapped. */
int block_map(struct block *block, u64 nbytes)
{
    struct blocks *blocks = block->blocks;
    struct known *known = known_of(block);
    struct mapping *mapping = mapping_of(blocks, block->index);
    const struct place *place = &known->place;
    if (nbytes == 0) /* it has an address all the same */
        nbytes = 1;
    if (known->is_private && known->n_users == 1 && place->offset / WINDOW < mapping->n_windows) {
        char *address = mapping_at(mapping, place->offset, place->stride, nbytes);
        if (address && mapping_share(mapping, place->offset, address, place->nbytes) == 0)
            known->is_private = false;
    }
    if (!known->is_private)
        block->address = mapping_at(mapping, place->offset, place->stride, nbytes);
    if (block->address == NULL) { /* or there is no address space for a whole window */
        block->mapped = round_up(nbytes, PAGE);
        block->address = mapping_again(mapping, place->offset, block->mapped);
        block->is_apart = block->address != NULL;
        return block->address ? 0 : -1;
    }
    mapping_use(mapping, place->offset);
    block->is_using = true;
    return 0;
}

/* Let the GIL go, unless it is to be kept, while nobody ends the arena; `go_on` takes it again. */
static PyThreadState *let_others_run(struct blocks *blocks, bool keeps_gil)
{
    if (keeps_gil)
        return NULL;
    blocks->n_inside++;
    return PyEval_SaveThread();
}

/* With the errno of what was done meanwhile. */
static void go_on(struct blocks *blocks, PyThreadState *ours)
{
    int error = errno;
    if (ours == NULL)
        return;
    PyEval_RestoreThread(ours);
    blocks->n_inside--;
    errno = error;
}

/* Have the first bytes, which have pages, in our page tables; not what is on disk: all of it might have
   to be read. */
void block_enter(struct block *block, u64 nbytes)
{
    struct blocks *blocks = block->blocks;
    if (block->is_apart || block->address == NULL || is_on_disk(&blocks->table, block->index))
        return;
    struct known *known = known_of(block);
    u32 punches = get_half(&table_row(&blocks->table, block->index)->punches);
    u64 before = known->entered, entered = known->punches == punches ? before : 0;
    known->punches = punches;
    if (nbytes > entered) {
        known->entered = nbytes;
        blocks->entered_nbytes += nbytes - before;
        char *from = block->address + entered;
        nbytes -= entered;
        if (nbytes > PAGE_FAULTS_SUFFICE) {
            PyThreadState *ours = let_others_run(blocks, nbytes <= LONG || blocks->lock.keeps_gil);
            populate(from, nbytes, false);
            go_on(blocks, ours);
        }
    }
}

/* Take what nobody uses out of our page tables, if it is much: there are pools that replace a
   process which has grown, and that counts. `message` is all of its blocks: the next needs as much. */
void leave_others(struct blocks *blocks, PyObject *message)
{
    u64 nbytes = 0, left = 0;
    for (Py_ssize_t i = 0; i < PyList_Size(message); i++)
        nbytes += ((struct block *)PyList_GetItem(message, i))->nbytes;
    const u64 limit = blocks->entered_limit, most = 2 * nbytes > limit ? 2 * nbytes : limit;
    /* Not for a little: each time costs a look at all of them. */
    if (blocks->entered_nbytes <= most || blocks->unused_nbytes < most / 8)
        return;
    for (u32 i = 0; i < blocks->table.n_known; i++) {
        struct known *known = &blocks->table.known[i];
        if (known->entered == 0)
            continue;
        const struct window *window = &blocks->mapping.windows[known->place.offset / WINDOW];
        if (known->n_users) {
            left += known->entered;
            continue;
        }
        if (window->address && !known->is_private)
            advise(window->address + known->place.offset % WINDOW, round_up(known->entered, PAGE),
                   MADV_DONTNEED);
        known->entered = 0;
    }
    blocks->entered_nbytes = left;
    blocks->unused_nbytes = 0;
}

/* --- tails: pages of a larger message that was in the block before */

/* What pages a block keeps for its message; an eighth more is not worth the trouble. */
static u64 kept_pages(const struct block *block)
{
    u64 nbytes = block->nbytes ? block->nbytes : 1;
    return table_pages(&block->blocks->table, known_of(block)->place.size_class, nbytes + nbytes / 8);
}

/* Note a block that was claimed, if it has one. Most are dropped soon, and the next message needs the
   pages: only those that outlive the next claim give them back. */
void tail_note(struct block *block)
{
    struct blocks *blocks = block->blocks;
    u64 resident = table_resident(&blocks->table, block->index);
    if (block->state != HELD || !block->is_using || blocks->n_tails == TAILS ||
        resident <= kept_pages(block))
        return;
    blocks->tails[blocks->n_tails++] = block;
    block->has_tail = true;
}

static void tail_forget(struct block *block)
{
    struct blocks *blocks = block->blocks;
    for (u32 i = 0; i < blocks->n_tails; i++)
        if (blocks->tails[i] == block) {
            blocks->tails[i] = blocks->tails[--blocks->n_tails];
            break;
        }
    block->has_tail = false;
}

/* Count the pages no more: how many bytes there are to give back, or -1 without the lock, which no load
   waits for. If we die before they are back they are there and not counted, until nothing is in use. */
static int64_t tail_uncount(struct block *block, u64 kept)
{
    struct blocks *blocks = block->blocks;
    u64 resident = table_resident(&blocks->table, block->index), left = 0;
    const bool was_deaf = blocks->lock.is_deaf;
    blocks->lock.keeps_gil = blocks->lock.is_deaf = true;
    enum taken taken = lock_take(&blocks->lock, 0, is_alive, blocks);
    blocks->lock.keeps_gil = false;
    blocks->lock.is_deaf = was_deaf;
    if (taken != TAKEN && taken != TAKEN_DIRTY)
        return -1;
    if (taken == TAKEN_DIRTY)
        table_rebuild(&blocks->table, NULL, NULL);
    if (resident > kept && row_is(&blocks->table, block->index, HELD, block->generation)) {
        left = resident - kept;
        table_count_pages(&blocks->table, block->index, resident, kept);
    }
    lock_give(&blocks->lock);
    return (int64_t)left;
}

/* As long as the block is ours, nobody else can use what is behind its message. */
static void tail_punch(struct block *block, u64 kept, u64 nbytes)
{
    struct blocks *blocks = block->blocks;
    struct known *known = known_of(block);
    if (known->entered > kept) {
        blocks->entered_nbytes -= known->entered - kept;
        known->entered = kept;
    }
    u64 offset = known->place.offset + kept;
    const struct mapping *mapping = mapping_of(blocks, block->index);
    char *address = block->address + kept;
    Py_INCREF((PyObject *)block); /* it may be dropped while the GIL is gone */
    PyThreadState *ours = let_others_run(blocks, false);
    mapping_punch(mapping, offset, address, nbytes);
    go_on(blocks, ours);
    Py_DECREF((PyObject *)block);
}

void tails_cut(struct blocks *blocks)
{
    while (blocks->n_tails) {
        struct block *block = blocks->tails[blocks->n_tails - 1];
        bool is_ours = block->state == HELD && block->epoch == epoch() && !block->is_private;
        u64 kept = kept_pages(block);
        int64_t left = is_ours ? tail_uncount(block, kept) : 0;
        if (left < 0)
            return;
        tail_forget(block);
        if (left > 0)
            tail_punch(block, kept, (u64)left);
    }
}

/* --- giving it back */

/* A child that was forked in the middle of our message may be reading it: see `are_unchanged`. */
static void tell_emptied(struct row *row)
{
    atomic_store_explicit(&row->used, 0, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
}

/* The pages go back to the system; the block is ours still, so nobody else can be using it. Where the
   mount cannot punch, the pages stay, and the account is wrong by them. */
static void punch(struct block *block, bool keeps_gil)
{
    struct blocks *blocks = block->blocks;
    const struct place place = known_of(block)->place; /* others may move it when the GIL is gone */
    const struct mapping *mapping = mapping_of(blocks, block->index);
    char *address = block->is_using ? block->address : NULL;
    struct row *row = table_row(&blocks->table, block->index);
    u64 nbytes = table_resident(&blocks->table, block->index);
    tell_emptied(row);
    PyThreadState *ours = let_others_run(blocks, keeps_gil);
    mapping_punch(mapping, place.offset, address, nbytes);
    go_on(blocks, ours);
    block->is_emptied = true;
}

static bool is_too_much(const struct block *block)
{
    const struct header *header = &block->blocks->table.shared->header;
    int64_t idle = (int64_t)get(&header->idle);
    u64 nbytes = table_resident(&block->blocks->table, block->index);
    return get(&header->closed) || is_on_disk(&block->blocks->table, block->index) ||
           (idle > 0 ? (u64)idle : 0) + nbytes > block->blocks->keep_nbytes;
}

/* Release the block, if it is ours to release. */
void block_release(struct block *block)
{
    struct blocks *blocks = block->blocks;
    enum state state = block->state;
    block->state = NONE;
    block->is_sending = false;
    if (state == NONE || block->epoch == 0 || block->epoch != epoch() || !blocks->table.shared)
        return;
    struct header *header = &blocks->table.shared->header;
    struct row *row = table_row(&blocks->table, block->index);
    u64 seen = atomic_load_explicit(&row->commit, memory_order_acquire);
    if (state == HELD)
        blocks->n_held--;
    if (state_of(seen) != state || (owner_of(seen) != blocks->lock.slot && !block->is_given_up) ||
        get(&row->generation) != block->generation)
        return; /* damaged, or taken from us */
    u64 used = row_nbytes(row);
    bool is_reference = is_name(get(&row->used)), on_disk = is_on_disk(&blocks->table, block->index);
    if (!block->is_emptied && !is_reference &&
        ((state == LEASED && block_fresh(block)) || (!block->is_kept && is_too_much(block))))
        /* An array has died, and the disk may be writing what was in it: others can go on meanwhile. */
        punch(block, state != HELD || !on_disk);
    u64 resident = table_resident(&blocks->table, block->index);
    FAULT("release.begun");
    /* Ours, although the sender of a message that we give up was another: as long as we live nobody
       else frees it before it is on the stack. */
    u32 slot = has_joined(blocks) ? blocks->lock.slot : owner_of(seen);
    u64 low = low_of(block->is_emptied ? EMPTIED : RELEASED, slot);
    if (!row_change(row, block->index, seen, low))
        return;
    FAULT("release.committed");
    if (state == HELD && !on_disk)
        atomic_fetch_sub_explicit(&header->held, used, memory_order_relaxed);
    if (!block->is_emptied && !block->is_kept)
        table_count_idle(&blocks->table, block->index, (int64_t)resident);
    table_push(&blocks->table, block->index);
    FAULT("release.pushed");
    if (is_reference)
        /* A handle, or what is on disk since a fork: seldom, and perhaps the last of all. */
        release_unheld(blocks, block->is_frozen || block->is_shared ||
                                   is_on_disk(&blocks->table, block->named));
}

/* The object is ordinary memory from now on, whatever it was: a copy of its content, from malloc. */
void block_become_copy(struct block *block, char *copy, u64 nbytes)
{
    view_forget(block); /* of a reference nothing is mapped after that */
    if (block->is_using)
        mapping_leave(mapping_of(block->blocks, block->index), known_of(block)->place.offset);
    if (block->is_apart)
        munmap(block->address, block->mapped);
    block->is_using = block->is_apart = false;
    block->address = copy;
    block->nbytes = nbytes;
    block->is_copy = true;
}

/* What is private memory by now belongs to nothing but this object: its arena is about to end. */
void block_detach(struct block *block)
{
    struct blocks *blocks = block->blocks;
    if (block->has_tail)
        tail_forget(block);
    block_release(block);
    if (block->is_using) {
        mapping_leave(mapping_of(blocks, block->index), known_of(block)->place.offset);
        block->mapped = round_up(block->nbytes ? block->nbytes : 1, PAGE);
        block->is_using = false;
        block->is_apart = true;
    }
    block->before = block->after = NULL;
}

static void leave_window(struct block *block)
{
    struct blocks *blocks = block->blocks;
    struct known *known = known_of(block);
    const struct place *place = &known->place;
    struct mapping *mapping = mapping_of(blocks, block->index);
    /* Only the object that was made private may map the range again. The sender's object has the same
       range, and until it ends the private pages are its content. */
    if (block->is_private && known->is_private &&
        mapping_share(mapping, place->offset, block->address, place->nbytes) == 0)
        known->is_private = false;
    if (block->is_emptied && known->n_users == 1)
        mapping_bar(mapping, place->offset, place->stride);
    mapping_leave(mapping, place->offset);
}

static void dealloc(PyObject *self)
{
    struct block *block = (struct block *)self;
    struct blocks *blocks = block->blocks;
    PyTypeObject *type = Py_TYPE(self);
    if (block->has_tail)
        tail_forget(block);
    view_forget(block);
    block_release(block);
    if (block->is_copy)
        free(block->address);
    else if (block->is_apart)
        munmap(block->address, block->mapped);
    else if (block->is_using)
        leave_window(block);
    if (block->before)
        block->before->after = block->after;
    else if (blocks->first == block) /* else it was detached */
        blocks->first = block->after;
    if (block->after)
        block->after->before = block->before;
    if (blocks->table.known && --known_of(block)->n_users == 0)
        blocks->unused_nbytes += known_of(block)->entered;
    Py_DECREF((PyObject *)blocks);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static int getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    struct block *block = (struct block *)self;
    if (block->address == NULL && block->nbytes) { /* on disk, or a reference */
        PyErr_SetString(PyExc_BufferError, "it is not mapped before it is received: write() to it");
        view->obj = NULL;
        return -1;
    }
    return PyBuffer_FillInfo(view, self, block->address, (Py_ssize_t)block->nbytes, block->is_frozen,
                             flags);
}

/* Bytes of pages that were counted for it and not made. */
u64 block_fresh(const struct block *block)
{
    if (block->blocks->table.shared == NULL)
        return 0;
    u64 nbytes = table_resident(&block->blocks->table, block->index);
    return nbytes > block->reserved ? nbytes - block->reserved : 0;
}

/* --- the type */

static PyObject *get_is_on_disk(PyObject *self, void *Py_UNUSED(closure))
{
    const struct block *block = (const struct block *)self;
    const struct table_view *table = &block->blocks->table; /* that of an arena that has ended knows nothing */
    return PyBool_FromLong(table->shared && is_on_disk(table, block->index));
}

static PyObject *get_fresh(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(block_fresh((struct block *)self));
}

static PyObject *get_resident(PyObject *self, void *Py_UNUSED(closure))
{
    const struct block *block = (struct block *)self;
    struct table_view *table = &block->blocks->table;
    return PyLong_FromUnsignedLongLong(
        table->shared ? table_resident(table, block->index) : 0);
}

/* Make up to so many more bytes of the pages that were counted for a leased block; -1 with errno. */
static int reserve_up_to(struct block *block, u64 most)
{
    struct blocks *blocks = block->blocks;
    if (block->state != LEASED || block->epoch != epoch())
        return 0;
    u64 nbytes = block_fresh(block), counted = block->reserved + nbytes;
    if (nbytes == 0)
        return 0;
    if (nbytes > most)
        nbytes = most;
    u64 at = known_of(block)->place.offset + block->reserved;
    const struct mapping *mapping = mapping_of(blocks, block->index);
    char *address = block->is_using ? block->address + block->reserved : NULL;
    bool by_fault = blocks->table.by_fault && counted >= HUGE && address;
    PyThreadState *ours = let_others_run(blocks, blocks->lock.keeps_gil);
    int result = mapping_reserve(mapping, at, address, nbytes, by_fault);
    go_on(blocks, ours);
    if (result != 0)
        return -1;
    FAULT("block.reserved");
    block->reserved += nbytes;
    if (address) {
        struct known *known = known_of(block);
        blocks->entered_nbytes += block->reserved - known->entered;
        known->entered = block->reserved;
        known->punches = get_half(&table_row(&blocks->table, block->index)->punches);
    }
    return 0;
}

/* All of them, in the middle of a message that has taken `total` bytes of fresh pages with these: in
   steps, each after a look at what is left of the machine's memory; the page cache is not in the way. */
bool block_reserve_now(struct block *block, u64 total)
{
    struct lock *lock = &block->blocks->lock;
    const bool is_memory = mapping_of(block->blocks, block->index)->is_memory;
    u64 left = block_fresh(block);
    if (is_memory && left > WINDOW && !headroom_has(left, total))
        return false; /* rather than make what would have to go back */
    while ((left = block_fresh(block)) > 0) {
        u64 step = left < WINDOW ? left : WINDOW;
        if (is_memory && !headroom_allows(step, total))
            return false;
        lock->keeps_gil = true;
        int result = reserve_up_to(block, step);
        lock->keeps_gil = false;
        if (result != 0)
            return false;
    }
    return true;
}

/* reserve(nbytes): give the block up to so many more bytes of the pages that were counted for it */
static PyObject *reserve(PyObject *self, PyObject *argument)
{
    u64 most = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    if (reserve_up_to((struct block *)self, most) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

bool block_can_take(const struct block *block, u64 at, u64 nbytes)
{
    return block->state == LEASED && block->epoch == epoch() &&
           (block->address || is_on_disk(&block->blocks->table, block->index)) &&
           at <= block->nbytes && nbytes <= block->nbytes - at && block->reserved >= at + nbytes;
}

/* Write to a leased block that can take it; -1 with errno: the disk refuses. */
int block_write(struct block *block, u64 at, const char *from, u64 nbytes, bool keeps_gil)
{
    if (block->address) {
        copy_now(block->address + at, from, nbytes);
        return 0;
    }
    struct blocks *blocks = block->blocks;
    u64 offset = known_of(block)->place.offset + at;
    PyThreadState *ours = let_others_run(blocks, keeps_gil);
    int result = mapping_write(&blocks->disk, offset, from, nbytes);
    go_on(blocks, ours);
    FAULT("block.spilled");
    return result;
}

/* So much of a leased block is the message's. */
void block_use(struct block *block, u64 nbytes)
{
    if (block->state != LEASED || block->epoch != epoch())
        return;
    put(&table_row(&block->blocks->table, block->index)->used, nbytes);
    block->nbytes = nbytes;
}

/* Pages of a leased block that is needed no more go back to the system. */
void block_punch_range(struct block *block, u64 at, u64 nbytes)
{
    u64 offset = known_of(block)->place.offset + at;
    tell_emptied(table_row(&block->blocks->table, block->index));
    mapping_punch(mapping_of(block->blocks, block->index), offset, block->address + at,
                  round_up(nbytes, PAGE));
    block->is_emptied = true;
}

/* The same of all of it, at once. */
void block_empty_now(struct block *block)
{
    if (block->state == LEASED && block->epoch == epoch() && !block->is_reference) /* that has no pages */
        punch(block, true);
}

/* write(at, bytes): into a leased block, wherever it is; OSError: the disk refuses */
static PyObject *write_bytes(PyObject *self, PyObject *arguments)
{
    struct block *block = (struct block *)self;
    unsigned long long at;
    Py_buffer from;
    if (!PyArg_ParseTuple(arguments, "Ky*", &at, &from))
        return NULL;
    u64 nbytes = (u64)from.len;
    PyObject *result = NULL;
    if (!block_can_take(block, at, nbytes))
        PyErr_SetString(PyExc_ValueError, "the block is not leased, or too small");
    else if (block_write(block, at, from.buf, nbytes, false) != 0)
        PyErr_SetFromErrno(PyExc_OSError);
    else
        result = Py_NewRef(Py_None);
    PyBuffer_Release(&from);
    return result;
}

/* empty(): give the pages of a block that was leased for it back to the system */
static PyObject *empty(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct block *block = (struct block *)self;
    if (block->state != LEASED || block->epoch != epoch())
        Py_RETURN_NONE;
    punch(block, false);
    FAULT("block.emptied");
    Py_RETURN_NONE;
}

/* __reduce__(): only a message knows what to do with a reference, and has a reducer of its own */
static PyObject *refuse(PyObject *Py_UNUSED(self), PyObject *Py_UNUSED(none))
{
    PyErr_SetString(PyExc_TypeError,
                    "what share() returned is shared memory, and no value: it can be sent through "
                    "multiprocessing inside oobpickle.enabled() only, not by another pickler. Send a "
                    "copy of an array in it instead");
    return NULL;
}

static PyMethodDef methods[] = {
    {"reserve", reserve, METH_O, NULL},
    {"empty", empty, METH_NOARGS, NULL},
    {"write", write_bytes, METH_VARARGS, NULL},
    {"freeze", view_freeze, METH_NOARGS, NULL},
    {"again", view_again, METH_NOARGS, NULL},
    {"share", view_share, METH_NOARGS, NULL},
    {"refer", refer, METH_O, NULL},
    {"__reduce__", refuse, METH_NOARGS, NULL},
    {0},
};

static PyMemberDef members[] = {
    {"index", T_UINT, offsetof(struct block, index), READONLY, NULL},
    {"generation", T_ULONGLONG, offsetof(struct block, generation), READONLY, NULL},
    {"is_copy", T_BOOL, offsetof(struct block, is_copy), READONLY, NULL},
    {"is_reference", T_BOOL, offsetof(struct block, is_reference), READONLY, NULL},
    {0},
};

static PyGetSetDef attributes[] = {
    {"is_on_disk", get_is_on_disk, NULL, NULL, NULL},
    {"nbytes_fresh", get_fresh, NULL, NULL, NULL},
    {"nbytes_resident", get_resident, NULL, NULL, NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_dealloc, dealloc},
    {Py_bf_getbuffer, getbuffer},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, attributes},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "oobpickle._core.Block",
    .basicsize = sizeof(struct block),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

int block_type_make(PyObject *module)
{
    return type_make(module, &block_type, &spec);
}
