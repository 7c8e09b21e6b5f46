"""record --cgroup: members, those that join, groups below that are made later, and nobody else."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from scope_ebpf.loaders.cgroups import mount_point
from tests.live.recording import Target, compiled, no_losses, scope_ebpf_command

pytestmark = pytest.mark.live

TAKEN_UP_SECONDS = 0.5  # the recorder looks for processes that joined at least ten times a second


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The program that makes known calls."""
    return compiled("calls", tmp_path_factory.mktemp("calls"))


@pytest.fixture
def group() -> Iterator[Path]:
    """A new cgroup of the unified hierarchy; it is removed with all below it."""
    root = mount_point()
    if root is None:
        pytest.skip("needs the unified cgroup hierarchy (mount -t cgroup2)")
    directory = root / f"scope-ebpf-test-{os.getpid()}"
    directory.mkdir()
    try:
        yield directory
    finally:
        for path in sorted(directory.rglob("*/"), reverse=True):
            if path.is_dir():
                remove(path)
        remove(directory)


def remove(directory: Path) -> None:
    """Remove a cgroup as soon as its last process is gone."""
    for _ in range(200):
        try:
            directory.rmdir()
            return
        except OSError:
            time.sleep(0.01)
    directory.rmdir()


def join(group: Path, target: Target) -> None:
    """Move a process into a cgroup."""
    (group / "cgroup.procs").write_text(str(target.pid))


def test_members_and_nobody_else(calls, group, tmp_path):
    path = tmp_path / "group.scope"
    root = mount_point()
    assert root is not None
    below = group / "below"
    below.mkdir()
    with ExitStack() as stack:
        outside, member, deep, joins, late, parent = (
            stack.enter_context(Target(calls, mode))
            for mode in ("counts", "counts", "threads", "counts", "threads", "children")
        )
        join(group, member)
        join(below, deep)
        join(group, parent)
        session = stack.enter_context(
            scope_ebpf_command(path, "record", "--cgroup", f"/{group.name}", "-o", path)
        )
        member.work()
        outside.work()
        deep.work()
        parent.work()
        join(group, joins)
        later = group / "later" / "deeper"
        later.mkdir(parents=True)
        join(later, late)
        time.sleep(TAKEN_UP_SECONDS)
        joins.work()
        late.work()
        session.stop()
        assert session.wait() == 0
    no_losses(session)
    rows, processes = session.table("syscalls"), session.table("processes")
    for target in (member, joins):
        own = rows.filter(tgid=target.pid, name="getppid")
        assert own["arg1"].to_list() == list(range(1009))
    for target in (deep, late):
        assert rows.filter(tgid=target.pid, name="getppid").height == 7 * 211
        assert processes.filter(tgid=target.pid, event="thread").height == 7
    assert rows.filter(tgid=parent.pid, name="getppid").height == 307
    children = processes.filter(event="fork", parent_tgid=parent.pid)["tgid"].to_list()
    assert len(children) == 13
    for child in children:
        assert rows.filter(tgid=child, name="getppid").height == 101
    assert rows.filter(tgid=outside.pid).is_empty()
    known = {target.pid for target in (member, deep, joins, late, parent)} | set(children)
    assert set(rows["tgid"]) == set(processes["tgid"]) == known
    places = {
        target.pid: processes.filter(tgid=target.pid)["cgroup"].unique().to_list()
        for target in (member, deep, joins, late)
    }
    assert places == {
        member.pid: [f"/{group.name}"],
        deep.pid: [f"/{group.name}/below"],
        joins.pid: [f"/{group.name}"],
        late.pid: [f"/{group.name}/later/deeper"],
    }
    meta = session.recording.meta
    assert meta.scope == "cgroup"
    # those that joined were alive when they did
    for target in (joins, late):
        taken = processes.filter(tgid=target.pid, event="alive")
        assert len(taken) == 1
        assert taken["time_ns"][0] > meta.started_ns


def test_busy_process_joins(calls, group, tmp_path):
    """From its first recorded call on, none is missing."""
    path = tmp_path / "group.scope"
    with (
        Target(calls, "busy") as target,
        scope_ebpf_command(path, "record", "--cgroup", group, "-o", path) as session,
    ):
        join(group, target)
        time.sleep(TAKEN_UP_SECONDS)
        totals = target.work()
        session.stop()
        assert session.wait() == 0
    losses = session.table("losses")
    rows = session.table("syscalls")
    assert rows.filter(status="refused").is_empty()
    for i, total in enumerate(totals):
        numbers = rows.filter(name="getppid", arg0=50 + i)["arg1"]
        if losses.is_empty():
            assert numbers.to_list() == list(range(numbers[0], total))
        assert numbers[0] > 0
