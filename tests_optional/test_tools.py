"""The programs of the how-to pages for other tools. An environment of their own: CONTRIBUTING."""

import importlib.util
import itertools
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import oobpickle
from conftest import eventually
from project.test_docs import PROJECT, blocks_of

HOW_TO = PROJECT / "docs" / "how-to"
SOURCE = Path(oobpickle.__file__).parents[1]


def need(module):
    """Skip without the module, or else fail later with what it says."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


def programs_of(page):
    """Return the programs of a page that its own tests do not run, and what follows each."""
    blocks = blocks_of(HOW_TO / page, (HOW_TO / page).read_text())
    return [
        ("\n".join(block.lines) + "\n", "\n".join(after.lines) + "\n")
        for block, after in itertools.pairwise(blocks)
        if block.language == "python no-run"
    ]


def environment(folder, **more):
    return {
        **os.environ,
        "PYTHONPATH": f"{SOURCE}:{folder}",
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


def run(folder, *command, **more):
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment(folder, **more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "page"),
    [
        ("cv2", "send-camera-frames.md"),
        ("emcee", "use-with-emcee.md"),
        ("torch", "use-with-pytorch.md"),
    ],
)
def test_the_program_prints_what_the_page_says(tmp_path, module, page):
    need(module)
    [(program, output)] = programs_of(page)
    (tmp_path / "program.py").write_text(program)
    child = run(tmp_path, "program.py")

    assert (child.returncode, child.stderr, child.stdout) == (0, "", output)


@pytest.mark.parametrize("more", [[], ["--preload"]])
def test_gunicorn_serves_what_the_page_says(tmp_path, more):
    need("gunicorn")
    program, output = programs_of("use-in-a-server.md")[0]
    (tmp_path / "app.py").write_text(program)
    socket = ["--bind", "127.0.0.1:0", "--log-file", str(tmp_path / "log"), "--no-control-socket"]
    server = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "app:application", *socket, *more],
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    try:
        url = eventually(lambda: address_in(tmp_path / "log"))
        found = [urllib.request.urlopen(url, timeout=60).read().decode() for _ in range(2)]
    finally:
        server.terminate()

    assert server.wait(60) == 0
    assert all(text in output for text in found)
    assert len(set(found)) == 2


def address_in(log):
    text = log.read_text() if log.exists() else ""
    return text.partition("Listening at: ")[2].partition(" ")[0]


def test_celery_does_what_the_page_says(tmp_path):
    need("celery")
    program, output = programs_of("use-in-a-server.md")[1]
    (tmp_path / "tasks.py").write_text(program)
    (tmp_path / "queue").mkdir()
    more = {"QUEUE": str(tmp_path / "queue")}
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--pool", "solo", "-l", "error"],
        cwd=tmp_path,
        env=environment(tmp_path, **more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        code = "from tasks import study; print(study.delay(4).get(timeout=60))"
        child = run(tmp_path, "-c", code, **more)
    finally:
        worker.terminate()

    assert (child.returncode, child.stdout) == (0, output.splitlines()[-1] + "\n"), child.stderr
    assert worker.wait(60) == 0
