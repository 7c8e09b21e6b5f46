"""On each kernel of the lab: messages through io_uring are rows, in every way in which they can be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from scope_ebpf.loaders import extras
from scope_ebpf.records import RecordFlags, RecordLimits
from tests.live import rings
from tests.live.recording import no_losses
from tests.live.rings import CASES, CONNECTS, Case

pytestmark = pytest.mark.lab

PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
# Of each kind of function one, for the ways that are not chosen here.
SOME = (
    Case("tcp", "sendmsg", "sqpoll"),
    Case("tcp6", "writev", "async"),
    Case("unix", "write", "enter"),
    Case("dgram", "sendmsg", "async"),
    Case("pipe", "writev", "enter"),
)


@pytest.mark.parametrize("way", extras.WAYS)
def test_each_message_once(way, tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(extras, "WAYS", {way: extras.WAYS[way]})
    chosen = extras.choose()
    offered = way != "tracepoints" or kernel >= (6, 3)
    assert chosen.name == (way if offered else ""), chosen.told()
    cases: tuple[Case, ...] = CASES if way == "fexit" else SOME
    connects = CONNECTS if way == "fexit" else CONNECTS[:1]
    if way == "kprobes" and kernel < (6, 1):
        # the guest has one CPU, so that one return is waited for: that of a target at its gate
        cases = tuple(case for case in cases if case.kind != "pipe")
    found, notes, lost = rings.record(tmp_path, cases + connects)
    assert lost == 0
    assert notes == [chosen.told()]
    for case, seen in zip(cases, found[: len(cases)], strict=True):
        rings.check(case, seen, chosen.name, kernel)
    for case, seen in zip(connects, found[len(cases) :], strict=True):
        rings.check_connects(case, seen, chosen.name)


@pytest.fixture
def capabilities_count():
    """Debian's kernels let only CAP_SYS_ADMIN have perf events, unless they are told to be as others."""
    before = PARANOID.read_text()
    PARANOID.write_text("2")
    yield
    PARANOID.write_text(before)


@pytest.mark.usefixtures("capabilities_count")
@pytest.mark.parametrize(("way", "ring"), [("", "early"), ("", "late"), ("kprobes", "late")])
def test_with_four_capabilities(way, ring, tmp_path):
    """Root is not needed; and two of these four have been given up when a ring is made late."""
    case = Case("tcp", "send", "enter", ring)
    session = rings.attach_unprivileged(tmp_path, case, way)
    no_losses(session)
    # others tell of uprobes, which need CAP_SYS_ADMIN on older kernels
    notes = session.recording.meta.notes
    [note] = [note for note in notes if note.startswith("messages through io_uring")]
    rows = session.table("messages").filter(tgid=session.target, kind="tcp")
    by_ring = rows["fd"].null_count()
    assert len(rows) == by_ring + 4
    if way == "kprobes":
        assert note.startswith(f"{extras.NOT_SEEN}: kprobes need CAP_PERFMON to be attached")
        assert by_ring == 0
    else:
        assert note == "messages through io_uring: seen by fexit"
        assert by_ring == 2 * rings.ROUNDS


def test_what_kprobes_miss_is_lost(tmp_path, monkeypatch, kernel):
    if kernel >= (6, 1):
        pytest.skip("optional: kprobes miss nothing here before more calls wait than targets do")
    monkeypatch.setattr(extras, "WAYS", {"kprobes": extras.WAYS["kprobes"]})
    [seen, _], _, lost = rings.record(tmp_path, (SOME[-1], SOME[-1]))
    ring = seen.rows["fd"] == RecordLimits.NO_DESCRIPTOR
    receive = seen.rows["flags"] & RecordFlags.FLAG_RECEIVE != 0
    assert 0 < rings.ROUNDS - (ring & receive).sum() <= lost


def test_the_cheapest_is_chosen(tmp_path, kernel):
    way = extras.choose()
    assert way.told() == "messages through io_uring: seen by fexit"
    case = Case("unix", "sendmsg", "async", "late")
    [seen], notes, lost = rings.record(tmp_path, (case,))
    assert lost == 0
    assert notes == [way.told()]
    rings.check(case, seen, way.name, kernel)
