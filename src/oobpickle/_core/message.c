/* A message that is being taken apart: its stream, and its buffers as they were handed out.

What. `Message` is all that the pickler needs of us: the file that it writes to, the callback that it
asks about each buffer, and the table that it looks for reducers in. What leaves the stream is copied
at once.

How it works. Plain pickle takes the content of an object when it reduces it, under the GIL. So do
we: each buffer is copied as the pickler hands it out, into a block of the arena that is leased for
it, and nothing between the first buffer and the last waits or lets the GIL go. A buffer leaves the
stream once the sum of all so far reaches the threshold; what is in the stream by then stays. ::

    IN_BLOCKS   the buffers are in leased blocks, laid out by plan.c; some of them on disk, if memory has no
                room for them and the arena has a file there
    IN_MEMORY   in ordinary memory, as an ordinary pickle has them, one after the other: there was no
                room, or the message will not go through an arena
    NOWHERE     they are counted only
    LOST        half of the message was given back when the rest could not be read or copied

What lies in published memory and cannot be written (published.c) is not copied: a reference to it is
sent, wherever the others are. Of what lies in a file that is mapped (mapped.c) the place is sent. A pickle
that everybody can load has copies of both. A reference to what
is shared (`refer`) is handed out by its owner; it cannot become a copy, so such a message is refused
where it would have to travel in-band.

A message goes from IN_BLOCKS to IN_MEMORY as a whole when there is no room for its next buffer, and
back as a whole when room was waited for.

A method that asks another object for its memory, drops one, or lets the GIL go (on the way to disk),
marks the message as busy. Whoever changes it meanwhile, from there or in another thread, is refused.

Lifetime. Blocks and memory are the message's until it is sealed; it may be dropped at any time. A
forked child that goes on with a message of its parent reads the blocks, and then looks whether they
were its parent's still.

When it cannot. What finds no room, or is refused by the disk, is in memory; why there was none, is
found out when room is waited for. Without memory: MemoryError. */

#include "core.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HEAD_ROOM 1024 /* for what is put before the first buffer */
#define BYTEARRAY8 '\x96'
#define HEADER_NBYTES 9 /* that opcode, and 64 bits */
#define STEP ((u64)16 << 20)
#define LARGE ((u64)1 << 20)

/* In the place of the header of a bytearray: its content is a buffer. */
#define CALL_BYTEARRAY "cbuiltins\nbytearray\n\x97\x85R"

enum where { IN_BLOCKS, IN_MEMORY, NOWHERE, LOST };

struct buffer {
    u64 nbytes;
    u64 at; /* within its block, or the memory; of a reference, within what is published, or the file */
    u32 block; /* of `leased`, or of `references` */
    bool is_reference;
    struct mapped *file; /* of `files`: the reference is a place in it */
};

/* What the pickler has in the place of memory, until it asks about that. */
struct pending {
    PyObject *stand_in, *source; /* `source`: its buffer has not been taken yet */
    Py_buffer view;
};

struct message {
    PyObject_HEAD
    struct blocks *blocks; /* the arena: a reference, or NULL */
    struct blocks *published; /* the same: whose published memory is sent as references */
    PyObject *tables;      /* (registered, special, general, find) */
    u64 threshold, kept_nbytes, stream_nbytes, buffers_nbytes, fresh_nbytes;
    u64 spilled_nbytes, spilling_us; /* of buffers and stream on disk; how long that took */
    PyObject *pieces; /* of the stream: [bytes, or memoryview of `made`, which nobody resizes then] */
    PyObject *leased; /* [Block] */
    PyObject *references; /* [Block], or NULL */
    PyObject *files; /* [MappedFile] that were found to be there, or NULL */
    PyObject *made;   /* a bytearray that nobody else has */
    PyObject *plain;  /* the last class that was found to be of no special kind */
    struct buffer *buffers;
    size_t n_buffers, buffers_room;
    struct pending *pending;
    size_t n_pending, pending_room;
    struct plan plan;
    struct dtype dtype;
    enum where where, begun; /* where it is, and where it began */
    char *memory; /* HEAD_ROOM, and then (header, content) of each buffer */
    u64 used, room, from; /* `from`: where the pickle begins in it; 0: there is none yet */
    Py_ssize_t n_exports;
    bool keeps_flags; /* read-only arrays arrive read-only, as NumPy sends them */
    bool is_for_one; /* it is written once, and its memory is given back meanwhile */
    bool is_spilling; /* memory had no room for one of its buffers: the rest goes to disk, too */
    bool is_busy; /* one of its methods is in the middle of what others may change */
};

static PyTypeObject *message_type, *rebuild_type;
static PyObject *as_pickle, *as_rebuild, *picklebuffer, *shared_stand_in;
static PyObject *reduce_ex, *protocol; /* "__reduce_ex__", 5 */

static struct message *of(PyObject *self)
{
    return (struct message *)self;
}

/* What changes the message, and runs alone. */
typedef PyObject *method(PyObject *self, PyObject *argument);

static PyObject *alone(method *change, PyObject *self, PyObject *argument)
{
    struct message *message = of(self);
    if (message->is_busy) {
        PyErr_SetString(PyExc_RuntimeError, "the message is being changed already: by another thread, or by "
                                            "whoever has called an object that calls the message");
        return NULL;
    }
    message->is_busy = true;
    PyObject *result = change(self, argument);
    message->is_busy = false;
    return result;
}

#define ALONE(name)                                                                                \
    static PyObject *name##_alone(PyObject *self, PyObject *argument)                              \
    {                                                                                              \
        return alone(name, self, argument);                                                        \
    }

/* --- what array.c asks */

bool message_keeps_flags(const struct message *message)
{
    return message->keeps_flags;
}

struct dtype *message_dtype(struct message *message)
{
    return &message->dtype;
}

/* Decide about so many bytes: true if they stay in the stream. */
bool message_stays(struct message *message, u64 nbytes)
{
    if (message->kept_nbytes + nbytes >= message->threshold)
        return false;
    message->kept_nbytes += nbytes;
    return true;
}

/* A bytearray that was made for the stream, so that it need not be copied again. */
void message_made(struct message *message, PyObject *memory)
{
    Py_XDECREF(message->made);
    message->made = Py_XNewRef(memory);
}

/* An array with room for one more than the `n` in it, perhaps elsewhere; NULL with an exception. */
static void *with_room(void *array, size_t n, size_t *room, size_t each)
{
    if (n < *room)
        return array;
    size_t larger = *room ? 2 * *room : 8;
    array = realloc(array, larger * each);
    if (array == NULL)
        return PyErr_NoMemory();
    *room = larger;
    return array;
}

static struct pending *new_pending(struct message *message)
{
    struct pending *all = with_room(message->pending, message->n_pending, &message->pending_room, sizeof *all);
    if (all == NULL)
        return NULL;
    message->pending = all;
    return memset(&all[message->n_pending], 0, sizeof *all);
}

/* What the pickler gets in the place of memory that leaves the stream; takes over `view`. One for all
   will do: what is reduced within an array's arguments is asked about before the array. */
