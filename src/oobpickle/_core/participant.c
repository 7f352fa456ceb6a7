/* The participants of an arena, and this process among them.

What. Joining, with a slot and its proof of life; looking whether another one lives; recovering what
the dead had; the list of messages that a participant may still load.

How it works. A participant holds byte 1 + slot of the locks file for life, by an open file
description of its own (F_OFD_SETLK), which the kernel drops however the process dies. A page of
that description is mapped with MADV_DONTFORK: it keeps the description if somebody closes the
descriptor, and ends with the process although a forked child lives on. A forked child closes what
it inherited, and never unlocks. Whether a slot is held is asked through the handle, which nobody
locks. A slot whose row says JOINED but whose byte is free belongs to a dead process.

Lifetime. A slot is used again only after the blocks of its dead owner were recovered. A participant
that leaves does nothing: the kernel releases the byte.

When it cannot. `participant_join` returns a shortage, or -1 with an exception. */

#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { REAP_EVERY = 16 };

static struct participant *row_of(const struct blocks *blocks, u32 slot)
{
    return &blocks->table.shared->participants[slot];
}

bool has_joined(const struct blocks *blocks)
{
    return blocks->own.epoch != 0 && blocks->own.epoch == epoch();
}

u32 n_slots(const struct blocks *blocks)
{
    u64 n = get(&blocks->table.shared->header.n_slots);
    return n < SLOTS ? (u32)n : SLOTS;
}

/* --- proof of life */

static struct flock life_byte(short type, u32 slot)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = 1 + (off_t)slot, .l_len = 1};
}

/* Whether a living participant has the slot; also if that cannot be known. */
bool is_alive(void *with, u32 slot)
{
    const struct blocks *blocks = with;
    const struct participation *own = &blocks->own;
    struct flock byte = life_byte(F_WRLCK, slot);
    if (slot >= SLOTS)
        return false;
    if (slot == blocks->lock.slot && blocks->lock.epoch == epoch())
        return has_joined(blocks); /* not yet: it is that of a dead predecessor */
    const struct file *file = file_is_ours(&own->handle) ? &own->handle : &own->life;
    if (!file_is_ours(file) || fcntl(file->fd, F_OFD_GETLK, &byte) != 0)
        return true;
    return byte.l_type != F_UNLCK || !file_is_ours(file);
}

static bool hold(const struct participation *own, u32 slot)
{
    struct flock byte = life_byte(F_WRLCK, slot);
    return fcntl(own->life.fd, F_OFD_SETLK, &byte) == 0;
}

static void let_go(const struct participation *own, u32 slot)
{
    struct flock byte = life_byte(F_UNLCK, slot);
    fcntl(own->life.fd, F_OFD_SETLK, &byte);
}

