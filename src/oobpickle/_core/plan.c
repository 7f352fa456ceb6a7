/* How the buffers of a message lie in its blocks.

What. `plan_next`, which sender and receiver compute alike from the sizes, in order; `plan` and
`spread` do it for all buffers of a message.

How it works. A large buffer has a block of its own. Smaller ones share *chunks*, 64-byte aligned.
What survives of a message pins little: buffers from 4 KiB on share chunks of 64 KiB, so one of them
keeps at most 16 times itself; those that are smaller become ordinary memory on arrival, and their
chunk comes back at once, so that it may be large. A buffer that lies in published memory is a
reference, which comes behind the blocks; its size is marked, and its offset follows.

Lifetime. No state.

When it cannot. It cannot fail. */

#include "core.h"

#include <stdlib.h>
#include <string.h>

#define OWN ((u64)32 << 10)
#define SMALL ((u64)4 << 10)
#define CHUNK_NBYTES ((u64)64 << 10)
#define LARGE_CHUNK_NBYTES ((u64)1 << 20)
#define COARSE ((u64)4 << 20)
#define ALIGN 64

/* What is published lives as a whole, and each block is a mapping for each reader: so few of them. The
   chunks grow with what is in them. */
static u64 coarse_capacity(u64 before, u64 nbytes)
{
    u64 capacity = 2 * before < CHUNK_NBYTES ? CHUNK_NBYTES : 2 * before;
    return capacity > COARSE ? COARSE : capacity < nbytes ? round_up(nbytes, PAGE) : capacity;
}

/* The place of the next buffer, which is not empty. */
struct placed plan_next(struct plan *plan, u64 nbytes)
{
    bool is_small = nbytes < SMALL && !plan->is_coarse;
    struct chunk *chunk = is_small ? &plan->small : &plan->shared;
    u64 at = round_up(chunk->filled, ALIGN), capacity = 0;
    if (nbytes >= (plan->is_coarse ? COARSE : OWN))
        return (struct placed){.block = plan->n_blocks++, .capacity = nbytes};
    if (at + nbytes > chunk->capacity) {
        /* The first is not larger than those of the others: most messages have few. */
        capacity = is_small && chunk->capacity ? LARGE_CHUNK_NBYTES : CHUNK_NBYTES;
        if (plan->is_coarse)
            capacity = coarse_capacity(chunk->capacity, nbytes);
        *chunk = (struct chunk){.block = plan->n_blocks++, .capacity = capacity};
        at = 0;
    }
    chunk->filled = at + nbytes;
    return (struct placed){.block = chunk->block, .at = at, .capacity = capacity};
}

/* What Python passes as sizes: 64-bit words. */
static Py_ssize_t n_sizes(const Py_buffer *sizes)
{
    return sizes->len / (Py_ssize_t)sizeof(u64);
}

static u64 size_at(const Py_buffer *view, Py_ssize_t i)
{
    u64 nbytes;
    memcpy(&nbytes, (const char *)view->buf + i * (Py_ssize_t)sizeof nbytes, sizeof nbytes);
    return nbytes;
}

/* The range of the next reference among the sizes from `*i` on; false: there is none. */
bool plan_next_reference(const Py_buffer *sizes, Py_ssize_t *i, u64 *at, u64 *nbytes)
{
    for (; *i + 1 < n_sizes(sizes); ++*i)
        if (size_at(sizes, *i) & REFERRED) {
            *nbytes = size_at(sizes, *i) & ~REFERRED;
            *at = size_at(sizes, *i + 1);
            *i += 2;
            return true;
        }
    return false;
}

/* How many sizes are marked, each with an offset behind it. */
static Py_ssize_t references_in(const Py_buffer *sizes)
{
    Py_ssize_t n = 0, i = 0;
    u64 at, nbytes;
    while (plan_next_reference(sizes, &i, &at, &nbytes))
        n++;
    return n;
}

/* plan(sizes, before, coarse): [bytes used of each block, and 0 of each reference]; or before the message
   is there, what is leased */
