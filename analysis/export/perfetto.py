"""Spans and off-CPU intervals as a Perfetto trace, for https://ui.perfetto.dev.

Each process is a group with a track per thread. Spans are slices on the track of their thread; what
overlaps there without being caller and callee, as in event loops, goes to tracks named
`concurrent`. Off-CPU intervals have a track `off-CPU` under their thread. Arrows lead from a span to
those that it caused in other threads; a cause that is only guessed gets none.

Format: https://perfetto.dev/docs/reference/synthetic-track-event. Repeated strings are interned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import (
    BuiltinClock,
    TracePacket,
    TrackEvent,
)

from scope_ebpf.analysis.export.lanes import Lanes
from scope_ebpf.analysis.export.selection import Selection, Traced
from scope_ebpf.analysis.schema import span_text

Row = dict[str, Any]

_CHUNK_ROWS: Final = 10_000
_SEQUENCE: Final = 1  # any number: all packets are of one writer
_CLEARED: Final = TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
_INTERNED: Final = TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
_MONOTONIC: Final = BuiltinClock.BUILTIN_CLOCK_MONOTONIC
_BEGIN: Final = TrackEvent.TYPE_SLICE_BEGIN
_END: Final = TrackEvent.TYPE_SLICE_END
# What a slice of a span tells besides its name, in this order.
_SHOWN: Final = [
    "kind", "protocol", "operation", "detail", "status", "error", "peer", "edge", "evidence",
    "state",
]  # fmt: skip
_STATES: Final = {
    "R": "preempted",
    "S": "sleeping",
    "D": "uninterruptible",
    "I": "idle",
    "T": "stopped",
    "t": "traced",
    "X": "ended",
    "Z": "ended",
    "P": "parked",
}


def perfetto_chunks(
    recording: Traced, selection: Selection, *, offcpu: bool = True
) -> Iterator[tuple[bytes, int]]:
    """Serialised packets, and how many spans they hold; one after the other they are a `Trace`.

    `offcpu`: with the off-CPU intervals of the threads that have spans, from the first of these
    spans to the last one.
    """
    trace = _Writer(recording, selection.spans)
    trace.begin()
    yield trace.taken(), 0
    spans = _with_flows(selection.spans).sort(
        "start_ns", pl.col("end_ns"), "span_id", descending=[False, True, False]
    )
    for rows in spans.iter_slices(_CHUNK_ROWS):
        for row in rows.iter_rows(named=True):
            trace.span(row)
        yield trace.taken(), rows.height
    trace.finish_spans()
    if offcpu and spans.height:
        for rows in recording.collect(_offcpu(recording, spans)).iter_slices(_CHUNK_ROWS):
            for interval in rows.iter_rows():
                trace.interval(*interval)
            yield trace.taken(), 0
    yield trace.taken(), 0


def _with_flows(spans: pl.DataFrame) -> pl.DataFrame:
    """Adds `flows`: an arrow has the span_id of its effect, and is on its cause and its effect."""
    threads = spans.select("span_id", "tgid", "tid")
    arrows = (
        spans.select(pl.col("span_id").alias("flow"), "parent", "tgid", "tid")
        .join(threads, left_on="parent", right_on="span_id", suffix="_cause")
        .filter((pl.col("tgid") != pl.col("tgid_cause")) | (pl.col("tid") != pl.col("tid_cause")))
    )
    ends = pl.concat(
        [
            arrows.select(pl.col("parent").alias("span_id"), "flow"),
            arrows.select(pl.col("flow").alias("span_id"), "flow"),
        ]
    )
    flows = ends.sort("span_id", "flow").group_by("span_id").agg(pl.col("flow").alias("flows"))
    texts = pl.col("kind", "edge", "evidence", "state").cast(pl.String)
    return spans.join(flows, on="span_id", how="left").with_columns(texts)


def _offcpu(recording: Traced, spans: pl.DataFrame) -> pl.LazyFrame:
    """Intervals by thread and start; none reaches into the next one of its thread."""
    threads = spans.lazy().select("tgid", "tid").unique()
    first, last = spans["start_ns"].min(), spans["end_ns"].max()
    word = pl.col("state").cast(pl.String).replace_strict(_STATES, default="off-CPU")
    following = pl.col("start_ns").shift(-1).over("tgid", "tid")
    end = pl.min_horizontal(pl.col("start_ns") + pl.col("duration_ns"), following)
    return (
        recording.offcpu.join(threads, on=["tgid", "tid"], how="semi")
        .filter(
            pl.col("start_ns") + pl.col("duration_ns") >= first,
            pl.col("start_ns") <= last,
        )
        .sort("tgid", "tid", "start_ns")
        .select(
            "tgid",
            "tid",
            "start_ns",
            pl.max_horizontal(end, "start_ns").alias("end_ns"),
            pl.when(pl.col("name").is_null())
            .then(word)
            .otherwise(pl.format("{} in {}", word, pl.col("name")))
            .alias("why"),
            "runnable_ns",
            "waker_tgid",
            "waker_tid",
            "waker_name",
        )
    )


class _Writer:
    """Packets of one trace; each thread's tracks are described before their first slice."""

    def __init__(self, recording: Traced, spans: pl.DataFrame) -> None:
        self._meta = recording.meta
        self._comms = _comms(recording)
        named = spans.drop_nulls("service").unique("tgid", keep="last", maintain_order=True)
        self._services = dict(named.select("tgid", "service").iter_rows())
        self._data: list[bytes] = []
        self._tracks: dict[tuple[object, ...], int] = {}
        self._names: dict[str, int] = {}  # ids of interned strings
        self._keys: dict[str, int] = {}
        self._lanes: dict[tuple[int, int], Lanes] = {}

    def taken(self) -> bytes:
        """What was written since the last time."""
        data = b"".join(self._data)
        self._data.clear()
        return data

    def begin(self) -> None:
        """The first packet: what the clocks showed when the recording began."""
        clock, now_ns = self._meta.clock, self._meta.started_ns
        packet = TracePacket(
            trusted_packet_sequence_id=_SEQUENCE,
            sequence_flags=_CLEARED | _INTERNED,
            first_packet_on_sequence=True,
        )
        packet.trace_packet_defaults.timestamp_clock_id = _MONOTONIC
        snapshot = packet.clock_snapshot
        snapshot.primary_trace_clock = _MONOTONIC
        for number, time_ns in [
            (_MONOTONIC, now_ns),
            (BuiltinClock.BUILTIN_CLOCK_BOOTTIME, now_ns + clock.boottime_offset_ns),
            (BuiltinClock.BUILTIN_CLOCK_REALTIME, now_ns + clock.realtime_offset_ns),
        ]:
            snapshot.clocks.add(clock_id=number, timestamp=max(time_ns, 0))
        self._write(packet)

    def span(self, row: Row) -> None:
        """A span; they come by their start."""
        thread = (row["tgid"], row["tid"])
        lanes = self._lanes.get(thread)
        if lanes is None:
            lanes = self._lanes[thread] = Lanes()
        start_ns, end_ns = max(row["start_ns"], 0), max(row["end_ns"], 0)
        lane, ended = lanes.place(row["span_id"], row["parent"], start_ns, end_ns)
        for other, moment_ns in ended:
            self._end(self._lane_track(*thread, other), moment_ns)
        packet = self._begin(
            self._lane_track(*thread, lane),
            start_ns,
            row["operation"] or row["protocol"] or row["kind"],
            "span",
        )
        if row["flows"]:
            packet.track_event.flow_ids.extend(row["flows"])
        self._note(packet, "span", span_text(row["span_id"]))
        self._note(packet, "request", span_text(row["request_id"]))
        for key in _SHOWN:
            if row[key] is not None:
                self._note(packet, key, row[key])
        if row["miss"]:
            self._note(packet, "cache miss", "yes")
        self._write(packet)

    def finish_spans(self) -> None:
        """Ends all spans that are open."""
        for thread, lanes in self._lanes.items():
            for lane, moment_ns in lanes.finish():
                self._end(self._lane_track(*thread, lane), moment_ns)

    def interval(
        self,
        tgid: int,
        tid: int,
        start_ns: int,
        end_ns: int,
        why: str,
        runnable_ns: int | None,
        waker_tgid: int | None,
        waker_tid: int | None,
        waker_name: str | None,
    ) -> None:
        """An off-CPU interval."""
        track = self._offcpu_track(tgid, tid)
        packet = self._begin(track, max(start_ns, 0), why, "off-CPU")
        if runnable_ns:
            self._note(packet, "runnable_ns", runnable_ns)
        if waker_tid is not None:
            self._note(packet, "waker tid", waker_tid)
            self._note(packet, "waker", self._process_name(waker_tgid))
            if waker_name is not None:
                self._note(packet, "waker in", waker_name)
        self._write(packet)
        self._end(track, max(end_ns, 0))

    def _begin(self, track: int, time_ns: int, name: str, category: str) -> TracePacket:
        packet = _packet(track, time_ns, _BEGIN)
        event = packet.track_event
        event.categories.append(category)
        number = self._names.get(name)
        if number is None:
            number = self._names[name] = len(self._names) + 1
            packet.interned_data.event_names.add(iid=number, name=name)
        event.name_iid = number
        return packet

    def _end(self, track: int, time_ns: int) -> None:
        self._write(_packet(track, time_ns, _END))

    def _note(self, packet: TracePacket, key: str, value: str | int) -> None:
        number = self._keys.get(key)
        if number is None:
            number = self._keys[key] = len(self._keys) + 1
            packet.interned_data.debug_annotation_names.add(iid=number, name=key)
        note = packet.track_event.debug_annotations.add()
        note.name_iid = number
        if isinstance(value, str):
            note.string_value = value
        else:
            note.int_value = value

    def _process_track(self, tgid: int) -> int:
        number = self._tracks.get((tgid,))
        if number is None:
            number, packet = self._describe(tgid)
            process = packet.track_descriptor.process
            process.pid, process.process_name = tgid, self._process_name(tgid)
            self._write(packet)
        return number

    def _thread_track(self, tgid: int, tid: int) -> int:
        number = self._tracks.get((tgid, tid))
        if number is None:
            parent = self._process_track(tgid)
            number, packet = self._describe(tgid, tid)
            packet.track_descriptor.parent_uuid = parent
            thread = packet.track_descriptor.thread
            thread.pid, thread.tid = tgid, tid
            name = self._comms.get((tgid, tid)) or self._comms.get((tgid, tgid))
            thread.thread_name = name or self._process_name(tgid)
            self._write(packet)
        return number

    def _lane_track(self, tgid: int, tid: int, lane: int) -> int:
        if lane == 0:
            return self._thread_track(tgid, tid)
        # Under the process: under a thread, the viewer would mix it up with the thread's own.
        return self._named_track(self._process_track(tgid), f"concurrent, thread {tid}", lane)

    def _offcpu_track(self, tgid: int, tid: int) -> int:
        return self._named_track(self._thread_track(tgid, tid), "off-CPU")

    def _named_track(self, parent: int, name: str, lane: int = 0) -> int:
        key = (parent, name, lane)
        number = self._tracks.get(key)
        if number is None:
            number, packet = self._describe(*key)
            packet.track_descriptor.parent_uuid = parent
            packet.track_descriptor.name = name
            self._write(packet)
        return number

    def _describe(self, *key: object) -> tuple[int, TracePacket]:
        number = self._tracks[key] = len(self._tracks) + 1
        packet = TracePacket(trusted_packet_sequence_id=_SEQUENCE, sequence_flags=_INTERNED)
        packet.track_descriptor.uuid = number
        return number, packet

    def _process_name(self, tgid: int | None) -> str:
        if tgid is None:
            return "unknown"
        return self._services.get(tgid) or self._comms.get((tgid, tgid)) or f"process {tgid}"

    def _write(self, packet: TracePacket) -> None:
        data = packet.SerializeToString()
        self._data += (b"\x0a", _varint(len(data)), data)  # field 1 of Trace: packet


def _packet(track: int, time_ns: int, kind: TrackEvent.Type) -> TracePacket:
    packet = TracePacket(
        trusted_packet_sequence_id=_SEQUENCE, sequence_flags=_INTERNED, timestamp=time_ns
    )
    event = packet.track_event
    event.type = kind
    event.track_uuid = track
    return packet


def _varint(number: int) -> bytes:
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def _comms(recording: Traced) -> dict[tuple[int, int], str]:
    """The last name of each thread."""
    frame = recording.collect(
        recording.processes.filter(pl.col("comm").is_not_null() & (pl.col("comm") != ""))
        .sort("time_ns", maintain_order=True)
        .unique(["tgid", "tid"], keep="last", maintain_order=True)
        .select("tgid", "tid", "comm")
    )
    comms = {(tgid, tid): comm for tgid, tid, comm in frame.iter_rows()}
    targets = {(target.tgid, target.tgid): target.comm for target in recording.meta.targets}
    return targets | comms
