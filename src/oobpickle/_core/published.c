/* Published blocks, as this process sees them: one object for many readers.

What. `publish` hands leased blocks to all who will have references to them. A reference that this
process holds has a *view*: the published bytes, mapped privately.

How it works. A view is a mapping of its own (MAP_PRIVATE): pages that were not written show the
block, which nobody writes while a reference names it, and a write makes the page this process's own.
So what arrives is writable and independent, and costs page tables. A view that is frozen cannot be
written, neither by NumPy nor by anybody else; memory that lies in one can be sent on as a reference
(`refer_now`), since it is what was published. A view that is shared (`share`) is the block itself, for
everybody to write to: it is never frozen, so memory in it is copied when it is sent, and nothing but
`refer` makes a reference to it.

Lifetime. A view is a `Block`; its deallocation unmaps it and releases the reference. Who releases the
last one frees the published block, if the lock can be had at once; else the next step of any process
does.

A forked child inherits views. It takes references of its own in the hook that Python calls after the
fork (`views_inherit`); until then, and for ever if that hook does not run or the lock is not to be had,
its row says that it inherits, and all that is published lives as long as it does. A child that cannot
be known (no descriptor for its proof of life) makes it live as long as the arena; one of a raw clone(2)
runs no handler and must not use what it inherited.

A block on disk that is held when its process forks becomes a published one, and the array over it a
view, in its place (`block_publish_in_place`).

When it cannot. Without a mapping the bytes that the message has are copied, no others, and the reference is
released at once. */

#include "core.h"

#include <string.h>
#include <sys/mman.h>

static struct place *place_of(const struct block *block)
{
    return &block->blocks->table.known[block->named].place;
}

/* --- views */

/* What the reference names; false: nothing that is in order. */
bool reference_look(struct block *block)
{
    struct table_view *table = &block->blocks->table;
    u32 named = references_named(table, block->index);
    if (named == ROWS)
        return false;
    u64 nbytes = row_nbytes(table_row(table, named));
    block->is_reference = true;
    block->named = named;
    block->nbytes = nbytes <= place_of(block)->nbytes ? nbytes : 0;
    block->part_at = 0;
    block->part_nbytes = block->nbytes;
    return true;
}

/* The message has only this of what the reference names; false: that has no such part. */
bool reference_narrow(struct block *block, u64 at, u64 nbytes)
{
    if (nbytes > block->nbytes || at > block->nbytes - nbytes)
        return false;
    block->part_at = at;
    block->part_nbytes = nbytes;
    return true;
}

static void remember(struct block *block)
{
    struct blocks *blocks = block->blocks;
    block->view_before = NULL;
    block->view_after = blocks->first_view;
    if (blocks->first_view)
        blocks->first_view->view_before = block;
    blocks->first_view = block;
    birth_note_views(blocks);
}

/* Give a reference an address. -1: it cannot be mapped. */
int view_map(struct block *block)
{
    u64 nbytes = round_up(block->nbytes ? block->nbytes : 1, PAGE);
    block->address = mapping_view(mapping_of(block->blocks, block->named), place_of(block)->offset,
                                  nbytes, !block->is_frozen);
    if (block->address == NULL)
        return -1;
    block->mapped = nbytes;
    remember(block);
    return 0;
}

/* Copy what a reference names: also where nothing more can be mapped. */
int reference_read(const struct block *block, u64 at, char *to, u64 nbytes)
{
    return mapping_read(mapping_of(block->blocks, block->named), place_of(block)->offset + at, to, nbytes);
}

/* A view that lies in a window, see `block_publish_in_place`: the range is the file's again. */
static void leave_place(struct block *block)
{
    struct known *known = &block->blocks->table.known[block->named];
    struct mapping *mapping = mapping_of(block->blocks, block->named);
    if (mapping_share(mapping, known->place.offset, block->address, known->place.nbytes) == 0)
        known->is_private = false;
    mapping_leave(mapping, known->place.offset);
    block->is_using = false;
}

