"""``oobpickle doctor``: what it finds, also of a package that is broken."""

import importlib.metadata
import json
import shutil
from types import SimpleNamespace

import oobpickle
from oobpickle._cli import doctor
from oobpickle._cli.doctor import BROKEN, CHECKS, OK, WARNING, Finding


def test_this_machine_is_fit(command):
    child = command("doctor", "--json")
    found = json.loads(child.stdout)

    assert child.stderr == ""
    assert set(found["checks"]) == set(CHECKS)
    assert child.returncode in (0, 1), found
    assert found["checks"]["a message, spawn"]["text"].endswith("out of band")


def broken(tmp_path):
    """Return a copy of the package, to be damaged."""
    folder = tmp_path / "copy"
    source = oobpickle.__file__.rpartition("/")[0]
    shutil.copytree(source, folder / "oobpickle", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_module_that_cannot_be_imported(command, tmp_path):
    folder = broken(tmp_path)
    (folder / "oobpickle" / "_hook" / "channels.py").write_text("raise ImportError('half of it')\n")
    child = command("doctor", "--json", source=folder)
    found = json.loads(child.stdout)

    assert (child.returncode, child.stderr) == (2, "")
    assert "ImportError: half of it" in found["checks"]["package"]["text"]
    assert found["checks"]["locks"]["level"] == "ok"
    assert command("run", "nothing.py", source=folder).returncode == 1  # others say it as ever


def test_a_core_that_is_missing(command, tmp_path):
    folder = broken(tmp_path)
    for path in (folder / "oobpickle").glob("_core*.so"):
        path.unlink()
    child = command("doctor", source=folder)

    assert (child.returncode, child.stderr) == (2, "")
    assert "oobpickle._core is not here" in child.stdout
    assert child.stdout.endswith("it cannot work here\n")


def test_exit_codes_and_the_verdict(monkeypatch, capsys):
    for level, words in ((OK, "all is well"), (WARNING, "it works"), (BROKEN, "it cannot work")):
        findings = {"one": lambda: Finding(OK, "a"), "two": lambda at=level: Finding(at, "b")}
        monkeypatch.setattr(doctor, "CHECKS", findings)
        assert doctor.doctor() == level
        assert capsys.readouterr().out.splitlines()[-1].startswith(words)


def test_a_check_that_raises_is_broken_and_the_others_go_on(monkeypatch, capsys):
    def fails():
        raise OSError("no\nway")

    monkeypatch.setattr(doctor, "CHECKS", {"one": fails, "two": lambda: Finding(OK, "fine")})

    assert doctor.doctor(as_json=True) == BROKEN
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert checks == {
        "one": {"level": "BROKEN", "text": "OSError: no"},
        "two": {"level": "ok", "text": "fine"},
    }


def test_every_check_leaves_nothing_behind():
    for name, check in CHECKS.items():
        if not name.startswith("a message"):
            assert check().level in (OK, WARNING), name


def test_a_small_dev_shm_is_said_and_a_full_one_is_a_reason_to_look(monkeypatch):
    def of(free, size):
        status = SimpleNamespace(f_bavail=free // 4096, f_blocks=size // 4096, f_frsize=4096)
        monkeypatch.setattr(doctor.os, "statvfs", lambda _: status)
        monkeypatch.setattr(doctor.os.path, "isdir", lambda _: True)
        monkeypatch.setattr(doctor.os, "access", lambda *_: True)
        return CHECKS["/dev/shm"]()

    assert of(60 << 20, 64 << 20) == Finding(
        OK, "60 MiB free of 64 MiB (for multiprocessing's locks; the arena is not there)"
    )
    assert of(8 << 10, 64 << 20).level == WARNING


def test_which_libraries_are_served(monkeypatch):
    def version(name):
        if name in ("joblib", "multiprocess", "billiard"):
            return "1.0"
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)

    assert CHECKS["libraries"]().text == (
        "served: multiprocessing, concurrent.futures, joblib 1.0, "
        "multiprocess 1.0 (if it is imported before the block); not served: billiard 1.0"
    )
