/* What this process has becomes its own at a fork.

What. Before a fork each block that this process holds is turned into ordinary private memory, so
that neither process sees the other's writes. What is on disk stays there, and is published: of that
there may be more than memory has room for (`block_publish_in_place`).

How it works. Python calls the last three as hooks (os.register_at_fork). They are C, so no signal
handler runs inside, and a Ctrl-C that is pending comes afterwards. Between the hook and the fork
other threads and other hooks can run: what is claimed then is copied (`n_forking`). C code that
forks by itself tells Python in the child only, or never. If it has the GIL, the handlers of fork(3)
do the same as the hooks (birth.c); else the child makes a copy, leaves the file to its parent, and
its parent waits for that.

Lifetime. Arenas are watched from their making to their end.

When it cannot. If the system allows no further mapping, a block stays shared; it is counted. Of a
raw clone(2), which runs no handler, nothing is known but the epoch: nothing is released, sent or
claimed then, and what the child writes its parent sees. */

#include "core.h"

static struct blocks *arenas;

struct blocks *fork_arenas(void)
{
    return arenas;
}

void fork_watch(struct blocks *blocks)
{
    birth_pause();
    blocks->next_arena = arenas;
    blocks->arena_before = NULL;
    if (arenas)
        arenas->arena_before = blocks;
    arenas = blocks;
    birth_go_on();
}

void fork_unwatch(struct blocks *blocks)
{
    birth_pause();
    if (blocks->arena_before)
        blocks->arena_before->next_arena = blocks->next_arena;
    else if (arenas == blocks)
        arenas = blocks->next_arena;
    if (blocks->next_arena)
        blocks->next_arena->arena_before = blocks->arena_before;
    blocks->next_arena = blocks->arena_before = NULL;
    birth_go_on();
}

static bool must_become_private(const struct block *block, u64 of_epoch)
{
    /* What has no address yet is in the middle of a claim by another thread: see `receive_one`. */
    return block->state == HELD && block->address && block->epoch == of_epoch && !block->is_private &&
           !block->is_copy && !block->is_reference;
}

static void privatize(struct block *block, bool is_owned, bool keep_file)
{
    struct blocks *blocks = block->blocks;
    struct known *known = &blocks->table.known[block->index];
    const struct mapping *mapping = mapping_of(blocks, block->index);
    u64 pages = round_up(block->nbytes, PAGE);
    if (mapping_privatize(mapping, known->place.offset, block->address, pages, is_owned, keep_file)) {
        known->is_private |= !block->is_apart; /* a part of it may be */
        blocks->n_shared++;
        return;
    }
    block->is_private = true;
    known->is_private |= !block->is_apart;
    FAULT("fork.privatized");
    if (keep_file)
        return;
    u64 resident = table_resident(&blocks->table, block->index);
    if (resident > pages) /* of a larger message before */
        mapping_punch(mapping, known->place.offset + pages, NULL, resident - pages);
    block->is_emptied = true;
    blocks->n_copied++;
    blocks->nbytes_copied += block->nbytes;
}

/* What a process that is about to fork holds. */
static void make_own(struct block *block)
{
    struct blocks *blocks = block->blocks;
    const struct known *known = &blocks->table.known[block->index];
    bool is_owned = is_on_disk(&blocks->table, block->index) && !FAILS("fork.view") &&
                    mapping_own(&blocks->disk, known->place.offset, block->address, block->nbytes) == 0;
    if (!is_owned || !block_publish_in_place(block))
        privatize(block, is_owned, false);
}

/* Before its arena ends: the block is ordinary private memory. False: the system does not allow it. */
bool block_privatize(struct block *block)
{
    if (must_become_private(block, epoch()))
        privatize(block, false, false);
    return block->is_private || block->is_copy;
}

/* Step: the pages of what became private have gone. */
static void account(struct blocks *blocks)
{
    for (struct block *block = blocks->first; block; block = block->after)
        if (block->is_emptied && block->state == HELD && block->epoch == epoch() &&
            table_resident(&blocks->table, block->index))
            row_emptied(&blocks->table, block->index);
}

/* What needs the lock, if it can be had at once. What went away is accounted, else when its block is
   released; and the child finds a slot, else it takes a new one. */
