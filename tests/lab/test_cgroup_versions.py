"""record --cgroup and --all where cgroups are of version 2, of version 1, and of both.

Systemd mounts what the guest is told: version 2 by itself, both with

    vagrant/lab.py run 5.10 --systemd --append systemd.unified_cgroup_hierarchy=0
        tests/lab/test_cgroup_versions.py

and version 1 alone if systemd.legacy_systemd_cgroup_controller=1 is there, too.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from scope_ebpf.recording.reader import Recording, open_recording
from tests.lab.recorded import ATTACH_SECONDS
from tests.live.recording import recorder

pytestmark = [pytest.mark.lab, pytest.mark.systemd, pytest.mark.timeout(400)]
COMMAND = "/usr/local/bin/scope-ebpf"
UNIT = "lab-member.service"
PATH = f"/system.slice/{UNIT}"


def where(kind: str) -> list[Path]:
    """Where hierarchies of a kind are mounted: cgroup2, or cgroup for version 1."""
    mounts = Path("/proc/self/mounts").read_text()
    return [Path(path) for path in re.findall(rf"^\S+ (\S+) {kind} ", mounts, re.MULTILINE)]


UNIFIED, OLD = where("cgroup2"), where("cgroup")


@pytest.fixture(scope="module")
def member() -> Iterator[int]:
    """A service; returns its process."""
    run = ["systemd-run", "--quiet", f"--unit={UNIT}", "/bin/sleep", "1000"]
    subprocess.run(run, check=True)
    show = ["systemctl", "show", "-p", "MainPID", "--value", UNIT]
    yield int(subprocess.run(show, check=True, capture_output=True, text=True).stdout)
    subprocess.run(["systemctl", "stop", UNIT], check=True)


def recorded(folder: Path, *arguments: object) -> Recording:
    """A recording in which programs are executed."""
    path = folder / "test.scope"
    command = [COMMAND, "record", *arguments, "-o", path]
    with recorder(path, *command, attach_seconds=ATTACH_SECONDS) as session:
        for _ in range(3):
            subprocess.run(["/bin/true"], check=True)
        session.stop()
    assert session.code == 0, session.talk
    found = open_recording(path)
    found.check()
    return found


def refused(*arguments: object) -> str:
    """The one line that is said instead of a recording."""
    command = [COMMAND, "record", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and done.stdout == "", done
    (line,) = done.stderr.splitlines()
    return line


def test_a_cgroup(member, tmp_path):
    """By its path: its members are recorded, or it is said why that cannot be."""
    if not UNIFIED:
        line = refused("--cgroup", PATH, "-o", tmp_path / "test.scope")
        assert "this host has cgroups of version 1 only; boot it with" in line, line
        assert "mount" not in line  # over those that the host uses
        assert not (tmp_path / "test.scope").exists()
        return
    found = recorded(tmp_path, "--cgroup", PATH)
    processes = found.collect(found.processes)
    assert processes["tgid"].unique().to_list() == [member]
    assert processes["cgroup"].unique().to_list() == [PATH]


def test_a_directory_of_version_1(member, tmp_path):
    """It has members, too, but not those that the probes can tell."""
    for root in OLD:
        folder = root / PATH.lstrip("/")
        if not folder.is_dir():
            continue
        line = refused("--cgroup", folder, "-o", tmp_path / "test.scope")
        assert "version 1" in line, line


def test_everything(member, tmp_path):
    """The host is recorded either way; without the unified hierarchy services have no names."""
    found = recorded(tmp_path, "--all", "--families", "processes,syscalls")
    processes = found.collect(found.processes)
    own = processes.filter(pl.col("event") == "alive", tgid=member)
    assert own["comm"].to_list() == ["sleep"]
    assert own["cgroup"].to_list() == [PATH if UNIFIED else None]
    assert processes.filter(event="exec", comm="true").height == 3
    notes = [note for note in found.meta.notes if "cgroup" in note]
    no_paths = (
        "cgroups have no paths: this host has cgroups of version 1 only, and paths are those of version 2;"
        " services are named by their commands only"
    )
    assert notes == ([] if UNIFIED else [no_paths])