void view_forget(struct block *block)
{
    struct blocks *blocks = block->blocks;
    if (!block->is_reference || block->address == NULL || block->is_copy)
        return;
    if (block->view_before)
        block->view_before->view_after = block->view_after;
    else
        blocks->first_view = block->view_after;
    if (block->view_after)
        block->view_after->view_before = block->view_before;
    block->view_before = block->view_after = NULL;
    if (block->is_using)
        leave_place(block);
    else
        munmap(block->address, block->mapped);
    block->address = NULL;
}

/* The frozen view that has all of this memory, or NULL. */
struct block *view_at(struct blocks *blocks, const void *address, u64 nbytes)
{
    uintptr_t at = (uintptr_t)address;
    if (blocks->table.shared == NULL || nbytes < LEAST_REFERRED)
        return NULL;
    for (struct block *block = blocks->first_view; block; block = block->view_after) {
        uintptr_t from = (uintptr_t)block->address;
        if (block->is_frozen && at >= from && at - from <= block->nbytes &&
            nbytes <= block->nbytes - (at - from))
            return block->state == HELD && block->epoch == epoch() ? block : NULL;
    }
    return NULL;
}

/* freeze(): nobody can write to this view any more; False if it is none */
PyObject *view_freeze(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct block *block = (struct block *)self;
    if (block->is_reference && !block->is_copy && block->address && !block->is_frozen &&
        !block->is_shared)
        block->is_frozen = mprotect(block->address, block->mapped, PROT_READ) == 0;
    return PyBool_FromLong(block->is_frozen);
}

/* --- making references */

static bool lease_reference(struct blocks *blocks, u32 *index)
{
    struct leased leased = {0};
    u64 room;
    enum shortage shortage = table_lease(&blocks->table, 0, 0, blocks->lock.slot, &leased, &room);
    *index = leased.index;
    return shortage == ROOM;
}

/* The same with an object; NULL: there is none, perhaps with an exception. */
static struct block *new_reference(struct blocks *blocks)
{
    u32 index;
    return lease_reference(blocks, &index) ? block_leased(blocks, index, 0) : NULL;
}

static void hold(struct blocks *blocks, u32 index)
{
    struct row *row = table_row(&blocks->table, index);
    if (row_change(row, index, get(&row->commit), low_of(HELD, blocks->lock.slot)))
        blocks->n_held++;
}

/* In the middle of a message, with the GIL kept: a reference, leased, to what a view shows. NULL,
   without an exception: it cannot be had now. */
PyObject *refer_now(struct blocks *blocks, const struct block *view)
{
    const bool was_deaf = blocks->lock.is_deaf, kept_gil = blocks->lock.keeps_gil;
    struct block *block = NULL;
    if (!file_is_ours(&blocks->mapping.data))
        return NULL;
    blocks->lock.keeps_gil = blocks->lock.is_deaf = true;
    if (step_begin(blocks) == ROOM) {
        block = new_reference(blocks);
        if (block && references_add(&blocks->table, block->index, view->named))
            reference_look(block);
        step_end(blocks);
    }
    blocks->lock.keeps_gil = kept_gil;
    blocks->lock.is_deaf = was_deaf;
    PyObject *object = (PyObject *)block;
    if (object && !block->is_reference)
        Py_CLEAR(object);
    if (object == NULL)
        PyErr_Clear();
    return object;
}

/* again(): a further view of what this one shows, which may be written; None if there is none */
PyObject *view_again(PyObject *self, PyObject *Py_UNUSED(none))
{
    const struct block *view = (const struct block *)self;
    struct blocks *blocks = view->blocks;
    if (!view->is_reference || view->state != HELD || view->epoch != epoch() || !blocks->table.shared ||
        view->is_shared)
        Py_RETURN_NONE;
    struct block *again = (struct block *)refer_now(blocks, view);
    if (again == NULL)
        Py_RETURN_NONE;
    hold(blocks, again->index);
    again->state = HELD;
    if (view_map(again) == 0)
        return (PyObject *)again;
    Py_DECREF((PyObject *)again);
    Py_RETURN_NONE;
}

