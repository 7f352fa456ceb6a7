/* Arrays, as a message takes them apart: an exact numpy.ndarray, and memory with strides.

What. `array_reduce` is the reducer of an exact ndarray; `memory_copy` copies a buffer in the order
of its memory.

How it works. An array is rebuilt by ``numpy.ndarray(shape, dtype, buffer[, 0, strides])``, so a
receiver needs only NumPy. Its bytes are sent in the order of its memory if that has no gaps in some
order of axes, and in C order else. The name of a builtin dtype stands for it: much cheaper to send
and to load than the object. ``_pickling/reducers.py`` does the same in Python, for those who want
an object's memory and not a copy; a test compares the two.

Lifetime. Nothing is kept but references to functions of NumPy.

When it cannot. Arrays with Python objects in them go NumPy's way. */

#include "core.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_AXES 64
#define PIECE ((size_t)1 << 20)
#define MIN_BUFFER 512 /* below this a buffer of its own costs more than its bytes in the stream */
#define MOST_OWNED 1000 /* NumPy copies up to here when it loads */

/* --- strides */

struct layout {
    int n_axes;
    Py_ssize_t shape[MOST_AXES], strides[MOST_AXES];
};

/* The axes of more than one element, the largest step first. */
static struct layout ordered_axes(const Py_buffer *view)
{
    struct layout axes = {0};
    for (int i = 0; i < view->ndim && i < MOST_AXES; i++) {
        if (view->shape[i] == 1)
            continue;
        int at = axes.n_axes++;
        for (; at > 0 && axes.strides[at - 1] < view->strides[i]; at--) {
            axes.shape[at] = axes.shape[at - 1];
            axes.strides[at] = axes.strides[at - 1];
        }
        axes.shape[at] = view->shape[i];
        axes.strides[at] = view->strides[i];
    }
    return axes;
}

static bool has_gaps(const Py_buffer *view)
{
    struct layout axes = ordered_axes(view);
    Py_ssize_t expected = view->itemsize;
    for (int i = axes.n_axes - 1; i >= 0; i--) {
        if (axes.strides[i] != expected)
            return true;
        expected *= axes.shape[i];
    }
    return false;
}

static bool is_in_c_order(const Py_buffer *view)
{
    Py_ssize_t expected = view->itemsize;
    for (int i = view->ndim - 1; i >= 0; i--) {
        if (view->shape[i] != 1 && view->strides[i] != expected)
            return false;
        expected *= view->shape[i];
    }
    return true;
}

#define COPY_ITEMS(type)                                                                           \
    for (; n > 0; n--, from += stride, to += sizeof(type))                                         \
        memcpy(to, from, sizeof(type));                                                            \
    return to

static char *copy_items(char *to, const char *from, Py_ssize_t n, Py_ssize_t stride, size_t itemsize)
{
    switch (itemsize) { /* a constant size becomes one load and one store */
    case 1:
        COPY_ITEMS(uint8_t);
    case 2:
        COPY_ITEMS(uint16_t);
    case 4:
        COPY_ITEMS(u32);
    case 8:
        COPY_ITEMS(u64);
    default:
        for (; n > 0; n--, from += stride, to += itemsize)
            memcpy(to, from, itemsize);
        return to;
    }
}

static char *copy_axes(char *to, const char *from, const struct layout *axes, int axis, size_t run)
{
    if (axis == axes->n_axes) {
        memcpy(to, from, run);
        return to + run;
    }
    if (axis == axes->n_axes - 1)
        return copy_items(to, from, axes->shape[axis], axes->strides[axis], run);
    for (Py_ssize_t i = 0; i < axes->shape[axis]; i++, from += axes->strides[axis])
        to = copy_axes(to, from, axes, axis + 1, run);
    return to;
}

/* In which order memory with gaps is copied, and how much of it has none; false: it has none at all. */
static bool axes_to_copy(const Py_buffer *view, struct layout *axes, size_t *run)
{
    if (view->strides == NULL || view->ndim == 0 || view->len == 0 || !has_gaps(view))
        return false;
    *axes = (struct layout){0};
    for (int i = 0; i < view->ndim; i++) {
        axes->shape[axes->n_axes] = view->shape[i];
        axes->strides[axes->n_axes] = view->strides[i];
        axes->n_axes += view->shape[i] != 1;
    }
    *run = (size_t)view->itemsize;
    while (axes->n_axes && axes->strides[axes->n_axes - 1] == (Py_ssize_t)*run)
        *run *= (size_t)axes->shape[--axes->n_axes];
    return true;
}

