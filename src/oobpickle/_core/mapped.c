/* Files that this process has mapped: what lies in one is sent as its place there.

What. `MappedFile` is a whole file in memory. `mapped_at` finds the one that memory lies in, and
`mapped_is_there` says whether others can find that file.

How it works. Whoever exports the memory keeps the object, as with a block. All that live are in a list. A
file is known by device, inode, size and time of the last change. Before a place in it is sent, its path has
to lead to it. The descriptor that was opened for that stays, so that a receiver for whom the path leads
elsewhere by then gets the file through it (/proc/PID/fd; `_in_files`). Memory that can be written is never
sent so, be it the file's or a private copy: a message is a snapshot.

Lifetime. Mapping and descriptor end with the object. A forked child has both, too.

When it cannot. What cannot be mapped is an OSError, and a ValueError if the file is too short. What is not
found again is copied. */

#include "core.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static PyTypeObject *mapped_type;
static struct mapped *first;

static struct mapped *of(PyObject *self)
{
    return (struct mapped *)self;
}

/* --- which file it is */

static struct identity identity_in(const struct stat *status)
{
    int64_t mtime_ns = (int64_t)status->st_mtim.tv_sec * 1000000000 + status->st_mtim.tv_nsec;
    return (struct identity){status->st_dev, status->st_ino, (u64)status->st_size, mtime_ns};
}

static bool is_same(const struct identity *one, const struct identity *other)
{
    return one->device == other->device && one->inode == other->inode &&
           one->nbytes == other->nbytes && one->mtime_ns == other->mtime_ns;
}

static bool is_it(const struct mapped *mapped, const struct stat *status)
{
    const struct identity found = identity_in(status);
    return is_same(&mapped->identity, &found);
}