static void step_before(struct blocks *blocks, bool should_reap)
{
    blocks->lock.is_deaf = true;
    blocks->n_inside++;
    enum taken taken = lock_take(&blocks->lock, HURRIED_US, is_alive, blocks);
    blocks->n_inside--;
    blocks->lock.is_deaf = false;
    if (taken != TAKEN && taken != TAKEN_DIRTY)
        return;
    if (taken == TAKEN_DIRTY)
        table_rebuild(&blocks->table, NULL, NULL);
    account(blocks);
    if (should_reap)
        participant_reap(blocks);
    lock_give(&blocks->lock);
}

static void count(struct blocks *blocks)
{
    count_in(blocks, N_COPIED_AT_FORK, blocks->n_copied);
    count_in(blocks, NBYTES_COPIED_AT_FORK, blocks->nbytes_copied);
    count_in(blocks, N_SHARED_AFTER_FORK, blocks->n_shared);
    blocks->n_copied = blocks->nbytes_copied = blocks->n_shared = 0;
}

static void make_all_own(struct blocks *blocks)
{
    for (struct block *block = blocks->first; block; block = block->after)
        if (must_become_private(block, epoch()))
            make_own(block);
}

/* Before a fork(3) by whoever has the GIL, and keeps it. */
void fork_make_own(void)
{
    for (struct blocks *blocks = arenas; blocks; blocks = blocks->next_arena) {
        if (!blocks->n_forking) {
            make_all_own(blocks);
            count(blocks);
        }
    }
}

/* Whether a child that is forked without the GIL would share something. */
bool fork_shares(const struct blocks *blocks)
{
    return blocks->n_held && !blocks->n_forking;
}

/* In a child of which the hook before knew nothing. */
void fork_make_childs_own(struct blocks *blocks)
{
    u64 parents = blocks->own.epoch;
    if (blocks->n_forking || !parents)
        return;
    for (struct block *block = blocks->first; block; block = block->after)
        if (must_become_private(block, parents))
            privatize(block, false, true);
}

PyObject *fork_before(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    for (struct blocks *blocks = arenas, *next; blocks; blocks = next) {
        Py_INCREF((PyObject *)blocks); /* another thread may drop it while we wait for the lock */
        blocks->n_forking++;
        make_all_own(blocks);
        bool should_reap = has_joined(blocks) && participant_should_reap(blocks);
        if ((blocks->n_copied && has_joined(blocks)) || should_reap)
            step_before(blocks, should_reap);
        count(blocks);
        next = blocks->next_arena;
        Py_DECREF((PyObject *)blocks);
    }
    FAULT("fork.before");
    Py_RETURN_NONE;
}

PyObject *fork_in_parent(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    FAULT("fork.after_in_parent");
    for (struct blocks *blocks = arenas; blocks; blocks = blocks->next_arena)
        if (blocks->n_forking)
            blocks->n_forking--;
    Py_RETURN_NONE;
}

/* Nothing is waited for here but a lock whose holder lives; the child joins, or tries again later. */
PyObject *fork_in_child(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    FAULT("fork.after_in_child");
    for (struct blocks *blocks = arenas; blocks; blocks = blocks->next_arena) {
        blocks->n_copied = blocks->nbytes_copied = blocks->n_shared = 0;
        fork_make_childs_own(blocks); /* else its handler has */
        blocks->n_forking = blocks->n_inside = 0;
        blocks->n_held = 0;
        if (blocks->entered_limit == UINT64_MAX) /* its maker keeps everything, we do not */
            blocks->entered_limit = ENTERED_LIMIT;
        blocks->entered_nbytes = blocks->unused_nbytes = 0; /* page tables of the file are not inherited */
        for (u32 i = 0; i < blocks->table.n_known; i++)
            blocks->table.known[i].entered = 0;
        participant_renew(blocks);
        blocks->lock.is_deaf = true; /* a signal is seen when the hook is done */
        if (get(&blocks->table.shared->header.closed) && !blocks->first_view)
            life_close(&blocks->own.birth.life);
        else
            participant_join(blocks);
        views_inherit(blocks);
        blocks->lock.is_deaf = false;
        count(blocks);
    }
    Py_RETURN_NONE;
}