/* share(): what is written to this view is written to the block, from now on; False if it cannot be */
PyObject *view_share(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct block *block = (struct block *)self;
    if (block->is_shared && block->address)
        Py_RETURN_TRUE;
    if (!block->is_reference || block->is_copy || block->address == NULL || FAILS("view.share") ||
        mapping_share(mapping_of(block->blocks, block->named), place_of(block)->offset, block->address,
                      block->mapped) != 0)
        Py_RETURN_FALSE;
    FAULT("view.shared");
    block->is_frozen = false;
    block->is_shared = true;
    Py_RETURN_TRUE;
}

/* Make something of each block of a list, under one lock; takes over the list. `problem`: 0, a shortage, or
   -1 with an exception. */
static PyObject *in_one_step(struct blocks *blocks, PyObject *list,
                             bool (*make)(struct blocks *, PyObject *list, PyObject *made), int *problem)
{
    PyObject *made = PyList_New(PyList_Size(list));
    *problem = made ? step_begin(blocks) : -1;
    if (*problem == ROOM) {
        if (get(&blocks->table.shared->header.closed))
            *problem = DETACHED;
        else if (!make(blocks, list, made))
            *problem = TABLE;
        step_end(blocks);
    }
    Py_DECREF(list);
    return made;
}

/* Takes over what was made. */
static PyObject *made_or_shortage(PyObject *made, int problem)
{
    if (problem == ROOM)
        return made;
    Py_XDECREF(made);
    return problem < 0 || PyErr_Occurred() ? NULL : Py_BuildValue("iKK", problem, 0ULL, 0ULL);
}

static bool refer_all(struct blocks *blocks, PyObject *list, PyObject *references)
{
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        const struct block *view = block_at(list, i);
        struct block *block = new_reference(blocks);
        if (block == NULL)
            return false;
        PyList_SetItem(references, i, (PyObject *)block);
        if (!references_add(&blocks->table, block->index, view->named) || !reference_look(block))
            return false;
        block->is_shared = true;
    }
    return true;
}

/* refer([Block]): [Block] references to these shared views of its arena, for one message, or
   (shortage, 0, 0) */
PyObject *refer(PyObject *self, PyObject *list)
{
    struct blocks *blocks = ((struct block *)self)->blocks;
    list = list_taken(list);
    if (list == NULL)
        return NULL;
    Py_ssize_t n = PyList_Size(list);
    for (Py_ssize_t i = 0; i < n; i++) {
        const struct block *view = block_at(list, i);
        if (view && view->is_shared && view->state == HELD && view->blocks == blocks)
            continue;
        if (view)
            PyErr_SetString(PyExc_TypeError, "not a list of shared views of this arena");
        Py_DECREF(list);
        return NULL;
    }
    int problem;
    PyObject *references = in_one_step(blocks, list, refer_all, &problem);
    return made_or_shortage(references, problem);
}

/* Free what nobody refers to any more, if the lock can be had; with `reap` also what was left by the
   dead. */
void release_unheld(struct blocks *blocks, bool reap)
{
    const bool was_deaf = blocks->lock.is_deaf, kept_gil = blocks->lock.keeps_gil;
    const u64 hurried_until = blocks->hurried_until;
    blocks->lock.keeps_gil = blocks->lock.is_deaf = true;
    if (blocks->drops_hurried_until > hurried_until)
        blocks->hurried_until = blocks->drops_hurried_until;
    int problem = step_begin(blocks);
    blocks->hurried_until = hurried_until;
    if (problem == ROOM) {
        if (reap)
            participant_reap(blocks);
        step_end(blocks);
    } else if (problem == BUSY)
        blocks->drops_hurried_until = now_us() + HURRY_US; /* the next ones do not wait for it */
    blocks->lock.keeps_gil = kept_gil;
    blocks->lock.is_deaf = was_deaf;
}

