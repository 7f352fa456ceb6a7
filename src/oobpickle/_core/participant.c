/* The participants of an arena, and this process among them.

What. Joining, with a slot and its proof of life; looking whether another one lives; recovering what
the dead had; the list of messages that a participant may still load.

How it works. A participant holds byte 1 + slot of the locks file for life, by an open file
description of its own (F_OFD_SETLK), which the kernel drops however the process dies. A page of
that description is mapped with MADV_DONTFORK: it keeps the description if somebody closes the
descriptor, and ends with the process although a forked child lives on. A forked child closes what
it inherited, and never unlocks; it has a slot of its own from birth (birth.c). Whether a slot is held
is asked through the handle, which nobody locks. A slot whose row says JOINED but whose byte is free
belongs to a dead process.

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
        return has_joined(blocks); /* before that, the slot is still that of a dead process */
    const struct file *file = file_is_ours(&own->handle) ? &own->handle : &own->life.file;
    if (!file_is_ours(file) || fcntl(file->fd, F_OFD_GETLK, &byte) != 0)
        return true;
    return byte.l_type != F_UNLCK || !file_is_ours(file);
}

static bool hold(const struct file *life, u32 slot)
{
    struct flock byte = life_byte(F_WRLCK, slot);
    return fcntl(life->fd, F_OFD_SETLK, &byte) == 0;
}

static void let_go(const struct file *life, u32 slot)
{
    struct flock byte = life_byte(F_UNLCK, slot);
    fcntl(life->fd, F_OFD_SETLK, &byte);
}

/* A description of its own, which a child that is forked inherits. */
int life_open(const struct file *handle, struct life *life)
{
    char path[40];
    if (!file_is_ours(handle)) /* before it is opened: to open a strange file can have effects */
        return -1;
    snprintf(path, sizeof path, "/proc/self/fd/%d", handle->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOCTTY);
    if (fd < 0)
        return -1;
    if (file_note(&life->file, fd) != 0 || life->file.device != handle->device ||
        life->file.inode != handle->inode) {
        close(fd);
        life->file.fd = -1;
        errno = EBADF;
        return -1;
    }
    char *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    life->page = page == MAP_FAILED ? NULL : page; /* without it there is less protection */
    return 0;
}

/* From now on no child inherits it. */
void life_own(const struct life *life)
{
    if (life->page == NULL)
        return;
    madvise(life->page, PAGE, MADV_DONTFORK);
    madvise(life->page, PAGE, MADV_DONTDUMP);
}

static int open_own(struct participation *own)
{
    birth_pause(); /* a child of another thread would inherit it */
    int result = life_open(&own->handle, &own->life);
    if (result == 0)
        life_own(&own->life);
    birth_go_on();
    own->life_epoch = epoch();
    return result;
}

/* What it has locked stays locked as long as another process has the description. */
void life_close(struct life *life)
{
    if (life->page)
        munmap(life->page, PAGE);
    if (file_is_ours(&life->file))
        close(life->file.fd);
    *life = NO_LIFE;
}

/* In a forked child: keep nothing of it. */
void life_of_parent(struct life *life)
{
    if (advice_is_obeyed())
        life->page = NULL; /* MADV_DONTFORK: not mapped here */
    life_close(life);
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

enum known_life { ASKED_NEVER, ALIVE, DEAD, NOBODYS };

struct lives {
    struct blocks *blocks;
    unsigned char known[SLOTS];
};

/* As it was when it was asked first, but for a vacant slot: a child may be born there meanwhile. */
static bool is_alive_known(void *with, u32 slot)
{
    struct lives *lives = with;
    if (slot >= SLOTS)
        return false;
    unsigned char *known = &lives->known[slot];
    bool is_vacant = get(&row_of(lives->blocks, slot)->state) == VACANT;
    if (*known == ASKED_NEVER)
        *known = is_vacant ? NOBODYS : is_alive(lives->blocks, slot) ? ALIVE : DEAD;
    if (*known == NOBODYS)
        return !is_vacant || is_alive(lives->blocks, slot);
    return *known == ALIVE;
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
        if (lives.known[slot] != DEAD)
            continue;
        absorb(blocks, slot);
        put(&row_of(blocks, slot)->state, VACANT);
        FAULT("participant.reaped");
    }
    return n_dead;
}

/* --- joining */

/* A slot that nobody has had, or that was recovered; its byte is held then. */
u32 participant_vacant(const struct blocks *blocks, const struct file *life)
{
    for (u32 slot = 0; slot < SLOTS; slot++) {
        if (get(&row_of(blocks, slot)->state) != VACANT || !hold(life, slot))
            continue;
        if (get(&row_of(blocks, slot)->state) == VACANT)
            return slot;
        let_go(life, slot); /* whoever had it died a moment ago */
    }
    return SLOTS;
}

/* Whether the next ones to join should have dead ones recovered, rather than take new slots. */
bool participant_should_reap(const struct blocks *blocks)
{
    u32 n = n_slots(blocks);
    for (u32 slot = 0; slot < n; slot++)
        if (get(&row_of(blocks, slot)->state) == VACANT)
            return false;
    return n != 0 && n % REAP_EVERY == 0;
}

/* One of a dead participant; a living one holds its byte, whatever was written over its state. */
static u32 hold_dead(const struct blocks *blocks, const struct file *life)
{
    u32 n = n_slots(blocks);
    for (u32 slot = 0; slot < n; slot++)
        if (get(&row_of(blocks, slot)->state) == JOINED && hold(life, slot))
            return slot;
    return SLOTS;
}

