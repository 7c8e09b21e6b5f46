"""What the doctor tells of the CPythons of this machine, and of a process of each."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from scope_ebpf.cli import doctor as command
from scope_ebpf.errors import FormatError, TargetError
from scope_ebpf.loaders import doctor
from scope_ebpf.loaders.doctor import Check, InterpreterCheck
from scope_ebpf.loaders.python.checks import (
    BY_PROBES,
    report_file,
    report_process,
    usdt_names,
)
from scope_ebpf.loaders.python.files import interpreter_files, interpreters_in_path
from tests.live.pythons import Python, pythons, started

pytestmark = pytest.mark.object

ALL = ("stacks", "waits for the GIL", *BY_PROBES)
WORKS = Check("syscalls", True, "recorded 23 of 23 getppid calls", family=True)
PYTHON = InterpreterCheck("process 7", False, "not to be looked into", "it is PyPy, not CPython")


@pytest.fixture(params=[python for python in pythons() if python.root is None], ids=str)
def python(request) -> Python:
    """Each CPython of this machine itself."""
    found: Python = request.param
    return found


def version_of(python: Python) -> str:
    """Such as 3.11."""
    return ".".join(map(str, python.version[:2]))


def test_a_file(python):
    files = interpreter_files([], [python.path])
    reports = [report_file(path) for path in files if version_of(python) in path.name]
    assert reports
    for report in reports:
        assert re.fullmatch(rf"Python {re.escape(version_of(python))}\.\d+", report.name)
        assert report.recorded == ALL
        assert all(clause.startswith("static probes") for clause in report.missing)
        assert bool(report.usdt) == (not report.missing)


def test_static_probes_are_those_that_readelf_shows(python):
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf: apt install binutils")
    for path in interpreter_files([], [python.path]):
        out = subprocess.run(["readelf", "-n", path], capture_output=True, text=True, check=True)
        shown = set(re.findall(r"Provider: python\n\s+Name: (\S+)", out.stdout))
        assert usdt_names(path) == shown
        assert usdt_names(path, "another") == set()


def test_a_process(python):
    with started(python, "print(flush=True); input()", flags=("-I",)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        check = doctor.check_interpreter_of(process.pid)
    assert check.works is True
    assert check.name == f"process {process.pid}"
    assert check.detail.startswith(f"Python {version_of(python)}.")
    assert "records stacks, waits for the GIL, contexts of tasks and work items" in check.detail


def test_what_is_no_python(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            check = doctor.check_interpreter_of(process.pid)
            assert report_process(process.pid) is None
        finally:
            process.kill()
    assert (check.works, check.detail) == (None, "sleep has no CPython in it")
    with pytest.raises(TargetError, match="there is none with that id"):
        doctor.check_interpreter_of(process.pid)
    sleep = shutil.which("sleep")
    assert sleep is not None
    with pytest.raises(FormatError, match="there is no CPython in it"):
        report_file(Path(sleep))
    text = tmp_path / "python3"
    text.write_text("#!/bin/sh\n")
    with pytest.raises(FormatError, match="cannot read"):
        usdt_names(text)
    check = doctor.tell_interpreter(text)
    assert check.works is None
    assert check.detail == f"cannot read {text}"


def test_interpreters_in_path(python, monkeypatch, tmp_path):
    (tmp_path / "python3").symlink_to(python.path)
    (tmp_path / "python3.99").write_text("#!/bin/sh\n")  # pyenv's shims are scripts
    monkeypatch.setenv("PATH", str(tmp_path))
    found = interpreters_in_path()
    assert len(found) == 1
    assert version_of(python) in found[0].name


def test_they_have_a_section_of_their_own(monkeypatch):
    """And no say in whether recording works."""
    asked = []

    def examine(*tgids: int) -> list[Check]:
        asked.append(tgids)
        return [WORKS, PYTHON]

    monkeypatch.setattr(command, "examine", examine)
    result = CliRunner().invoke(command.doctor, ["--pid", "7", "--pid", "8"])
    assert asked == [(7, 8)]
    assert result.exit_code == 0
    assert result.output == (
        "Probes, tried just now\n"
        "  works  syscalls   recorded 23 of 23 getppid calls\n"
        "\n"
        "Python\n"
        "  FAILS  process 7  not to be looked into\n"
        "                    why: it is PyPy, not CPython\n"
        "\n"
        "Everything works: record with `sudo scope-ebpf attach --pid PID`.\n"
    )
    document = json.loads(CliRunner().invoke(command.doctor, ["--json"]).output)
    assert [check["name"] for check in document["checks"]] == ["syscalls"]
    assert [check["name"] for check in document["interpreters"]] == ["process 7"]
