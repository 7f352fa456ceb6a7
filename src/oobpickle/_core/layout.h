/* Where everything lies in the table file, which all participants map.

What. The words of the header, of a participant's row and of a block's row; size classes; checks.

How it works. Everything is an aligned 64-bit word, or two 32-bit ones. A block's *commit* word says
all that matters of it, and one store of it changes the block's state:

    bits 63..32 check    bits 31..8 slot of the owner    bits 7..0 state

What a faulty process may have overwritten is not believed: the check of a commit word covers index,
generation, owner and state; `place`, `resident` and `n_rows` carry a check in the same word; and
one word of the header covers what never changes there. Checks find faults, not attacks.

Lifetime. VERSION changes with the layout; a process with another one refuses to attach.

When it cannot. At most ROWS blocks and SLOTS participants at a time. */

#ifndef OOBPICKLE_LAYOUT_H
#define OOBPICKLE_LAYOUT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef _Atomic uint64_t word;
typedef _Atomic uint32_t half;

enum {
    PAGE = 4096,
    ROWS = 1 << 20,
    SLOTS = 4096,
    CLASSES = 128,
    COUNTERS = 48,
    KEPT = 64,   /* sources of messages that a participant may still load */
    PASSED = 32, /* ends of channels that were passed on last */
    CHUNK = 1 << 16, /* rows that are mapped at once */
    VERSION = 6,
};

/* Beside the size class in a row's place: the block lies in the file on disk, at that offset. Each list
   of free blocks has as many heads more. */
#define ON_DISK 0x80u
#define LISTS (2 * CLASSES)

#define HUGE ((u64)2 << 20)
#define WINDOW ((u64)64 << 20) /* what is mapped at once; a larger block has windows of its own */
#define MAGIC 0x4c4b4349504f4f4fULL

enum state {
    NONE,
    FREE,
    LEASED,
    IN_FLIGHT,
    HELD,
    RELEASED,    /* by its owner, and not seen by a holder of the lock yet */
    EMPTIED,     /* the same, and its pages have gone back to the system */
    QUARANTINED, /* damaged: not used any more */
    PUBLISHED,   /* many read it and nobody writes: it lives as long as a reference names it */
};

#define STATE_MASK 0xFFULL
#define LOW_MASK 0xFFFFFFFFULL
#define OWNER_SHIFT 8
#define OWNER_MASK 0xFFFFFFULL
#define RESIDENT_MASK (((u64)1 << 48) - 1)
#define PLACE_MASK (((u64)1 << 40) - 1)

/* What `channel` of a row may hold, besides the number of a pipe or a socket (bit 63). */
#define FOLLOWS ((u64)1 << 62)  /* the message's first block: index, and generation above it */
#define ADOPTED ((u64)1 << 61)  /* it has left its channel: who has read it, and the generation */
#define UNPROVEN ((u64)1 << 60) /* beside a channel whose readers may be no connections */
#define PREPARED ((u64)1 << 59) /* the pages of a free block are kept until a message takes them */
#define INCOMPLETE ((u64)1 << 58) /* of a free block: who knows how many of its pages were made */
#define INDEX_BITS 20

/* What `used` of a reference holds: which published block it names, with a check. */
#define NAMES ((u64)1 << 63)
#define NAMED_MASK (((u64)1 << 48) - 1)
#define FOLLOWED_MASK (((u64)1 << 60) - 1)
#define ADOPTION_SHIFT 28
#define ADOPTION_MASK (((u64)1 << ADOPTION_SHIFT) - 1)

/* One block: a cache line. `place` never changes once the row is counted. */
struct row {
    word commit;
    word generation; /* counts the leases; never reset */
    word place;      /* check << 40 | offset in pages << 8 | ON_DISK | size class */
    word used;       /* bytes of the message in it; of a reference, what it names */
    word resident;   /* bytes whose pages, or room on disk, are counted: there, or about to be made by who
                        has leased it (`reserved`, core.h); with a check in the upper bits */
    word channel;    /* where the envelope waits, see above; of a published block, how many name it */
    half next;       /* link of a free list: index + 1, or 0 */
    half below;      /* link of the stack of released blocks, likewise, while it is on it */
    half last;       /* slot that wrote it last */
    half punches;    /* how often its pages went back to the system */
};

enum { VACANT = 0, JOINED = 1 };

/* The counters that are counted here; `_statistics` has all of them. */
enum { N_COPIED_AT_FORK = 6, NBYTES_COPIED_AT_FORK = 7, N_RECLAIMED = 8, N_SHARED_AFTER_FORK = 9 };

struct participant { /* 1 KiB */
    word state;
    word incarnation;
    word pid;
    word pid_namespace;
    word reading; /* messages that it may have taken from their channel and not adopted yet */
    word steps;   /* counts its steps: a holder of the lock that moves is not stopped */
    word keeps_all;
    word inherits; /* it may have views whose references are those of its parent */
    word unused[8];
    word counters[COUNTERS];
    word kept[KEPT];
};

