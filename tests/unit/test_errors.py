"""The errors: one tree, caught by what callers already catch, and whole after a crossing."""

import copy
import errno
import pickle

import pytest

import oobpickle
from oobpickle import _errors
from oobpickle._errors import format_nbytes

STANDARD = {
    "PayloadError": pickle.UnpicklingError,
    "EnvelopeError": pickle.UnpicklingError,
    "StaleEnvelopeError": pickle.UnpicklingError,
    "StructureError": ValueError,
    "FileFormatError": ValueError,
    "SharedStructureError": ValueError,
    "ArenaError": OSError,
    "ArenaFullError": MemoryError,
}
TEXT = "arena full: need 256 MiB in one block, 40 MiB left of 512 MiB. Pass enabled(capacity=...)."


def public_names():
    return {
        name
        for name, value in vars(_errors).items()
        if isinstance(value, type) and value.__module__ == _errors.__name__
    }


def test_every_error_is_listed_here():

    warnings = {"FallbackWarning", "NotServedWarning", "LockOwnerDiedWarning", "RepeatedWarning"}

    assert public_names() == {"OobPickleError", *warnings, *STANDARD}


@pytest.mark.parametrize("name", STANDARD)
def test_errors_are_caught_by_the_base_and_by_the_standard_class(name):
    error = getattr(oobpickle, name)

    assert issubclass(error, oobpickle.OobPickleError)
    assert issubclass(error, STANDARD[name])


def test_a_stale_envelope_is_an_envelope_error():

    assert issubclass(oobpickle.StaleEnvelopeError, oobpickle.EnvelopeError)


def test_the_warning_can_be_filtered_as_a_user_warning():

    assert issubclass(oobpickle.FallbackWarning, UserWarning)
    assert not issubclass(oobpickle.FallbackWarning, oobpickle.OobPickleError)


def name_of(error):
    return f"{type(error).__name__}-{getattr(error, 'reason', error.args[0])}"[:32]


def with_everything():
    errors = [getattr(oobpickle, name)(TEXT) for name in sorted(public_names())]
    errors += [
        oobpickle.ArenaError(errno.ENOSPC, TEXT),
        oobpickle.ArenaError(errno.EMFILE, TEXT, "/dev/shm"),
        oobpickle.ArenaFullError(TEXT, "memory"),
        oobpickle.ArenaFullError(TEXT, reason="busy"),
    ]
    return errors


def shown(error):
    names = ("args", "errno", "strerror", "filename", "reason")
    return type(error), str(error), {name: getattr(error, name, None) for name in names}


@pytest.mark.parametrize("error", with_everything(), ids=name_of)
def test_errors_survive_pickling_with_text_and_attributes(error):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        arrived = pickle.loads(pickle.dumps(error, protocol))

        assert shown(error) == shown(arrived)


@pytest.mark.parametrize("error", with_everything(), ids=name_of)
def test_errors_survive_copying_with_text_and_attributes(error):

    assert shown(error) == shown(copy.copy(error))


@pytest.mark.parametrize("name", sorted(public_names()))
def test_notes_and_further_attributes_survive_pickling(name):
    error = getattr(oobpickle, name)(TEXT)
    error.add_note("seen by worker 3")
    error.worker = 3
    arrived = pickle.loads(pickle.dumps(error))

    assert arrived.__notes__ == ["seen by worker 3"]
    assert arrived.worker == 3


def test_the_reason_of_a_full_arena_has_a_default():

    assert oobpickle.ArenaFullError(TEXT).reason == "full"


def test_an_arena_error_shows_its_number():
    error = oobpickle.ArenaError(errno.ENOSPC, TEXT)

    assert error.errno == errno.ENOSPC
    assert TEXT in str(error)


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (10 << 10, "10 KiB"),
        (100 << 10, "100 KiB"),
        (1 << 20, "1.0 MiB"),
        (5 << 29, "2.5 GiB"),
        (1 << 43, "8192 GiB"),
    ],
)
def test_bytes_are_shown_in_the_largest_unit_that_fits(nbytes, expected):

    assert expected == format_nbytes(nbytes)