PyObject *plan_needs(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    Py_buffer view;
    int before = 0, coarse = 0;
    if (!PyArg_ParseTuple(arguments, "y*|pp", &view, &before, &coarse))
        return NULL;
    const Py_ssize_t n = n_sizes(&view);
    struct plan plan = {.is_coarse = coarse};
    u64 *needs = calloc((size_t)n + 1, sizeof *needs);
    PyObject *list = needs ? NULL : PyErr_NoMemory();
    for (Py_ssize_t i = 0; needs && i < n; i++) {
        u64 nbytes = size_at(&view, i);
        if (nbytes & REFERRED) {
            i++;
        } else if (nbytes) {
            struct placed placed = plan_next(&plan, nbytes);
            if (!before)
                needs[placed.block] = placed.at + nbytes;
            else if (placed.capacity)
                needs[placed.block] = placed.capacity;
        }
    }
    if (needs)
        list = list_of(needs, plan.n_blocks + (size_t)references_in(&view)); /* a reference needs nothing */
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
    return PySequence_GetSlice(block, (Py_ssize_t)at, (Py_ssize_t)(at + nbytes));
}

/* spread([memoryview of each block], sizes, received, coarse): [memory of each buffer]; of what was
   received the smallest are copies */
PyObject *plan_spread(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *blocks, *list = NULL;
    Py_buffer view, memory = {0};
    int received, coarse = 0;
    if (!PyArg_ParseTuple(arguments, "O!y*p|p", &PyList_Type, &blocks, &view, &received, &coarse))
        return NULL;
    struct plan plan = {.is_coarse = coarse};
    const Py_ssize_t n = n_sizes(&view), n_references = references_in(&view), n_buffers = n - n_references;
    Py_ssize_t next_reference = PyList_Size(blocks) - n_references;
    u32 looked_at = UINT32_MAX; /* `memory` is that of this block */
    list = PyList_New(n_buffers);
    PyObject *block = NULL; /* a reference: whoever is asked for its memory may change the list */
    for (Py_ssize_t i = 0, k = 0; list && k < n_buffers; i++, k++) {
        u64 nbytes = i < n ? size_at(&view, i) : 0; /* or the sizes, if they are in a bytearray */
        PyObject *part = NULL;
        if (nbytes == 0) {
            part = PyByteArray_FromStringAndSize(NULL, 0);
        } else {
            struct placed placed;
            bool is_reference = nbytes & REFERRED;
            if (is_reference && i + 1 == n) {
                PyErr_SetString(PyExc_ValueError, "a reference without its offset");
                Py_CLEAR(list);
                break;
            }
            if (is_reference) {
                placed = (struct placed){.block = (u32)next_reference++, .at = size_at(&view, ++i)};
                nbytes &= ~REFERRED;
            } else {
                placed = plan_next(&plan, nbytes);
            }
            Py_XDECREF(block);
            block = Py_XNewRef(PyList_GetItem(blocks, (Py_ssize_t)placed.block));
            if (block && looked_at != placed.block) {
                if (memory.obj)
                    PyBuffer_Release(&memory);
                looked_at = placed.block;
                if (PyObject_GetBuffer(block, &memory, PyBUF_SIMPLE) != 0) {
                    memory.obj = NULL;
                    Py_CLEAR(block);
                }
            }
            if (block && is_reference && nbytes == (u64)memory.len)
                placed.at = 0; /* it could not be mapped: `claim` has copied this part, and no more */
            if (block && (nbytes > (u64)memory.len || placed.at > (u64)memory.len - nbytes))
                PyErr_SetString(PyExc_ValueError, "a block is smaller than what lies in it");
            else if (block)
                part = part_of(block, &memory, placed.at, nbytes, received && !is_reference);
        }
        if (part == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, k, part);
    }
    Py_XDECREF(block);
    if (memory.obj)
        PyBuffer_Release(&memory);
    PyBuffer_Release(&view);
    return list;
}
