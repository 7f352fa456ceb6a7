/* What the files of the core share. Each has one noun; its first comment says which. */

#ifndef OOBPICKLE_CORE_H
#define OOBPICKLE_CORE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>
#include <structmember.h>

/* The headers of 3.12 and of the first 3.13 return these without a new reference. They never die
   there, but the same binary runs on 3.11, where each call would take a reference away. */
#undef Py_RETURN_NONE
#undef Py_RETURN_TRUE
#undef Py_RETURN_FALSE
#define Py_RETURN_NONE return Py_NewRef(Py_None)
#define Py_RETURN_TRUE return Py_NewRef(Py_True)
#define Py_RETURN_FALSE return Py_NewRef(Py_False)

#include "layout.h"

/* --- module.c */

int type_make(PyObject *module, PyTypeObject **type, PyType_Spec *spec);
void list_add(PyObject **list, PyObject *made);
PyObject *list_of(const u64 *numbers, size_t n);

/* --- faults.c: places where a test can have this process killed */

extern const char *fault_armed;
void fault_reach(const char *point);
bool fault_fail(const char *point);
PyObject *fault_arm(PyObject *module, PyObject *arguments);

/* Whether a system call is to count as refused, with errno. */
#define FAILS(point) (__builtin_expect(fault_armed != NULL, 0) && fault_fail(point))

#define FAULT(point)                                                                               \
    do {                                                                                           \
        if (__builtin_expect(fault_armed != NULL, 0))                                              \
            fault_reach(point);                                                                    \
    } while (0)

/* --- epoch.c: whose is it, after a fork? */

u64 epoch(void); /* differs in each process of a tree of forks; 0: of a fork without any handler */
int epoch_start(void);

/* --- mapping.c: the files of an arena, and windows into the data */

struct file {
    int fd;
    u64 device, inode;
};

struct window {
    char *address;
    u64 nbytes;
    u32 n_users; /* leases and blocks that have an address in it */
    u32 opened;  /* units of 2 MiB that may be touched: bits, or of a large block how many */
    bool is_open; /* all of it, for want of mappings */
};

struct mapping {
    struct file data;
    bool is_on_disk, is_memory; /* a file on a tmpfs is both */
    char *first; /* of the data: one page, in the place of a descriptor that somebody may close */
    u64 data_nbytes;
    u32 n_windows;
    struct window *windows; /* one for each WINDOW bytes of the data file */
};

struct range {
    char *address;
    u64 nbytes;
};

bool file_is_ours(const struct file *file);
int file_note(struct file *file, int fd);
char *map_behind(char *first, u64 offset, u64 nbytes, int protection, bool huge);
char *map_quietly(int fd, u64 offset, u64 nbytes, int sharing, int protection, bool huge);
int mapping_start(struct mapping *mapping, int fd, bool is_on_disk);
char *mapping_at(struct mapping *mapping, u64 offset, u64 stride, u64 nbytes);
char *mapping_again(const struct mapping *mapping, u64 offset, u64 nbytes);
void mapping_bar(struct mapping *mapping, u64 offset, u64 stride);
void mapping_use(struct mapping *mapping, u64 offset);
void mapping_leave(struct mapping *mapping, u64 offset);
void mapping_unmap_unused(struct mapping *mapping);
void mapping_unmap_but(struct mapping *mapping, struct range *kept, size_t n);
void mapping_end(struct mapping *mapping);
int mapping_reserve(const struct mapping *mapping, u64 offset, char *address, u64 nbytes, bool by_fault);
int mapping_punch(const struct mapping *mapping, u64 offset, char *address, u64 nbytes);
int mapping_privatize(const struct mapping *mapping, u64 offset, char *address, u64 nbytes,
                      bool is_owned, bool keep_file);
int mapping_own(const struct mapping *mapping, u64 offset, char *address, u64 nbytes);
char *mapping_view(const struct mapping *mapping, u64 offset, u64 nbytes, bool writable);
int mapping_share(const struct mapping *mapping, u64 offset, char *address, u64 nbytes);
int mapping_read(const struct mapping *mapping, u64 offset, char *to, u64 nbytes);
void advice_start(void);
bool advice_is_obeyed(void);
int mapping_write(const struct mapping *mapping, u64 offset, const char *from, u64 nbytes);
PyObject *mapping_try(PyObject *module, PyObject *fd);
int advise(char *address, u64 nbytes, int advice);
void populate(char *address, u64 nbytes, bool write);

