"""What a release says of itself: one version, the Pythons that it is tested on, its files."""

import re
import tomllib
from pathlib import Path

import pytest

import oobpickle

PROJECT = Path(__file__).parents[2]
METADATA = tomllib.loads((PROJECT / "pyproject.toml").read_text())


def test_the_version_stands_in_one_place():
    citation = (PROJECT / "CITATION.cff").read_text()

    assert METADATA["project"]["dynamic"] == ["version"]
    assert METADATA["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "oobpickle.__version__"}
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [oobpickle.__version__]


def test_every_python_that_is_tested_has_a_classifier():
    classifiers = METADATA["project"]["classifiers"]
    named = [c.rpartition(" ")[2] for c in classifiers if re.search(r":: 3\.\d+$", c)]
    readme = (PROJECT / "README.md").read_text()
    first, last = re.search(r"CPython 3\.(\d+) to 3\.(\d+)", readme).groups()

    assert named == [f"3.{minor}" for minor in range(int(first), int(last) + 1)]
    assert METADATA["project"]["requires-python"] == f">=3.{first}"


def test_authors_are_those_of_the_licence():
    holder = re.search(r"Copyright \(c\) \d+, (.*)", (PROJECT / "LICENSE").read_text())[1]
    citation = (PROJECT / "CITATION.cff").read_text()

    assert METADATA["project"]["authors"] == [{"name": holder}]
    assert f"- name: {holder}\n" in citation


def test_what_the_group_and_the_extra_need_is_the_same():
    assert (
        METADATA["dependency-groups"]["test"]
        == METADATA["project"]["optional-dependencies"]["test"]
    )


@pytest.mark.skipif(not (PROJECT / ".github").exists(), reason="it is in the repository only")
def test_the_workflow_is_in_step_with_the_release_script_and_the_classifiers():
    workflow = (PROJECT / ".github" / "workflows" / "release.yml").read_text()
    script = (PROJECT / ".ci" / "release").read_text()
    pythons = re.findall(
        r'"(3\.\d+)"', re.search(r"^ +python: \[(.*)\]$", workflow, re.MULTILINE)[1]
    )
    runners = re.search(r"^ +runner: \[(.*)\]$", workflow, re.MULTILINE)[1].split(", ")
    machines = re.search(r'^readonly MACHINES="(.*)"$', script, re.MULTILINE)[1].split()

    assert [f"Programming Language :: Python :: {python}" for python in pythons] == [
        c for c in METADATA["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)
    ]
    assert [f"ubuntu-24.04{'-arm' * (machine == 'aarch64')}" for machine in machines] == runners
    assert "run: .ci/release python " in workflow
    assert "release/dist/*" in workflow


def test_no_address_is_given_as_long_as_there_is_none():
    assert "urls" not in METADATA["project"]
