/* Fault points: places in a step where a test can have this process killed, or a call refused.

What. FAULT("name") stands where an interruption must be survivable, FAILS("name") before a call
that the system may refuse. Not armed, each is one branch.

How it works. `arm` names a point, the hit at which something happens, and the signal of which the
process dies; or, less than 0, the errno with which the calls from then on are refused.

Lifetime. A forked child inherits what is armed, and its count.

When it cannot. Nothing in the library arms a point. */

#include "core.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

const char *fault_armed;
static char name[64];
static int hits_left, number;

void fault_reach(const char *point)
{
    if (number > 0 && strcmp(point, name) == 0 && --hits_left == 0)
        kill(getpid(), number);
}

bool fault_fail(const char *point)
{
    if (number >= 0 || strcmp(point, name) != 0 || --hits_left > 0)
        return false;
    errno = -number;
    return true;
}

/* arm(point or None, hit, signal or -errno) */
PyObject *fault_arm(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    const char *point;
    if (!PyArg_ParseTuple(arguments, "zii", &point, &hits_left, &number))
        return NULL;
    fault_armed = NULL;
    if (point) {
        strncpy(name, point, sizeof name - 1);
        fault_armed = name;
    }
    Py_RETURN_NONE;
}
