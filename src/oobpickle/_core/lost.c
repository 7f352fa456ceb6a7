/* Messages in flight that nobody can load any more, as far as the table tells.

What. `unowned` finds blocks in flight that may be nobody's, `free_lost` frees those of them that the
caller has found to be lost.

How it works. Who has read a message through a connection owns it: it is lost if he is dead. Else
it may be lost if its sender is dead or done; whether it can still be read in its channel, the
caller asks the system. Nothing is freed while a participant is in the middle of reading, or may
load what was sent there (`kept` in its row). What follows a first block that is gone is lost too.

Lifetime. No state.

When it cannot. What is damaged is not found. */

#include "core.h"

#include <stdlib.h>

struct view {
    u64 *kept; /* sorted: sources of which somebody may load messages */
    size_t n_kept;
    bool keeps_all, is_read, has_others;
};

static int compare(const void *one, const void *other)
{
    u64 a = *(const u64 *)one, b = *(const u64 *)other;
    return a < b ? -1 : a > b;
}

static bool is_kept(const struct view *view, u64 source)
{
    return view->n_kept && bsearch(&source, view->kept, view->n_kept, sizeof source, compare);
}

static bool is_joined(const struct blocks *blocks, u32 slot)
{
    return slot < SLOTS && get(&blocks->table.shared->participants[slot].state) == JOINED;
}

static bool is_other(const struct blocks *blocks, u32 slot)
{
    return is_joined(blocks, slot) && !(has_joined(blocks) && slot == blocks->lock.slot);
}

static bool look(const struct blocks *blocks, struct view *view)
{
    u32 n = n_slots(blocks);
    *view = (struct view){.kept = malloc((size_t)(n + 1) * (KEPT + 1) * sizeof(u64))};
    if (view->kept == NULL)
        return false;
    view->is_read = get(&blocks->table.shared->header.strangers) != 0;
    for (u32 slot = 0; slot < n; slot++) {
        const struct participant *row = &blocks->table.shared->participants[slot];
        if (!is_joined(blocks, slot))
            continue;
        view->has_others |= is_other(blocks, slot);
        view->is_read |= get(&row->reading) != 0;
        view->keeps_all |= get(&row->keeps_all) != 0;
        view->kept[view->n_kept++] = adopted_by(get(&row->incarnation), 0);
        for (u32 k = 0; k < KEPT; k++)
            if (get(&row->kept[k]))
                view->kept[view->n_kept++] = get(&row->kept[k]);
    }
    qsort(view->kept, view->n_kept, sizeof(u64), compare);
    return true;
}

static bool is_being_sent(const struct blocks *blocks, u32 index)
{
    for (const struct block *block = blocks->first; block; block = block->after)
        if (block->index == index && block->epoch == epoch() &&
            (block->is_sending || block->state == IN_FLIGHT))
            return true;
    return false;
}

static bool is_unowned(struct blocks *blocks, const struct view *view, u32 index)
{
    const struct row *row = table_row(&blocks->table, index);
    u64 commit = get(&row->commit);
    if (state_of(commit) != IN_FLIGHT || !table_knows(&blocks->table, index))
        return false;
    u64 channel = get(&row->channel);
    if ((channel & (ADOPTED | FOLLOWS)) == ADOPTED)
        /* An adoption that came too late, for an earlier lease of the block, says nothing. */
        return ((channel ^ get(&row->generation)) & ADOPTION_MASK) == 0 && !view->keeps_all &&
               !is_kept(view, channel & ~ADOPTION_MASK);
    return !is_other(blocks, owner_of(commit)) && (!view->keeps_all || channel & FOLLOWS) &&
           !is_kept(view, channel & ~UNPROVEN) && !is_being_sent(blocks, index);
}

static bool is_abandoned(struct blocks *blocks, u32 index)
{
    const struct row *row = table_row(&blocks->table, index);
    u64 channel = get(&row->channel);
    if (state_of(get(&row->commit)) != IN_FLIGHT || !(channel & FOLLOWS) ||
        !table_knows(&blocks->table, index))
        return false;
    u32 head = (u32)(channel & (ROWS - 1));
    if (!table_knows(&blocks->table, head))
        return false; /* the link is damaged: whoever loads the message frees it */
    const struct row *first = table_row(&blocks->table, head);
    enum state state = state_of(get(&first->commit));
    return (state != LEASED && state != IN_FLIGHT && state != HELD) ||
           follows(head, get(&first->generation)) != channel;
}

/* unowned(): [(index, commit word, channel)] */
PyObject *lost_unowned(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = (struct blocks *)self;
    struct view view;
    PyObject *found = PyList_New(0); /* before: this may run finalizers, which may end the arena */
    u32 n_rows = blocks->table.shared ? table_n_rows(&blocks->table) : 0;
    if (found == NULL || n_rows == 0)
        return found;
    if (!look(blocks, &view)) {
        Py_DECREF(found);
        return PyErr_NoMemory();
    }
    blocks->n_inside++; /* no finalizer ends it now */
    for (u32 i = 0; found && i < n_rows; i++) {
        if (!is_unowned(blocks, &view, i))
            continue;
        const struct row *row = table_row(&blocks->table, i);
        list_add(&found, Py_BuildValue("IKK", i, get(&row->commit), get(&row->channel)));
    }
    blocks->n_inside--;
    free(view.kept);
    return found;
}

