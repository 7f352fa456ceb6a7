/* The table of blocks: who has which block.

What. Rows are made, leased, freed and counted; the free lists and sums are rebuilt.

How it works. A block belongs to nobody or to exactly one participant:

    FREE -lease-> LEASED -seal-> IN FLIGHT -claim-> HELD -release-> RELEASED -drain-> FREE

lease and drain are steps under the lock. seal, claim and release need none: each changes the
block's commit word, once, which only the owner (seal, release) or whoever comes first (claim) may
do. What is RELEASED waits on a stack, onto which any process pushes; whoever next has the lock
empties it. Everything but the rows can be rebuilt from the rows, and is, after a death in a step.

A faulty process may write anywhere in the file. So a row whose words do not agree is QUARANTINED
when somebody meets it; a link that leads to a block that is not free makes the lists be rebuilt.

Lifetime. A row is made when it is first needed, and never destroyed. Its place never changes, so
each process reads it once, checks it, and from then on believes its own copy only. A generation
counts each lease and is never reset, so an old placement is recognised for ever.

When it cannot. `table_lease` says why not; a damaged row has no place, and nobody uses it. */

#include "core.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { AFFINITY = 8, CLASSES_UP = 4, ROWS_AHEAD = 1024 };

/* Bytes of the pages under the first `nbytes` bytes of a block of such a class. */
u64 table_pages(const struct table_view *table, u32 size_class, u64 nbytes)
{
    return round_up(nbytes, table->huge && !(size_class & ON_DISK) && nbytes >= HUGE ? HUGE : PAGE);
}

/* Step: a block has more pages than before, or less. */
void table_count_pages(struct table_view *table, u32 index, u64 before, u64 after)
{
    struct header *header = &table->shared->header;
    word *total = is_on_disk(table, index) ? &header->on_disk : &header->resident;
    u64 others = get(total) > before ? get(total) - before : 0;
    put(&table_row(table, index)->resident, resident_word(index, after));
    put(total, others + after);
}

/* The pages of a block are free, or are no more. What is on disk is not kept, and no memory. */
void table_count_idle(struct table_view *table, u32 index, int64_t nbytes)
{
    if (!is_on_disk(table, index))
        atomic_fetch_add_explicit(&table->shared->header.idle, (u64)nbytes, memory_order_relaxed);
}

static struct row *map_chunk(struct table_view *table, u32 chunk)
{
    static struct row unmapped[CHUNK]; /* no address space: none of its rows is in order */
    const int access = PROT_READ | PROT_WRITE;
    u64 nbytes = CHUNK * sizeof(struct row), offset = sizeof(struct table) + chunk * nbytes;
    char *mapped = file_is_ours(&table->file)
                       ? map_quietly(table->file.fd, offset, nbytes, MAP_SHARED, access, true)
                       : map_behind((char *)table->shared, offset, nbytes, access, true);
    if (mapped == NULL)
        return unmapped;
    return table->chunks[chunk] = (struct row *)(void *)mapped;
}

struct row *table_row(struct table_view *table, u32 index)
{
    struct row *chunk = table->chunks[index / CHUNK];
    return (chunk ? chunk : map_chunk(table, index / CHUNK)) + index % CHUNK;
}

/* --- rows */

static bool is_number_of_rows(const struct table_view *table, u64 n_rows)
{
    return n_rows >= table->n_known && n_rows <= ROWS;
}

/* Whether a place is where `make_row` may have put it: of two rows in one file the later one is behind,
   none lies in two windows, and a large one has its own. With a right check it may be forged all the
   same; what this process maps never overlaps. */
static bool is_in_order(const struct table_view *table, u32 index, const struct place *place)
{
    const u64 within = place->offset % WINDOW;
    const bool on_disk = place->size_class & ON_DISK;
    const struct place *other;
    if (place->stride > WINDOW ? within != 0 : within + place->stride > WINDOW)
        return false;
    for (u32 i = index < table->n_known ? index : table->n_known; i-- > 0;) {
        other = &table->known[i].place;
        if (other->nbytes && is_on_disk(table, i) == on_disk) {
            if (other->offset + other->stride > place->offset)
                return false;
            break;
        }
    }
    for (u32 i = index + 1; i < table->n_known; i++) {
        other = &table->known[i].place;
        if (other->nbytes && is_on_disk(table, i) == on_disk)
            return place->offset + place->stride <= other->offset;
    }
    return true;
}