PyObject *message_stand_in(struct message *message, Py_buffer *view)
{
    struct pending *pending = new_pending(message);
    if (pending == NULL) {
        PyBuffer_Release(view);
        return NULL;
    }
    pending->view = *view;
    pending->stand_in = Py_NewRef(shared_stand_in);
    message->n_pending++;
    return Py_NewRef(shared_stand_in);
}

static void drop_pending(struct message *message, size_t i)
{
    struct pending *pending = &message->pending[i];
    PyObject *stand_in = pending->stand_in, *source = pending->source;
    Py_buffer view = pending->view;
    message->n_pending--;
    memmove(pending, pending + 1, (message->n_pending - i) * sizeof *pending);
    if (view.obj)
        PyBuffer_Release(&view);
    Py_XDECREF(source);
    Py_XDECREF(stand_in);
}

/* --- classes of modules that the program may have imported */

static PyObject *imported(const char *module)
{
    PyObject *name = PyUnicode_FromString(module);
    PyObject *found = name ? PyImport_GetModule(name) : NULL;
    Py_XDECREF(name);
    return found;
}

/* A class of a module that the program has imported, or NULL. */
static PyTypeObject *imported_class(const char *module, const char *name)
{
    PyObject *found = imported(module);
    PyObject *class = found ? PyObject_GetAttrString(found, name) : NULL;
    PyErr_Clear(); /* also while another thread is importing it */
    Py_XDECREF(found);
    if (class && !PyType_Check(class))
        Py_CLEAR(class);
    return (PyTypeObject *)class;
}

static bool is_ndarray(const PyTypeObject *kind)
{
    static PyTypeObject *ndarray;
    if (ndarray == NULL)
        ndarray = imported_class("numpy", "ndarray");
    return kind == ndarray;
}

/* --- ordinary memory */

static void free_memory(struct message *message)
{
    if (message->room >= STEP)
        munmap(message->memory, message->room);
    else
        free(message->memory);
    message->memory = NULL;
    message->used = message->room = message->from = 0;
}

/* Memory of `room` bytes in the place of what there is: much of it is a mapping of its own, which grows
   without being copied, and which malloc would keep below something that is not free. */
static char *resized_memory(const struct message *message, u64 room)
{
    if (room < STEP)
        return realloc(message->memory, room);
    char *memory;
    if (message->room >= STEP) {
        memory = mremap(message->memory, message->room, room, MREMAP_MAYMOVE);
        return memory == MAP_FAILED ? NULL : memory;
    }
    memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
    madvise(memory, room, MADV_HUGEPAGE); /* all of it: two kinds could not grow as one */
    if (message->memory)
        memcpy(memory, message->memory, message->used);
    free(message->memory);
    return memory;
}

/* Room for so many bytes more: an address, or NULL with an exception. */
static char *more_memory(struct message *message, u64 nbytes)
{
    u64 used = message->memory ? message->used : HEAD_ROOM, needed = used + nbytes;
    if (message->n_exports) {
        PyErr_SetString(PyExc_BufferError, "its memory is in use");
        return NULL;
    }
    if (needed > message->room) {
        u64 room = round_up(needed + needed / 2, PAGE);
        char *memory = resized_memory(message, room);
        if (memory == NULL)
            memory = resized_memory(message, room = round_up(needed, PAGE));
        if (memory == NULL) {
            PyErr_Format(PyExc_MemoryError, "no memory to copy %llu bytes of a message",
                         (unsigned long long)nbytes);
            return NULL;
        }
        message->memory = memory;
        message->room = room;
    }
    message->used = needed;
    return message->memory + used;
}

/* Room for a buffer behind its header. */
static char *more_for_buffer(struct message *message, u64 nbytes)
{
    char *header = more_memory(message, HEADER_NBYTES + nbytes);
    if (header == NULL)
        return NULL;
    *header = BYTEARRAY8;
    memcpy(header + 1, &nbytes, sizeof nbytes);
    return header + HEADER_NBYTES;
}

/* The pages of a range of the memory go back to the system. */
static void give_back(struct message *message, u64 at, u64 nbytes)
{
    uintptr_t start = round_up((uintptr_t)message->memory + at, PAGE);
    uintptr_t end = ((uintptr_t)message->memory + at + nbytes) / PAGE * PAGE;
    if (end > start)
        madvise((void *)start, end - start, MADV_DONTNEED); /* refused if they are locked */
}

/* --- blocks */

static struct block *block_of(const struct message *message, u32 i)
{
    return (struct block *)PyList_GetItem(message->leased, (Py_ssize_t)i);
}

static struct block *lease_in(struct message *message, u64 nbytes, u32 where, int *problem)
{
    struct block *block = blocks_lease_now(message->blocks, nbytes, where, problem);
    if (block == NULL)
        return NULL;
    u64 fresh = block_fresh(block);
    bool is_there = block_reserve_now(block, message->fresh_nbytes + fresh);
    *problem = is_there ? ROOM : SPACE;
    is_there = is_there && PyList_Append(message->leased, (PyObject *)block) == 0;
    message->fresh_nbytes += fresh;
    Py_DECREF((PyObject *)block); /* the list has it */
    return is_there ? block : NULL;
}

/* NULL without an exception: there is no room now; with one: there is no memory. */
static struct block *lease_block(struct message *message, u64 nbytes)
{
    struct block *block = NULL;
    int problem = FULL;
    if (!message->is_spilling) {
        block = lease_in(message, nbytes, 0, &problem);
        if (block || PyErr_Occurred() || !message->blocks->spills)
            return block;
        if (problem == FULL && blocks_make_room_now(message->blocks, nbytes))
            block = lease_in(message, nbytes, 0, &problem);
        if (block || PyErr_Occurred() || (problem != FULL && problem != SPACE))
            return block;
    }
    block = lease_in(message, nbytes, ON_DISK, &problem);
    message->is_spilling = block != NULL;
    return block;
}

/* Copy out of a block that we need no more; if a large buffer is all that is in it, its pages go as they
   are read, so that no message is there twice. -1 with errno: it cannot be read from disk. */
static int copy_out_of(struct block *block, u64 at, char *to, u64 nbytes)
{
    bool is_ours = block->epoch == epoch() && block->state == LEASED;
    struct table_view *table = &block->blocks->table;
    if (block->address == NULL)
        return mapping_read(&block->blocks->disk, table->known[block->index].place.offset + at, to,
                            nbytes);
    if (nbytes < LARGE || nbytes != block->nbytes || !is_ours || !block->is_using) {
        copy_now(to, block->address + at, nbytes);
        return 0;
    }
    for (u64 done = 0; done < nbytes; done += STEP) {
        u64 step = nbytes - done < STEP ? nbytes - done : STEP;
        copy_now(to + done, block->address + done, step);
        block_punch_range(block, done, step);
    }
    return 0;
}

/* In a child of fork the blocks are its parent's, who may have sent them by now, so that their receiver
   may have changed them, or may have given them up, with their pages. */
static bool are_unchanged(const struct message *message)
{
    atomic_thread_fence(memory_order_acquire);
    for (Py_ssize_t i = 0; i < PyList_Size(message->leased); i++) {
        struct block *block = block_of(message, (u32)i);
        struct table_view *table = &block->blocks->table;
        if (block->epoch == epoch())
            continue;
        if (!row_is(table, block->index, LEASED, block->generation) &&
            !row_is(table, block->index, IN_FLIGHT, block->generation))
            return false;
        if (get(&table_row(table, block->index)->used) == 0) /* its pages are going */
            return false;
    }
    return true;
}

