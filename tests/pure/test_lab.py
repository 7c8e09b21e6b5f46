"""The lab's runner where it needs no guest: kernels, exit codes, what is brought back, the table."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.pure

SOURCE = Path(__file__).resolve().parents[2] / "vagrant" / "lab.py"


@pytest.fixture(scope="module")
def lab():
    """vagrant/lab.py, which no package holds."""
    spec = importlib.util.spec_from_file_location("lab_runner", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def image(lab, tmp_path):
    (tmp_path / "kernels").write_text(
        "6.1 6.1.0-56-cloud-amd64\n6.12 6.12.1+deb12-cloud-amd64\nnewest 7.3.4+deb13-cloud-amd64\n"
    )
    return lab.find_image(tmp_path)


@pytest.mark.parametrize(
    ("asked", "release"),
    [
        ("6.1", "6.1.0-56-cloud-amd64"),  # not 6.12
        ("6.12", "6.12.1+deb12-cloud-amd64"),
        ("newest", "7.3.4+deb13-cloud-amd64"),
        ("6", "6.1.0-56-cloud-amd64"),  # the oldest of them
        ("7.3", "7.3.4+deb13-cloud-amd64"),
        ("7.3.4+deb13-cloud-amd64", "7.3.4+deb13-cloud-amd64"),
    ],
)
def test_kernel_by_name_or_start(image, asked, release):
    assert image.release(asked) == release


@pytest.mark.parametrize("asked", ["4.19", "", "6.1.0-5"])
def test_unknown_kernel(lab, image, asked):
    with pytest.raises(lab.LabError, match=r"it has 6\.1, 6\.12, newest; name one of these"):
        image.release(asked)


def test_no_image(lab, tmp_path):
    assert lab.find_image(tmp_path / "none") is None


def test_key_follows_what_the_image_is_made_of(lab, tmp_path, monkeypatch):
    (tmp_path / "vagrant" / "guest").mkdir(parents=True)
    for name in lab.IMAGE_SOURCES:
        (tmp_path / "vagrant" / name).write_text(name)
    project = tmp_path / "pyproject.toml"
    text = '[build-system]\n[project]\ndependencies = ["a"]\n[project.scripts]\nx = "y"\n'
    project.write_text(text)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    first = lab.image_key()
    project.write_text(text + "[tool.ruff]\n")
    assert lab.image_key() == first
    project.write_text(text.replace('"a"', '"b"'))
    assert lab.image_key() != first
    project.write_text(text)
    (tmp_path / "vagrant" / "provision.sh").write_text("other")
    assert lab.image_key() != first


def left(folder: Path, **texts: str) -> Path:
    """What a guest left: its serial ports, and what QEMU said."""
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("texts", "stopped", "code", "problem"),
    [
        ({"exit": "exit 0\n"}, None, 0, ""),
        ({"exit": "exit 3\n", "console": "Kernel panic - no"}, (124, "late"), 3, ""),
        ({"exit": "", "console": "x"}, (124, "late"), 124, "late"),
        (
            {"exit": "", "console": "[ 1.2] Kernel panic - not syncing: Oops\r\n"},
            None,
            125,
            "Kernel panic - not syncing: Oops",
        ),
        ({"qemu": "qemu: could not open it\n"}, None, 125, "QEMU says: qemu: could not open it"),
        ({}, None, 125, "it ended without an exit code (QEMU's is 0)"),
    ],
)
def test_exit_code(lab, tmp_path, texts, stopped, code, problem):
    assert lab.judge(left(tmp_path, **texts), stopped, 0) == (code, problem)


class Running:
    """A process that runs for some polls."""

    def __init__(self, polls: int) -> None:
        self.polls = polls

    def poll(self) -> int | None:
        self.polls -= 1
        return 0 if self.polls < 0 else None


@pytest.mark.parametrize(
    ("polls", "console", "seconds", "stopped"),
    [
        (2, "quiet", 9, None),
        (99, "quiet", 0, (124, "it did not end within 0 s, and was stopped")),
        (99, "[ 52.1] nvme nvme0: I/O 4 QID 1 timeout, aborting", 9, (125, "the emulated disk")),
        (
            99,
            "nvme nvme0: I/O tag 4 (1004) opcode 0x2 QID 1 timeout",
            9,
            (125, "the emulated disk"),
        ),
    ],
)
def test_following_a_guest(lab, tmp_path, polls, console, seconds, stopped):
    work = left(tmp_path, console=console, output="printed")
    out = io.BytesIO()
    guest = lab.Guest("6.1", timeout_seconds=seconds)
    found = lab.follow(Running(polls), work, guest, out)
    assert out.getvalue() == b"printed"
    if stopped is None:
        assert found is None
    else:
        assert found[0] == stopped[0]
        assert found[1].startswith(stopped[1])


def results_tar(path: Path) -> None:
    """Results of a guest that means no good, beside two honest files."""
    with tarfile.open(path, "w") as tar:
        for name in ("./doctor.json", "../outside", "/tmp/outside", "a/../../outside", "a/fine"):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            tar.addfile(entry, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        device = tarfile.TarInfo("device")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)


def test_results_stay_in_their_folder(lab, tmp_path, monkeypatch):
    work = left(tmp_path, console="c", output="o")
    results_tar(work / "results.tar")
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(lab, "RESULTS", results)
    kept = lab.keep_results(work, "6.1.0")
    found = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    assert found == {"console.log", "output.log", "doctor.json", "a/fine"}
    assert not list(tmp_path.rglob("outside"))
    assert (results / "6.1.0").resolve() == kept


def test_results_of_a_guest_that_wrote_none(lab, tmp_path, monkeypatch):
    (tmp_path / "results.tar").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(lab, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    assert list(lab.keep_results(tmp_path, "6.1.0").iterdir()) == []


def test_only_the_last_results_are_kept(lab, tmp_path, monkeypatch):
    (tmp_path / "results.tar").write_bytes(bytes(10240))
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(lab, "RESULTS", results)
    monkeypatch.setattr(lab, "KEPT_RESULTS", 3)
    made = []
    for second in range(5):
        made.append(lab.keep_results(tmp_path, "6.1.0"))
        os.utime(made[-1], (second, second))
    assert [path.exists() for path in made] == [False, False, True, True, True]


def test_what_killed_runners_left_is_removed(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "WORK", tmp_path)
    for name in (f"scope-lab-{os.getpid()}-a", "scope-lab-99999999-b", "scope-lab-x", "other"):
        (tmp_path / name).mkdir()
    lab.remove_abandoned()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other",
        f"scope-lab-{os.getpid()}-a",
        "scope-lab-x",
    ]


def test_pytest_runs_the_labs_own_tests_unless_told_else(lab):
    assert lab.pytest_command([]).endswith(" tests/lab")
    assert " tests/lab -k probes" in lab.pytest_command(["-k", "probes"])
    assert "tests/lab" not in lab.pytest_command(["tests/live/test_tls.py::test_x"])


def test_job_environment_is_quoted(lab):
    script = lab.job_script(lab.Guest("6.1", systemd=True), "6.1.0-56-cloud-amd64", "true")
    assert "export SCOPE_EBPF_LAB=6.1\n" in script
    assert "export SCOPE_EBPF_LAB_INIT=systemd\n" in script
    assert script.endswith("\ntrue\n")


def row(works, detail="", **more):
    return {"works": works, "detail": detail, "cause": "", **more}


def test_table(lab):
    found = {
        "5.10": {
            "syscalls": row(True, "recorded 23 of 23"),
            "offcpu": row(False, "cannot load it", cause="the verifier refused it"),
            "loader bcc": row(True, warning="BCC 0.26 warns"),
            "extra io_uring": row(None, "this kernel has no io_uring"),
        },
        "6.1": {
            "syscalls": row(True),
            "offcpu": row(False, "cannot load it: the verifier refused it"),
        },
    }
    assert lab.render_table(found) == (
        "                5.10             6.1\n"
        "syscalls        works            works\n"
        "offcpu          refused [1]      refused [1]\n"
        "loader bcc      works [2]        not tried\n"
        "extra io_uring  not offered [3]  not tried\n"
        "[1] cannot load it: the verifier refused it\n"
        "[2] BCC 0.26 warns\n"
        "[3] this kernel has no io_uring"
    )


def test_rows_of_the_table(lab, tmp_path):
    checks = [
        {"name": "libbpf", "works": True, "detail": "", "cause": "", "family": False},
        {"name": "syscalls", "works": True, "detail": "", "cause": "", "family": True},
        {"name": "transport perf", "works": False, "detail": "no", "cause": "", "family": False},
    ]
    (tmp_path / "doctor.json").write_text(json.dumps({"checks": checks}))
    (tmp_path / "row-x.json").write_text(json.dumps({"name": "headers", **row(None)}))
    assert list(lab.table_rows(tmp_path)) == ["syscalls", "transport perf", "headers"]


def test_guest_without_a_doctor_has_no_rows(lab, tmp_path):
    assert lab.table_rows(tmp_path) == {}
    (tmp_path / "doctor.json").write_text("{")
    assert lab.table_rows(tmp_path) == {}


def run_main(lab: ModuleType, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lab.py", *arguments])
    return int(lab.main())


def test_missing_qemu_is_one_sentence(lab, monkeypatch, capsys):
    monkeypatch.setattr(lab.shutil, "which", lambda *_, **__: None)
    assert run_main(lab, monkeypatch, "run", "6.1") == 2
    assert capsys.readouterr().err == (
        "lab: cannot run the lab: qemu-system-x86_64 is missing; install it with sudo make lab-setup,"
        " or as the package qemu-system-x86\n"
    )


def test_missing_image_without_root_is_one_sentence(lab, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lab, "IMAGES", tmp_path)
    monkeypatch.setattr(lab.os, "geteuid", lambda: 1000)
    assert run_main(lab, monkeypatch, "image") == 2
    assert capsys.readouterr().err.endswith("only root can make one: run sudo make lab-image\n")


def test_tests_and_a_command_exclude_each_other(lab, monkeypatch, capsys):
    assert run_main(lab, monkeypatch, "run", "6.1", "--command", "true", "tests/lab") == 2
    assert capsys.readouterr().err == (
        "lab: cannot run both tests and --command: give one of them\n"
    )
