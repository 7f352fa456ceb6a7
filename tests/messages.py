"""Messages as the hook makes them, without a channel."""

from oobpickle import _envelope
from oobpickle._native import core
from oobpickle._pickling.serializer import take_apart


def message_of(obj, blocks=None, threshold=0, special=(), *, is_coarse=False):
    """Return what `obj` was taken apart into: in the blocks of an arena, or in memory."""
    message = core.Message(blocks, threshold, _envelope.tables(dict(special)))
    message.is_coarse = is_coarse
    take_apart(obj, message, by_value=True)
    return message


def envelope_of(obj, arena, channel=0):
    """Put an object into an arena and return its envelope, which nobody else sends."""
    return _envelope.pack(message_of(obj, arena.blocks), arena, channel)