struct header {
    /* Never change; `check` is over them. */
    u64 magic, version, identity[2], capacity, data_nbytes, threshold, wait, copy, huge;
    u64 data_inode, locks_inode, disk_nbytes, disk_inode, check; /* `disk`: 0 without */
    u64 unused_constants[1];
    /* Each on a cache line of its own: who waits for one does not slow down the others. */
    _Alignas(64) half lock;     /* slot of the holder + 1, and WAITERS */
    _Alignas(64) word released; /* top of the stack: index + 1 */
    _Alignas(64) word held;     /* bytes of messages in blocks that are held, in memory */
    _Alignas(64) word idle;     /* bytes of pages of free blocks, without those that are prepared */
    _Alignas(64) word dirty;
    word draining; /* what `released` was when a holder of the lock began to empty the stack */
    word n_rows;   /* with a check */
    word n_rows_again;
    word resident; /* bytes that blocks may occupy, in memory ... */
    word on_disk;  /* ... and on disk */
    word n_slots;
    word incarnation;
    word closed;
    word strangers; /* a process that cannot join has read messages: nothing is reclaimed */
    word unheld;    /* there may be published blocks that no reference names */
    word unborn;    /* a child that is not known may have views: nothing published is freed */
    word n_passed;
    word passed[PASSED];
    half warm[LISTS]; /* heads of the free lists, index + 1: blocks with pages */
    half empty[LISTS];
    /* Counters of the dead, twice: the sum is written into the bank that is not valid, with the
       incarnation of whom it includes, and one store makes it the valid one. */
    word bank;
    word totals[2][COUNTERS + 1];
};

/* The rows come behind it, and are mapped in chunks. */
struct table {
    union {
        struct header header;
        char pages[16384];
    };
    struct participant participants[SLOTS];
};

#define TABLE_NBYTES (sizeof(struct table) + ROWS * sizeof(struct row))

_Static_assert(sizeof(struct row) == 64, "a row is a cache line");
_Static_assert(sizeof(struct participant) == 1024, "a participant is a KiB");
_Static_assert(sizeof(struct header) <= 16384, "the header fits before the participants");
_Static_assert(sizeof(struct table) % 4096 == 0, "what comes behind begins a page");

#define BY_FIRST 0x9E3779B97F4A7C15ULL
#define BY_SECOND 0xC2B2AE3D27D4EB4FULL
#define PLUS 0x165667B19E3779F9ULL

static inline u64 low_of(enum state state, u32 slot)
{
    return (u64)slot << OWNER_SHIFT | (u64)state;
}

static inline u64 commit_word(u32 index, u64 low, u64 generation)
{
    u64 mixed = generation * BY_FIRST + ((u64)index << 32 | low) * BY_SECOND + PLUS;
    return (mixed & ~LOW_MASK) | low;
}

static inline enum state state_of(u64 commit)
{
    return (enum state)(commit & STATE_MASK);
}

static inline u32 owner_of(u64 commit)
{
    return (u32)(commit >> OWNER_SHIFT & OWNER_MASK);
}

static inline u64 place_word(u32 index, u64 offset, u32 size_class)
{
    u64 place = offset / PAGE << 8 | size_class;
    return ((place * BY_FIRST + (u64)index * BY_SECOND + PLUS) & ~PLACE_MASK) | place;
}

static inline u64 resident_word(u32 index, u64 nbytes)
{
    return ((nbytes * BY_FIRST + (u64)index * BY_SECOND + PLUS) & ~RESIDENT_MASK) | nbytes;
}

static inline u64 rows_word(u64 n_rows)
{
    return ((n_rows * BY_FIRST + PLUS) & ~LOW_MASK) | n_rows;
}

static inline u64 counted_word(u32 index, u64 n)
{
    return ((n * BY_FIRST + (u64)index * BY_SECOND + PLUS) & ~LOW_MASK) | n;
}

/* A reference names a published block, and as much of its generation as there is room for. */
static inline u64 name_word(u32 reference, u32 index, u64 generation)
{
    u64 named = (generation << INDEX_BITS | index) & NAMED_MASK;
    u64 mixed = named * BY_FIRST + (u64)reference * BY_SECOND + PLUS;
    return NAMES | (mixed & ~NAMED_MASK & ~NAMES) | named;
}

static inline bool is_name(u64 used)
{
    return used & NAMES;
}

static inline u64 follows(u32 index, u64 generation)
{
    return FOLLOWS | ((generation << INDEX_BITS | index) & FOLLOWED_MASK);
}

static inline u64 adopted_by(u64 incarnation, u64 generation)
{
    return ADOPTED | (incarnation & LOW_MASK) << ADOPTION_SHIFT | (generation & ADOPTION_MASK);
}

static inline u64 round_up(u64 nbytes, u64 unit)
{
    return (nbytes + unit - 1) / unit * unit;
}

/* Size classes, four to each doubling: a range is never split or merged, since address space is
   free and only pages cost. */
static inline u32 class_of(u64 nbytes)
{
    u64 pages = (nbytes + PAGE - 1) / PAGE;
    if (pages <= 4)
        return pages ? (u32)pages - 1 : 0;
    u32 shift = 64 - (u32)__builtin_clzll(pages - 1) - 3;
    return 4 * shift + (u32)((pages - 1) >> shift);
}

static inline u64 class_nbytes(u32 size_class)
{
    size_class &= ~ON_DISK;
    if (size_class < 4)
        return ((u64)size_class + 1) * PAGE;
    u32 shift = (size_class - 4) / 4, step = (size_class - 4) % 4;
    return ((u64)(step + 5) << shift) * PAGE;
}

/* The address space of one block: its bytes, then a hole that an overflow falls into. */
static inline u64 class_stride(u32 size_class)
{
    u64 nbytes = class_nbytes(size_class);
    return round_up(nbytes + PAGE, nbytes >= HUGE ? HUGE : PAGE);
}

static inline u64 get(const word *from)
{
    return atomic_load_explicit((word *)(uintptr_t)from, memory_order_relaxed);
}

static inline void put(word *to, u64 value)
{
    atomic_store_explicit(to, value, memory_order_relaxed);
}

static inline u32 get_half(const half *from)
{
    return atomic_load_explicit((half *)(uintptr_t)from, memory_order_relaxed);
}

static inline void put_half(half *to, u32 value)
{
    atomic_store_explicit(to, value, memory_order_relaxed);
}

#endif
