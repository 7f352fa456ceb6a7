/* How the buffers of a message lie in its blocks.

What. `plan_next`, which sender and receiver compute alike from the sizes, in order; `plan` and
`spread` do it for all buffers of a message.

How it works. A large buffer has a block of its own. Smaller ones share *chunks*, 64-byte aligned.
What survives of a message pins little: buffers from 4 KiB on share chunks of 64 KiB, so one of them
keeps at most 16 times itself; those that are smaller become ordinary memory on arrival, and their
chunk comes back at once, so that it may be large.

Lifetime. No state.

When it cannot. It cannot fail. */

#include "core.h"

#include <stdlib.h>
#include <string.h>

#define OWN ((u64)32 << 10)
#define SMALL ((u64)4 << 10)
#define CHUNK_NBYTES ((u64)64 << 10)
#define LARGE_CHUNK_NBYTES ((u64)1 << 20)
#define ALIGN 64

/* The place of the next buffer, which is not empty. */
struct placed plan_next(struct plan *plan, u64 nbytes)
{
    if (nbytes >= OWN)
        return (struct placed){.block = plan->n_blocks++, .capacity = nbytes};
    struct chunk *chunk = nbytes < SMALL ? &plan->small : &plan->shared;
    u64 at = round_up(chunk->filled, ALIGN), capacity = 0;
    if (at + nbytes > chunk->capacity) {
        /* The first is not larger than those of the others: most messages have few. */
        capacity = nbytes < SMALL && chunk->capacity ? LARGE_CHUNK_NBYTES : CHUNK_NBYTES;
        *chunk = (struct chunk){.block = plan->n_blocks++, .capacity = capacity};
        at = 0;
    }
    chunk->filled = at + nbytes;
    return (struct placed){.block = chunk->block, .at = at, .capacity = capacity};
}

/* What Python passes as sizes: 64-bit words. */
static int sizes_of(PyObject *argument, Py_buffer *view, Py_ssize_t *n)
{
    if (PyObject_GetBuffer(argument, view, PyBUF_SIMPLE) != 0)
        return -1;
    *n = view->len / (Py_ssize_t)sizeof(u64);
    return 0;
}

static u64 size_at(const Py_buffer *view, Py_ssize_t i)
{
    u64 nbytes;
    memcpy(&nbytes, (const char *)view->buf + i * (Py_ssize_t)sizeof nbytes, sizeof nbytes);
    return nbytes;
}

/* plan(sizes, before): [bytes used of each block]; or before the message is there, what is leased */
PyObject *plan_needs(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *sizes;
    Py_buffer view;
    Py_ssize_t n;
    int before = 0;
    if (!PyArg_ParseTuple(arguments, "O|p", &sizes, &before) || sizes_of(sizes, &view, &n) != 0)
        return NULL;
    struct plan plan = {0};
    u64 *needs = calloc((size_t)n + 1, sizeof *needs);
    PyObject *list = needs ? NULL : PyErr_NoMemory();
    for (Py_ssize_t i = 0; needs && i < n; i++) {
        u64 nbytes = size_at(&view, i);
        if (nbytes) {
            struct placed placed = plan_next(&plan, nbytes);
            if (!before)
                needs[placed.block] = placed.at + nbytes;
            else if (placed.capacity)
                needs[placed.block] = placed.capacity;
        }
    }
    if (needs)
        list = PyList_New(plan.n_blocks);
    for (u32 i = 0; list && i < plan.n_blocks; i++) {
        PyObject *need = PyLong_FromUnsignedLongLong(needs[i]);
        if (need == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, need);
    }
    free(needs);
    PyBuffer_Release(&view);
    return list;
}

static PyObject *part_of(PyObject *block, const Py_buffer *memory, u64 at, u64 nbytes, bool is_mine)
{
    if (is_mine && nbytes < SMALL)
        return PyByteArray_FromStringAndSize((const char *)memory->buf + at, (Py_ssize_t)nbytes);
    if (at == 0 && nbytes == (u64)memory->len)
        return Py_NewRef(block);
    PyObject *start = PyLong_FromUnsignedLongLong(at), *part = NULL;
    PyObject *end = PyLong_FromUnsignedLongLong(at + nbytes);
    PyObject *range = start && end ? PySlice_New(start, end, NULL) : NULL;
    if (range)
        part = PyObject_GetItem(block, range);
    Py_XDECREF(range);
    Py_XDECREF(start);
    Py_XDECREF(end);
    return part;
}

/* spread([memoryview of each block], sizes, received): [memory of each buffer]; of what was received the
   smallest are copies */
PyObject *plan_spread(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *blocks, *sizes, *list = NULL;
    Py_buffer view, memory = {0};
    Py_ssize_t n;
    int received;
    if (!PyArg_ParseTuple(arguments, "O!Op", &PyList_Type, &blocks, &sizes, &received) ||
        sizes_of(sizes, &view, &n) != 0)
        return NULL;
    struct plan plan = {0};
    u32 looked_at = UINT32_MAX; /* `memory` is that of this block */
    list = PyList_New(n);
    for (Py_ssize_t i = 0; list && i < n; i++) {
        u64 nbytes = size_at(&view, i);
        PyObject *part = NULL;
        if (nbytes == 0) {
            part = PyByteArray_FromStringAndSize(NULL, 0);
        } else {
            struct placed placed = plan_next(&plan, nbytes);
            PyObject *block = PyList_GetItem(blocks, (Py_ssize_t)placed.block);
            if (block && looked_at != placed.block) {
                if (memory.obj)
                    PyBuffer_Release(&memory);
                looked_at = placed.block;
                if (PyObject_GetBuffer(block, &memory, PyBUF_SIMPLE) != 0) {
                    memory.obj = NULL;
                    block = NULL;
                }
            }
            if (block && placed.at + nbytes > (u64)memory.len)
                PyErr_SetString(PyExc_ValueError, "a block is smaller than what lies in it");
            else if (block)
                part = part_of(block, &memory, placed.at, nbytes, received);
        }
        if (part == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, part);
    }
    if (memory.obj)
        PyBuffer_Release(&memory);
    PyBuffer_Release(&view);
    return list;
}
