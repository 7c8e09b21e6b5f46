"""Perfetto traces, parsed with Perfetto's own protobuf schema."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TracePacket, TrackEvent

from scope_ebpf.analysis.export.lanes import Lanes
from scope_ebpf.analysis.export.perfetto import perfetto_chunks
from scope_ebpf.analysis.export.selection import select_spans
from tests.pure.recordings import META, at
from tests.pure.traced import SPAN_ROWS, Traced, make_traced

pytestmark = pytest.mark.pure
MONOTONIC = 3
LAST = 0xFFFFFFFFFFFFFFFF
PROCESSES = [
    {"time_ns": at(0), "event": 0, "tgid": 100, "tid": 100, "comm": "nginx"},
    {"time_ns": at(0), "event": 0, "tgid": 200, "tid": 200, "comm": "gunicorn"},
    {"time_ns": at(9), "event": 3, "tgid": 200, "tid": 200, "comm": "gunicorn: w1"},
]
OFFCPU = [
    {"start_ns": at(5_000), "duration_ns": 800, "runnable_ns": 300, "tgid": 200, "tid": 200,
     "state": 1, "number": 45, "waker_tgid": 100, "waker_tid": 100, "waker_number": 44},
    {"start_ns": at(7_000), "duration_ns": 50, "tgid": 200, "tid": 200, "state": 0},
    # reaches into the next one: its end was not seen in time
    {"start_ns": at(6_000), "duration_ns": 5_000, "tgid": 200, "tid": 200, "state": 2},
    # no span is on this thread, or at this time
    {"start_ns": at(5_000), "duration_ns": 800, "tgid": 200, "tid": 201, "state": 1},
    {"start_ns": at(9_000_000), "duration_ns": 800, "tgid": 200, "tid": 200, "state": 1},
]  # fmt: skip


@dataclass
class Slice:
    name: str
    track: int
    start_ns: int
    notes: dict[str, Any]
    category: str
    flows: list[int]
    end_ns: int = -1
    inside: Slice | None = None


@dataclass
class Parsed:
    """A trace, read as trace_processor reads it; every rule of the format is asserted."""

    tracks: dict[int, Any] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    first: TracePacket | None = None

    def span(self, span_id: int) -> Slice:
        (found,) = (each for each in self.slices if each.notes.get("span") == f"{span_id:016x}")
        return found

    def named(self, track: int) -> str:
        """The track's name, after those of the tracks that it is under."""
        one = self.tracks[track]
        if one.HasField("process"):
            return f"{one.process.process_name} {one.process.pid}"
        name = f"{one.thread.thread_name} {one.thread.tid}" if one.HasField("thread") else one.name
        return f"{self.named(one.parent_uuid)}/{name}"


def parse(data: bytes) -> Parsed:
    parsed, names, keys = Parsed(), dict[int, str](), dict[int, str]()
    stacks: dict[int, list[Slice]] = defaultdict(list)
    latest: dict[int, int] = {}
    packets = list(Trace.FromString(data).packet)
    parsed.first = packets[0]
    for packet in packets:
        assert packet.trusted_packet_sequence_id == 1
        assert packet.sequence_flags & TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        if packet.HasField("track_descriptor"):
            uuid = packet.track_descriptor.uuid
            assert uuid and uuid not in parsed.tracks
            parent = packet.track_descriptor.parent_uuid
            assert not parent or parent in parsed.tracks
            parsed.tracks[uuid] = packet.track_descriptor
        for each in packet.interned_data.event_names:
            assert each.iid and each.iid not in names
            names[each.iid] = each.name
        for each in packet.interned_data.debug_annotation_names:
            assert each.iid and each.iid not in keys
            keys[each.iid] = each.name
        if not packet.HasField("track_event"):
            continue
        event, time_ns = packet.track_event, packet.timestamp
        track = event.track_uuid
        assert track in parsed.tracks
        assert time_ns >= latest.get(track, 0)
        latest[track] = time_ns
        if event.type == TrackEvent.TYPE_SLICE_END:
            stacks[track].pop().end_ns = time_ns
            continue
        assert event.type == TrackEvent.TYPE_SLICE_BEGIN
        notes = {keys[note.name_iid]: getattr(note, note.WhichOneof("value"))
                 for note in event.debug_annotations}  # fmt: skip
        inside = stacks[track][-1] if stacks[track] else None
        (category,) = event.categories
        begun = Slice(names[event.name_iid], track, time_ns, notes, category,
                      list(event.flow_ids), inside=inside)  # fmt: skip
        stacks[track].append(begun)
        parsed.slices.append(begun)
    assert not any(stacks.values())
    ends: dict[int, int] = defaultdict(int)
    for each in parsed.slices:
        for flow in each.flows:
            ends[flow] += 1
    assert set(ends.values()) <= {2}
    return parsed


