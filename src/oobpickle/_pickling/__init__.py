"""An object and its payload: pickled with its buffers out of band, and loaded again.

Knows nothing of shared memory."""