static bool read_place(struct table_view *table, u32 index, struct place *place)
{
    u64 packed = get(&table_row(table, index)->place);
    place->size_class = packed & 0xFF;
    place->offset = (packed & PLACE_MASK) >> 8;
    place->offset *= PAGE;
    if (packed != place_word(index, place->offset, place->size_class))
        return false;
    u64 file_nbytes = place->size_class & ON_DISK ? table->disk_nbytes : table->data_nbytes;
    place->nbytes = class_nbytes(place->size_class);
    place->stride = class_stride(place->size_class);
    return place->stride <= file_nbytes && place->offset <= file_nbytes - place->stride &&
           is_in_order(table, index, place);
}

/* Where the word with the check was overwritten, the other one counts if it is that of a last row. */
static u32 count_rows(struct table_view *table, bool *is_certain)
{
    const struct header *header = &table->shared->header;
    u64 packed = atomic_load_explicit((word *)&header->n_rows, memory_order_acquire);
    u64 n_rows = packed & LOW_MASK;
    struct place place;
    *is_certain = packed == rows_word(n_rows) && is_number_of_rows(table, n_rows);
    if (!*is_certain) {
        n_rows = get(&header->n_rows_again);
        *is_certain = is_number_of_rows(table, n_rows) && n_rows < ROWS &&
                      (n_rows == 0 || read_place(table, (u32)n_rows - 1, &place)) &&
                      get(&table_row(table, (u32)n_rows)->place) == 0;
    }
    return *is_certain ? (u32)n_rows : table->n_known;
}

u32 table_n_rows(struct table_view *table)
{
    bool is_certain;
    return count_rows(table, &is_certain);
}

/* Read the places of all rows that are new to this process. */
static bool learn_rows(struct table_view *table)
{
    u32 n_rows = table_n_rows(table);
    if (n_rows == table->n_known)
        return true;
    if (n_rows > table->n_room) {
        struct known *known = realloc(table->known, (size_t)n_rows * 2 * sizeof *known);
        if (known == NULL)
            return false;
        table->known = known;
        table->n_room = 2 * n_rows;
    }
    for (; table->n_known < n_rows; table->n_known++) {
        struct known *known = &table->known[table->n_known];
        *known = (struct known){0};
        if (!read_place(table, table->n_known, &known->place))
            known->place.nbytes = 0;
    }
    return true;
}

/* Whether there is such a block, and its place is in order. */
bool table_knows(struct table_view *table, u32 index)
{
    if (index >= table->n_known && (!learn_rows(table) || index >= table->n_known))
        return false;
    struct known *known = &table->known[index];
    if (known->place.nbytes == 0) /* damaged, or not written yet when it was read first */
        return read_place(table, index, &known->place) || (known->place.nbytes = 0);
    return true;
}

/* Give the next rows their pages: on a full mount a fault would be fatal. */
static bool reserve_rows(struct table_view *table, u32 n_more)
{
    u32 n_rows = table_n_rows(table), needed = n_rows + n_more + 1;
    if (needed > ROWS)
        needed = ROWS;
    if (needed <= table->n_reserved || n_rows >= ROWS)
        return true;
    u32 end = needed + ROWS_AHEAD < ROWS ? needed + ROWS_AHEAD : ROWS;
    if (table->n_reserved / CHUNK != (end - 1) / CHUNK) /* one after the other */
        end = (table->n_reserved / CHUNK + 1) * CHUNK;
    char *from = (char *)table_row(table, table->n_reserved);
    from -= (uintptr_t)from % PAGE;
    u64 nbytes = round_up((u64)((char *)(table_row(table, end - 1) + 1) - from), PAGE);
    if (advise(from, nbytes, MADV_POPULATE_WRITE) != 0 && errno != EINVAL)
        return false; /* EINVAL: a kernel before 5.14 */
    table->n_reserved = end;
    return end >= needed || reserve_rows(table, n_more);
}