/* From blocks to ordinary memory. */
static int leave_blocks(struct message *message)
{
    for (size_t i = 0; i < message->n_buffers; i++) {
        struct buffer *buffer = &message->buffers[i];
        if (buffer->is_reference)
            continue;
        char *to = more_for_buffer(message, buffer->nbytes);
        if (to == NULL) {
            message->where = LOST;
            return -1;
        }
        if (buffer->nbytes &&
            copy_out_of(block_of(message, buffer->block), buffer->at, to, buffer->nbytes) != 0) {
            PyErr_SetFromErrno(PyExc_OSError);
            message->where = LOST;
            return -1;
        }
        buffer->at = (u64)(to - message->memory);
    }
    message->spilled_nbytes = 0;
    bool is_sound = are_unchanged(message);
    Py_CLEAR(message->leased);
    message->where = IN_MEMORY;
    if (is_sound)
        return 0;
    PyErr_SetString(PyExc_RuntimeError, "this process was forked while it sent a message, and its "
                                        "parent has sent that: send it again");
    return -1;
}

/* --- taking buffers */

/* The caller counts it. */
static struct buffer *next_buffer(struct message *message, u64 nbytes)
{
    struct buffer *all = with_room(message->buffers, message->n_buffers, &message->buffers_room, sizeof *all);
    if (all == NULL)
        return NULL;
    message->buffers = all;
    all[message->n_buffers] = (struct buffer){.nbytes = nbytes};
    return &all[message->n_buffers];
}

static void note_spilled(struct message *message, const struct block *block, u64 nbytes, u64 begun_us)
{
    if (block->address)
        return;
    message->spilled_nbytes += nbytes;
    message->spilling_us += now_us() - begun_us;
}

/* Copy the next buffer into a block; false: there is none, or the disk refuses. */
static bool copy_into_block(struct message *message, struct buffer *buffer, const Py_buffer *view)
{
    struct placed placed = plan_next(&message->plan, buffer->nbytes);
    struct block *block = placed.capacity ? lease_block(message, placed.capacity)
                                          : block_of(message, placed.block);
    if (block == NULL || block->epoch != epoch())
        return false;
    u64 begun_us = block->address ? 0 : now_us();
    if (memory_write(block, placed.at, view) != 0)
        return false;
    note_spilled(message, block, buffer->nbytes, begun_us);
    buffer->block = placed.block;
    buffer->at = placed.at;
    return true;
}

/* Copy the next buffer to where it goes. */
static int copy_buffer(struct message *message, struct buffer *buffer, const Py_buffer *view)
{
    if (message->where == IN_BLOCKS && buffer->nbytes) {
        if (copy_into_block(message, buffer, view))
            return 0;
        if (PyErr_Occurred() || leave_blocks(message) != 0)
            return -1;
    }
    if (message->where >= NOWHERE || (message->where == IN_BLOCKS && buffer->nbytes == 0))
        return 0;
    char *to = more_for_buffer(message, buffer->nbytes);
    if (to == NULL)
        return -1;
    buffer->at = (u64)(to - message->memory);
    memory_copy(to, view);
    return 0;
}

/* Whether a buffer is sent as a reference; -1 with an exception. */
static int take_reference(struct message *message, struct buffer *buffer, const Py_buffer *view)
{
    if (message->published == NULL || message->published->first_view == NULL)
        return 0;
    const struct block *from = view_at(message->published, view->buf, (u64)view->len);
    if (from == NULL || !PyBuffer_IsContiguous(view, 'A') ||
        get(&message->published->table.shared->header.closed))
        return 0;
    if (message->references == NULL && (message->references = PyList_New(0)) == NULL)
        return -1;
    PyObject *reference = refer_now(message->published, from);
    if (reference == NULL)
        return 0;
    buffer->is_reference = true;
    buffer->block = (u32)PyList_Size(message->references);
    buffer->at = (u64)((const char *)view->buf - from->address);
    int result = PyList_Append(message->references, reference);
    Py_DECREF(reference);
    return result == 0 ? 1 : -1;
}

/* Whether a buffer is sent as its place in a file; -1 with an exception. */
static int take_place(struct message *message, struct buffer *buffer, const Py_buffer *view)
{
    struct mapped *file = message->published ? mapped_at(view->buf, (u64)view->len) : NULL;
    if (file == NULL || !PyBuffer_IsContiguous(view, 'A'))
        return 0;
    if (message->files == NULL && (message->files = PyList_New(0)) == NULL)
        return -1;
    int is_known = PySequence_Contains(message->files, (PyObject *)file);
    if (is_known == 0) {
        if (!mapped_is_there(file))
            return 0;
        is_known = PyList_Append(message->files, (PyObject *)file) == 0 ? 1 : -1;
    }
    if (is_known < 0)
        return -1;
    buffer->is_reference = true;
    buffer->file = file;
    buffer->at = (u64)((const char *)view->buf - file->address);
    return 1;
}

static int take_memory(struct message *message, const Py_buffer *view)
{
    struct buffer *buffer = next_buffer(message, (u64)view->len);
    int is_reference = buffer ? take_reference(message, buffer, view) : -1;
    if (is_reference == 0)
        is_reference = take_place(message, buffer, view);
    if (is_reference) {
        message->n_buffers += is_reference > 0;
        return is_reference > 0 ? 0 : -1;
    }
    if (message->published && !message->plan.is_coarse)
        repeats_note(message->published, view);
    if (copy_buffer(message, buffer, view) != 0)
        return -1;
    message->n_buffers++;
    message->buffers_nbytes += (u64)view->len;
    return 0;
}

static int view_of(struct message *message, PyObject *source, Py_buffer *view)
{
    if (is_ndarray(Py_TYPE(source)))
        return array_view(&message->dtype, source, view);
    return PyObject_GetBuffer(source, view, PyBUF_STRIDED_RO);
}

static int refuse_shared(void)
{
    PyErr_SetString(PyExc_TypeError,
                    "what share() returned cannot be sent in this message: its receiver has not joined "
                    "the arena that it lies in, or there was no room there for the rest of the message. "
                    "Start the receiver inside the same oobpickle.enabled(), and send large arrays in a "
                    "message of their own");
    return -1;
}

/* A reference that its owner has made for this message. */
static int take_shared(struct message *message, struct block *reference)
{
    if (message->where < NOWHERE && (reference->blocks != message->published ||
                                      reference->state != LEASED || reference->epoch != epoch()))
        return refuse_shared();
    struct buffer *buffer = next_buffer(message, 0);
    if (buffer == NULL)
        return -1;
    if (message->where < NOWHERE) {
        if (message->references == NULL && (message->references = PyList_New(0)) == NULL)
            return -1;
        *buffer = (struct buffer){.nbytes = reference->nbytes, .is_reference = true,
                                  .block = (u32)PyList_Size(message->references)};
        if (PyList_Append(message->references, (PyObject *)reference) != 0)
            return -1;
    }
    message->n_buffers++;
    return 0;
}

