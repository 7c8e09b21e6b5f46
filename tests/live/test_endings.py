"""What ends a recording, and what is left of it: always whole, with the summary and exit code 0."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from scope_ebpf.loaders.capture import Capture, CaptureOptions
from tests.live.recording import (
    Session,
    Target,
    attached,
    compiled,
    no_losses,
    scope_ebpf_command,
)

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The program that makes known calls."""
    return compiled("calls", tmp_path_factory.mktemp("calls"))


def is_whole(session: Session) -> None:
    """Complete, nothing lost, and the summary is on stdout."""
    no_losses(session)
    assert session.recording.meta.ended_ns is not None
    assert not session.recording.running
    assert "syscalls" in session.out
    assert "Traceback" not in "\n".join(session.talk)
    for table in ("syscalls", "messages", "offcpu", "processes"):
        assert session.recording.meta.tables[table].rows == session.recording.rows(table)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal(calls, tmp_path, number):
    """The target goes on."""
    with Target(calls, "stays") as target:
        with attached(tmp_path, target) as session:
            target.open_gate()
            target.note()
            target.wait_until_blocked()
            session.stop(number)
            assert session.wait() == 0
        assert target.process.poll() is None
        target.open_gate()
        assert target.process.wait(10) == 0
    is_whole(session)


def test_at_once(calls, tmp_path):
    """Also in the first moment, before the writer is ready."""
    with Target(calls, "stays") as target:
        with attached(tmp_path, target) as session:
            session.stop()
            assert session.wait() == 0
        assert target.process.poll() is None
    is_whole(session)


def test_duration(calls, tmp_path):
    with Target(calls, "stays") as target:
        with attached(tmp_path, target, "--duration", "700ms") as session:
            assert session.wait() == 0
        assert target.process.poll() is None
    is_whole(session)
    meta = session.recording.meta
    assert meta.ended_ns is not None
    assert 0.7 <= (meta.ended_ns - meta.started_ns) / 1e9 < 5


def test_last_target(calls, tmp_path):
    """One target's end does not end it; the last one's does."""
    with (
        Target(calls, "counts") as first,
        Target(calls, "threads") as second,
        attached(tmp_path, [first, second]) as session,
    ):
        first.work()
        time.sleep(0.5)
        assert session.process.poll() is None
        second.work()
        assert session.wait() == 0
    is_whole(session)
    rows = session.table("syscalls")
    for target, number in ((first, 1009), (second, 7 * 211)):
        assert rows.filter(tgid=target.pid, name="getppid").height == number


def test_whole_host(calls, tmp_path):
    """record --all: everything but the recorder itself."""
    path = tmp_path / "host.scope"
    with scope_ebpf_command(path, "record", "--all", "-o", path) as session:
        with Target(calls, "threads") as target:
            target.work()
        session.stop()
        session.wait()
    assert session.code == 0
    losses = session.table("losses")
    rows = session.table("syscalls")
    assert session.recording.meta.scope == "host"
    assert rows.filter(tgid=session.process.pid).is_empty()
    if losses.is_empty():
        for tag in range(10, 17):
            own = rows.filter(name="getppid", arg0=tag, tgid=target.pid)
            assert own["arg1"].to_list() == list(range(211))
    # this test's own calls, too
    assert rows.filter(tgid=os.getpid()).height > 0
    events = session.table("processes").filter(tgid=target.pid)["event"].to_list()
    assert sorted(events) == sorted(["fork", "exec", *["thread", "thread_exit"] * 7, "exit"])
    assert (events[:2], events[-1]) == (["fork", "exec"], "exit")


def test_nothing_stays_in_the_kernel(calls):
    """A capture's programs, maps and links are held by its descriptors alone, and those are closed."""

    def held() -> list[str]:
        links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return [link for link in links if "bpf" in link]

    def capture_once(pid: int) -> None:
        with Capture(CaptureOptions(tgids=(pid,), hot_slots=1024, wide_slots=256)) as capture:
            capture.start()
            assert len(held()) > len(before) + 5
            capture.stop()
        # the rings are mapped as long as the object is there
        assert not any("prog" in link or "link" in link for link in held())

    before = held()
    with Target(calls, "stays") as target:
        for _ in range(3):
            capture_once(target.pid)
            assert held() == before
