/* A data file of an arena, in memory or on disk, and this process's windows into it.

What. A file is a descriptor that is believed only after a look at what it is. A window is a part of
the data that is mapped: 64 MiB, or as much as a larger block takes. Ranges of it are given pages
(reserve), give them back (punch), become private memory at the same address (privatize) and are
mapped from the file again (share).

How it works. The file is as sparse as it likes, so blocks never move; but a process maps what it
uses. A window is mapped without access and unlocked, and units of 2 MiB become accessible as blocks
in them are used: so mlockall(2) of any kind brings no hole in. There huge pages are asked for. Where the system allows no further
mapping, the whole window does. A window knows how many objects have an address in it; one that
nobody uses can be unmapped. That is done seldom: to map a touched MiB again costs 200 us.

What is on disk comes and goes through the page cache: its pages are not made before they are needed,
and what is sent is written by pwrite(2), since a disk that has no room after all refuses a write, but
kills who touches a page.

mremap(2) of a shared page with an old size of zero maps the file once more: what is left of a file
whose descriptor somebody has closed (`mapping_again`).

madvise(2) is believed only if a try at the start has shown that it does what it is asked for. qemu-user,
which runs programs of other machines, takes most advice for hints: it does nothing, and reports success.

Lifetime. Of the object that has the mapping. A forked child inherits windows and counts.

When it cannot. NULL or -1, with errno. */

#include "core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

#define STEP WINDOW
#define MOST_WRITTEN ((u64)16 << 20)
#define UNIT HUGE

int file_note(struct file *file, int fd)
{
    struct stat status;
    if (fstat(fd, &status) != 0)
        return -1;
    *file = (struct file){.fd = fd, .device = status.st_dev, .inode = status.st_ino};
    return 0;
}

/* Whether the descriptor is still the file that it was: somebody may have closed it. Else errno says so. */
bool file_is_ours(const struct file *file)
{
    struct stat status;
    if (file->fd >= 0 && fstat(file->fd, &status) == 0 && status.st_dev == file->device &&
        status.st_ino == file->inode)
        return true;
    errno = EBADF;
    return false;
}

static bool again(int result)
{
    return result != 0 && (errno == EINTR || errno == EAGAIN);
}

static bool is_obeyed = true;

/* Whether advice that is no hint has an effect. */
bool advice_is_obeyed(void)
{
    return is_obeyed;
}

/* Try it, once in a process: a page that is to go, and one that is to come. */
void advice_start(void)
{
    const int read_write = PROT_READ | PROT_WRITE;
    unsigned char is_there = 1;
    char *page = mmap(NULL, PAGE, read_write, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page != MAP_FAILED) {
        *(volatile char *)page = 1;
        if (madvise(page, PAGE, MADV_REMOVE) == 0 && *(volatile char *)page != 0)
            is_obeyed = false;
        munmap(page, PAGE);
    }
    page = mmap(NULL, PAGE, read_write, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page != MAP_FAILED) {
        if (madvise(page, PAGE, MADV_POPULATE_WRITE) == 0 && mincore(page, PAGE, &is_there) == 0 &&
            (is_there & 1) == 0)
            is_obeyed = false;
        munmap(page, PAGE);
    }
}

int advise(char *address, u64 nbytes, int advice)
{
    int result;
    if (!is_obeyed && advice != MADV_DONTNEED) {
        errno = EINVAL; /* as of a kernel that does not know it */
        return -1;
    }
    do
        result = madvise(address, nbytes, advice);
    while (again(result));
    return result;
}

