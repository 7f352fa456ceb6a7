"""What tests reach behind the public names, in one place."""


def inner(arena):
    """Return the library's own arena behind an `oobpickle.Arena`; the very object if it is one."""
    return getattr(arena, "_memory", arena)