struct gapped {
    char *to;
    const char *from;
    const struct layout *axes;
    size_t run, each; /* bytes without a gap, and of an item of the first axis */
};

static void copy_gapped(const void *with, size_t at, size_t n)
{
    const struct gapped *memory = with;
    struct layout some = *memory->axes;
    some.shape[0] = (Py_ssize_t)n;
    copy_axes(memory->to + at * memory->each, memory->from + (Py_ssize_t)at * some.strides[0], &some, 0,
              memory->run);
}

/* Copy all of it, in the order of its memory if that has no gaps, else in C order. */
void memory_copy(char *to, const Py_buffer *view)
{
    struct layout axes;
    size_t run, nbytes = (size_t)view->len;
    if (!axes_to_copy(view, &axes, &run) || axes.n_axes == 0) {
        copy_now(to, view->buf, nbytes);
        return;
    }
    size_t n = (size_t)axes.shape[0];
    struct gapped memory = {to, view->buf, &axes, run, nbytes / n};
    copy_in_pieces(copy_gapped, &memory, n, nbytes);
}

/* What is written piece by piece to a block on disk. */
struct writing {
    struct block *block;
    u64 at;
    char *memory; /* for what has gaps: PIECE bytes */
};

static int write_piece(struct writing *to, const char *from, u64 nbytes)
{
    int result = block_write(to->block, to->at, from, nbytes, true);
    to->at += nbytes;
    return result;
}

/* From one axis on: as many of its items at a time as fit into a piece. */
static int write_axes(struct writing *to, const char *from, const struct layout *axes, int axis, size_t run)
{
    if (axis == axes->n_axes)
        return write_piece(to, from, run);
    size_t each = run;
    for (int i = axis + 1; i < axes->n_axes; i++)
        each *= (size_t)axes->shape[i];
    Py_ssize_t at_once = each > PIECE ? 1 : (Py_ssize_t)(PIECE / each);
    for (Py_ssize_t i = 0; i < axes->shape[axis]; i += at_once, from += at_once * axes->strides[axis]) {
        int result;
        if (each > PIECE) {
            result = write_axes(to, from, axes, axis + 1, run);
        } else {
            struct layout some = *axes;
            some.shape[axis] = axes->shape[axis] - i < at_once ? axes->shape[axis] - i : at_once;
            result = write_piece(to, to->memory,
                                 (u64)(copy_axes(to->memory, from, &some, axis, run) - to->memory));
        }
        if (result != 0)
            return -1;
    }
    return 0;
}

/* The same into a leased block, wherever it is, with the GIL kept; -1 with errno: the disk refuses. */
int memory_write(struct block *block, u64 at, const Py_buffer *view)
{
    if (block->address) {
        memory_copy(block->address + at, view);
        return 0;
    }
    struct layout axes;
    size_t run;
    if (!axes_to_copy(view, &axes, &run))
        return block_write(block, at, view->buf, (u64)view->len, true);
    struct writing to = {.block = block, .at = at, .memory = malloc(PIECE)};
    int result = to.memory ? write_axes(&to, view->buf, &axes, 0, run) : -1;
    free(to.memory);
    return result;
}

/* --- dtypes */

static PyObject *attribute(PyObject *object, const char *name)
{
    return PyObject_GetAttrString(object, name);
}

static char first_char(PyObject *object, const char *name)
{
    PyObject *text = attribute(object, name);
    Py_ssize_t n;
    const char *chars = text ? PyUnicode_AsUTF8AndSize(text, &n) : NULL;
    char first = chars ? *chars : 0;
    Py_XDECREF(text);
    PyErr_Clear();
    return first;
}

static bool is_true(PyObject *object, const char *name)
{
    PyObject *value = attribute(object, name);
    bool is = value && PyObject_IsTrue(value) == 1;
    Py_XDECREF(value);
    PyErr_Clear();
    return is;
}

static bool is_none(PyObject *object, const char *name)
{
    PyObject *value = attribute(object, name);
    bool is = value == Py_None;
    Py_XDECREF(value);
    PyErr_Clear();
    return is;
}