/* --- table.c: who has which block */

struct place {
    u64 offset, nbytes, stride;
    u32 size_class; /* and ON_DISK */
};

enum shortage { ROOM, FULL, TABLE, DAMAGED, SPACE, BUSY, DETACHED };

/* What this process knows of a row, and has done with it. */
struct known {
    struct place place; /* nbytes is 0: it is damaged */
    u64 entered;        /* bytes of it that are in our page tables ... */
    u64 adopted;        /* generation of a message that was read here and not loaded, or 0 */
    u32 punches;        /* ... unless its pages have gone back since */
    u32 n_users;        /* objects that have it */
    bool is_private;    /* the range is private memory of this process since a fork */
};

struct table_view {
    struct table *shared;
    u64 data_nbytes, disk_nbytes, capacity;
    bool huge, by_fault;
    struct file file;
    struct row *chunks[ROWS / CHUNK];
    u32 n_known; /* a prefix of the rows */
    u32 n_room;     /* of `known` */
    u32 n_reserved; /* rows that have pages */
    struct known *known;
};

struct row *table_row(struct table_view *table, u32 index);
bool table_knows(struct table_view *table, u32 index);
u32 table_n_rows(struct table_view *table);

/* Of a block that is known. */
static inline bool is_on_disk(const struct table_view *table, u32 index)
{
    return table->known[index].place.size_class & ON_DISK;
}

u64 table_pages(const struct table_view *table, u32 size_class, u64 nbytes);
void table_count_pages(struct table_view *table, u32 index, u64 before, u64 after);
void table_count_idle(struct table_view *table, u32 index, int64_t nbytes);
bool row_is(struct table_view *table, u32 index, enum state state, u64 generation);
bool row_is_damaged(struct table_view *table, u32 index);
u64 row_resident(const struct row *row, u32 index);
u64 table_resident(struct table_view *table, u32 index);
u64 row_nbytes(const struct row *row);
void row_quarantine(struct table_view *table, u32 index);
bool row_change(struct row *row, u32 index, u64 seen, u64 low);
void row_emptied(struct table_view *table, u32 index);
struct leased {
    u32 index;
    u64 counted; /* bytes of pages that it had */
    u64 present; /* and that are there for certain */
};

enum shortage table_lease(struct table_view *table, u64 nbytes, u32 where, u32 slot,
                          struct leased *leased, u64 *room);
u32 table_take_warm(struct table_view *table, u32 size_class, u32 slot);
void table_push(struct table_view *table, u32 index);
void table_drain(struct table_view *table);
void table_free(struct table_view *table, u32 index, u64 generation, bool emptied);
void row_lease(struct table_view *table, u32 index, u64 nbytes, u32 slot);

/* --- references.c: rows that name a published block */

bool references_publish(struct table_view *table, u32 index, enum state state, u64 generation, u32 reference);
bool references_add(struct table_view *table, u32 reference, u32 index);
u32 references_named(struct table_view *table, u32 reference);
void references_remove(struct table_view *table, u32 reference);
void references_forget_counts(struct table_view *table, u32 n_rows);
void references_count(struct table_view *table, u32 reference);
u32 references_take_unheld(struct table_view *table, u32 slot, bool (*is_alive)(void *, u32), void *with);

void table_rebuild(struct table_view *table, bool (*is_alive)(void *, u32), void *with);

/* --- lock.c: one step at a time, between all processes */

enum taken { TAKEN, TAKEN_DIRTY, LOCK_BUSY, LOCK_LOST, LOCK_ERROR };

/* After a wait for the lock in vain the next ones wait for so long only, and for how long that is so. */
#define HURRIED_US 20000
#define HURRY_US 5000000