/* take(buffer): what the pickler asks about each PickleBuffer: True leaves it in the stream */
static PyObject *take(PyObject *self, PyObject *buffer)
{
    struct message *message = of(self);
    Py_buffer view = {0};
    size_t i = message->n_pending;
    while (i > 0 && message->pending[i - 1].stand_in != buffer)
        i--;
    struct pending *pending = i > 0 ? &message->pending[i - 1] : NULL;
    if (pending && pending->source && Py_TYPE(pending->source) == block_type) {
        PyObject *reference = Py_NewRef(pending->source);
        drop_pending(message, i - 1);
        int result = take_shared(message, (struct block *)reference);
        Py_DECREF(reference);
        return result == 0 ? Py_NewRef(Py_False) : NULL;
    }
    if (pending && pending->view.obj) {
        view = pending->view;
        pending->view.obj = NULL; /* ours now */
    } else if (view_of(message, pending ? pending->source : buffer, &view) != 0) {
        return NULL;
    }
    if (pending)
        drop_pending(message, i - 1);
    /* What is in several pieces the pickler refuses to write. */
    bool stays = !pending && (!PyBuffer_IsContiguous(&view, 'A') || message_stays(message, (u64)view.len));
    int result = stays ? 0 : take_memory(message, &view);
    PyBuffer_Release(&view);
    return result == 0 ? PyBool_FromLong(stays) : NULL;
}

/* stays(nbytes): whether so many bytes stay in the stream */
static PyObject *stays(PyObject *self, PyObject *argument)
{
    u64 nbytes = PyLong_AsUnsignedLongLong(argument);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(message_stays(of(self), nbytes));
}

/* stand_in(source): what a reducer hands out in the place of memory that leaves the stream */
static PyObject *stand_in(PyObject *self, PyObject *source)
{
    struct message *message = of(self);
    PyObject *nothing = PyByteArray_FromStringAndSize(NULL, 0);
    PyObject *made = nothing ? PyObject_CallFunctionObjArgs(picklebuffer, nothing, NULL) : NULL;
    Py_XDECREF(nothing);
    struct pending *pending = made ? new_pending(message) : NULL;
    if (pending == NULL) {
        Py_XDECREF(made);
        return NULL;
    }
    pending->stand_in = Py_NewRef(made);
    pending->source = Py_NewRef(source);
    message->n_pending++;
    return made;
}

/* --- the stream */

static const char *content_of(PyObject *piece, Py_ssize_t *nbytes)
{
    Py_buffer view;
    if (PyBytes_CheckExact(piece)) {
        *nbytes = PyBytes_Size(piece);
        return PyBytes_AsString(piece);
    }
    *nbytes = 0;
    if (PyObject_GetBuffer(piece, &view, PyBUF_SIMPLE) != 0) /* it has been exported once, and is again */
        return NULL;
    const char *content = view.buf;
    *nbytes = view.len;
    PyBuffer_Release(&view); /* the piece keeps it */
    return content;
}

static int add_piece(struct message *message, PyObject *piece)
{
    Py_ssize_t nbytes;
    if (piece == NULL || PyList_Append(message->pieces, piece) != 0)
        return -1;
    content_of(piece, &nbytes);
    message->stream_nbytes += (u64)nbytes;
    return 0;
}

/* A large bytearray becomes a buffer; the header that the pickler has written for it becomes the call
   that makes it. */
static int take_bytearray(struct message *message, PyObject *owner)
{
    Py_ssize_t n = PyList_Size(message->pieces);
    PyObject *last = n ? PyList_GetItem(message->pieces, n - 1) : NULL, *changed = NULL;
    Py_ssize_t nbytes = 0;
    const char *content = last ? content_of(last, &nbytes) : NULL;
    Py_buffer view;
    if (nbytes < HEADER_NBYTES || content[nbytes - HEADER_NBYTES] != BYTEARRAY8) {
        PyErr_SetString(PyExc_SystemError, "a bytearray without its header");
        return -1;
    }
    if (PyObject_GetBuffer(owner, &view, PyBUF_SIMPLE) != 0)
        return -1;
    int result = take_memory(message, &view);
    PyBuffer_Release(&view);
    nbytes -= HEADER_NBYTES;
    if (result == 0)
        changed = PyBytes_FromStringAndSize(NULL, nbytes + (Py_ssize_t)sizeof CALL_BYTEARRAY - 1);
    if (changed == NULL)
        return -1;
    char *to = PyBytes_AsString(changed);
    memcpy(to, content, (size_t)nbytes);
    memcpy(to + nbytes, CALL_BYTEARRAY, sizeof CALL_BYTEARRAY - 1);
    message->stream_nbytes += sizeof CALL_BYTEARRAY - 1 - HEADER_NBYTES;
    return PyList_SetItem(message->pieces, n - 1, changed);
}

/* write(piece): as the file of a pickler */
static PyObject *write_piece(PyObject *self, PyObject *piece)
{
    struct message *message = of(self);
    int result;
    if (PyBytes_CheckExact(piece)) {
        result = add_piece(message, piece);
    } else if (piece == message->made) {
        PyObject *exported = PyMemoryView_FromObject(piece);
        result = add_piece(message, exported);
        Py_XDECREF(exported);
    } else if (PyByteArray_CheckExact(piece) && !message_stays(message, (u64)PyByteArray_Size(piece))) {
        result = take_bytearray(message, piece);
    } else { /* its owner may change it */
        Py_buffer view;
        if (PyObject_GetBuffer(piece, &view, PyBUF_STRIDED_RO) != 0)
            return NULL;
        PyObject *copy = PyBytes_FromStringAndSize(NULL, view.len);
        if (copy)
            memory_copy(PyBytes_AsString(copy), &view);
        PyBuffer_Release(&view);
        result = add_piece(message, copy);
        Py_XDECREF(copy);
    }
    return result == 0 ? Py_NewRef(Py_None) : NULL;
}

static void copy_stream(const struct message *message, char *to)
{
    for (Py_ssize_t i = 0; i < PyList_Size(message->pieces); i++) {
        Py_ssize_t nbytes;
        const char *content = content_of(PyList_GetItem(message->pieces, i), &nbytes);
        copy_now(to, content, (size_t)nbytes);
        to += nbytes;
    }
}

static PyObject *get_stream(PyObject *self, void *Py_UNUSED(closure))
{
    struct message *message = of(self);
    PyObject *first = PyList_Size(message->pieces) == 1 ? PyList_GetItem(message->pieces, 0) : NULL;
    if (first && PyBytes_CheckExact(first))
        return Py_NewRef(first);
    PyObject *stream = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)message->stream_nbytes);
    if (stream)
        copy_stream(message, PyBytes_AsString(stream));
    return stream;
}

/* small(): the stream, if that is all, and below the threshold; else None */
static PyObject *small(PyObject *self, PyObject *Py_UNUSED(none))
{
    struct message *message = of(self);
    if (message->n_buffers || message->stream_nbytes >= message->threshold)
        Py_RETURN_NONE;
    return get_stream(self, NULL);
}