/* The last block in the same file, or NULL; false: one of those that may be it is damaged. */
static bool find_last(struct table_view *table, u32 n_rows, u32 size_class, const struct place **last)
{
    *last = NULL;
    for (u32 i = n_rows; i-- > 0 && *last == NULL;) {
        if (!table_knows(table, i))
            return false;
        if (is_on_disk(table, i) == ((size_class & ON_DISK) != 0))
            *last = &table->known[i].place;
    }
    return true;
}

/* Where the next block of a class goes: none lies in two windows, a large one has its own. */
static u64 offset_after(const struct place *last, u32 size_class)
{
    u64 stride = class_stride(size_class), offset = 0;
    if (last) {
        offset = last->offset + last->stride;
        if (last->stride > WINDOW)
            offset = round_up(offset, WINDOW);
    }
    if (class_nbytes(size_class) >= HUGE)
        offset = round_up(offset, HUGE);
    return offset % WINDOW + stride > WINDOW ? round_up(offset, WINDOW) : offset;
}

static enum shortage make_row(struct table_view *table, u32 size_class, u32 *made)
{
    struct header *header = &table->shared->header;
    bool is_certain;
    u32 index = count_rows(table, &is_certain);
    if (index >= ROWS)
        return TABLE;
    const struct place *last;
    if (!is_certain || !find_last(table, index, size_class, &last))
        return DAMAGED;
    if (FAILS("row.make"))
        return errno == ENOSPC ? TABLE : DAMAGED;
    if (!reserve_rows(table, 1))
        return SPACE;
    u64 offset = offset_after(last, size_class);
    if (offset + class_stride(size_class) > (size_class & ON_DISK ? table->disk_nbytes : table->data_nbytes))
        return size_class & ON_DISK ? SPACE : TABLE;
    struct row *row = table_row(table, index);
    put(&row->generation, 0);
    put(&row->channel, 0);
    put(&row->resident, resident_word(index, 0));
    put_half(&row->below, 0);
    put_half(&row->punches, 0);
    put(&row->commit, commit_word(index, FREE, 0));
    put(&row->place, place_word(index, offset, size_class));
    FAULT("row.written");
    put(&header->n_rows_again, index + 1);
    FAULT("row.numbered");
    atomic_store_explicit(&header->n_rows, rows_word(index + 1), memory_order_release);
    FAULT("row.counted");
    *made = index;
    return table_knows(table, index) ? ROOM : DAMAGED;
}

/* --- what is believed */

static bool is_sound(struct table_view *table, u32 index, u64 commit)
{
    return table_knows(table, index) && state_of(commit) != QUARANTINED &&
           commit == commit_word(index, commit & LOW_MASK, get(&table_row(table, index)->generation));
}

/* Whether a block is in a state, of a lease. Needs no lock. */
bool row_is(struct table_view *table, u32 index, enum state state, u64 generation)
{
    if (!table_knows(table, index))
        return false;
    u64 commit = atomic_load_explicit(&table_row(table, index)->commit, memory_order_acquire);
    return state_of(commit) == state && commit == commit_word(index, commit & LOW_MASK, generation) &&
           get(&table_row(table, index)->generation) == generation;
}

/* A generation that was counted but not committed: its owner died, or is in the middle of it. */
static bool is_torn(struct table_view *table, u32 index, u64 commit)
{
    return table_knows(table, index) &&
           commit == commit_word(index, FREE, get(&table_row(table, index)->generation) - 1);
}

/* Bytes of a message in it; none if it is a reference. */
u64 row_nbytes(const struct row *row)
{
    u64 used = get(&row->used);
    return is_name(used) ? 0 : used;
}