struct lock {
    struct table *shared;
    u32 slot;
    u64 epoch;
    bool is_deaf;   /* signals are handled after it was taken */
    bool keeps_gil; /* while it waits, which is not for long then */
};

enum taken lock_take(struct lock *lock, u64 bound_us, bool (*is_alive)(void *, u32), void *with);
extern u64 lock_patience_us;
void lock_give(struct lock *lock);
u64 now_us(void);

/* --- participant.c: this process among the participants */

struct life { /* a description of the locks file: what it locks ends with the last process that has it */
    struct file file;
    char *page; /* keeps it if somebody closes the descriptor */
};

#define NO_LIFE ((struct life){.file.fd = -1})

struct birth { /* of a child; in the child, until it joins */
    struct life life;
    u64 epoch; /* of the child; 0: it is not forked yet */
    u64 incarnation;
    u32 slot;
    half preparing; /* while it is forked: its slot + 1, or UNKNOWN_CHILD; else 0 */
    bool copies;    /* what its parent holds, before it is anything else */
};

#define UNKNOWN_CHILD UINT32_MAX

struct participation {
    struct file handle; /* of the locks file: inherited, never locked */
    struct life life;
    u64 life_epoch; /* of the process that has opened it */
    u64 epoch;      /* in which this process joined; another one: it has not */
    u64 incarnation, pid_namespace;
    struct birth birth;
    u64 kept[KEPT]; /* what our row says, for the children */
    u32 n_adopted;
    bool keeps_all, reads_for_ever, retired;
    bool is_joining; /* a thread of this process */
};

struct blocks;

bool has_joined(const struct blocks *blocks);
bool is_alive(void *blocks, u32 slot);
int participant_join(struct blocks *blocks);
void participant_renew(struct blocks *blocks);
void participant_leave(struct blocks *blocks);
u32 participant_reap(struct blocks *blocks);
int life_open(const struct file *handle, struct life *life);
void life_own(const struct life *life);
void life_close(struct life *life);
void life_of_parent(struct life *life);
u32 participant_vacant(const struct blocks *blocks, const struct file *life);
bool participant_should_reap(const struct blocks *blocks);
u64 participant_write(struct blocks *blocks, u32 slot, u64 pid, u64 pid_namespace);
void participant_inherit(struct blocks *blocks, bool inherits);
bool participant_keep(struct blocks *blocks, u64 source);
void participant_retain(struct blocks *blocks, const bool *needed);
u32 n_slots(const struct blocks *blocks);

/* --- birth.c: a child is a participant from the moment of the fork */

int birth_start(void);
void birth_pause(void);
void birth_go_on(void);
bool birth_take(struct blocks *blocks);
void birth_note_views(struct blocks *blocks);

/* --- blocks.c: one arena, as this process has it */

/* What this process owns, or is sending. */
struct block {
    PyObject_HEAD
    struct blocks *blocks; /* a reference */
    struct block *before, *after;
    u64 generation, nbytes, epoch;
    u64 reserved; /* bytes that have pages, of a lease */
    u64 mapped;   /* bytes of a mapping of its own */
    char *address;
    u32 index;
    enum state state; /* LEASED, IN_FLIGHT or HELD; NONE: not ours to release */
    bool is_copy;     /* ordinary memory */
    bool is_given_up; /* released by who has read it, although its row may say that another owns it */
    bool is_apart;    /* a mapping of its own */
    bool is_private;  /* ordinary memory since a fork */
    bool is_emptied;  /* its pages in the file have gone */
    bool is_kept;     /* its pages stay when it is released */
    bool is_sending;  /* its envelope is being written */
    bool is_using;    /* counted as a user of its window */
    bool has_tail;    /* see `tails` */
    bool is_reference; /* without memory of its own: it names a published block */
    bool is_frozen;   /* nobody here can write to its view */
    bool is_shared;   /* what is written to its view, all see; or a reference that will be such a view */
    u32 named;        /* that block */
    u64 part_at, part_nbytes; /* what the message has of it: all that there is of a copy */
    struct block *view_before, *view_after; /* of a reference with an address */
};

#define TAILS 16
#define REPEATS 16

struct repeat { /* a buffer that was sent */
    const void *address;
    u64 nbytes, sample, n;
};