static PyObject *sent_as(PyObject *dtype)
{
    PyObject *builtin = attribute(dtype, "isbuiltin");
    long number = builtin ? PyLong_AsLong(builtin) : 0;
    Py_XDECREF(builtin);
    PyErr_Clear();
    return number == 1 && is_none(dtype, "metadata") ? attribute(dtype, "str") : Py_NewRef(dtype);
}

/* Whether pickling a dtype may run code of others: it has an object of theirs somewhere. */
static bool has_objects_in(PyObject *dtype)
{
    if (!is_none(dtype, "metadata"))
        return true;
    bool has = false;
    PyObject *part = attribute(dtype, "subdtype");
    if (part && PyTuple_Check(part))
        has = has_objects_in(PyTuple_GetItem(part, 0));
    Py_XDECREF(part);
    PyObject *fields = attribute(dtype, "fields"), *values = NULL;
    if (fields && fields != Py_None)
        values = PyMapping_Values(fields); /* (dtype, offset[, title]) of each */
    for (Py_ssize_t i = 0; values && i < PyList_Size(values) && !has; i++) {
        PyObject *field = PyList_GetItem(values, i);
        has = !PyTuple_Check(field) || PyTuple_Size(field) < 2 ||
              (PyTuple_Size(field) > 2 && !PyUnicode_CheckExact(PyTuple_GetItem(field, 2))) ||
              has_objects_in(PyTuple_GetItem(field, 0));
    }
    Py_XDECREF(values);
    Py_XDECREF(fields);
    PyErr_Clear();
    return has;
}

/* Learn of a dtype, unless it is the one of the array before. */
static int dtype_learn(struct dtype *known, PyObject *dtype)
{
    if (known->object == dtype)
        return 0;
    dtype_forget(known);
    char kind = first_char(dtype, "kind"), type = first_char(dtype, "char");
    known->is_ours = kind && strchr("biufcmMSUV", kind) && !is_true(dtype, "hasobject");
    /* Those that the buffer protocol has in every byte order: not that of long doubles. */
    known->is_exported = type && strchr("?bBhHiIlLqQefdFDS", type);
    known->has_names = !is_none(dtype, "names");
    known->sent = sent_as(dtype);
    known->may_run_code = known->sent == dtype && has_objects_in(dtype);
    PyObject *nbytes = attribute(dtype, "itemsize");
    known->itemsize = nbytes ? PyLong_AsLongLong(nbytes) : 0;
    Py_XDECREF(nbytes);
    known->object = Py_NewRef(dtype);
    return known->sent == NULL || PyErr_Occurred() ? -1 : 0;
}

void dtype_forget(struct dtype *known)
{
    Py_CLEAR(known->object);
    Py_CLEAR(known->sent);
}

/* --- the reducer */

static PyObject *strides_of(const Py_buffer *view)
{
    PyObject *strides = PyTuple_New(view->ndim);
    for (int i = 0; strides && i < view->ndim; i++) {
        PyObject *stride = PyLong_FromSsize_t(view->strides[i]);
        if (stride == NULL)
            Py_CLEAR(strides);
        else
            PyTuple_SetItem(strides, i, stride);
    }
    return strides;
}

/* Its memory; of a dtype that the buffer protocol does not have, as items without a meaning. */
static int view_of(PyObject *array, const struct dtype *dtype, Py_buffer *view)
{
    if (dtype->is_exported)
        return PyObject_GetBuffer(array, view, PyBUF_STRIDED_RO);
    char name[32];
    snprintf(name, sizeof name, "V%lld", dtype->itemsize);
    PyObject *plain = PyObject_CallMethod(array, "view", "s", name);
    if (plain == NULL)
        return -1;
    int result = PyObject_GetBuffer(plain, view, PyBUF_STRIDED_RO);
    Py_DECREF(plain);
    return result;
}

/* The memory of any exact array, if the buffer protocol can have it. */
int array_view(struct dtype *known, PyObject *array, Py_buffer *view)
{
    PyObject *dtype = attribute(array, "dtype");
    int result = dtype && dtype_learn(known, dtype) == 0 ? view_of(array, known, view) : -1;
    Py_XDECREF(dtype);
    return result;
}

/* ndarray, (shape, dtype, memory[, 0, strides]); takes over `memory` and `strides` */
static PyObject *arguments_of(PyObject *array, PyObject *sent, PyObject *memory, PyObject *strides)
{
    PyObject *shape = memory ? attribute(array, "shape") : NULL;
    PyObject *result = NULL;
    if (shape)
        result = strides ? Py_BuildValue("OOOiO", shape, sent, memory, 0, strides)
                         : Py_BuildValue("OOO", shape, sent, memory);
    Py_XDECREF(shape);
    Py_XDECREF(memory);
    Py_XDECREF(strides);
    return result;
}

