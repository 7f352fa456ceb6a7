/* References: rows without memory that name a published block.

What. `references_publish` makes a leased block one that many may read; `references_add` makes a further
reference to it; `references_take_unheld` finds those that no reference names any more.

How it works. A reference is a block like any other, of no bytes: leased, sealed, claimed, held,
released and recovered by the same steps, and belongs to exactly one process or message. What is
published belongs to nobody, and lives as long as references name it, wherever they are and however
their owners die. It has a count of them, which changes under the lock only, and is counted again
from the rows after a death in a step.

A forked child has its parent's mappings, and no references of its own until it takes some
(published.c). Until then its row says so (`inherits`), from before the fork on, and nothing
published is freed.

Lifetime. That of the table.

When it cannot. A reference that is damaged counts for ever, as its reader may be alive; one that is
damaged so that it names nothing does not, and then a reader may see another block's bytes: checks
find faults, not attacks. */

#include "core.h"

/* The published block that a reference names, or ROWS. */
u32 references_named(struct table_view *table, u32 reference)
{
    u64 used = get(&table_row(table, reference)->used);
    u32 index = (u32)(used & (ROWS - 1));
    if (!is_name(used) || !table_knows(table, index))
        return ROWS;
    const struct row *row = table_row(table, index);
    u64 generation = get(&row->generation);
    bool is_published = get(&row->commit) == commit_word(index, PUBLISHED, generation);
    return is_published && used == name_word(reference, index, generation) ? index : ROWS;
}

static void set_count(struct table_view *table, u32 index, u64 n)
{
    put(&table_row(table, index)->channel, counted_word(index, n));
}

static u64 count_again(struct table_view *table, u32 index)
{
    u64 n = 0;
    for (u32 i = 0; i < table_n_rows(table); i++)
        n += references_named(table, i) == index;
    return n;
}

static u64 counted(struct table_view *table, u32 index)
{
    u64 packed = get(&table_row(table, index)->channel), n = packed & LOW_MASK;
    return packed == counted_word(index, n) ? n : count_again(table, index);
}

/* Step: a block that is leased, complete, or held is published, and named by a block of no bytes that
   was leased. */
bool references_publish(struct table_view *table, u32 index, enum state state, u64 generation, u32 reference)
{
    struct row *row = table_row(table, index);
    u64 seen = get(&row->commit);
    if (!row_is(table, index, state, generation))
        return false;
    put(&table_row(table, reference)->used, name_word(reference, index, generation));
    set_count(table, index, 1);
    FAULT("publish.named");
    if (!row_change(row, index, seen, PUBLISHED))
        return false;
    FAULT("publish.committed");
    return true;
}

/* Step: a block of no bytes that was leased names a published one; whoever leased it has a reference. */
bool references_add(struct table_view *table, u32 reference, u32 index)
{
    const struct row *row = table_row(table, index);
    u64 generation = get(&row->generation), n;
    if (!row_is(table, index, PUBLISHED, generation))
        return false;
    n = counted(table, index);
    put(&table_row(table, reference)->used, name_word(reference, index, generation));
    FAULT("reference.named");
    set_count(table, index, n + 1);
    FAULT("reference.counted");
    return true;
}

/* Step: what a block names, if it is a reference, it names no more. */
void references_remove(struct table_view *table, u32 reference)
{
    struct row *row = table_row(table, reference);
    if (!is_name(get(&row->used)))
        return;
    u32 index = references_named(table, reference);
    u64 n = index == ROWS ? 0 : counted(table, index);
    put(&row->used, 0);
    FAULT("reference.unnamed");
    if (index == ROWS)
        return;
    set_count(table, index, n ? n - 1 : 0);
    if (n <= 1)
        put(&table->shared->header.unheld, 1);
    FAULT("reference.uncounted");
}

/* Rebuilding: before the rows are looked at, and for each that is not free. */
void references_forget_counts(struct table_view *table, u32 n_rows)
{
    for (u32 i = 0; i < n_rows; i++)
        if (row_is(table, i, PUBLISHED, get(&table_row(table, i)->generation))) {
            set_count(table, i, 0);
            put(&table->shared->header.unheld, 1); /* somebody has to look */
        }
}

void references_count(struct table_view *table, u32 reference)
{
    u32 index = references_named(table, reference);
    if (index != ROWS)
        set_count(table, index, (get(&table_row(table, index)->channel) & LOW_MASK) + 1);
}

static bool may_have_views(struct table_view *table, bool (*is_alive)(void *, u32), void *with)
{
    u64 n = get(&table->shared->header.n_slots);
    for (u32 slot = 0; slot < n && slot < SLOTS; slot++) {
        const struct participant *row = &table->shared->participants[slot];
        if (get(&row->inherits) && get(&row->state) == JOINED && is_alive(with, slot))
            return true;
    }
    return get(&table->shared->header.unborn) != 0;
}

/* Step: lease a published block that no reference names; ROWS: there is none. */
u32 references_take_unheld(struct table_view *table, u32 slot, bool (*is_alive)(void *, u32), void *with)
{
    struct header *header = &table->shared->header;
    if (get(&header->unheld) == 0 || may_have_views(table, is_alive, with))
        return ROWS;
    u32 n_rows = table_n_rows(table);
    for (u32 i = 0; i < n_rows; i++)
        if (row_is(table, i, PUBLISHED, get(&table_row(table, i)->generation)) &&
            counted(table, i) == 0) {
            row_lease(table, i, 0, slot);
            return i;
        }
    put(&header->unheld, 0);
    return ROWS;
}