/* sources(): [channel, or who has read it] of what is in flight */
PyObject *lost_sources(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = (struct blocks *)self;
    PyObject *found = PyList_New(0);
    u32 n_rows = blocks->table.shared ? table_n_rows(&blocks->table) : 0;
    for (u32 i = 0; found && i < n_rows; i++) {
        const struct row *row = table_row(&blocks->table, i);
        u64 channel = get(&row->channel);
        if (state_of(get(&row->commit)) != IN_FLIGHT || channel & FOLLOWS)
            continue;
        channel &= channel & ADOPTED ? ~ADOPTION_MASK : ~UNPROVEN;
        list_add(&found, PyLong_FromUnsignedLongLong(channel));
    }
    return found;
}

/* has_abandoned(): whether there are blocks that follow a first one which is gone */
PyObject *lost_has_abandoned(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct blocks *blocks = (struct blocks *)self;
    u32 n_rows = blocks->table.shared ? table_n_rows(&blocks->table) : 0;
    for (u32 i = 0; i < n_rows; i++)
        if (is_abandoned(blocks, i))
            Py_RETURN_TRUE;
    Py_RETURN_FALSE;
}

static bool free_one(struct blocks *blocks, u32 index, u64 seen)
{
    struct row *row = table_row(&blocks->table, index);
    if (!row_change(row, index, seen, low_of(RELEASED, blocks->lock.slot)))
        return false;
    table_count_idle(&blocks->table, index, (int64_t)row_resident(row, index));
    table_free(&blocks->table, index, get(&row->generation), false);
    return true;
}

struct lost { /* as `unowned` has seen it */
    unsigned int index;
    unsigned long long seen, channel;
};

/* Before the lock is taken: what is in the list may be anything, and may run code. NULL with an exception. */
static struct lost *lost_in(PyObject *heads, Py_ssize_t *n)
{
    PyObject *list = list_taken(heads);
    struct lost *all = NULL;
    bool are_good = list != NULL;
    *n = list ? PyList_Size(list) : 0;
    if (list && (all = calloc((size_t)*n + 1, sizeof *all)) == NULL)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; all && are_good && i < *n; i++) {
        PyObject *one = PyList_GetItem(list, i);
        are_good = PyTuple_Check(one) &&
                   PyArg_ParseTuple(one, "IKK", &all[i].index, &all[i].seen, &all[i].channel);
    }
    Py_XDECREF(list);
    if (all == NULL || are_good)
        return all;
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_TypeError, "not a list of (index, commit word, channel)");
    free(all);
    return NULL;
}

/* Step: free those that are still what was seen, and what is abandoned; return how many. */
static long free_all(struct blocks *blocks, const struct view *view, const struct lost *all, Py_ssize_t n)
{
    u32 n_rows = table_n_rows(&blocks->table);
    long n_freed = 0;
    for (Py_ssize_t i = 0; i < n; i++)
        /* The channel, too: another thread may have sent the message on. */
        if (all[i].index < n_rows && is_unowned(blocks, view, all[i].index) &&
            get(&table_row(&blocks->table, all[i].index)->channel) == all[i].channel)
            n_freed += free_one(blocks, all[i].index, all[i].seen);
    for (u32 i = 0; i < n_rows; i++)
        if (is_abandoned(blocks, i))
            n_freed += free_one(blocks, i, get(&table_row(&blocks->table, i)->commit));
    return n_freed;
}

/* free_lost([(index, commit word, channel)]): free those that are still what was seen, and what is abandoned;
   return how many, or a shortage as a negative number */
PyObject *lost_free(PyObject *self, PyObject *heads)
{
    struct blocks *blocks = (struct blocks *)self;
    struct view view;
    long n_freed = 0;
    Py_ssize_t n;
    struct lost *all = lost_in(heads, &n);
    if (all == NULL)
        return NULL;
    int problem = step_begin(blocks);
    if (problem) {
        free(all);
        return problem < 0 ? NULL : PyLong_FromLong(-problem);
    }
    if (look(blocks, &view)) {
        /* Processes that saw that it is closed no longer say when they read. */
        if (!view.is_read && !(get(&blocks->table.shared->header.closed) && view.has_others))
            n_freed = free_all(blocks, &view, all, n);
        free(view.kept);
    }
    step_end(blocks);
    free(all);
    count_in(blocks, N_RECLAIMED, (u64)n_freed);
    return PyErr_Occurred() ? NULL : PyLong_FromLong(n_freed);
}