/* Step, in a forked child: references of its own for the views that it has inherited. */
void views_take(struct blocks *blocks)
{
    for (struct block *view = blocks->first_view; view; view = view->view_after) {
        u32 index;
        if (view->epoch == epoch() || view->state != HELD)
            continue;
        if (!lease_reference(blocks, &index))
            return; /* at the next step, perhaps */
        hold(blocks, index);
        if (!references_add(&blocks->table, index, view->named))
            continue; /* damaged: nobody frees it */
        FAULT("views.referred");
        blocks->table.known[view->index].n_users--;
        blocks->table.known[index].n_users++;
        view->index = index;
        view->generation = get(&table_row(&blocks->table, index)->generation);
        view->epoch = epoch();
    }
    participant_inherit(blocks, false);
}

void views_inherit(struct blocks *blocks)
{
    if (!has_joined(blocks))
        return; /* whoever joins later says so then */
    if (blocks->first_view == NULL) { /* a hook that ran before ours may have dropped what there was */
        participant_inherit(blocks, false);
        return;
    }
    blocks->lock.keeps_gil = true;
    if (step_begin(blocks) == ROOM)
        step_end(blocks);
    blocks->lock.keeps_gil = false;
}

/* --- publishing */

static void become_view(struct block *block, u32 reference)
{
    struct table_view *table = &block->blocks->table;
    table->known[block->index].is_private |= block->is_using;
    table->known[block->index].n_users--;
    table->known[reference].n_users++;
    block->named = block->index;
    block->index = reference;
    block->generation = get(&table_row(table, reference)->generation);
    block->is_reference = true;
    block->is_apart = false;
    block->mapped = round_up(block->nbytes, PAGE);
    remember(block);
}

/* Before a fork: publish a block that this process holds, and make it a view of that, where it is mapped
   privately already. So parent and child have it, neither sees what the other writes, and nothing is
   copied. False: it is still held. */
bool block_publish_in_place(struct block *block)
{
    struct blocks *blocks = block->blocks;
    const bool was_deaf = blocks->lock.is_deaf;
    u32 reference;
    bool is_view = false;
    blocks->lock.keeps_gil = blocks->lock.is_deaf = true;
    if (step_begin(blocks) == ROOM) {
        if (lease_reference(blocks, &reference)) {
            struct row *row = table_row(&blocks->table, reference);
            is_view = references_publish(&blocks->table, block->index, HELD, block->generation, reference) &&
                      row_change(row, reference, get(&row->commit), low_of(HELD, blocks->lock.slot));
            if (is_view)
                become_view(block, reference);
        }
        step_end(blocks);
    }
    blocks->lock.keeps_gil = false;
    blocks->lock.is_deaf = was_deaf;
    return is_view;
}

/* Make a reference to each of the blocks, and publish it: under one lock. */
static bool publish_all(struct blocks *blocks, PyObject *list, PyObject *views)
{
    for (Py_ssize_t i = 0; i < PyList_Size(list); i++) {
        struct block *block = block_at(list, i), *view;
        if (block->state != LEASED || block->epoch != epoch() || block->blocks != blocks ||
            (view = new_reference(blocks)) == NULL)
            return false;
        PyList_SetItem(views, i, (PyObject *)view);
        if (!references_publish(&blocks->table, block->index, LEASED, block->generation, view->index))
            return false;
        block->state = NONE; /* nobody's, from now on */
        reference_look(view);
        view->is_frozen = true;
        hold(blocks, view->index);
        view->state = HELD;
    }
    return true;
}

/* publish([Block]): [Block] frozen views of what was leased and written, or (shortage, 0, 0). What
   was published before something failed is freed with its view. */
PyObject *publish(PyObject *self, PyObject *list)
{
    struct blocks *blocks = (struct blocks *)self;
    list = list_taken(list);
    if (list == NULL)
        return NULL;
    Py_ssize_t n = PyList_Size(list);
    for (Py_ssize_t i = 0; i < n; i++)
        if (block_at(list, i) == NULL) {
            Py_DECREF(list);
            return NULL;
        }
    int problem;
    PyObject *views = in_one_step(blocks, list, publish_all, &problem);
    for (Py_ssize_t i = 0; i < n && problem == ROOM; i++)
        if (view_map((struct block *)PyList_GetItem(views, i)) != 0)
            problem = SPACE;
    if (problem == ROOM)
        leave_others(blocks, views);
    return made_or_shortage(views, problem);
}