def exported(traced: Traced, request: str | None = None, *, offcpu: bool = True) -> Parsed:
    selection = select_spans(traced, request)
    chunks = list(perfetto_chunks(traced, selection, offcpu=offcpu))
    assert sum(spans for _, spans in chunks) == selection.spans.height
    return parse(b"".join(data for data, _ in chunks))


@pytest.fixture
def traced(tmp_path) -> Traced:
    return make_traced(tmp_path / "shop.scope", processes=PROCESSES, offcpu=OFFCPU)


def test_each_span_is_a_slice_of_its_time_and_thread(traced):
    parsed = exported(traced, offcpu=False)
    assert len(parsed.slices) == len(SPAN_ROWS)
    for row in SPAN_ROWS:
        found = parsed.span(row["span_id"])
        assert found.start_ns == row["start_ns"]
        assert found.end_ns == row["start_ns"] + row["duration_ns"]
        assert found.category == "span"
        assert f"{row['service']} {row['tgid']}/" in parsed.named(found.track)
    assert parsed.named(parsed.span(0xA1).track) == "nginx 100/nginx 100"
    assert parsed.named(parsed.span(0xA3).track) == "web 200/gunicorn: w1 200"  # its last name
    assert parsed.named(parsed.span(0xA6).track) == "worker 300/worker 300"  # its name was lost


def test_callees_are_inside_their_callers_on_one_thread(traced):
    parsed = exported(traced, offcpu=False)
    assert parsed.span(0xA2).inside is parsed.span(0xA1)
    assert parsed.span(0xA4).inside is parsed.span(0xA5).inside is parsed.span(0xA3)
    assert parsed.span(0xA3).inside is None


def test_what_overlaps_or_is_only_guessed_has_a_track_of_its_own(traced):
    parsed = exported(traced, offcpu=False)
    other = parsed.span(LAST)
    assert other.inside is None
    assert parsed.named(other.track) == "web 200/concurrent, thread 200"
    guessed = parsed.span(0xA7)  # during the job, but not proven to be a part of it
    assert guessed.inside is None
    assert parsed.named(guessed.track) == "worker 300/concurrent, thread 300"
    assert parsed.span(0xA8).inside is guessed


def test_arrows_lead_to_other_threads_and_never_from_a_guess(traced):
    parsed = exported(traced, offcpu=False)
    arrows = {flow: [each.notes["span"] for each in parsed.slices if flow in each.flows]
              for each in parsed.slices for flow in each.flows}  # fmt: skip
    assert arrows == {
        0xA3: [f"{0xA2:016x}", f"{0xA3:016x}"],
        0xA6: [f"{0xA3:016x}", f"{0xA6:016x}"],
    }


