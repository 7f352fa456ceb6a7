"""Who has not joined, or cannot: every message arrives, in-band where it must, and counted."""

import shutil
import subprocess

import pytest

from process.harness import run_program

HIDDEN_PROC = ("sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
#: Commands that start a program elsewhere; the first that the system permits is used.
ELSEWHERE = {
    "here": [()],
    "pid namespace": [
        ("unshare", "--fork", "--pid", "--mount-proc"),
        ("unshare", "--user", "--map-root-user", "--fork", "--pid", "--mount-proc"),
    ],
    "old /proc": [
        ("unshare", "--fork", "--pid"),
        ("unshare", "--user", "--map-root-user", "--fork", "--pid"),
    ],
    "hidden /proc": [
        ("unshare", "--mount", *HIDDEN_PROC),
        ("unshare", "--user", "--map-root-user", "--mount", *HIDDEN_PROC),
    ],
    "root": [("chroot", "/")],
    "user": [("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")],
}
#: What a child needs for taking something away from itself.
NEEDS = {"proc": "hidden /proc", "root": "root", "user": "user", "namespace": "pid namespace"}


def prefix(where):
    """Return the command that starts a program there; skip with the system's own words."""
    refusals = []
    for command in ELSEWHERE[where]:
        if command and shutil.which(command[0]) is None:
            refusals.append(f"no program {command[0]}")
            continue
        done = subprocess.run(
            [*command, "true"], capture_output=True, text=True, timeout=20, check=False
        )
        if done.returncode == 0:
            return command
        refusals.append(f"{' '.join(command)}: {done.stderr.strip()}")
    pytest.skip("; ".join(refusals))


def test_tcp_within_one_tree():
    run_program("strangers", "tcp_within_one_tree")


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("AF_UNIX", "here"),
        ("AF_INET", "here"),
        ("AF_UNIX", "pid namespace"),
        ("AF_UNIX", "hidden /proc"),
    ],
)
def test_a_program_that_calls(family, where, when):
    run_program("strangers", "it_calls", family, when, *prefix(where))


@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_program_that_is_called(when):
    run_program("strangers", "we_call", when)


@pytest.mark.parametrize("where", ["here", "pid namespace", "old /proc", "hidden /proc"])
def test_a_program_with_an_older_pipe(where):
    run_program("strangers", "older_pipe", "", *prefix(where))


def test_a_program_of_another_user_with_an_older_pipe():
    prefix("user")
    run_program("strangers", "older_pipe", "65534")


def test_a_program_with_a_block_of_its_own():
    run_program("strangers", "program_with_a_block_of_its_own")


def test_an_older_worker_with_another_version(start_method):
    run_program("strangers", "older_worker_with_another_version", start_method)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_participant_that_writes_over_the_table(seed):
    run_program("strangers", "faulty_participant", seed)


def test_a_sender_without_a_descriptor():
    run_program("strangers", "sender_without_a_descriptor")


@pytest.mark.parametrize(
    "what",
    [
        "address space",
        "descriptors",
        "files",
        "most address space",
        "proc",
        "root",
        "slots",
        "swap",
        "user",
    ],
)
def test_a_child_that_cannot_attach(what):
    prefix(NEEDS.get(what, "here"))
    run_program("strangers", "child_that_cannot_attach", what)


@pytest.mark.parametrize(
    ("what", "method"),
    [
        ("address space", "fork"),
        ("descriptors", "fork"),
        ("files", "fork"),
        ("files", "spawn"),
        ("hook", "fork"),
        ("hook", "spawn"),
        ("proc", "fork"),
        ("root", "fork"),
        ("swap", "fork"),
        ("user", "fork"),
        ("user", "forkserver"),
    ],
)
def test_a_worker_whose_initializer_takes_away(what, method):
    prefix(NEEDS.get(what, "here"))
    run_program("strangers", "worker_whose_initializer_takes_away", what, method)


@pytest.mark.parametrize("hidden_by", ["namespace", "proc", "root"])
def test_what_is_in_flight_stays_though_its_reader_is_hidden(hidden_by):
    prefix(NEEDS[hidden_by])
    run_program("strangers", "what_is_in_flight_stays", hidden_by)