/* A descriptor of the file, if its path leads to it, unchanged; else -1. */
static int open_again(const struct mapped *mapped)
{
    /* Without O_NONBLOCK the open of a FIFO waits for its other end. */
    int fd = open(PyBytes_AsString(mapped->path), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat status;
    if (fd < 0 || (fstat(fd, &status) == 0 && is_it(mapped, &status)))
        return fd;
    close(fd);
    return -1;
}

/* --- the object */

static char *map_whole(int fd, u64 nbytes, enum access access)
{
    const int flags = access == COPIES ? MAP_PRIVATE | MAP_NORESERVE : MAP_SHARED;
    char *address = MAP_FAILED;
    if (!FAILS("file.map"))
        address = mmap(NULL, nbytes, PROT_READ | (access == READS ? 0 : PROT_WRITE), flags, fd, 0);
    return address == MAP_FAILED ? NULL : address;
}

/* MappedFile(fd, nbytes, mode, path): so much of an open file; `mode` as of `load`, `path` absolute, bytes */
static PyObject *new_mapped(PyTypeObject *type, PyObject *arguments, PyObject *Py_UNUSED(keywords))
{
    int fd;
    unsigned long long nbytes;
    const char *mode;
    PyObject *path;
    struct stat status;
    if (!PyArg_ParseTuple(arguments, "iKsO!", &fd, &nbytes, &mode, &PyBytes_Type, &path))
        return NULL;
    if (fstat(fd, &status) != 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    if (nbytes == 0 || (u64)status.st_size < nbytes)
        return PyErr_Format(PyExc_ValueError, "%lld bytes, need %llu", (long long)status.st_size, nbytes);
    enum access access = strcmp(mode, "r") == 0 ? READS : strcmp(mode, "c") == 0 ? COPIES : WRITES;
    char *address = map_whole(fd, nbytes, access);
    if (address == NULL)
        return PyErr_SetFromErrno(PyExc_OSError);
    struct mapped *mapped = (struct mapped *)PyType_GenericAlloc(type, 0); /* zeroed */
    if (mapped == NULL) {
        munmap(address, nbytes);
        return NULL;
    }
    mapped->after = first;
    mapped->address = address;
    mapped->nbytes = nbytes;
    mapped->access = access;
    mapped->identity = identity_in(&status);
    mapped->opened.fd = -1;
    mapped->path = Py_NewRef(path);
    if (first)
        first->before = mapped;
    first = mapped;
    return (PyObject *)mapped;
}

static void dealloc(PyObject *self)
{
    struct mapped *mapped = of(self);
    PyTypeObject *type = Py_TYPE(self);
    if (mapped->before)
        mapped->before->after = mapped->after;
    else
        first = mapped->after;
    if (mapped->after)
        mapped->after->before = mapped->before;
    munmap(mapped->address, mapped->nbytes);
    if (file_is_ours(&mapped->opened))
        close(mapped->opened.fd);
    Py_DECREF(mapped->path);
    PyObject_Free(self);
    Py_DECREF((PyObject *)type);
}

static int getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    struct mapped *mapped = of(self);
    return PyBuffer_FillInfo(view, self, mapped->address, (Py_ssize_t)mapped->nbytes,
                             mapped->access == READS, flags);
}

/* --- what is sent */

/* The file that all of this memory lies in, and that nobody can write to through it; or NULL. */
struct mapped *mapped_at(const void *address, u64 nbytes)
{
    if (nbytes < LEAST_REFERRED)
        return NULL;
    for (struct mapped *mapped = first; mapped; mapped = mapped->after) {
        u64 at = (u64)((uintptr_t)address - (uintptr_t)mapped->address);
        if (at < mapped->nbytes && nbytes <= mapped->nbytes - at)
            return mapped->access == READS ? mapped : NULL;
    }
    return NULL;
}

/* Whether its path leads to it, so that a receiver can map it; and nobody here is about to change it. */
bool mapped_is_there(struct mapped *mapped)
{
    for (const struct mapped *other = first; other; other = other->after)
        if (other->access == WRITES && other->identity.device == mapped->identity.device &&
            other->identity.inode == mapped->identity.inode)
            return false;
    int fd = open_again(mapped);
    if (fd < 0)
        return false;
    /* Of the same number: the first one was closed by somebody, and this is the one that there is. */
    if (fd != mapped->opened.fd && file_is_ours(&mapped->opened))
        close(fd);
    else
        file_note(&mapped->opened, fd);
    return true;
}

/* mapped_as(identity): MappedFile that this process has for reading already, or None */
PyObject *mapped_as(PyObject *Py_UNUSED(module), PyObject *argument)
{
    unsigned long long device, inode, nbytes;
    long long mtime_ns;
    if (!PyArg_ParseTuple(argument, "KKKL", &device, &inode, &nbytes, &mtime_ns))
        return NULL;
    const struct identity identity = {device, inode, nbytes, mtime_ns};
    for (struct mapped *mapped = first; mapped; mapped = mapped->after)
        if (mapped->access == READS && mapped->nbytes == nbytes && is_same(&mapped->identity, &identity))
            return Py_NewRef((PyObject *)mapped);
    Py_RETURN_NONE;
}

/* name: (path, (device, inode, size in bytes, time of the last change in ns), descriptor or -1) */
static PyObject *get_name(PyObject *self, void *Py_UNUSED(closure))
{
    const struct identity *identity = &of(self)->identity;
    return Py_BuildValue("O(KKKL)i", of(self)->path, (unsigned long long)identity->device,
                         (unsigned long long)identity->inode, (unsigned long long)identity->nbytes,
                         (long long)identity->mtime_ns, of(self)->opened.fd);
}

static PyGetSetDef attributes[] = {{"name", get_name, NULL, NULL, NULL}, {0}};

static PyType_Slot slots[] = {
    {Py_tp_new, new_mapped},
    {Py_tp_dealloc, dealloc},
    {Py_tp_getset, attributes},
    {Py_bf_getbuffer, getbuffer},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "oobpickle._core.MappedFile",
    .basicsize = sizeof(struct mapped),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

int mapped_type_make(PyObject *module)
{
    return type_make(module, &mapped_type, &spec);
}