/* start(nbytes): so many bytes of the stream, or all of it if it is less */
static PyObject *get_start(PyObject *self, PyObject *argument)
{
    const struct message *message = of(self);
    u64 most = PyLong_AsUnsignedLongLong(argument), filled = 0;
    if (PyErr_Occurred())
        return NULL;
    most = most < message->stream_nbytes ? most : message->stream_nbytes;
    PyObject *start = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)most);
    char *to = start ? PyBytes_AsString(start) : NULL;
    for (Py_ssize_t i = 0; to && filled < most; i++) {
        Py_ssize_t n;
        const char *content = content_of(PyList_GetItem(message->pieces, i), &n);
        u64 step = (u64)n < most - filled ? (u64)n : most - filled;
        memcpy(to + filled, content, step);
        filled += step;
    }
    return start;
}

/* write_stream_into(block, at): OSError: the disk refuses */
static PyObject *write_stream_into(PyObject *self, PyObject *arguments)
{
    struct message *message = of(self);
    PyObject *given;
    unsigned long long at;
    if (!PyArg_ParseTuple(arguments, "O!K", block_type, &given, &at))
        return NULL;
    struct block *block = (struct block *)given;
    u64 nbytes = message->stream_nbytes, begun_us = now_us();
    if (!block_can_take(block, at, nbytes)) {
        PyErr_Format(PyExc_ValueError, "a stream of %llu bytes does not fit into %llu from %llu on",
                     (unsigned long long)nbytes, (unsigned long long)block->nbytes, at);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < PyList_Size(message->pieces); i++) {
        Py_ssize_t n;
        const char *content = content_of(PyList_GetItem(message->pieces, i), &n);
        if (block_write(block, at, content, (u64)n, false) != 0)
            return PyErr_SetFromErrno(PyExc_OSError);
        at += (u64)n;
    }
    note_spilled(message, block, nbytes, begun_us);
    Py_RETURN_NONE;
}

/* --- where reducers are found */

static PyObject *reduce_as_pickle(PyObject *Py_UNUSED(module), PyObject *object)
{
    PyObject *reduce = PyObject_GetAttr(object, reduce_ex);
    if (reduce == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return NULL;
        PyErr_Clear();
        return PyObject_CallMethod(object, "__reduce__", NULL);
    }
    PyObject *reduced = PyObject_CallFunctionObjArgs(reduce, protocol, NULL);
    Py_DECREF(reduce);
    return reduced;
}

/* reduce_array(array): what is called for an exact ndarray where no table has another reducer */
static PyObject *reduce_array(PyObject *self, PyObject *array)
{
    if (is_ndarray(Py_TYPE(array)))
        return array_reduce(of(self), array);
    PyErr_SetString(PyExc_TypeError, "not an exact ndarray");
    return NULL;
}

ALONE(reduce_array)

/* memoryview(memory): a reference that its owner hands out arrives as the block that it names */
static PyObject *reduce_reference(PyObject *self, PyObject *object)
{
    struct block *reference = (struct block *)object;
    if (Py_TYPE(object) != block_type || !reference->is_shared || reference->state != LEASED) {
        PyErr_SetString(PyExc_TypeError, "not a reference to what is shared");
        return NULL;
    }
    PyObject *made = stand_in(self, object);
    PyObject *arguments = made ? PyTuple_Pack(1, made) : NULL;
    Py_XDECREF(made);
    PyObject *call = arguments ? PyTuple_Pack(2, (PyObject *)&PyMemoryView_Type, arguments) : NULL;
    Py_XDECREF(arguments);
    return call;
}

static PyMethodDef reducers[] = {
    {"reduce_as_pickle", reduce_as_pickle, METH_O, NULL},
    {"reduce_array", reduce_array_alone, METH_O, NULL},
    {"reduce_reference", reduce_reference, METH_O, NULL},
};

static bool is_a(PyTypeObject *kind, PyTypeObject **known, const char *module, const char *name)
{
    if (*known == NULL)
        *known = imported_class(module, name);
    return *known && PyType_IsSubtype(kind, *known);
}

PyObject *numpy_attribute(const char *name)
{
    PyObject *numpy = imported("numpy");
    PyObject *found = numpy ? PyObject_GetAttrString(numpy, name) : NULL;
    if (numpy == NULL && !PyErr_Occurred())
        PyErr_SetString(PyExc_ImportError, "numpy was taken out of sys.modules");
    Py_XDECREF(numpy);
    return found;
}

/* Whether a class derives from one that has memory: those Python knows more about. */
static bool may_be_special(PyTypeObject *kind)
{
    static PyTypeObject *array, *ndarray, *arrow, *structure, *data;
    if (PyType_IsSubtype(kind, &PyBytes_Type) || PyType_IsSubtype(kind, &PyByteArray_Type) ||
        is_a(kind, &array, "array", "array") || is_a(kind, &ndarray, "numpy", "ndarray") ||
        is_a(kind, &arrow, "pyarrow", "Array"))
        return true;
    if (structure == NULL && (structure = imported_class("_ctypes", "Structure")) != NULL)
        data = PyType_GetSlot(structure, Py_tp_base);
    return data && PyType_IsSubtype(kind, data);
}

static PyObject *found_in(PyObject *table, PyObject *kind)
{
    if (PyDict_CheckExact(table))
        return Py_XNewRef(PyDict_GetItemWithError(table, kind));
    PyObject *found = PyObject_GetItem(table, kind);
    if (found == NULL && PyErr_ExceptionMatches(PyExc_KeyError))
        PyErr_Clear();
    return found;
}

/* message[class]: its reducer */
static PyObject *subscript(PyObject *self, PyObject *kind)
{
    struct message *message = of(self);
    /* Of many of one class all but the first. What is registered meanwhile, plain pickle misses, too. */
    if (kind == message->plain)
        return Py_NewRef(as_pickle);
    for (Py_ssize_t i = 0; i < 3; i++) {
        PyObject *found = found_in(PyTuple_GetItem(message->tables, i), kind);
        if (found || PyErr_Occurred())
            return found;
    }
    PyTypeObject *type = (PyTypeObject *)kind;
    if (is_ndarray(type))
        return PyCFunction_NewEx(&reducers[1], self, NULL);
    if (type == rebuild_type)
        return Py_NewRef(as_rebuild);
    if (type == block_type)
        return PyCFunction_NewEx(&reducers[2], self, NULL);
    if (!PyType_Check(kind) || PyType_IsSubtype(type, &PyType_Type)) {
        PyErr_SetObject(PyExc_KeyError, kind); /* its instances are classes, pickled by their names */
        return NULL;
    }
    if (may_be_special(type)) {
        PyObject *find = PyTuple_GetItem(message->tables, 3);
        PyObject *found = PyObject_CallFunctionObjArgs(find, kind, self, NULL);
        if (found != Py_None)
            return found;
        Py_DECREF(found);
    } else {
        PyObject *before = message->plain;
        message->plain = Py_NewRef(kind);
        Py_XDECREF(before);
    }
    return Py_NewRef(as_pickle);
}

/* get(class, default): what the pickler in Python asks for */
static PyObject *get_reducer(PyObject *self, PyObject *arguments)
{
    PyObject *kind, *otherwise = Py_None;
    if (!PyArg_ParseTuple(arguments, "O|O", &kind, &otherwise))
        return NULL;
    PyObject *found = subscript(self, kind);
    if (found == NULL && PyErr_ExceptionMatches(PyExc_KeyError)) {
        PyErr_Clear();
        return Py_NewRef(otherwise);
    }
    return found;
}