bool row_is_damaged(struct table_view *table, u32 index)
{
    for (int i = 0; i < 3; i++) { /* without the lock, one may be half written */
        u64 commit = get(&table_row(table, index)->commit);
        if (is_sound(table, index, commit) || is_torn(table, index, commit))
            return false;
    }
    return true;
}

void row_quarantine(struct table_view *table, u32 index)
{
    struct row *row = table_row(table, index);
    put(&row->commit, commit_word(index, QUARANTINED, get(&row->generation)));
}

u64 row_resident(const struct row *row, u32 index)
{
    u64 packed = get(&row->resident), nbytes = packed & RESIDENT_MASK;
    return packed == resident_word(index, nbytes) ? nbytes : 0;
}

/* The same of a block that this process knows: of a forged number no more than the block has room for. */
u64 table_resident(struct table_view *table, u32 index)
{
    u64 nbytes = row_resident(table_row(table, index), index), most = table->known[index].place.stride;
    return nbytes < most ? nbytes : most;
}

/* Change the commit word that was seen to one with another owner or state; false if it has changed. */
bool row_change(struct row *row, u32 index, u64 seen, u64 low)
{
    u64 generation = get(&row->generation);
    return seen == commit_word(index, seen & LOW_MASK, generation) &&
           atomic_compare_exchange_strong_explicit(&row->commit, &seen,
                                                   commit_word(index, low, generation),
                                                   memory_order_acq_rel, memory_order_relaxed);
}

/* Step: the pages of a block have gone back to the system. */
void row_emptied(struct table_view *table, u32 index)
{
    struct row *row = table_row(table, index);
    table_count_pages(table, index, row_resident(row, index), 0);
    put_half(&row->punches, get_half(&row->punches) + 1);
    FAULT("row.emptied");
}

/* --- free lists */

static void link_free(struct table_view *table, u32 index)
{
    struct row *row = table_row(table, index);
    struct header *header = &table->shared->header;
    u32 size_class = table->known[index].place.size_class;
    half *head = &(row_resident(row, index) ? header->warm : header->empty)[size_class];
    put_half(&row->next, get_half(head));
    FAULT("free.linked");
    put_half(head, index + 1);
}

static bool is_free_for(struct table_view *table, u32 index, u64 nbytes)
{
    if (!table_knows(table, index) || nbytes > table->known[index].place.nbytes)
        return false;
    struct row *row = table_row(table, index);
    return get(&row->commit) == commit_word(index, FREE, get(&row->generation));
}

/* The link to the block of a list that this process wrote last: its pages are in our page tables. */
static half *nearest(struct table_view *table, half *head, u64 nbytes, u32 slot)
{
    half *link = head;
    for (int i = 0; i < AFFINITY; i++) {
        u32 index = get_half(link) - 1;
        if (index >= ROWS)
            break;
        struct row *row = table_row(table, index);
        if (get_half(&row->last) == slot && row_resident(row, index) >= nbytes)
            return link;
        link = &row->next;
    }
    return head;
}

static half *find_free(struct table_view *table, u32 size_class, u64 nbytes, u32 slot)
{
    struct header *header = &table->shared->header;
    /* A reference takes no pages: nobody would know any more which of them were made. */
    if (nbytes && get_half(&header->warm[size_class]))
        return nearest(table, &header->warm[size_class], nbytes, slot);
    for (u32 up = size_class + 1; nbytes && up <= size_class + CLASSES_UP && up < LISTS; up++) {
        if ((up ^ size_class) & ON_DISK)
            break;
        u32 index = get_half(&header->warm[up]) - 1;
        if (index < ROWS && row_resident(table_row(table, index), index) >= nbytes)
            return &header->warm[up];
    }
    return get_half(&header->empty[size_class]) ? &header->empty[size_class] : NULL;
}

/* --- leasing and freeing */

void row_lease(struct table_view *table, u32 index, u64 nbytes, u32 slot)
{
    struct row *row = table_row(table, index);
    u64 generation = get(&row->generation) + 1;
    put(&row->generation, generation);
    put(&row->used, nbytes);
    put(&row->channel, 0);
    put_half(&row->last, slot);
    FAULT("lease.written");
    put(&row->commit, commit_word(index, low_of(LEASED, slot), generation));
    FAULT("lease.committed");
}