/* Enter a range in our page tables at once: cheaper than by faults. An old kernel refuses. */
void populate(char *address, u64 nbytes, bool write)
{
    uintptr_t within = (uintptr_t)address % PAGE;
    advise(address - within, round_up(nbytes + within, PAGE),
           write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
}

static void advise_always(char *address, u64 nbytes, bool huge)
{
    madvise(address, nbytes, MADV_DONTDUMP); /* a core dump would fault every hole in */
    if (huge)
        madvise(address, nbytes, MADV_HUGEPAGE);
}

/* Map a sparse file, MAP_SHARED or MAP_PRIVATE, so that mlockall(2) of the past brings nothing in. */
char *map_quietly(int fd, u64 offset, u64 nbytes, int sharing, int protection, bool huge)
{
    char *address = mmap(NULL, nbytes, PROT_NONE, sharing | MAP_NORESERVE, fd, (off_t)offset);
    if (address == MAP_FAILED)
        return NULL;
    munlock(address, nbytes);
    if (protection != PROT_NONE && mprotect(address, nbytes, protection) != 0) {
        int error = errno;
        munmap(address, nbytes);
        errno = error;
        return NULL;
    }
    advise_always(address, nbytes, huge);
    return address;
}

/* Map a range of the data; NULL with EBADF if its descriptor is that of another file by now. */
static char *map_data(const struct mapping *mapping, u64 offset, u64 nbytes, int sharing, int protection)
{
    if (!file_is_ours(&mapping->data))
        return NULL;
    char *address = map_quietly(mapping->data.fd, offset, nbytes, sharing, protection,
                                !mapping->is_on_disk);
    if (address == NULL || file_is_ours(&mapping->data))
        return address;
    munmap(address, nbytes); /* closed a moment ago, and perhaps another file was mapped */
    errno = EBADF;
    return NULL;
}

int mapping_start(struct mapping *mapping, int fd, bool is_on_disk)
{
    struct stat status;
    if (file_note(&mapping->data, fd) != 0 || fstat(fd, &status) != 0)
        return -1;
    struct statfs system;
    mapping->is_on_disk = is_on_disk;
    mapping->is_memory = !is_on_disk || (fstatfs(fd, &system) == 0 && (system.f_type == TMPFS_MAGIC ||
                                                                       system.f_type == RAMFS_MAGIC));
    mapping->data_nbytes = (u64)status.st_size;
    mapping->n_windows = (u32)(mapping->data_nbytes / WINDOW + 1);
    mapping->windows = calloc(mapping->n_windows, sizeof *mapping->windows);
    if (mapping->windows == NULL) {
        errno = ENOMEM;
        return -1;
    }
    /* Or NULL, and one thing less to fall back on. */
    mapping->first = map_quietly(fd, 0, PAGE, MAP_SHARED, PROT_NONE, false);
    return 0;
}

/* Map a range of a file whose beginning is mapped at `first`, without its descriptor. */
char *map_behind(char *first, u64 offset, u64 nbytes, int protection, bool huge)
{
    if (first == NULL) {
        errno = EBADF;
        return NULL;
    }
    char *all = mremap(first, 0, offset + nbytes, MREMAP_MAYMOVE);
    if (all == MAP_FAILED)
        return NULL;
    if (offset)
        munmap(all, offset);
    if (mprotect(all + offset, nbytes, protection) != 0) {
        munmap(all + offset, nbytes);
        return NULL;
    }
    advise_always(all + offset, nbytes, huge);
    return all + offset;
}

static char *map_anyhow(const struct mapping *mapping, u64 offset, u64 nbytes, int protection)
{
    char *address = map_data(mapping, offset, nbytes, MAP_SHARED, protection);
    if (address || errno != EBADF)
        return address;
    return map_behind(mapping->first, offset, nbytes, protection, !mapping->is_on_disk);
}

/* Map a range of the file at another address, also if its descriptor was closed. */
char *mapping_again(const struct mapping *mapping, u64 offset, u64 nbytes)
{
    return map_anyhow(mapping, offset, nbytes, PROT_READ | PROT_WRITE);
}

/* Map a range of the file so that what is written to it is this process's own. Without the file's
   descriptor it is a copy. */
char *mapping_view(const struct mapping *mapping, u64 offset, u64 nbytes, bool writable)
{
    const int access = PROT_READ | (writable ? PROT_WRITE : 0);
    if (FAILS("mapping.view"))
        return NULL;
    /* First without access, and unlocked: mlockall(2) of the past would write every page. */
    return map_data(mapping, offset, nbytes, MAP_PRIVATE, access);
}

/* --- windows */

static u32 units_of(u64 within, u64 nbytes)
{
    u64 first = within / UNIT, last = (within + nbytes - 1) / UNIT;
    return (u32)((((u64)1 << (last - first + 1)) - 1) << first);
}

/* Of a large block's window `opened` counts the units. */
static int open_large(struct window *window, u64 nbytes)
{
    u32 units = (u32)((nbytes + UNIT - 1) / UNIT);
    u64 end = (u64)units * UNIT < window->nbytes ? (u64)units * UNIT : window->nbytes;
    if (window->opened >= units)
        return 0;
    if (mprotect(window->address, end, PROT_READ | PROT_WRITE) != 0)
        return -1;
    window->opened = units;
    return 0;
}

static int open_units(struct window *window, u64 within, u64 nbytes)
{
    if (window->nbytes > WINDOW)
        return open_large(window, within + nbytes);
    u32 units = units_of(within, nbytes);
    if (window->is_open || (window->opened & units) == units)
        return 0;
    u64 start = within / UNIT * UNIT, end = round_up(within + nbytes, UNIT);
    if (end > window->nbytes)
        end = window->nbytes;
    if (mprotect(window->address + start, end - start, PROT_READ | PROT_WRITE) == 0) {
        window->opened |= units;
        return 0;
    }
    if (mprotect(window->address, window->nbytes, PROT_READ | PROT_WRITE) != 0)
        return -1;
    window->is_open = true;
    return 0;
}

/* The address of a block of `stride` bytes, of which the first `nbytes` may be touched. */
char *mapping_at(struct mapping *mapping, u64 offset, u64 stride, u64 nbytes)
{
    struct window *window = &mapping->windows[offset / WINDOW];
    u64 within = offset % WINDOW;
    if (window->address == NULL) {
        u64 size = within + stride <= WINDOW ? WINDOW : stride;
        if (offset - within + size > mapping->data_nbytes)
            size = mapping->data_nbytes - (offset - within);
        window->address = map_anyhow(mapping, offset - within, size, PROT_NONE);
        if (window->address == NULL && errno == ENOMEM) {
            mapping_unmap_unused(mapping);
            window->address = map_anyhow(mapping, offset - within, size, PROT_NONE);
        }
        if (window->address == NULL)
            return NULL;
        window->nbytes = size;
        window->opened = 0;
        window->is_open = false;
    }
    return open_units(window, within, nbytes) == 0 ? window->address + within : NULL;
}

/* Nobody may touch a large block any more until it is used again. */
void mapping_bar(struct mapping *mapping, u64 offset, u64 stride)
{
    struct window *window = &mapping->windows[offset / WINDOW];
    u64 within = offset % WINDOW;
    if (window->address == NULL || within % UNIT || stride % UNIT || window->is_open)
        return;
    u32 units = window->nbytes > WINDOW ? UINT32_MAX : units_of(within, stride);
    if (mprotect(window->address + within, stride, PROT_NONE) == 0)
        window->opened &= ~units;
}

void mapping_use(struct mapping *mapping, u64 offset)
{
    mapping->windows[offset / WINDOW].n_users++;
}

void mapping_leave(struct mapping *mapping, u64 offset)
{
    mapping->windows[offset / WINDOW].n_users--;
}

void mapping_unmap_unused(struct mapping *mapping)
{
    for (u32 i = 0; i < mapping->n_windows; i++) {
        struct window *window = &mapping->windows[i];
        if (window->address && window->n_users == 0) {
            munmap(window->address, window->nbytes);
            *window = (struct window){0};
        }
    }
}

static int by_address(const void *one, const void *other)
{
    const char *a = ((const struct range *)one)->address, *b = ((const struct range *)other)->address;
    return (a > b) - (a < b);
}

/* Unmap all windows, but not these ranges of whole pages. */
void mapping_unmap_but(struct mapping *mapping, struct range *kept, size_t n)
{
    qsort(kept, n, sizeof *kept, by_address);
    for (u32 i = 0; i < mapping->n_windows; i++) {
        struct window *window = &mapping->windows[i];
        char *at = window->address, *end = at + window->nbytes;
        if (at == NULL)
            continue;
        for (size_t k = 0; k < n; k++) {
            if (kept[k].address < at || kept[k].address >= end)
                continue;
            if (kept[k].address > at)
                munmap(at, (size_t)(kept[k].address - at));
            at = kept[k].address + kept[k].nbytes;
        }
        if (end > at)
            munmap(at, (size_t)(end - at));
        *window = (struct window){0};
    }
}

void mapping_end(struct mapping *mapping)
{
    if (mapping->windows) {
        mapping_unmap_unused(mapping);
        free(mapping->windows);
        mapping->windows = NULL;
        mapping->n_windows = 0;
    }
    if (mapping->first)
        munmap(mapping->first, PAGE);
    mapping->first = NULL;
}

/* --- pages */

/* Give a range its pages, with `by_fault` where fallocate(2) would make small ones of huge ones; or its
   room on disk. */
int mapping_reserve(const struct mapping *mapping, u64 offset, char *address, u64 nbytes, bool by_fault)
{
    int result;
    if (!file_is_ours(&mapping->data))
        return -1;
    if (mapping->is_on_disk ? FAILS("disk.reserve") : FAILS("mapping.reserve"))
        return -1;
    if (by_fault)
        populate(address, nbytes, true);
    do
        result = fallocate(mapping->data.fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)nbytes);
    while (again(result));
    if (result == 0 && address && !mapping->is_on_disk)
        populate(address, nbytes, true);
    return result;
}

