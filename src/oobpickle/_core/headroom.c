/* How much memory may still be taken before somebody is killed for it, asked in the middle of a
message.

What. `headroom_allows`: whether so many bytes of fresh pages may be made now. `headroom_limits`
says where the limits are.

How it works. A cgroup at its limit kills, it does not refuse; so each step of fresh pages is asked
for. Which cgroups limit this process Python finds out (`_memory/headroom.py`), now and then; what
is left in them is read here, since nothing may let the GIL go between two buffers of a message.

Lifetime. One list for the process.

When it cannot. What cannot be read does not limit. */

#include "core.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MARGIN ((u64)256 << 20)
#define MOST_LIMITS 16
#define PATH_NBYTES 512

static struct limit {
    u64 nbytes;
    char usage[PATH_NBYTES], statistics[PATH_NBYTES];
    char cache[2][32]; /* keys in the statistics of what can be dropped */
} limits[MOST_LIMITS];

static int n_limits;
static u64 least_limit = UINT64_MAX;
static u64 allowance; /* granted by an earlier look */

/* The beginning of a small file of the system's. */
bool read_text(const char *path, char *text, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, room - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    return n > 0;
}

/* The number behind a key at the beginning of a line, or `otherwise`. */
static u64 number_of(const char *text, const char *key, u64 otherwise)
{
    size_t n = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, n) == 0 && (line[n] == ' ' || line[n] == ':'))
            return strtoull(line + n + 1, NULL, 10);
        if (*line == 0)
            break;
    }
    return otherwise;
}

static u64 left_in(const struct limit *limit)
{
    char text[16384];
    if (!read_text(limit->usage, text, sizeof text))
        return UINT64_MAX;
    u64 usage = strtoull(text, NULL, 10), cache = 0;
    if (read_text(limit->statistics, text, sizeof text))
        for (int i = 0; i < 2; i++)
            cache += number_of(text, limit->cache[i], 0);
    u64 room = limit->nbytes + cache;
    return room > usage ? room - usage : 0;
}

static u64 available(void)
{
    char text[4096];
    u64 least = UINT64_MAX;
    if (read_text("/proc/meminfo", text, sizeof text)) {
        u64 kilobytes = number_of(text, "MemAvailable", UINT64_MAX / 1024);
        least = kilobytes * 1024;
    }
    for (int i = 0; i < n_limits; i++) {
        u64 left = left_in(&limits[i]);
        if (left < least)
            least = left;
    }
    return least;
}

static u64 smaller(u64 one, u64 other)
{
    return one < other ? one : other;
}

static u64 room_for(u64 total)
{
    /* If the next message has to travel in-band, that takes six times its size in ordinary memory, in
       both processes together; and those who use it take some too. */
    u64 in_band = smaller(smaller(10 * total, 2 * MARGIN), least_limit / 2);
    u64 margin = smaller(MARGIN, least_limit / 4), room = available();
    if (margin < in_band)
        margin = in_band;
    return room > margin ? room - margin : 0;
}

/* Whether there is that much now, before the first of several steps. */
bool headroom_has(u64 nbytes, u64 total)
{
    return nbytes <= allowance || nbytes <= room_for(total);
}

/* Whether `nbytes` of fresh pages may be made for a message that has had `total` so far. */
bool headroom_allows(u64 nbytes, u64 total)
{
    if (FAILS("headroom.look"))
        return false;
    if (nbytes <= allowance) {
        allowance -= nbytes;
        return true;
    }
    u64 room = room_for(total);
    if (nbytes > room)
        return false;
    /* Small requests need not look each time; the margin covers what others take meanwhile. */
    allowance = smaller((room - nbytes) / 8, WINDOW);
    return true;
}

static bool take_text(char *to, size_t room, PyObject *from)
{
    Py_ssize_t n;
    const char *text = PyUnicode_AsUTF8AndSize(from, &n);
    if (text == NULL || (size_t)n >= room) {
        PyErr_Clear();
        return false;
    }
    memcpy(to, text, (size_t)n + 1);
    return true;
}

/* headroom(least, [(limit, path of the usage, path of the statistics, (key, key))]): the lowest limit,
   and the cgroups that this process is in; what was granted before is forgotten */
PyObject *headroom_limits(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *list;
    unsigned long long least;
    if (!PyArg_ParseTuple(arguments, "KO!", &least, &PyList_Type, &list))
        return NULL;
    n_limits = 0;
    allowance = 0;
    least_limit = least;
    for (Py_ssize_t i = 0; i < PyList_Size(list) && n_limits < MOST_LIMITS; i++) {
        unsigned long long nbytes;
        PyObject *usage, *statistics, *keys[2];
        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "KUU(UU)", &nbytes, &usage, &statistics,
                              &keys[0], &keys[1]))
            return NULL;
        struct limit *limit = &limits[n_limits];
        limit->nbytes = nbytes;
        n_limits += take_text(limit->usage, PATH_NBYTES, usage) &&
                    take_text(limit->statistics, PATH_NBYTES, statistics) &&
                    take_text(limit->cache[0], sizeof limit->cache[0], keys[0]) &&
                    take_text(limit->cache[1], sizeof limit->cache[1], keys[1]);
    }
    Py_RETURN_NONE;
}
