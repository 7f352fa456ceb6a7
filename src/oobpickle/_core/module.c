/* The extension module oobpickle._core.

What. `Blocks`, `Block`, `Message`, `SharedLock` and `MappedFile`, and small types beside them; `plan`
and `spread`; `header` and `constants`, the words of a table file that never change; `copy`; the fork
hooks; `arm` for tests.

How it works. One initialisation in a process: sub-interpreters with a lock of their own cannot
import it, and no memory is shared between such without a lock around it.

Lifetime. Of the interpreter.

When it cannot. Importing fails where a page cannot be wiped at a fork (Linux before 4.14). */

#include "core.h"

#include <stdio.h>
#include <string.h>

static u64 check_of(const struct header *header)
{
    const u64 *words = (const u64 *)header;
    u64 check = 0;
    for (size_t i = 0; i < offsetof(struct header, check) / sizeof(u64); i++)
        check = (check ^ words[i]) * BY_FIRST + PLUS;
    return check;
}

/* header(identity, capacity, data_nbytes, threshold, wait, copy, huge, data_inode, locks_inode,
   disk_nbytes, disk_inode): the first bytes of a table file; the last two are 0 without a file on disk */
static PyObject *new_header(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    /* No '#' in formats: what it means depends on the version of the headers, not of Python. */
    struct header header;
    Py_buffer identity;
    memset(&header, 0, sizeof header);
    unsigned long long capacity, nbytes, threshold, wait, copy, huge, data, locks, disk_nbytes, disk;
    if (!PyArg_ParseTuple(arguments, "y*KKKKKKKKKK", &identity, &capacity, &nbytes, &threshold, &wait,
                          &copy, &huge, &data, &locks, &disk_nbytes, &disk))
        return NULL;
    bool is_whole = identity.len == sizeof header.identity;
    if (is_whole)
        memcpy(header.identity, identity.buf, sizeof header.identity);
    PyBuffer_Release(&identity);
    if (!is_whole) {
        PyErr_SetString(PyExc_ValueError, "an identity has 16 bytes");
        return NULL;
    }
    header.magic = MAGIC, header.version = VERSION;
    header.capacity = capacity, header.data_nbytes = nbytes, header.threshold = threshold;
    header.wait = wait, header.copy = copy, header.huge = huge;
    header.data_inode = data, header.locks_inode = locks;
    header.disk_nbytes = disk_nbytes, header.disk_inode = disk;
    header.check = check_of(&header);
    atomic_init(&header.n_rows, rows_word(0));
    return PyBytes_FromStringAndSize((const char *)&header, sizeof header);
}

/* constants(bytes): what `header` was given; ValueError says why it is none */
static PyObject *constants(PyObject *Py_UNUSED(module), PyObject *argument)
{
    char *bytes;
    Py_ssize_t length;
    struct header header;
    if (PyBytes_AsStringAndSize(argument, &bytes, &length) < 0)
        return NULL;
    if ((size_t)length < sizeof header) {
        PyErr_Format(PyExc_ValueError, "%zd bytes, expected %zu", length, sizeof header);
        return NULL;
    }
    memcpy(&header, bytes, sizeof header);
    if (header.magic != MAGIC || header.version != VERSION) {
        char text[200];
        snprintf(text, sizeof text,
                 "no table of this version: magic %llx, version %llu, expected %llx and %d. "
                 "Use one version of oobpickle in all processes",
                 (unsigned long long)header.magic, (unsigned long long)header.version,
                 (unsigned long long)MAGIC, VERSION);
        PyErr_SetString(PyExc_ValueError, text);
        return NULL;
    }
    if (header.check != check_of(&header)) {
        PyErr_SetString(PyExc_ValueError, "the header of the table is damaged: its check does not match");
        return NULL;
    }
    PyObject *identity =
        PyBytes_FromStringAndSize((const char *)header.identity, sizeof header.identity);
    return identity ? Py_BuildValue("NKKKKKKKKKK", identity, header.capacity, header.data_nbytes,
                                    header.threshold, header.wait, header.copy, header.huge,
                                    header.data_inode, header.locks_inode, header.disk_nbytes,
                                    header.disk_inode)
                    : NULL;
}

/* wait_for_the_lock(us): how long a step waits for a holder that does not move */
static PyObject *wait_for_the_lock(PyObject *Py_UNUSED(module), PyObject *argument)
{
    u64 patience_us = PyLong_AsUnsignedLongLong(argument);
    if (PyErr_Occurred())
        return NULL;
    lock_patience_us = patience_us;
    Py_RETURN_NONE;
}

/* epoch(): differs in each process of a tree of forks */
static PyObject *get_epoch(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    return PyLong_FromUnsignedLongLong(epoch());
}

#define WORD(type, field) {#type "." #field, offsetof(struct type, field)}

/* Where words of the table are, for whoever looks at one from outside: offsets within the header, a
   participant and a row; bytes. */