static PyObject *call_of(PyObject *function, PyObject *arguments)
{
    PyObject *call = arguments ? PyTuple_Pack(2, function, arguments) : NULL;
    Py_XDECREF(arguments);
    return call;
}

static PyObject *as_numpy_does(PyObject *array)
{
    return PyObject_CallMethod(array, "__reduce_ex__", "i", 5);
}

/* An array that arrives as small as this owns its memory, as it does in plain pickling. */
static PyObject *reduce_owned(PyObject *array, const struct dtype *dtype, const Py_buffer *view,
                              PyObject *strides)
{
    /* In NumPy's copy, what is between the fields would be anything. */
    if (dtype->has_names && (strides == NULL || PyBuffer_IsContiguous(view, 'F'))) {
        Py_XDECREF(strides);
        return PyObject_CallMethod(array, "__reduce__", NULL);
    }
    PyObject *memory = PyBytes_FromStringAndSize(NULL, view->len);
    if (memory)
        memory_copy(PyBytes_AsString(memory), view);
    PyObject *arguments = arguments_of(array, dtype->sent, memory, strides);
    PyObject *inner = call_of((PyObject *)Py_TYPE(array), arguments);
    PyObject *rebuild = inner ? rebuild_new(inner) : NULL;
    PyObject *copy = rebuild ? numpy_attribute("array") : NULL;
    PyObject *call = copy ? call_of(copy, PyTuple_Pack(1, rebuild)) : NULL;
    Py_XDECREF(copy);
    Py_XDECREF(rebuild);
    return call;
}

/* Put a copy in the place of a view. */
static int settle(Py_buffer *view)
{
    PyObject *copy = PyByteArray_FromStringAndSize(NULL, view->len);
    if (copy)
        memory_copy(PyByteArray_AsString(copy), view);
    PyBuffer_Release(view);
    /* Without shape and strides, which would point into the very structure, and that is moved. */
    int result = copy ? PyObject_GetBuffer(copy, view, PyBUF_SIMPLE) : -1;
    Py_XDECREF(copy);
    return result;
}

/* The reducer of exact ndarrays, of the message at hand. */
PyObject *array_reduce(struct message *message, PyObject *array)
{
    PyObject *dtype = attribute(array, "dtype"), *kind = (PyObject *)Py_TYPE(array);
    PyObject *result = NULL, *strides = NULL, *memory;
    struct dtype *known = message_dtype(message);
    Py_buffer view = {0};
    if (dtype == NULL || dtype_learn(known, dtype) != 0)
        goto done;
    if (!known->is_ours) {
        result = as_numpy_does(array);
        goto done;
    }
    if (view_of(array, known, &view) != 0)
        goto done;
    if (message_keeps_flags(message) && (view.readonly || view.len == 0)) {
        PyBuffer_Release(&view);
        result = as_numpy_does(array);
        goto done;
    }
    if (view.len == 0) {
        PyObject *shape = attribute(array, "shape");
        if (shape)
            result = call_of(kind, PyTuple_Pack(2, shape, dtype));
        Py_XDECREF(shape);
        goto done;
    }
    if (!is_in_c_order(&view) && !has_gaps(&view) && (strides = strides_of(&view)) == NULL)
        goto done;
    if (view.len >= MIN_BUFFER && !message_stays(message, (u64)view.len)) {
        /* The pickler comes to the dtype before it asks for the memory. */
        bool is_there = !known->may_run_code || settle(&view) == 0;
        memory = is_there ? message_stand_in(message, &view) : NULL;
        view.obj = NULL; /* the message has it */
    } else if (view.len <= MOST_OWNED) {
        result = reduce_owned(array, known, &view, strides);
        goto done;
    } else {
        memory = PyByteArray_FromStringAndSize(NULL, view.len);
        if (memory) {
            memory_copy(PyByteArray_AsString(memory), &view);
            message_made(message, memory);
        }
    }
    result = call_of(kind, arguments_of(array, known->sent, memory, strides));
done:
    PyBuffer_Release(&view);
    Py_XDECREF(dtype);
    return result;
}