/* --- what becomes of it */

/* blocks: [Block] with the buffers, in the order of the plan, each as large as what is in it, and the
   references behind them; None if the buffers are not in blocks */
static PyObject *get_blocks(PyObject *self, void *Py_UNUSED(closure))
{
    struct message *message = of(self);
    if (message->where != IN_BLOCKS)
        Py_RETURN_NONE;
    for (size_t i = 0; i < message->n_buffers; i++) {
        const struct buffer *buffer = &message->buffers[i];
        if (buffer->nbytes && !buffer->is_reference)
            block_use(block_of(message, buffer->block), buffer->at + buffer->nbytes);
    }
    PyObject *all = PyList_GetSlice(message->leased, 0, PyList_Size(message->leased));
    for (Py_ssize_t i = 0; all && message->references && i < PyList_Size(message->references); i++)
        if (PyList_Append(all, PyList_GetItem(message->references, i)) < 0)
            Py_CLEAR(all);
    return all;
}

/* Copy a buffer out of ordinary memory. That is given back step by step, except when the copy goes to
   disk: a refusal must leave the message whole. */
static int move_one(struct message *message, const struct buffer *buffer, struct block *block, u64 at)
{
    u64 begun_us = now_us();
    for (u64 done = 0; done < buffer->nbytes; done += STEP) {
        u64 step = buffer->nbytes - done < STEP ? buffer->nbytes - done : STEP;
        if (block_write(block, at + done, message->memory + buffer->at + done, step, false) != 0)
            return -1;
        if (block->address)
            give_back(message, buffer->at + done, step);
    }
    note_spilled(message, block, buffer->nbytes, begun_us);
    return 0;
}

/* Where each buffer goes in these blocks, and is then; -1 with an exception. */
static int move_all(struct message *message, PyObject *list, struct plan *plan)
{
    enum { CHECK, COPY, PLACE, DONE };
    for (int step = CHECK; step < DONE; step++) {
        *plan = (struct plan){.is_coarse = message->plan.is_coarse};
        for (size_t i = 0; i < message->n_buffers; i++) {
            struct buffer *buffer = &message->buffers[i];
            if (buffer->nbytes == 0 || buffer->is_reference)
                continue;
            struct placed placed = plan_next(plan, buffer->nbytes);
            struct block *block = block_at(list, (Py_ssize_t)placed.block);
            if (block == NULL)
                return -1;
            if (!block_can_take(block, placed.at, buffer->nbytes)) {
                PyErr_SetString(PyExc_ValueError, "a block is not leased, or too small");
                return -1;
            }
            if (step == CHECK)
                continue;
            if (step == COPY && move_one(message, buffer, block, placed.at) != 0) {
                PyErr_SetFromErrno(PyExc_OSError); /* all of it is where it was */
                return -1;
            }
            if (step == PLACE) {
                buffer->block = placed.block;
                buffer->at = placed.at;
            }
        }
        if (PyList_Size(list) != (Py_ssize_t)plan->n_blocks) {
            PyErr_SetString(PyExc_ValueError, "not as many blocks as the message needs");
            return -1;
        }
    }
    return 0;
}

/* move_into([Block]): from ordinary memory into blocks that were leased for the plan of its sizes, all in
   memory or all on disk; OSError: the disk refuses, and the message is where it was */
static PyObject *move_into(PyObject *self, PyObject *list)
{
    struct message *message = of(self);
    struct plan plan;
    if (message->where != IN_MEMORY || message->n_exports || !PyList_Check(list)) {
        PyErr_SetString(PyExc_ValueError, "not in memory of its own, or that is in use");
        return NULL;
    }
    PyObject *leased = list_taken(list);
    if (leased == NULL || move_all(message, leased, &plan) != 0) {
        Py_XDECREF(leased);
        return NULL;
    }
    Py_CLEAR(message->leased);
    message->leased = leased;
    message->where = IN_BLOCKS;
    message->plan = plan;
    free_memory(message);
    Py_RETURN_NONE;
}

/* leave_blocks(): from blocks into ordinary memory */
static PyObject *leave(PyObject *self, PyObject *Py_UNUSED(none))
{
    return of(self)->where != IN_BLOCKS || leave_blocks(of(self)) == 0 ? Py_NewRef(Py_None) : NULL;
}

static int copy_reference(const struct message *message, const struct buffer *buffer, char *to)
{
    if (buffer->file) {
        copy_now(to, buffer->file->address + buffer->at, buffer->nbytes);
        return 0;
    }
    struct block *block = (struct block *)PyList_GetItem(message->references, (Py_ssize_t)buffer->block);
    if (block->is_shared)
        return refuse_shared();
    if (reference_read(block, buffer->at, to, buffer->nbytes) == 0)
        return 0;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

/* Put copies in the place of references; the others are in memory. */
static int copy_references(struct message *message)
{
    if (message->references == NULL && message->files == NULL)
        return 0;
    struct message before = *message;
    message->memory = NULL;
    message->used = message->room = 0;
    int result = 0;
    for (size_t i = 0; i < message->n_buffers && result == 0; i++) {
        struct buffer *buffer = &message->buffers[i];
        char *to = more_for_buffer(message, buffer->nbytes);
        if (to == NULL)
            result = -1;
        else if (buffer->is_reference)
            result = copy_reference(message, buffer, to);
        else if (buffer->nbytes)
            copy_now(to, before.memory + buffer->at, buffer->nbytes);
        if (to && result == 0) {
            message->buffers_nbytes += buffer->is_reference ? buffer->nbytes : 0;
            buffer->at = (u64)(to - message->memory);
            buffer->is_reference = false;
            buffer->file = NULL;
        }
    }
    free_memory(&before);
    Py_CLEAR(message->references);
    if (result != 0)
        message->where = LOST;
    return result;
}

/* to_pickle(before, between, after): all of it as one pickle: the buffers, one after the other, each as
   a bytearray, and the stream. memoryview(message) shows it. */
static PyObject *to_pickle(PyObject *self, PyObject *arguments)
{
    struct message *message = of(self);
    Py_buffer before, between, after;
    if (!PyArg_ParseTuple(arguments, "y*y*y*", &before, &between, &after))
        return NULL;
    PyObject *result = NULL;
    if (message->where == LOST) {
        PyErr_SetString(PyExc_RuntimeError, "half of this message is lost: it could not be read or copied");
    } else if (before.len > HEAD_ROOM || message->n_exports || message->from || message->where == NOWHERE) {
        PyErr_SetString(PyExc_ValueError, "it is a pickle already, or what comes first is too long");
    } else if ((message->where != IN_BLOCKS || leave_blocks(message) == 0) &&
               copy_references(message) == 0) {
        u64 nbytes = (u64)between.len + message->stream_nbytes + (u64)after.len;
        char *to = more_memory(message, nbytes);
        if (to) {
            message->from = HEAD_ROOM - (u64)before.len;
            memcpy(message->memory + message->from, before.buf, (size_t)before.len);
            memcpy(to, between.buf, (size_t)between.len);
            copy_stream(message, to + between.len);
            memcpy(to + nbytes - after.len, after.buf, (size_t)after.len);
            result = Py_NewRef(Py_None);
        }
    }
    PyBuffer_Release(&before);
    PyBuffer_Release(&between);
    PyBuffer_Release(&after);
    return result;
}

static int getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    struct message *message = of(self);
    if (message->from == 0 || message->is_busy) {
        PyErr_SetString(PyExc_BufferError, "it is no pickle yet");
        view->obj = NULL;
        return -1;
    }
    int result = PyBuffer_FillInfo(view, self, message->memory + message->from,
                                   (Py_ssize_t)(message->used - message->from), 1, flags);
    message->n_exports += result == 0;
    return result;
}

