"""Messages through io_uring: each one is a row where the kernel lets them be seen, and else that is said."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from scope_ebpf.loaders import extras
from scope_ebpf.loaders.capture import Capture, CaptureOptions
from scope_ebpf.records import RecordFlags, RecordLimits
from tests.live import rings
from tests.live.recording import Target, attached, compiled, no_losses
from tests.live.rings import CASES, CONNECTS, ROUNDS, Case

pytestmark = pytest.mark.live

KERNEL = tuple(int(part) for part in platform.release().split(".")[:2])


@pytest.mark.parametrize("way", [*extras.WAYS, "none"])
def test_each_message_once(way, tmp_path, monkeypatch):
    only = {name: try_it for name, try_it in extras.WAYS.items() if name == way}
    monkeypatch.setattr(extras, "WAYS", only)
    chosen = extras.choose()
    if not chosen.name:
        # what is refused is said, and all the rest is recorded
        reason = f"{way}: " if only else "nothing was tried"
        assert chosen.told().startswith(f"messages through io_uring: not seen: {reason}")
    found, notes, lost = rings.record(tmp_path, CASES + CONNECTS)
    assert lost == 0
    assert notes == [chosen.told()]
    for case, seen in zip(CASES, found[: len(CASES)], strict=True):
        rings.check(case, seen, chosen.name, KERNEL)
    for case, seen in zip(CONNECTS, found[len(CASES) :], strict=True):
        rings.check_connects(case, seen, chosen.name)


def test_a_ring_that_is_made_later(tmp_path):
    case = Case("tcp", "sendmsg", "async", "late")
    [seen], notes, lost = rings.record(tmp_path, (case,))
    way = extras.choose()
    assert lost == 0
    assert notes == [way.told()]
    rings.check(case, seen, way.name, KERNEL)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_ring_that_is_used_before_it_is_met(kind, tmp_path, monkeypatch):
    # as late as it may be
    met = Capture.watch_rings
    waiting = [0]

    def watch_later(capture):
        waiting[0] += 1
        return met(capture) if waiting[0] == 2 else []

    monkeypatch.setattr(Capture, "watch_rings", watch_later)
    case = Case(kind, "send", "enter", "used")
    [seen], notes, lost = rings.record(tmp_path, (case,))
    assert lost == 0
    assert notes
    flags = seen.rows["flags"][seen.rows["fd"] == RecordLimits.NO_DESCRIPTOR]
    inexact = flags & RecordFlags.FLAG_INEXACT != 0
    if extras.choose().name:
        # nobody can tell how many bytes had gone
        assert len(flags) == 2 * ROUNDS
        assert inexact.tolist() == [kind == "unix"] * len(flags)


def test_nothing_is_attached_without_a_ring(tmp_path):
    program = compiled("calls", tmp_path)
    with Target(program, "counts") as target, attached(tmp_path, target) as session:
        target.work()
    assert not session.recording.meta.notes


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give privileges up")
@pytest.mark.parametrize("ring", ["early", "late"])
def test_with_the_needed_capabilities_only(ring, tmp_path):
    way = extras.choose()
    session = rings.attach_unprivileged(tmp_path, Case("tcp", "send", "enter", ring))
    no_losses(session)
    assert session.recording.meta.notes == [way.told()]
    rows = session.table("messages").filter(tgid=session.target, kind="tcp")
    assert rows["fd"].null_count() == (2 * ROUNDS if way.name else 0)
    assert len(rows) == rows["fd"].null_count() + 4


def test_where_nobody_could_make_one(tmp_path, monkeypatch):
    reason = "kernel.io_uring_disabled is 2"
    monkeypatch.setattr(extras, "why_unused", lambda: reason)
    with Capture(CaptureOptions(families=("messages",))) as capture:
        before = programs_held()
        capture.prepare_rings()
        assert programs_held() == before
    # and then it was allowed again
    case = Case("tcp", "sendmsg", "async", "late")
    [seen], notes, lost = rings.record(tmp_path, (case,))
    assert lost == 0
    assert notes == [f"messages through io_uring: not seen: {reason} when the recording began"]
    rings.check(case, seen, "", KERNEL)


def test_what_is_refused_refuses_nothing_else(tmp_path, monkeypatch):
    # no kernel has both
    functions = ("pipe_write", "anon_pipe_write")
    monkeypatch.setattr(extras, "WAYS", {"fexit": lambda: functions})
    case = Case("tcp", "send", "enter")
    [seen], [note], lost = rings.record(tmp_path, (case,))
    assert lost == 0
    start = "messages through io_uring: not seen: fexit: cannot load capture"
    assert note.startswith(start)
    rings.check(case, seen, "", KERNEL)


def programs_held() -> int:
    """How many BPF programs this process has loaded."""
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return links.count("anon_inode:bpf-prog")


def test_rows_of_a_recording(tmp_path):
    program = compiled("uring", tmp_path)
    way = extras.choose()
    with (
        Target(program, "tcp", "send", "enter", "early", ROUNDS) as target,
        attached(tmp_path, target) as session,
    ):
        note = target.work()
    no_losses(session)
    assert session.recording.meta.notes == [way.told()]
    rows = session.table("messages").filter(tgid=target.pid, kind="tcp")
    ring = rows.filter(name="io_uring_enter")
    assert ring["tid"].unique().to_list() == ([note["tid"]] if way.name else [])
    assert len(rows) == 4 + len(ring)
    assert ring["fd"].null_count() == len(ring) == (2 * ROUNDS if way.name else 0)
    # the stream of each is known to the other
    sent, received = (
        set(ring.filter(direction=which).select("stream", "stream_end").rows())
        for which in ("send", "receive")
    )
    assert sent == received
    entered = session.table("syscalls").filter(tgid=target.pid, name="io_uring_enter")
    assert len(entered)