#define ENTERED_LIMIT ((u64)96 << 20)

struct blocks {
    PyObject_HEAD
    struct table_view table; /* `shared` is NULL once it has ended */
    struct mapping mapping, disk; /* `disk`: no windows if there is none */
    struct lock lock;
    struct participation own;
    struct block *first, *first_view;
    struct blocks *next_arena, *arena_before;
    u64 keep_nbytes;    /* what free blocks may keep */
    u64 entered_nbytes; /* of blocks, in our page tables ... */
    u64 unused_nbytes;  /* ... and of those that nobody here has */
    u64 entered_limit;
    u64 hurried_until;
    u64 drops_hurried_until; /* the same for dropped references, which wait for less than messages do */
    u64 n_copied, nbytes_copied, n_shared; /* at a fork, and not counted yet */
    u32 n_held, n_inside, n_forking, n_tails;
    bool spills; /* a message for which memory has no room at once goes to disk */
    struct repeat repeats[REPEATS];
    struct block *tails[TAILS]; /* held, with pages of a larger message behind what is in them */
};

extern PyTypeObject *block_type;

int step_begin(struct blocks *blocks);
void step_end(struct blocks *blocks);
struct mapping *mapping_of(struct blocks *blocks, u32 index);
struct block *block_new(struct blocks *blocks, u32 index, u64 generation, u64 nbytes);
struct block *block_leased(struct blocks *blocks, u32 index, u64 nbytes);
int block_map(struct block *block, u64 nbytes);
void block_enter(struct block *block, u64 nbytes);
void block_release(struct block *block);
void block_detach(struct block *block);
void block_become_copy(struct block *block, char *copy, u64 nbytes);
void count_in(struct blocks *blocks, u32 counter, u64 amount);
void leave_others(struct blocks *blocks, PyObject *message);
void tail_note(struct block *block);
void tails_cut(struct blocks *blocks);
int block_type_make(PyObject *module);
int blocks_type_make(PyObject *module);
bool is_blocks(PyObject *object);

/* --- published.c: one object for many readers */

#define LEAST_REFERRED ((u64)64 << 10) /* a mapping and its page faults cost more than such a copy */

bool reference_look(struct block *block);
bool reference_narrow(struct block *block, u64 at, u64 nbytes);
int view_map(struct block *block);
int reference_read(const struct block *block, u64 at, char *to, u64 nbytes);
void view_forget(struct block *block);
bool block_publish_in_place(struct block *block);
struct block *view_at(struct blocks *blocks, const void *address, u64 nbytes);
PyObject *refer_now(struct blocks *blocks, const struct block *view);
void views_inherit(struct blocks *blocks);
void views_take(struct blocks *blocks);
void release_unheld(struct blocks *blocks, bool reap);
PyObject *publish(PyObject *self, PyObject *list);
PyObject *view_freeze(PyObject *self, PyObject *none);
PyObject *view_again(PyObject *self, PyObject *none);
PyObject *view_share(PyObject *self, PyObject *none);
PyObject *refer(PyObject *self, PyObject *list);
struct block *block_at(PyObject *list, Py_ssize_t i);
PyObject *list_taken(PyObject *list);
struct block *blocks_lease_now(struct blocks *blocks, u64 nbytes, u32 where, int *problem);
bool blocks_make_room_now(struct blocks *blocks, u64 nbytes);
bool block_reserve_now(struct block *block, u64 total);
u64 block_fresh(const struct block *block);
bool block_can_take(const struct block *block, u64 at, u64 nbytes);
int block_write(struct block *block, u64 at, const char *from, u64 nbytes, bool keeps_gil);
void block_empty_now(struct block *block);
void block_use(struct block *block, u64 nbytes);
void block_punch_range(struct block *block, u64 at, u64 nbytes);

/* --- repeats.c: the same memory sent again and again */

void repeats_note(struct blocks *blocks, const Py_buffer *view);
PyObject *repeated(PyObject *self, PyObject *none);

/* --- shared_lock.c: one at a time writes to what is shared */

int shared_lock_type_make(PyObject *module);