static int open_life(struct participation *own)
{
    char path[40];
    if (!file_is_ours(&own->handle)) { /* before it is opened: to open a strange file can have effects */
        errno = EBADF;
        return -1;
    }
    snprintf(path, sizeof path, "/proc/self/fd/%d", own->handle.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return -1;
    if (file_note(&own->life, fd) != 0 || own->life.device != own->handle.device ||
        own->life.inode != own->handle.inode) {
        close(fd);
        own->life.fd = -1;
        errno = EBADF;
        return -1;
    }
    own->life_epoch = epoch();
    char *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    own->life_page = page == MAP_FAILED ? NULL : page; /* without it there is less protection */
    if (own->life_page) {
        madvise(page, PAGE, MADV_DONTFORK);
        madvise(page, PAGE, MADV_DONTDUMP);
    }
    return 0;
}

static void close_file(struct file *file)
{
    if (file_is_ours(file))
        close(file->fd);
    file->fd = -1;
}

/* --- the dead */

static void absorb(struct blocks *blocks, u32 slot)
{
    struct header *header = &blocks->table.shared->header;
    struct participant *row = row_of(blocks, slot);
    u64 bank = get(&header->bank) & 1, incarnation = get(&row->incarnation);
    word *old = header->totals[bank], *new = header->totals[1 - bank];
    if (get(&old[COUNTERS]) == incarnation)
        return; /* whoever reaped it died right after this */
    for (u32 k = 0; k < COUNTERS; k++)
        put(&new[k], get(&old[k]) + get(&row->counters[k]));
    put(&new[COUNTERS], incarnation);
    FAULT("participant.summed");
    put(&header->bank, 1 - bank);
    FAULT("participant.absorbed");
}

struct lives {
    struct blocks *blocks;
    char known[SLOTS]; /* 1: alive, 2: dead */
};

static bool is_alive_known(void *with, u32 slot)
{
    struct lives *lives = with;
    if (slot >= SLOTS)
        return false;
    if (!lives->known[slot])
        lives->known[slot] = is_alive(lives->blocks, slot) ? 1 : 2;
    return lives->known[slot] == 1;
}

/* Step: recover every dead participant; return how many there were. */
u32 participant_reap(struct blocks *blocks)
{
    struct lives lives = {.blocks = blocks};
    u32 n = n_slots(blocks), n_dead = 0;
    for (u32 slot = 0; slot < n; slot++)
        if (get(&row_of(blocks, slot)->state) != VACANT && !is_alive_known(&lives, slot))
            n_dead++;
    if (n_dead == 0)
        return 0;
    table_rebuild(&blocks->table, is_alive_known, &lives);
    FAULT("participant.recovered");
    for (u32 slot = 0; slot < n; slot++) {
        if (lives.known[slot] != 2)
            continue;
        if (get(&row_of(blocks, slot)->state) != VACANT)
            absorb(blocks, slot);
        put(&row_of(blocks, slot)->state, VACANT);
        FAULT("participant.reaped");
    }
    return n_dead;
}

/* --- joining */

static u32 hold_where(const struct blocks *blocks, u32 from, u32 to, u64 state)
{
    for (u32 slot = from; slot < to; slot++)
        if (get(&row_of(blocks, slot)->state) == state && hold(&blocks->own, slot))
            return slot;
    return SLOTS;
}

/* A living one holds its byte, whatever was written over its state. */
static u32 find_slot(const struct blocks *blocks)
{
    u32 n = n_slots(blocks), slot = hold_where(blocks, 0, n, VACANT);
    if (slot == SLOTS && n % REAP_EVERY == 0)
        slot = hold_where(blocks, 0, n, JOINED);
    for (u32 next = n; slot == SLOTS && next < SLOTS; next++)
        if (hold(&blocks->own, next))
            slot = next;
    return slot == SLOTS ? hold_where(blocks, 0, n, JOINED) : slot;
}

static void write_row(struct blocks *blocks, u32 slot)
{
    struct header *header = &blocks->table.shared->header;
    struct participant *row = row_of(blocks, slot);
    struct participation *own = &blocks->own;
    u64 incarnation = get(&header->incarnation) + 1;
    put(&header->incarnation, incarnation);
    put(&row->incarnation, incarnation);
    put(&row->pid, (u64)getpid());
    put(&row->pid_namespace, own->pid_namespace);
    put(&row->reading, own->reads_for_ever);
    put(&row->keeps_all, own->keeps_all);
    for (u32 k = 0; k < COUNTERS; k++)
        put(&row->counters[k], 0);
    for (u32 k = 0; k < KEPT; k++)
        put(&row->kept[k], own->kept[k]);
    if (get(&header->n_slots) < slot + 1)
        put(&header->n_slots, slot + 1);
    own->incarnation = incarnation;
    atomic_store_explicit(&row->state, JOINED, memory_order_release);
    FAULT("participant.joined");
}

/* In a forked child, once: what was inherited is the parent's. */
void participant_renew(struct blocks *blocks)
{
    struct participation *own = &blocks->own;
    if (own->life_epoch == 0 || own->life_epoch == epoch())
        return;
    if (own->n_adopted) { /* the parent had read messages: we have their bytes too */
        if (!participant_keep(blocks, adopted_by(own->incarnation, 0)))
            own->keeps_all = true;
        for (u32 i = 0; i < blocks->table.n_known; i++)
            blocks->table.known[i].adopted = 0;
        own->n_adopted = 0;
    }
    if (own->parents.fd < 0)
        own->parents = own->life;
    else
        close_file(&own->life);
    own->life.fd = -1;
    own->life_page = NULL; /* MADV_DONTFORK: not mapped here */
    own->life_epoch = 0;
}

/* Become a participant: 0, a shortage, or -1 with an exception. */
int participant_join(struct blocks *blocks)
{
    struct participation *own = &blocks->own;
    if (has_joined(blocks))
        return ROOM;
    if (own->retired || epoch() == 0)
        return DETACHED;
    if (own->is_joining) /* another thread, in the middle of it */
        return BUSY;
    participant_renew(blocks);
    if (own->life.fd < 0 && open_life(own) != 0) {
        if (own->parents.fd < 0)
            return DETACHED;
        close_file(&own->parents); /* there is a descriptor to spare now */
        if (open_life(own) != 0)
            return DETACHED;
    }
    u32 slot = FAILS("participant.slot") ? SLOTS : find_slot(blocks);
    if (slot == SLOTS)
        return DETACHED;
    FAULT("participant.held");
    struct lives lives = {.blocks = blocks};
    bool had_owner = get(&row_of(blocks, slot)->state) != VACANT;
    u64 begun = epoch();
    blocks->lock.slot = slot;
    blocks->lock.epoch = begun;
    own->is_joining = true;
    blocks->n_inside++;
    enum taken taken = lock_take(&blocks->lock, lock_patience_us, is_alive, blocks);
    if (epoch() != begun) /* the child of a handler, which may have joined: all of that is its parent's */
        return DETACHED;
    own->is_joining = false;
    blocks->n_inside--;
    if (taken != TAKEN && taken != TAKEN_DIRTY) {
        let_go(own, slot);
        blocks->lock.epoch = 0;
        return taken == LOCK_ERROR ? -1 : taken == LOCK_BUSY ? BUSY : DETACHED;
    }
    if (had_owner) /* asked before what was released is drained */
        for (u32 other = 0; other < n_slots(blocks); other++)
            is_alive_known(&lives, other);
    if (taken == TAKEN_DIRTY || had_owner)
        table_rebuild(&blocks->table, had_owner ? is_alive_known : NULL, &lives);
    if (had_owner)
        absorb(blocks, slot);
    write_row(blocks, slot);
    own->epoch = epoch();
    lock_give(&blocks->lock);
    close_file(&own->parents);
    return ROOM;
}

/* Leave for good. */
void participant_leave(struct blocks *blocks)
{
    struct participation *own = &blocks->own;
    bool is_ours = own->life_epoch == epoch();
    own->retired = true;
    own->epoch = 0;
    if (own->life_page && is_ours)
        munmap(own->life_page, PAGE);
    own->life_page = NULL;
    close_file(&own->life);
    close_file(&own->parents);
}

/* --- messages that it may still load */

bool participant_keep(struct blocks *blocks, u64 source)
{
    struct participation *own = &blocks->own;
    for (u32 k = 0; k < KEPT; k++)
        if (own->kept[k] == source)
            return true;
    for (u32 k = 0; k < KEPT; k++) {
        if (own->kept[k])
            continue;
        own->kept[k] = source;
        if (has_joined(blocks))
            put(&row_of(blocks, blocks->lock.slot)->kept[k], source);
        return true;
    }
    return false;
}

/* Keep none but these. */
void participant_retain(struct blocks *blocks, const u64 *sources, size_t n)
{
    struct participation *own = &blocks->own;
    for (u32 k = 0; k < KEPT; k++) {
        bool is_needed = false; /* nor is an empty place */
        for (size_t i = 0; i < n && !is_needed; i++)
            is_needed = sources[i] == own->kept[k];
        if (is_needed)
            continue;
        own->kept[k] = 0;
        if (has_joined(blocks))
            put(&row_of(blocks, blocks->lock.slot)->kept[k], 0);
    }
}