/* Give the pages of a range back to the system; locked ones, and without an address, through the file. */
int mapping_punch(const struct mapping *mapping, u64 offset, char *address, u64 nbytes)
{
    int result;
    if (nbytes == 0)
        return 0;
    if (address && advise(address, nbytes, MADV_REMOVE) == 0)
        return 0;
    if (!file_is_ours(&mapping->data))
        return -1;
    do
        result = fallocate(mapping->data.fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
                           (off_t)offset, (off_t)nbytes);
    while (again(result));
    return result;
}

/* Copy a range, also if the descriptor was closed. */
int mapping_read(const struct mapping *mapping, u64 offset, char *to, u64 nbytes)
{
    if (!file_is_ours(&mapping->data)) {
        u64 within = offset % PAGE, all = round_up(within + nbytes, PAGE);
        char *mapped = map_behind(mapping->first, offset - within, all, PROT_READ, !mapping->is_on_disk);
        if (mapped == NULL)
            return -1;
        memcpy(to, mapped + within, nbytes);
        munmap(mapped, all);
        return 0;
    }
    if (FAILS("disk.read"))
        return -1;
    for (u64 done = 0; done < nbytes;) {
        ssize_t n = pread(mapping->data.fd, to + done, nbytes - done, (off_t)(offset + done));
        if (n > 0)
            done += (u64)n;
        else if (n == 0 || !again(-1)) {
            errno = n == 0 ? EIO : errno; /* somebody has made the file shorter */
            return -1;
        }
    }
    return 0;
}