static half *find_sound(struct table_view *table, u32 size_class, u64 nbytes, u32 slot)
{
    half *link = find_free(table, size_class, nbytes, slot);
    if (link == NULL || is_free_for(table, get_half(link) - 1, nbytes))
        return link;
    table_rebuild(table, NULL, NULL); /* a link, or what it leads to, was overwritten */
    link = find_free(table, size_class, nbytes, slot);
    return link && is_free_for(table, get_half(link) - 1, nbytes) ? link : NULL;
}

/* Step: lease a block of `nbytes` bytes; `where`: 0, or ON_DISK. How much the disk has, it says itself. */
enum shortage table_lease(struct table_view *table, u64 nbytes, u32 where, u32 slot,
                          struct leased *leased, u64 *room)
{
    const struct header *header = &table->shared->header;
    u32 size_class = class_of(nbytes) | where;
    half *link = find_sound(table, size_class, nbytes, slot);
    u32 found = link ? get_half(link) - 1 : 0;
    struct row *row = table_row(table, found);
    u64 have = link ? table_resident(table, found) : 0, want = table_pages(table, where, nbytes);
    if (want > have && !where) {
        u64 resident = get(&header->resident);
        *room = resident < table->capacity ? table->capacity - resident : 0;
        if (want - have > *room)
            return FULL;
    }
    if (link) {
        put_half(link, get_half(&row->next));
        FAULT("lease.unlinked");
        if (have && !(get(&row->channel) & PREPARED))
            table_count_idle(table, found, -(int64_t)have);
    } else {
        enum shortage shortage = make_row(table, size_class, &found);
        if (shortage != ROOM)
            return shortage;
        row = table_row(table, found);
    }
    if (want > have)
        table_count_pages(table, found, have, want);
    *leased = (struct leased){
        .index = found, .counted = have, .present = get(&row->channel) & INCOMPLETE ? 0 : have};
    row_lease(table, found, nbytes, slot);
    return ROOM;
}

/* Step: lease the first free block of a class that has pages, to empty it; ROWS: there is none. */
u32 table_take_warm(struct table_view *table, u32 size_class, u32 slot)
{
    struct header *header = &table->shared->header;
    half *head = &header->warm[size_class];
    if (get_half(head) && !is_free_for(table, get_half(head) - 1, 0))
        table_rebuild(table, NULL, NULL);
    u32 index = get_half(head) - 1;
    if (get_half(head) == 0 || !is_free_for(table, index, 0))
        return ROWS;
    struct row *row = table_row(table, index);
    put_half(head, get_half(&row->next));
    if (!(get(&row->channel) & PREPARED))
        table_count_idle(table, index, -(int64_t)table_resident(table, index));
    row_lease(table, index, 0, slot);
    return index;
}

/* Put a block that its owner has released on the stack: without the lock. */
void table_push(struct table_view *table, u32 index)
{
    word *top = &table->shared->header.released;
    half *below = &table_row(table, index)->below;
    u64 seen = get(top);
    do
        put_half(below, (u32)seen);
    while (!atomic_compare_exchange_weak_explicit(top, &seen, (u64)index + 1, memory_order_release,
                                                  memory_order_relaxed));
}

/* Step: make a released block free. */
void table_free(struct table_view *table, u32 index, u64 generation, bool emptied)
{
    struct row *row = table_row(table, index);
    if (emptied)
        row_emptied(table, index);
    references_remove(table, index);
    /* Its link stays: whoever follows us, if we die here, frees what is below. */
    put(&row->commit, commit_word(index, FREE, generation));
    FAULT("free.committed");
    link_free(table, index);
}

static bool is_released(enum state state)
{
    return state == RELEASED || state == EMPTIED;
}