def test_a_slice_tells_what_is_known_of_its_span(traced):
    parsed = exported(traced, offcpu=False)
    assert parsed.span(0xA5).notes == {
        "span": "00000000000000a5",
        "request": "00000000000000a1",
        "kind": "client",
        "protocol": "redis",
        "operation": "GET user:?",
        "detail": "GET user:17",
        "status": "nil",
        "peer": "redis",
        "edge": "calls",
        "evidence": "derived",
        "state": "complete",
        "cache miss": "yes",
    }
    assert parsed.span(0xA5).name == "GET user:?"
    assert parsed.span(0xA7).notes["evidence"] == "guess"
    assert parsed.span(0xA6).notes["error"] == "connection refused"
    assert parsed.span(0xA8).name == "client"


def test_offcpu_intervals_are_on_a_track_under_their_thread(traced):
    parsed = exported(traced)
    found = [each for each in parsed.slices if each.category == "off-CPU"]
    assert {parsed.named(each.track) for each in found} == {"web 200/gunicorn: w1 200/off-CPU"}
    assert [(each.name, each.start_ns, each.end_ns) for each in found] == [
        ("sleeping in recvfrom", at(5_000), at(5_800)),
        ("uninterruptible", at(6_000), at(7_000)),  # cut where the next one begins
        ("preempted", at(7_000), at(7_050)),
    ]
    assert found[0].notes == {
        "runnable_ns": 300,
        "waker tid": 100,
        "waker": "nginx",
        "waker in": "sendto",
    }
    spans = [each for each in parsed.slices if each.category == "span"]
    assert len(spans) == len(SPAN_ROWS)


def test_clocks_are_monotonic_and_tied_to_the_others(traced):
    first = exported(traced).first
    assert first is not None
    assert first.sequence_flags & TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
    assert first.trace_packet_defaults.timestamp_clock_id == MONOTONIC
    assert first.clock_snapshot.primary_trace_clock == MONOTONIC
    clocks = {each.clock_id: each.timestamp for each in first.clock_snapshot.clocks}
    now_ns = META.started_ns
    assert clocks == {
        MONOTONIC: now_ns,
        6: now_ns + META.clock.boottime_offset_ns,
        1: now_ns + META.clock.realtime_offset_ns,
    }


def test_one_request_and_no_spans(traced, tmp_path):
    one = exported(traced, "ff")
    assert [each.name for each in one.slices if each.category == "span"] == ["BREW /pot"]
    assert not [each for each in one.slices if each.category == "off-CPU"]  # none at its time
    nothing = exported(make_traced(tmp_path / "none.scope", [], [], offcpu=OFFCPU))
    assert not nothing.slices and not nothing.tracks


intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 10), st.integers(0, 8), st.integers(1, 2)),
    max_size=30,
)


def any_rows(drawn: Sequence[tuple[int, int, int, int]]) -> list[dict[str, Any]]:
    return [
        {
            "span_id": number,
            # perhaps a parent, of any time and thread
            "parent_id": number - back if back and number > back else None,
            "kind": "server",
            "tgid": 7,
            "tid": tid,
            "start_ns": at(start),
            "duration_ns": length,
        }
        for number, (start, length, back, tid) in enumerate(drawn, start=1)
    ]


@given(intervals)
def test_slices_of_any_spans_nest(tmp_path_factory, drawn):
    rows = any_rows(drawn)
    traced = make_traced(tmp_path_factory.mktemp("any") / "a.scope", rows, [])
    parsed = exported(traced, offcpu=False)
    for row in rows:
        found = parsed.span(row["span_id"])
        assert (found.start_ns, found.end_ns) == (
            row["start_ns"],
            row["start_ns"] + row["duration_ns"],
        )
        if found.inside is not None:
            assert found.inside.notes["span"] == f"{row['parent_id']:016x}"
            assert found.inside.start_ns <= found.start_ns
            assert found.inside.end_ns >= found.end_ns
    assert len(parsed.slices) == len(rows)


def test_a_lane_is_used_again():
    lanes = Lanes()
    assert [lanes.place(n, None, n, n + 2)[0] for n in range(1, 7)] == [0, 1, 0, 1, 0, 1]