/* What has room on disk is written to. */
int mapping_write(const struct mapping *mapping, u64 offset, const char *from, u64 nbytes)
{
    if (!file_is_ours(&mapping->data))
        return -1;
    for (u64 done = 0; done < nbytes;) {
        u64 step = nbytes - done < MOST_WRITTEN ? nbytes - done : MOST_WRITTEN;
        if (FAILS("disk.write"))
            return -1;
        ssize_t n = pwrite(mapping->data.fd, from + done, step, (off_t)(offset + done));
        if (n > 0)
            done += (u64)n;
        else if (n == 0 || !again(-1))
            return -1;
    }
    return 0;
}

static const char *refused(int fd)
{
    if (fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, PAGE) != 0)
        return "fallocate";
    if (pwrite(fd, "", 1, 0) != 1)
        return "write";
    char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED)
        return "mmap";
    munmap(page, PAGE);
    return fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, PAGE) == 0 ? NULL : "punch";
}

/* try_disk(fd): None, or what an empty file there cannot do, and the error number */
PyObject *mapping_try(PyObject *Py_UNUSED(module), PyObject *argument)
{
    long fd = PyLong_AsLong(argument);
    if (PyErr_Occurred())
        return NULL;
    errno = EIO; /* of a write of less */
    const char *what = refused((int)fd);
    if (what == NULL)
        Py_RETURN_NONE;
    return Py_BuildValue("si", what, errno);
}

/* --- private memory at the same address */