static void free_chain(struct table_view *table, u64 link)
{
    for (u32 n = 0; link != 0 && link <= ROWS && n < ROWS; n++) {
        u32 index = (u32)link - 1;
        if (!table_knows(table, index))
            return; /* damaged: what is below comes back with its owner's end */
        struct row *row = table_row(table, index);
        u64 commit = get(&row->commit);
        link = get_half(&row->below);
        if (is_released(state_of(commit)) && is_sound(table, index, commit))
            table_free(table, index, get(&row->generation), state_of(commit) == EMPTIED);
    }
}

/* Step: free what was released since the last one. */
void table_drain(struct table_view *table)
{
    struct header *header = &table->shared->header;
    u64 top = get(&header->released);
    if (top == 0)
        return;
    /* Noted first: if we die in the middle, whoever rebuilds finds what is left. */
    do
        put(&header->draining, top);
    while (!atomic_compare_exchange_weak_explicit(&header->released, &top, 0, memory_order_acquire,
                                                  memory_order_relaxed));
    FAULT("drain.taken");
    free_chain(table, top);
    put(&header->draining, 0);
}

/* --- rebuilding */

static void mend_row(struct table_view *table, u32 index)
{
    struct row *row = table_row(table, index);
    u64 commit = get(&row->commit);
    if (is_sound(table, index, commit) || state_of(commit) == QUARANTINED)
        return;
    if (is_torn(table, index, commit)) /* the generation stays used up */
        put(&row->commit, commit_word(index, FREE, get(&row->generation)));
    else
        row_quarantine(table, index);
}

/* Step: recompute lists and sums from the rows; quarantine what is damaged. With `is_alive`, what
   dead participants leased, held or were releasing is free from now on. */
void table_rebuild(struct table_view *table, bool (*is_alive)(void *, u32), void *with)
{
    struct header *header = &table->shared->header;
    u64 resident = 0, on_disk = 0, held = 0, idle = 0;
    u64 held_before = get(&header->held), idle_before = get(&header->idle);
    bool is_certain;
    u32 n_rows = count_rows(table, &is_certain);

    if (is_certain) {
        put(&header->n_rows, rows_word(n_rows));
        put(&header->n_rows_again, n_rows);
    }
    free_chain(table, get(&header->draining));
    put(&header->draining, 0);
    table_drain(table);
    references_forget_counts(table, n_rows);
    for (u32 i = 0; i < LISTS; i++) {
        put_half(&header->warm[i], 0);
        put_half(&header->empty[i], 0);
    }
    for (u32 i = n_rows; i-- > 0;) { /* the lowest address is at the head of its list */
        if (!table_knows(table, i) && table_row(table, i)->place == 0)
            continue;
        mend_row(table, i);
        struct row *row = table_row(table, i);
        u64 commit = get(&row->commit);
        enum state state = state_of(commit);
        bool is_lost = is_released(state) || state == LEASED || state == HELD;
        if (is_lost && is_alive && !is_alive(with, owner_of(commit)) &&
            row_change(row, i, commit, FREE)) {
            if (state == EMPTIED)
                row_emptied(table, i);
            if (state == LEASED) /* who knows how many of its pages were made */
                put(&row->channel, INCOMPLETE);
            state = FREE;
        }
        bool is_known = table_knows(table, i);
        u64 pages = is_known ? table_resident(table, i) : row_resident(row, i);
        bool is_idle = state == RELEASED || (state == FREE && !(get(&row->channel) & PREPARED));
        if (is_known && is_on_disk(table, i)) {
            on_disk += pages;
        } else {
            resident += pages;
            held += state == HELD ? row_nbytes(row) : 0;
            idle += is_idle ? pages : 0;
        }
        if (state == FREE) {
            put(&row->used, 0);
            link_free(table, i);
        } else {
            references_count(table, i); /* damaged, too: its reader may be alive */
        }
    }
    put(&header->resident, resident);
    put(&header->on_disk, on_disk);
    /* Others hold and release meanwhile. */
    atomic_fetch_add_explicit(&header->held, held - held_before, memory_order_relaxed);
    atomic_fetch_add_explicit(&header->idle, idle - idle_before, memory_order_relaxed);
}
