"""Spans as OpenTelemetry's protocol (OTLP) has them: protobuf, and its JSON form.

Format: https://opentelemetry.io/docs/specs/otlp/. Spans of one process share a resource; command
lines of processes stay out, since they may hold secrets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

import polars as pl
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span, Status

from scope_ebpf.analysis.export.attributes import attribute_columns, peer_addresses
from scope_ebpf.analysis.export.selection import Selection, Traced
from scope_ebpf.recording.meta import Meta
from scope_ebpf.version import __version__

BATCH: Final = 2000
"""Spans per message at most."""

Value = str | int | bool
Row = dict[str, Any]

SCOPE: Final = "scope-ebpf"
_KINDS: Final = {
    "server": Span.SPAN_KIND_SERVER,
    "client": Span.SPAN_KIND_CLIENT,
    "consumer": Span.SPAN_KIND_CONSUMER,
    "fault": Span.SPAN_KIND_INTERNAL,
}
_quoted: Final = json.JSONEncoder(ensure_ascii=False).encode
_ERROR: Final = Status.STATUS_CODE_ERROR
# What a row of a batch has that is no attribute.
_FIELDS: Final = ["span_id", "trace", "parent", "kind", "service", "tgid", "links"]


def protobuf_messages(
    recording: Traced, selection: Selection, *, batch: int = BATCH
) -> Iterator[tuple[bytes, int]]:
    """Serialised `ExportTraceServiceRequest` messages of at most `batch` spans each, and how many.

    Written one after the other they are, by the rules of protobuf, one single message, and it reads
    as `TracesData` as well.
    """
    identity = _Identity(recording.meta)
    for rows in _batches(recording, selection, batch):
        message = ExportTraceServiceRequest()
        resources: dict[tuple[str | None, int], ResourceSpans] = {}
        for row in rows:
            key = (row["service"], row["tgid"])
            resource = resources.get(key)
            if resource is None:
                resource = resources[key] = message.resource_spans.add()
                _set_attributes(resource.resource.attributes, _resource(recording.meta, *key))
                scope = resource.scope_spans.add().scope
                scope.name, scope.version = SCOPE, __version__
            span = resource.scope_spans[0].spans.add(
                trace_id=identity.trace(row["trace"]),
                span_id=row["span_id"].to_bytes(8, "big"),
                name=row["name"],
                kind=_KINDS[row["kind"]],
                start_time_unix_nano=row["start"],
                end_time_unix_nano=row["end"],
            )
            if row["parent"] is not None:
                span.parent_span_id = row["parent"].to_bytes(8, "big")
            if row["failure"] is not None:
                span.status.code, span.status.message = _ERROR, row["failure"]
            _set_attributes(span.attributes, _attributes(row))
            for link in row["links"] or ():
                added = span.links.add(
                    trace_id=identity.trace(link["cause_trace"]),
                    span_id=link["cause_id"].to_bytes(8, "big"),
                )
                _set_attributes(added.attributes, _link_attributes(link))
        yield message.SerializeToString(), len(rows)


def json_lines(
    recording: Traced, selection: Selection, *, batch: int = BATCH
) -> Iterator[tuple[bytes, int]]:
    r"""Lines of OTLP/JSON with at most `batch` spans each, each ended by \n, and how many.

    The protocol's own JSON form, which is not protobuf's: ids are lowercase hexadecimal, enums
    numbers, 64-bit integers strings. The collector's `otlpjsonfile` receiver reads such files.
    """
    # Joined from text: a tree of dicts, which json would then walk, takes several times as long.
    identity = _Identity(recording.meta)
    scope = f'{{"name":{_quoted(SCOPE)},"version":{_quoted(__version__)}}}'
    for rows in _batches(recording, selection, batch):
        resources: dict[tuple[str | None, int], list[str]] = {}
        for row in rows:
            resources.setdefault((row["service"], row["tgid"]), []).append(_json(row, identity))
        texts = [
            f'{{"resource":{{"attributes":{_json_attributes(_resource(recording.meta, *key))}}},'
            f'"scopeSpans":[{{"scope":{scope},"spans":[{",".join(spans)}]}}]}}'
            for key, spans in resources.items()
        ]
        yield f'{{"resourceSpans":[{",".join(texts)}]}}\n'.encode(), len(rows)


def _json(row: Row, identity: _Identity) -> str:
    parent, status, links = "", "{}", ""
    if row["parent"] is not None:
        parent = f'"parentSpanId":"{row["parent"]:016x}",'
    if row["failure"] is not None:
        status = f'{{"code":{_ERROR},"message":{_quoted(row["failure"])}}}'
    if row["links"]:
        texts = [
            f'{{"traceId":"{identity.trace(link["cause_trace"]).hex()}",'
            f'"spanId":"{link["cause_id"]:016x}",'
            f'"attributes":{_json_attributes(_link_attributes(link))}}}'
            for link in row["links"]
        ]
        links = f',"links":[{",".join(texts)}]'
    return (
        f'{{"traceId":"{identity.trace(row["trace"]).hex()}","spanId":"{row["span_id"]:016x}",'
        f'{parent}"name":{_quoted(row["name"])},"kind":{_KINDS[row["kind"]]},'
        f'"startTimeUnixNano":"{row["start"]}","endTimeUnixNano":"{row["end"]}",'
        f'"attributes":{_json_attributes(_attributes(row))},"status":{status}{links}}}'
    )


class _Identity:
    """Makes trace ids that are the same at each export, and differ from those of other recordings.

    Span ids are unique in a recording only, so the boot and the recording's start go in as well.
    """

    def __init__(self, meta: Meta) -> None:
        self._salt = f"{meta.host.boot_id} {meta.started_ns} ".encode()
        self._latest: dict[int, bytes] = {}

    def trace(self, root: int) -> bytes:
        """16 bytes."""
        known = self._latest.get(root)
        if known is None:
            if len(self._latest) > 10 * BATCH:
                self._latest.clear()
            text = self._salt + root.to_bytes(8, "big")
            known = self._latest[root] = hashlib.blake2b(text, digest_size=16).digest()
        return known


def _batches(recording: Traced, selection: Selection, size: int) -> Iterator[list[Row]]:
    """Spans as dicts: what a span has itself, and its attributes under their own names."""
    links = selection.links.group_by("effect_id", maintain_order=True).agg(
        pl.struct(
            "cause_id", "cause_trace", pl.col("edge", "evidence").cast(pl.String), "reason"
        ).alias("links")
    )
    ends = recording.collect(
        recording.connections.select(
            "connection",
            pl.col("kind").alias("transport"),
            pl.coalesce("remote_address", "remote_path").alias("remote"),
            pl.col("remote_port").cast(pl.Int64),
        ).unique("connection", keep="last")
    )
    peers = peer_addresses(selection.spans["peer"])
    offset_ns = recording.meta.clock.realtime_offset_ns
    for spans in selection.spans.iter_slices(size):
        frame = spans.lazy()
        for other, left, right in [
            (links, "span_id", "effect_id"),
            (ends, "connection", "connection"),
            (peers, "peer", "peer"),
        ]:
            frame = frame.join(
                other.lazy(), left_on=left, right_on=right, how="left", maintain_order="left"
            )
        frame = frame.with_columns(pl.col("kind", "edge", "evidence", "state").cast(pl.String))
        described = frame.select(
            *_FIELDS,
            pl.coalesce("operation", "protocol", "kind").alias("name"),
            (pl.col("start_ns") + offset_ns).clip(lower_bound=0).alias("start"),
            (pl.col("end_ns") + offset_ns).clip(lower_bound=0).alias("end"),
            pl.col("error").alias("failure"),
            *attribute_columns(),
        )
        yield recording.collect(described).to_dicts()


def _attributes(row: Row) -> Iterator[tuple[str, Value]]:
    for key, value in row.items():
        if value is not None and "." in key:  # no field's name has a dot, and every attribute's
            yield key, value


def _link_attributes(link: Row) -> Iterator[tuple[str, Value]]:
    for name in ("edge", "evidence", "reason"):
        if link[name] is not None:
            yield f"scope.{name}", link[name]


def _resource(meta: Meta, service: str | None, tgid: int) -> Iterator[tuple[str, Value]]:
    yield "service.name", service or "unknown_service"  # the name that the conventions demand
    yield "process.pid", tgid
    yield "host.name", meta.host.name
    yield "telemetry.sdk.name", SCOPE
    yield "telemetry.sdk.version", __version__


def _set_attributes(
    attributes: RepeatedCompositeFieldContainer[KeyValue], values: Iterable[tuple[str, Value]]
) -> None:
    for key, value in values:
        attribute = attributes.add()
        attribute.key = key
        if isinstance(value, str):
            attribute.value.string_value = value
        elif isinstance(value, bool):  # which is an int, too
            attribute.value.bool_value = value
        else:
            attribute.value.int_value = value


def _json_attributes(values: Iterable[tuple[str, Value]]) -> str:
    texts = []
    for key, value in values:
        if isinstance(value, str):
            typed = f'"stringValue":{_quoted(value)}'
        elif isinstance(value, bool):
            typed = f'"boolValue":{"true" if value else "false"}'
        else:
            typed = f'"intValue":"{value}"'
        texts.append(f'{{"key":"{key}","value":{{{typed}}}}}')
    return f"[{','.join(texts)}]"