/* Move a mapping to where another one is, in its place; -1: then it is gone, or there was none. */
static int move_to(char *address, char *mapped, u64 nbytes)
{
    if (mapped == NULL)
        return -1;
    if (mremap(mapped, nbytes, nbytes, MREMAP_MAYMOVE | MREMAP_FIXED, address) != MAP_FAILED)
        return 0;
    munmap(mapped, nbytes);
    return -1;
}

static int replace_by_copy(char *address, u64 nbytes)
{
    char *copy =
        mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (copy == MAP_FAILED)
        return -1;
    madvise(copy, nbytes, MADV_HUGEPAGE);
    memcpy(copy, address, nbytes);
    return move_to(address, copy, nbytes);
}

/* Write to each page what is there; what another thread writes meanwhile is not lost. */
static void touch(char *address, u64 nbytes)
{
    for (u64 at = 0; at < nbytes; at += PAGE) {
        _Atomic unsigned char *page = (_Atomic unsigned char *)(address + at);
        unsigned char seen = atomic_load_explicit(page, memory_order_relaxed);
        while (!atomic_compare_exchange_weak_explicit(page, &seen, seen, memory_order_relaxed,
                                                      memory_order_relaxed))
            ;
    }
}

static void free_step(const struct mapping *mapping, u64 offset, u64 nbytes)
{
    if (mapping_punch(mapping, offset, NULL, nbytes) == 0)
        return;
    char *mapped = mapping_again(mapping, offset, nbytes);
    if (mapped) {
        advise(mapped, nbytes, MADV_REMOVE);
        munmap(mapped, nbytes);
    }
}

/* Map a range of the file in its place so that what is written there from now on is this process's own.
   Pages that were not written show the file, which nobody may write any more. Nothing is copied, also
   where mlockall(2) was called. */
int mapping_own(const struct mapping *mapping, u64 offset, char *address, u64 nbytes)
{
    nbytes = round_up(nbytes, PAGE);
    return move_to(address, mapping_view(mapping, offset, nbytes, true), nbytes);
}

/* Turn a range into ordinary private memory of this process.

Writes of other threads, even without the GIL, are not lost: until its page is copied a read sees
the file, and a write copies the page first. (They can be if somebody has closed the descriptor.)
The file's pages are punched step by step, so the peak is one step above the range, unless they are
another process's (`keep_file`). `is_owned`: `mapping_own` was called. -1: the system allows no further
mapping; then the range is shared as before, but for the steps that are done. */
int mapping_privatize(const struct mapping *mapping, u64 offset, char *address, u64 nbytes,
                      bool is_owned, bool keep_file)
{
    const int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, read_write = PROT_READ | PROT_WRITE;
    bool is_mapped = is_owned || file_is_ours(&mapping->data);
    nbytes = round_up(nbytes, PAGE);
    if (FAILS("mapping.privatize"))
        return -1;
    if (is_mapped && !is_owned) {
        if (mmap(address, nbytes, read_write, flags, mapping->data.fd, (off_t)offset) == MAP_FAILED)
            return -1;
        if (!file_is_ours(&mapping->data)) { /* perhaps it was a strange file */
            is_mapped = false;
            if (mapping_share(mapping, offset, address, nbytes) != 0)
                return -1;
        }
    }
    if (is_mapped)
        advise_always(address, nbytes, !mapping->is_on_disk);
    for (u64 at = 0; at < nbytes; at += STEP) {
        u64 n = nbytes - at < STEP ? nbytes - at : STEP;
        if (is_mapped && advise(address + at, n, MADV_POPULATE_WRITE) != 0)
            touch(address + at, n); /* before Linux 5.14, or an emulator */
        else if (!is_mapped && replace_by_copy(address + at, n) != 0)
            return -1;
        FAULT("privatize.step");
        if (!keep_file)
            free_step(mapping, offset + at, n);
    }
    return 0;
}

/* Map a range that had become private from the file again. */
int mapping_share(const struct mapping *mapping, u64 offset, char *address, u64 nbytes)
{
    nbytes = round_up(nbytes, PAGE);
    return move_to(address, mapping_again(mapping, offset, nbytes), nbytes);
}