static void releasebuffer(PyObject *self, Py_buffer *Py_UNUSED(view))
{
    of(self)->n_exports--;
}

/* give_back(at, nbytes): these bytes of the pickle are needed no more; they read as anything */
static PyObject *give_back_range(PyObject *self, PyObject *arguments)
{
    struct message *message = of(self);
    unsigned long long at, nbytes;
    if (!PyArg_ParseTuple(arguments, "KK", &at, &nbytes))
        return NULL;
    u64 whole = message->used - message->from;
    if (message->from && at <= whole && nbytes <= whole - at)
        give_back(message, message->from + at, nbytes);
    Py_RETURN_NONE;
}

static void forget(struct message *message)
{
    while (message->n_pending)
        drop_pending(message, message->n_pending - 1);
    Py_CLEAR(message->leased);
    Py_CLEAR(message->references);
    Py_CLEAR(message->files);
    Py_CLEAR(message->made);
    Py_CLEAR(message->pieces);
    Py_CLEAR(message->plain);
    free_memory(message);
    message->n_buffers = 0;
    message->kept_nbytes = message->stream_nbytes = message->buffers_nbytes = 0;
    message->fresh_nbytes = message->spilled_nbytes = message->spilling_us = 0;
    message->is_spilling = false;
    message->plan = (struct plan){.is_coarse = message->plan.is_coarse};
    message->where = message->begun;
}

static int begin(struct message *message)
{
    message->pieces = PyList_New(0);
    message->leased = message->pieces ? PyList_New(0) : NULL;
    return message->leased ? 0 : -1;
}

/* clear(): as if nothing had been taken apart */
static PyObject *clear(PyObject *self, PyObject *Py_UNUSED(none))
{
    if (of(self)->n_exports) {
        PyErr_SetString(PyExc_BufferError, "its memory is in use");
        return NULL;
    }
    forget(of(self));
    int result = begin(of(self));
    dtype_forget(&of(self)->dtype); /* at last: what is in one may look at the message as it dies */
    return result == 0 ? Py_NewRef(Py_None) : NULL;
}

/* --- the type */

/* Message(blocks, threshold, tables, published): `blocks` is None if the buffers are not to go into an
   arena, and False if they are only to be counted; `published` is the arena to whose published memory
   references may be sent, if it is not the same: None or False if there is none */
static PyObject *new_message(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    PyObject *blocks, *number, *tables, *published = NULL;
    if (!PyArg_ParseTuple(arguments, "OOO!|O", &blocks, &number, &PyTuple_Type, &tables, &published))
        return NULL;
    u64 threshold = PyLong_AsUnsignedLongLong(number);
    if (PyErr_Occurred())
        return NULL;
    if (PyTuple_Size(tables) != 4 || !(blocks == Py_None || blocks == Py_False || is_blocks(blocks))) {
        PyErr_SetString(PyExc_TypeError, "expected Blocks, None or False, a threshold, four tables");
        return NULL;
    }
    struct message *message = (struct message *)PyType_GenericAlloc(type, 0); /* zeroed */
    if (message == NULL)
        return NULL;
    message->threshold = threshold;
    message->begun = blocks == Py_None ? IN_MEMORY : blocks == Py_False ? NOWHERE : IN_BLOCKS;
    message->where = message->begun;
    message->tables = Py_NewRef(tables);
    if (message->begun == IN_BLOCKS)
        message->blocks = (struct blocks *)Py_NewRef(blocks);
    if (published == NULL && message->begun == IN_BLOCKS)
        published = blocks;
    if (published && is_blocks(published))
        message->published = (struct blocks *)Py_NewRef(published);
    if (begin(message) != 0)
        Py_CLEAR(message);
    return (PyObject *)message;
}

static void dealloc(PyObject *self)
{
    struct message *message = of(self);
    PyTypeObject *type = Py_TYPE(self);
    forget(message);
    dtype_forget(&message->dtype);
    free(message->buffers);
    free(message->pending);
    Py_XDECREF(message->tables);
    Py_XDECREF((PyObject *)message->blocks);
    Py_XDECREF((PyObject *)message->published);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *get_nbytes(PyObject *self, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(of(self)->stream_nbytes + of(self)->buffers_nbytes);
}

static bool is_marked(const struct buffer *buffer)
{
    return buffer->is_reference && buffer->file == NULL;
}

/* sizes: nbytes of each buffer, 64-bit words; that of a reference is marked, and its offset follows; of
   a place in a file it is 0 */
static PyObject *get_sizes(PyObject *self, void *Py_UNUSED(closure))
{
    struct message *message = of(self);
    size_t n = message->n_buffers; /* and marks: not as `references` has, which may be gone */
    for (size_t i = 0; i < message->n_buffers; i++)
        n += is_marked(&message->buffers[i]);
    PyObject *sizes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(8 * n));
    char *to = sizes ? PyBytes_AsString(sizes) : NULL;
    for (size_t i = 0; to && i < message->n_buffers; i++) {
        const struct buffer *buffer = &message->buffers[i];
        const u64 mark = is_marked(buffer) ? REFERRED : 0;
        const u64 words[2] = {buffer->file ? 0 : buffer->nbytes | mark, buffer->at};
        memcpy(to, words, mark ? 16 : 8);
        to += mark ? 16 : 8;
    }
    return sizes;
}

/* places: [(which buffer, offset, nbytes, MappedFile)] of those that lie in files */
static PyObject *get_places(PyObject *self, void *Py_UNUSED(closure))
{
    struct message *message = of(self);
    PyObject *places = PyList_New(0);
    for (size_t i = 0; places && message->files && i < message->n_buffers; i++) {
        const struct buffer *buffer = &message->buffers[i];
        if (buffer->file)
            list_add(&places, Py_BuildValue("nKKO", (Py_ssize_t)i, (unsigned long long)buffer->at,
                                            (unsigned long long)buffer->nbytes, (PyObject *)buffer->file));
    }
    return places;
}

/* nbytes_in_band: of all of it, with the bytes of what is referred to */
static PyObject *get_nbytes_in_band(PyObject *self, void *Py_UNUSED(closure))
{
    u64 nbytes = of(self)->stream_nbytes;
    for (size_t i = 0; i < of(self)->n_buffers; i++)
        nbytes += of(self)->buffers[i].nbytes;
    return PyLong_FromUnsignedLongLong(nbytes);
}