static PyObject *layout(void)
{
    static const struct {
        const char *name;
        size_t offset;
    } words[] = {
        WORD(header, capacity),     WORD(header, data_nbytes), WORD(header, disk_nbytes),
        WORD(header, lock),
        WORD(header, released),     WORD(header, held),        WORD(header, idle),
        WORD(header, dirty),        WORD(header, draining),    WORD(header, n_rows),
        WORD(header, n_rows_again), WORD(header, resident),    WORD(header, on_disk),
        WORD(header, n_slots),
        WORD(header, incarnation),  WORD(header, closed),      WORD(header, strangers),
        WORD(header, n_passed),     WORD(header, passed),      WORD(header, warm),
        WORD(header, empty),        WORD(header, bank),        WORD(header, totals),
        WORD(participant, state),   WORD(participant, incarnation), WORD(participant, pid),
        WORD(participant, pid_namespace), WORD(participant, reading), WORD(participant, steps),
        WORD(header, unheld),       WORD(header, unborn),      WORD(participant, inherits),
        WORD(participant, keeps_all), WORD(participant, counters), WORD(participant, kept),
        WORD(row, commit),          WORD(row, generation),     WORD(row, place),
        WORD(row, used),            WORD(row, resident),       WORD(row, channel),
        WORD(row, next),            WORD(row, below),          WORD(row, last),
        WORD(row, punches),         WORD(table, participants), {"table.rows", sizeof(struct table)},
    };
    PyObject *found = PyDict_New();
    for (size_t i = 0; found && i < sizeof words / sizeof *words; i++) {
        PyObject *offset = PyLong_FromSize_t(words[i].offset);
        if (offset == NULL || PyDict_SetItemString(found, words[i].name, offset) < 0)
            Py_CLEAR(found);
        Py_XDECREF(offset);
    }
    return found;
}

/* Make a type, once in the process, and name it in the module. */
int type_make(PyObject *module, PyTypeObject **type, PyType_Spec *spec)
{
    if (*type == NULL)
        *type = (PyTypeObject *)PyType_FromSpec(spec);
    return *type ? PyModule_AddType(module, *type) : -1;
}

/* Append what was made just now; NULL: an exception, and then the list goes, too. */
void list_add(PyObject **list, PyObject *made)
{
    if (made == NULL || PyList_Append(*list, made) < 0)
        Py_CLEAR(*list);
    Py_XDECREF(made);
}

/* NULL with an exception. */
PyObject *list_of(const u64 *numbers, size_t n)
{
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < n; i++)
        list_add(&list, PyLong_FromUnsignedLongLong(numbers[i]));
    return list;
}

static PyMethodDef functions[] = {
    {"header", new_header, METH_VARARGS, NULL},
    {"constants", constants, METH_O, NULL},
    {"epoch", get_epoch, METH_NOARGS, NULL},
    {"wait_for_the_lock", wait_for_the_lock, METH_O, NULL},
    {"copy", copy_bytes, METH_VARARGS, NULL},
    {"headroom", headroom_limits, METH_VARARGS, NULL},
    {"plan", plan_needs, METH_VARARGS, NULL},
    {"spread", plan_spread, METH_VARARGS, NULL},
    {"try_disk", mapping_try, METH_O, NULL},
    {"mapped_as", mapped_as, METH_O, NULL},
    {"fork_before", fork_before, METH_NOARGS, NULL},
    {"fork_in_parent", fork_in_parent, METH_NOARGS, NULL},
    {"fork_in_child", fork_in_child, METH_NOARGS, NULL},
    {"arm", fault_arm, METH_VARARGS, NULL},
    {0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, .m_name = "oobpickle._core", .m_size = -1, .m_methods = functions};

static PyObject *shortages(void)
{
    /* In the order of `enum shortage`; the reasons of `_fallback`. */
    return Py_BuildValue("(sssssss)", "", "full", "table", "damaged", "space", "busy", "detached");
}

PyMODINIT_FUNC PyInit__core(void)
{
    advice_start();
    if (epoch_start() != 0 || birth_start() != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    PyObject *module = PyModule_Create(&definition);
    PyObject *reasons = shortages(), *words = layout();
    if (module == NULL || reasons == NULL || words == NULL || blocks_type_make(module) != 0 ||
        message_type_make(module) != 0 || shared_lock_type_make(module) != 0 ||
        mapped_type_make(module) != 0 ||
        PyModule_AddObjectRef(module, "SHORTAGES", reasons) != 0 ||
        PyModule_AddObjectRef(module, "LAYOUT", words) != 0 ||
        PyModule_AddIntConstant(module, "TABLE_NBYTES", (long)TABLE_NBYTES) != 0 ||
        PyModule_AddIntConstant(module, "HEADER_NBYTES", (long)sizeof(struct header)) != 0 ||
        PyModule_AddIntConstant(module, "N_COUNTERS", COUNTERS) != 0 ||
        PyModule_AddIntConstant(module, "MOST_BLOCKS", ROWS) != 0)
        Py_CLEAR(module);
    Py_XDECREF(reasons);
    Py_XDECREF(words);
    return module;
}