static u32 find_slot(const struct blocks *blocks)
{
    const struct file *life = &blocks->own.life.file;
    u32 slot = participant_should_reap(blocks) ? hold_dead(blocks, life) : SLOTS;
    if (slot == SLOTS)
        slot = participant_vacant(blocks, life);
    return slot == SLOTS ? hold_dead(blocks, life) : slot;
}

static void raise_n_slots(struct header *header, u64 least)
{
    u64 seen = get(&header->n_slots);
    while (seen < least && !atomic_compare_exchange_weak_explicit(&header->n_slots, &seen, least,
                                                                  memory_order_relaxed,
                                                                  memory_order_relaxed))
        ;
}

static void tell(const struct participation *own, struct participant *row, u64 also_kept)
{
    u32 k = 0;
    for (; k < KEPT; k++) {
        u64 source = own->kept[k] ? own->kept[k] : also_kept;
        also_kept = own->kept[k] ? also_kept : 0;
        put(&row->kept[k], source);
    }
    put(&row->reading, own->reads_for_ever);
    put(&row->keeps_all, own->keeps_all || also_kept);
}

/* Say whether this process may have views whose references are its parent's. */
void participant_inherit(struct blocks *blocks, bool inherits)
{
    put(&row_of(blocks, blocks->lock.slot)->inherits, inherits);
}

/* Begin the row of a slot whose byte is held, needing no lock; return the incarnation. It is that of
   a child that is not forked yet if `pid` is 0. */
u64 participant_write(struct blocks *blocks, u32 slot, u64 pid, u64 pid_namespace)
{
    struct header *header = &blocks->table.shared->header;
    struct participant *row = row_of(blocks, slot);
    const struct participation *own = &blocks->own;
    u64 incarnation =
        atomic_fetch_add_explicit(&header->incarnation, 1, memory_order_relaxed) + 1;
    put(&row->incarnation, incarnation);
    put(&row->pid, pid);
    put(&row->pid_namespace, pid_namespace);
    for (u32 k = 0; k < COUNTERS; k++)
        put(&row->counters[k], 0);
    /* The parent may have read messages: the child has their bytes too. */
    tell(own, row, pid == 0 && own->n_adopted ? adopted_by(own->incarnation, 0) : 0);
    put(&row->inherits, blocks->first_view != NULL);
    raise_n_slots(header, slot + 1);
    atomic_store_explicit(&row->state, JOINED, memory_order_release);
    return incarnation;
}

/* In a forked child, once: what was inherited is the parent's. */
void participant_renew(struct blocks *blocks)
{
    struct participation *own = &blocks->own;
    if (own->life_epoch == 0 || own->life_epoch == epoch())
        return;
    if (own->n_adopted) {
        if (!participant_keep(blocks, adopted_by(own->incarnation, 0)))
            own->keeps_all = true;
        for (u32 i = 0; i < blocks->table.n_known; i++)
            blocks->table.known[i].adopted = 0;
        own->n_adopted = 0;
    }
    own->life_epoch = 0;
}

/* What was prepared for this child before it was forked is its own. */
static void join_as_born(struct blocks *blocks)
{
    struct participation *own = &blocks->own;
    struct participant *row = row_of(blocks, blocks->lock.slot);
    tell(own, row, 0);
    put(&row->pid_namespace, own->pid_namespace);
    own->epoch = epoch();
    FAULT("participant.born");
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
    if (birth_take(blocks)) {
        join_as_born(blocks);
        return ROOM;
    }
    if (own->life.file.fd < 0 && open_own(own) != 0)
        return DETACHED;
    u32 slot = FAILS("participant.slot") ? SLOTS : find_slot(blocks);
    if (slot == SLOTS)
        return DETACHED;
    FAULT("participant.held");
    struct lives lives = {.blocks = blocks};
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
        let_go(&own->life.file, slot);
        blocks->lock.epoch = 0;
        return taken == LOCK_ERROR ? -1 : taken == LOCK_BUSY ? BUSY : DETACHED;
    }
    /* Whoever had the lock before may have recovered the slot meanwhile. */
    bool had_owner = get(&row_of(blocks, slot)->state) != VACANT;
    if (had_owner) /* asked before what was released is drained */
        for (u32 other = 0; other < n_slots(blocks); other++)
            is_alive_known(&lives, other);
    if (taken == TAKEN_DIRTY || had_owner)
        table_rebuild(&blocks->table, had_owner ? is_alive_known : NULL, &lives);
    if (had_owner)
        absorb(blocks, slot);
    own->incarnation = participant_write(blocks, slot, (u64)getpid(), own->pid_namespace);
    FAULT("participant.joined");
    own->epoch = epoch();
    lock_give(&blocks->lock);
    return ROOM;
}

/* Leave for good. */
void participant_leave(struct blocks *blocks)
{
    struct participation *own = &blocks->own;
    own->retired = true;
    own->epoch = 0;
    life_close(&own->life);
    life_close(&own->birth.life);
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

/* Keep none but those in these places of the list. */
void participant_retain(struct blocks *blocks, const bool *needed)
{
    struct participation *own = &blocks->own;
    for (u32 k = 0; k < KEPT; k++) {
        if (needed[k])
            continue;
        own->kept[k] = 0;
        if (has_joined(blocks))
            put(&row_of(blocks, blocks->lock.slot)->kept[k], 0);
    }
}