/* references: [Block] */
static PyObject *get_references(PyObject *self, void *Py_UNUSED(closure))
{
    PyObject *references = of(self)->references;
    return references ? PyList_GetSlice(references, 0, PyList_Size(references)) : PyList_New(0);
}

/* table: where a pickler is to look for reducers */
static PyObject *get_table(PyObject *self, void *Py_UNUSED(closure))
{
    return Py_NewRef(self);
}

/* levels: where reducers are looked for before ours are */
static PyObject *get_levels(PyObject *self, void *Py_UNUSED(closure))
{
    return PyTuple_GetSlice(of(self)->tables, 0, 3);
}

ALONE(write_piece)
ALONE(take)
ALONE(write_stream_into)
ALONE(move_into)
ALONE(leave)
ALONE(to_pickle)
ALONE(give_back_range)
ALONE(clear)

static PyMethodDef methods[] = {
    {"write", write_piece_alone, METH_O, NULL},
    {"take", take_alone, METH_O, NULL},
    {"stays", stays, METH_O, NULL},
    {"stand_in", stand_in, METH_O, NULL},
    {"reduce_array", reduce_array_alone, METH_O, NULL},
    {"get", get_reducer, METH_VARARGS, NULL},
    {"small", small, METH_NOARGS, NULL},
    {"start", get_start, METH_O, NULL},
    {"write_stream_into", write_stream_into_alone, METH_VARARGS, NULL},
    {"move_into", move_into_alone, METH_O, NULL},
    {"leave_blocks", leave_alone, METH_NOARGS, NULL},
    {"to_pickle", to_pickle_alone, METH_VARARGS, NULL},
    {"give_back", give_back_range_alone, METH_VARARGS, NULL},
    {"clear", clear_alone, METH_NOARGS, NULL},
    {0},
};

static PyMemberDef members[] = {
    {"stream_nbytes", T_ULONGLONG, offsetof(struct message, stream_nbytes), READONLY, NULL},
    {"n_buffers", T_PYSSIZET, offsetof(struct message, n_buffers), READONLY, NULL},
    {"nbytes_fresh", T_ULONGLONG, offsetof(struct message, fresh_nbytes), READONLY, NULL},
    {"nbytes_spilled", T_ULONGLONG, offsetof(struct message, spilled_nbytes), READONLY, NULL},
    {"us_spilling", T_ULONGLONG, offsetof(struct message, spilling_us), READONLY, NULL},
    {"is_for_one", T_BOOL, offsetof(struct message, is_for_one), 0, NULL},
    {"keeps_flags", T_BOOL, offsetof(struct message, keeps_flags), 0, NULL},
    {"is_coarse", T_BOOL, offsetof(struct message, plan.is_coarse), 0, NULL},
    {0},
};

static PyGetSetDef attributes[] = {
    {"table", get_table, NULL, NULL, NULL},
    {"levels", get_levels, NULL, NULL, NULL},
    {"stream", get_stream, NULL, NULL, NULL},
    {"nbytes", get_nbytes, NULL, NULL, NULL},
    {"sizes", get_sizes, NULL, NULL, NULL},
    {"blocks", get_blocks, NULL, NULL, NULL},
    {"references", get_references, NULL, NULL, NULL},
    {"places", get_places, NULL, NULL, NULL},
    {"nbytes_in_band", get_nbytes_in_band, NULL, NULL, NULL},
    {0},
};

static PyType_Slot slots[] = {
    {Py_tp_new, new_message},
    {Py_tp_dealloc, dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, attributes},
    {Py_mp_subscript, subscript},
    {Py_bf_getbuffer, getbuffer},
    {Py_bf_releasebuffer, releasebuffer},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "oobpickle._core.Message",
    .basicsize = sizeof(struct message),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

/* --- Rebuild: pickled as a call */

struct rebuild {
    PyObject_HEAD
    PyObject *reduced; /* (function, arguments) */
};

PyObject *rebuild_new(PyObject *reduced)
{
    struct rebuild *rebuild = PyObject_New(struct rebuild, rebuild_type);
    if (rebuild)
        rebuild->reduced = reduced;
    else
        Py_DECREF(reduced);
    return (PyObject *)rebuild;
}

static PyObject *new_rebuild(PyTypeObject *Py_UNUSED(type), PyObject *arguments,
                             PyObject *Py_UNUSED(keywords))
{
    PyObject *function, *its;
    if (!PyArg_ParseTuple(arguments, "OO!", &function, &PyTuple_Type, &its))
        return NULL;
    PyObject *reduced = PyTuple_Pack(2, function, its);
    return reduced ? rebuild_new(reduced) : NULL;
}

static PyObject *rebuild_reduce(PyObject *self, PyObject *Py_UNUSED(none))
{
    return Py_NewRef(((struct rebuild *)self)->reduced);
}

static PyObject *reduce_rebuild(PyObject *Py_UNUSED(module), PyObject *rebuild)
{
    if (Py_TYPE(rebuild) == rebuild_type)
        return rebuild_reduce(rebuild, NULL);
    PyErr_SetString(PyExc_TypeError, "not a Rebuild");
    return NULL;
}

static void rebuild_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_DECREF(((struct rebuild *)self)->reduced);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static PyMethodDef rebuild_methods[] = {{"__reduce__", rebuild_reduce, METH_NOARGS, NULL}, {0}};
static PyMethodDef rebuild_reducer = {"reduce_rebuild", reduce_rebuild, METH_O, NULL};
static PyMemberDef rebuild_members[] = {
    {"reduced", T_OBJECT_EX, offsetof(struct rebuild, reduced), READONLY, NULL},
    {0},
};
static PyType_Slot rebuild_slots[] = {
    {Py_tp_new, new_rebuild},
    {Py_tp_dealloc, rebuild_dealloc},
    {Py_tp_methods, rebuild_methods},
    {Py_tp_members, rebuild_members},
    {0, NULL},
};

static PyType_Spec rebuild_spec = {
    .name = "oobpickle._core.Rebuild",
    .basicsize = sizeof(struct rebuild),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = rebuild_slots,
};

int message_type_make(PyObject *module)
{
    if (as_pickle == NULL)
        as_pickle = PyCFunction_NewEx(&reducers[0], NULL, NULL);
    if (as_rebuild == NULL)
        as_rebuild = PyCFunction_NewEx(&rebuild_reducer, NULL, NULL);
    if (reduce_ex == NULL)
        reduce_ex = PyUnicode_InternFromString("__reduce_ex__");
    if (protocol == NULL)
        protocol = PyLong_FromLong(5);
    PyObject *pickle = PyImport_ImportModule("_pickle");
    if (picklebuffer == NULL && pickle)
        picklebuffer = PyObject_GetAttrString(pickle, "PickleBuffer");
    Py_XDECREF(pickle);
    PyObject *nothing = PyByteArray_FromStringAndSize(NULL, 0);
    if (shared_stand_in == NULL && picklebuffer && nothing)
        shared_stand_in = PyObject_CallFunctionObjArgs(picklebuffer, nothing, NULL);
    Py_XDECREF(nothing);
    if (!as_pickle || !as_rebuild || !shared_stand_in || !reduce_ex || !protocol)
        return -1;
    return type_make(module, &message_type, &spec) || type_make(module, &rebuild_type, &rebuild_spec);
}
