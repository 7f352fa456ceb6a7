/* The same memory sent again and again.

What. `repeats_note` is told of each large buffer that is sent; `repeated` says which was sent most,
so that a program can be told of `broadcast`.

How it works. What was sent is known by its address and size, and by a sample of its content: a frame
that is filled again before each message is not the same. Nothing is skipped because of it; it counts.

Lifetime. That of the arena in this process. No memory is kept by it, so an address may be another
object's by now, which then has another sample.

When it cannot. Of many different buffers it forgets those that were the least. */

#include "core.h"

#include <string.h>

#define LEAST_NOTED ((u64)256 << 10)
#define PLACES 16
#define OFTEN 10

static u64 sample_of(const char *from, u64 nbytes)
{
    u64 sample = nbytes;
    for (u64 i = 0; i < PLACES; i++) {
        u32 four;
        memcpy(&four, from + i * ((nbytes - sizeof four) / (PLACES - 1)), sizeof four);
        sample = (sample ^ four) * BY_FIRST + PLUS;
    }
    return sample;
}

void repeats_note(struct blocks *blocks, const Py_buffer *view)
{
    u64 nbytes = (u64)view->len, sample;
    if (nbytes < LEAST_NOTED || !PyBuffer_IsContiguous(view, 'A'))
        return;
    struct repeat *found = NULL, *least = blocks->repeats;
    for (struct repeat *one = blocks->repeats; one < blocks->repeats + REPEATS; one++) {
        if (one->address == view->buf && one->nbytes == nbytes)
            found = one;
        if (one->n * one->nbytes < least->n * least->nbytes)
            least = one;
    }
    sample = sample_of(view->buf, nbytes);
    if (found == NULL || found->sample != sample) {
        found = found ? found : least;
        *found = (struct repeat){.address = view->buf, .nbytes = nbytes, .sample = sample};
    }
    found->n++;
}

/* repeated(): (times, nbytes) of the buffer that was sent again and again, and is the most; or None */
PyObject *repeated(PyObject *self, PyObject *Py_UNUSED(none))
{
    const struct blocks *blocks = (struct blocks *)self;
    const struct repeat *most = NULL;
    for (const struct repeat *one = blocks->repeats; one < blocks->repeats + REPEATS; one++)
        if (one->n >= OFTEN && (most == NULL || one->n * one->nbytes > most->n * most->nbytes))
            most = one;
    return most ? Py_BuildValue("KK", most->n, most->nbytes) : Py_NewRef(Py_None);
}