/* --- fork.c: what this process has becomes its own */

PyObject *fork_before(PyObject *module, PyObject *none);
PyObject *fork_in_parent(PyObject *module, PyObject *none);
PyObject *fork_in_child(PyObject *module, PyObject *none);
bool block_privatize(struct block *block);
void fork_make_own(void);
bool fork_shares(const struct blocks *blocks);
void fork_make_childs_own(struct blocks *blocks);
void fork_watch(struct blocks *blocks);
void fork_unwatch(struct blocks *blocks);
struct blocks *fork_arenas(void);

/* --- lost.c: messages that nobody can load any more */

PyObject *lost_unowned(PyObject *self, PyObject *none);
PyObject *lost_sources(PyObject *self, PyObject *none);
PyObject *lost_has_abandoned(PyObject *self, PyObject *none);
PyObject *lost_free(PyObject *self, PyObject *heads);

/* --- copying.c */

typedef void copy_piece(const void *with, size_t at, size_t n); /* items from `at` on */
void copy_in_pieces(copy_piece *copy, const void *with, size_t n, size_t nbytes);
void copy_now(char *to, const void *from, size_t nbytes);
PyObject *copy_bytes(PyObject *module, PyObject *arguments);

/* --- headroom.c: may so many fresh pages be made? */

bool read_text(const char *path, char *text, size_t room);
bool headroom_has(u64 nbytes, u64 total);
bool headroom_allows(u64 nbytes, u64 total);
PyObject *headroom_limits(PyObject *module, PyObject *arguments);

/* --- plan.c: how buffers lie in blocks */

struct chunk {
    u64 capacity, filled;
    u32 block;
};

struct plan {
    struct chunk small, shared;
    u32 n_blocks;
    bool is_coarse; /* for what is published */
};

struct placed {
    u64 at, capacity; /* 0: the block is there already */
    u32 block;
};

#define REFERRED ((u64)1 << 63) /* beside the size of a buffer that is a reference; its offset follows */

struct placed plan_next(struct plan *plan, u64 nbytes);
bool plan_next_reference(const Py_buffer *sizes, Py_ssize_t *i, u64 *at, u64 *nbytes);
PyObject *plan_needs(PyObject *module, PyObject *arguments);
PyObject *plan_spread(PyObject *module, PyObject *arguments);

/* --- array.c: how arrays are taken apart, and copied */

struct message;

struct dtype { /* what is known of one */
    PyObject *object;
    PyObject *sent; /* what stands for it in the stream */
    long long itemsize;
    bool is_ours, is_exported, has_names;
    bool may_run_code; /* when it is pickled */
};

void memory_copy(char *to, const Py_buffer *view);
int memory_write(struct block *block, u64 at, const Py_buffer *view);
void dtype_forget(struct dtype *known);
int array_view(struct dtype *known, PyObject *array, Py_buffer *view);
PyObject *array_reduce(struct message *message, PyObject *array);

/* --- mapped.c: files that this process has mapped */

enum access { READS, COPIES, WRITES }; /* what may become of a file; `COPIES` is memory that is its own */

struct identity {
    u64 device, inode, nbytes;
    int64_t mtime_ns;
};

struct mapped {
    PyObject_HEAD
    struct mapped *before, *after;
    char *address;
    u64 nbytes;
    enum access access;
    struct identity identity;
    struct file opened; /* once a place in it was sent */
    PyObject *path;
};

struct mapped *mapped_at(const void *address, u64 nbytes);
bool mapped_is_there(struct mapped *mapped);
PyObject *mapped_as(PyObject *module, PyObject *identity);
int mapped_type_make(PyObject *module);

/* --- message.c: one message, as it is taken apart */

struct dtype *message_dtype(struct message *message);
bool message_keeps_flags(const struct message *message);
bool message_stays(struct message *message, u64 nbytes);
void message_made(struct message *message, PyObject *memory);
PyObject *message_stand_in(struct message *message, Py_buffer *view);
PyObject *rebuild_new(PyObject *reduced);
PyObject *numpy_attribute(const char *name);
int message_type_make(PyObject *module);

#endif
