"""OTLP: spans, links and attributes, in protobuf and in JSON."""

from __future__ import annotations

import base64
import json
from typing import Any

import polars as pl
import pytest
from google.protobuf.json_format import Parse
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status, TracesData

from scope_ebpf.analysis.export import otlp
from scope_ebpf.analysis.export.attributes import peer_addresses
from scope_ebpf.analysis.export.selection import select_spans
from scope_ebpf.errors import UsageError
from tests.pure.recordings import META, STARTED_NS, at
from tests.pure.traced import SPAN_ROWS, TREE, Traced, make_traced

pytestmark = pytest.mark.pure
LAST = 0xFFFFFFFFFFFFFFFF


@pytest.fixture
def traced(tmp_path) -> Traced:
    return make_traced(tmp_path / "shop.scope")


def exported(traced: Traced, request: str | None = None, batch: int = 2000) -> TracesData:
    chunks = otlp.protobuf_messages(traced, select_spans(traced, request), batch=batch)
    joined = TracesData()
    joined.ParseFromString(b"".join(data for data, _ in chunks))
    return joined


def by_id(data: Any) -> dict[int, Span]:
    spans = [
        span
        for resource in data.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    ids = {int.from_bytes(span.span_id, "big"): span for span in spans}
    assert len(ids) == len(spans)
    return ids


def attributes(owner: Any) -> dict[str, Any]:
    found = {each.key: getattr(each.value, each.value.WhichOneof("value"))
             for each in owner.attributes}  # fmt: skip
    assert len(found) == len(owner.attributes)
    return found


def test_each_span_is_there_once_with_its_parent_and_wall_clock_times(traced):
    spans = by_id(exported(traced))
    assert set(spans) == {row["span_id"] for row in SPAN_ROWS}
    assert all(len(span.trace_id) == 16 and len(span.span_id) == 8 for span in spans.values())
    parents = {key: int.from_bytes(span.parent_span_id, "big") for key, span in spans.items()}
    assert parents == {
        0xA1: 0, 0xA2: 0xA1, 0xA3: 0xA2, 0xA4: 0xA3, 0xA5: 0xA3, 0xA6: 0xA3, 0xA7: 0, 0xA8: 0xA7,
        LAST: 0,
    }  # fmt: skip
    offset_ns = META.clock.realtime_offset_ns
    assert spans[0xA4].start_time_unix_nano == at(4_000) + offset_ns
    assert spans[0xA4].end_time_unix_nano == at(14_000) + offset_ns
    assert spans[0xA4].name == "SELECT name FROM users WHERE id = ?"
    assert spans[0xA8].name == "client"  # nothing better is known of it
    kinds = {key: span.kind for key, span in spans.items()}
    assert kinds[0xA1] == Span.SPAN_KIND_SERVER
    assert kinds[0xA4] == Span.SPAN_KIND_CLIENT
    assert kinds[0xA6] == Span.SPAN_KIND_CONSUMER
    assert kinds[0xA7] == Span.SPAN_KIND_INTERNAL


def test_a_guessed_parent_is_a_link_to_another_trace(traced):
    spans = by_id(exported(traced))
    traces = {key: span.trace_id for key, span in spans.items()}
    assert {key for key in traces if traces[key] == traces[0xA1]} == TREE - {0xA7, 0xA8}
    assert traces[0xA7] == traces[0xA8] != traces[LAST]
    assert not spans[0xA7].parent_span_id
    (link,) = spans[0xA7].links
    assert (link.trace_id, link.span_id) == (traces[0xA6], (0xA6).to_bytes(8, "big"))
    assert attributes(link) == {
        "scope.edge": "caused_by",
        "scope.evidence": "guess",
        "scope.reason": "at the same time",
    }
    assert attributes(spans[0xA7])["scope.evidence"] == "guess"


def test_other_causes_are_links_and_parents_are_not(traced):
    spans = by_id(exported(traced))
    (link,) = spans[0xA4].links  # the cause that is in no span is left out
    assert (link.trace_id, link.span_id) == (spans[LAST].trace_id, b"\xff" * 8)
    assert attributes(link)["scope.edge"] == "woken_by"
    assert not spans[0xA2].links


def test_parents_in_a_circle_and_parents_that_are_missing_end_in_spans_all_the_same(tmp_path):
    row = {"kind": "client", "tgid": 1, "start_ns": at(0), "duration_ns": 1, "request_id": 1}
    rows = [{**row, "span_id": n, "parent_id": n % 3 + 1} for n in (1, 2, 3)]
    rows.append({**row, "span_id": 4, "parent_id": 99})
    frame = make_traced(tmp_path / "a.scope", []).span_frame
    given_frame = pl.DataFrame(
        {name: pl.Series(name, [each.get(name) for each in rows], dtype=dtype)
         for name, dtype in frame.schema.items()}
    )  # fmt: skip
    spans = by_id(exported(make_traced(tmp_path / "b.scope", given_frame, [])))
    assert set(spans) == {1, 2, 3, 4}
    assert not spans[4].parent_span_id


def test_attributes_follow_the_semantic_conventions(traced):
    spans = {key: attributes(span) for key, span in by_id(exported(traced)).items()}
    http = spans[0xA1]
    assert http["http.request.method"] == "GET"
    assert http["url.path"] == "/users/17"
    assert http["url.query"] == "full=1"
    assert http["url.template"] == "/users/{id}"
    assert http["http.response.status_code"] == 200
    assert (http["http.request.size"], http["http.response.size"]) == (120, 2_000)
    assert http["network.peer.address"] == "10.0.0.9"
    assert http["network.transport"] == "tcp"
    assert http["network.protocol.name"] == "http"
    assert http["thread.id"] == 100
    assert "peer.service" not in http
    assert spans[0xA2]["peer.service"] == "web"
    sql = spans[0xA4]
    assert sql["db.system.name"] == "postgresql"
    assert sql["db.operation.name"] == "SELECT"
    assert sql["db.query.summary"] == "SELECT name FROM users WHERE id = ?"
    assert sql["db.query.text"] == "SELECT name FROM users WHERE id = 17"
    assert (sql["server.address"], sql["server.port"]) == ("127.0.0.1", 5432)
    assert not any(key.startswith(("http.", "url.")) for key in sql)
    assert spans[0xA5]["scope.cache_miss"] is True
    assert spans[0xA5]["scope.status"] == "nil"
    job = spans[0xA6]
    assert (job["messaging.system"], job["messaging.operation.type"]) == ("redis", "process")
    assert (job["scope.edge"], job["scope.evidence"]) == ("queued_by", "exact")
    assert spans[0xA8]["scope.state"] == "no_response"
    brewed = spans[LAST]
    assert brewed["http.request.method"] == "_OTHER"
    assert brewed["http.request.method_original"] == "BREW"
    assert brewed["scope.context"] == str(2**63 + 5)


def test_errors_are_status_and_error_type(traced):
    spans = by_id(exported(traced))
    failed = {key for key, span in spans.items() if span.status.code == Status.STATUS_CODE_ERROR}
    assert failed == {0xA6, 0xA7, LAST}
    assert spans[0xA6].status.message == "connection refused"
    assert attributes(spans[0xA6])["error.type"] == "_OTHER"
    assert attributes(spans[LAST])["error.type"] == "503"
    assert "error.type" not in attributes(spans[0xA1])


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/a/b", "/a/b", None),
        ("/a?x=1", "/a", "x=1"),
        ("/?x=1", "/", "x=1"),
        ("/", "/", None),
        ("/a?", "/a", ""),
        ("/a?next=/b?c", "/a", "next=/b?c"),
        # masked: a run of word bytes is `?` and what fills it up
        ("/users/?4f", "/users/?4f", None),
        ("/users/?4f/cart", "/users/?4f/cart", None),
        ("/users/?4f??full=?", "/users/?4f", "?full=?"),
        ("/users?id=?4", "/users", "id=?4"),
        ("/?id=?4", "/", "id=?4"),
        ("http://web:8000/a?x=1", "/a", "x=1"),
        ("*", None, None),
        ("web:443", None, None),
    ],
)
def test_paths_and_queries(tmp_path, target, path, query):
    row = {"span_id": 1, "kind": "server", "tgid": 1, "start_ns": at(0), "duration_ns": 1,
           "protocol": "http", "operation": "GET x", "detail": f"GET {target}"}  # fmt: skip
    found = attributes(by_id(exported(make_traced(tmp_path / "a.scope", [row], [])))[1])
    assert (found.get("url.path"), found.get("url.query")) == (path, query)


def test_peers_are_services_or_addresses():
    rows = {
        "web": ("web", None, None),
        "web:80": ("web:80", None, None),
        "10.0.0.1:80": (None, "10.0.0.1", 80),
        "10.0.0.1": (None, "10.0.0.1", None),
        "[::1]:80": (None, "::1", 80),
        "2001:db8::1:80": (None, "2001:db8::1:80", None),
        "/run/db.sock": (None, "/run/db.sock", None),
        "@bus": (None, "@bus", None),
        "": ("", None, None),
        ":": (":", None, None),
    }
    found = peer_addresses(pl.Series([*rows, None, "web"]))
    assert {row[0]: row[1:] for row in found.iter_rows()} == rows


def test_resources_name_service_process_and_host_and_nothing_secret(traced):
    resources = exported(traced).resource_spans
    found = [attributes(resource.resource) for resource in resources]
    assert {(each["service.name"], each["process.pid"]) for each in found} == {
        ("nginx", 100), ("web", 200), ("worker", 300),
    }  # fmt: skip
    keys = {"service.name", "process.pid", "host.name", "telemetry.sdk.name",
            "telemetry.sdk.version"}  # fmt: skip
    assert all(set(each) == keys for each in found)
    assert all(each["host.name"] == "web1" for each in found)
    assert {resource.scope_spans[0].scope.name for resource in resources} == {"scope-ebpf"}


def test_a_process_without_a_name_has_the_one_that_the_conventions_demand(tmp_path):
    row = {"span_id": 1, "kind": "server", "tgid": 1, "start_ns": at(0), "duration_ns": 1}
    (resource,) = exported(make_traced(tmp_path / "a.scope", [row], [])).resource_spans
    assert attributes(resource.resource)["service.name"] == "unknown_service"


def test_trace_ids_stay_the_same_and_differ_between_recordings(tmp_path, traced):
    first = {key: span.trace_id for key, span in by_id(exported(traced)).items()}
    again = {key: span.trace_id for key, span in by_id(exported(traced, batch=2)).items()}
    assert first == again
    other = make_traced(tmp_path / "other.scope")
    object.__setattr__(other.meta, "started_ns", STARTED_NS + 1)
    assert not set(first.values()) & {span.trace_id for span in by_id(exported(other)).values()}


@pytest.mark.parametrize("batch", [1, 2, 4, 2000])
def test_batches_hold_so_many_spans_and_join_to_one_message(traced, batch):
    selection = select_spans(traced)
    messages = list(otlp.protobuf_messages(traced, selection, batch=batch))
    sizes = [len(by_id(ExportTraceServiceRequest.FromString(data))) for data, _ in messages]
    assert sizes == [count for _, count in messages]
    assert max(sizes) <= batch
    assert set(by_id(exported(traced, batch=batch))) == set(by_id(exported(traced)))


def test_one_request_has_its_tree_only(traced):
    assert set(by_id(exported(traced, "00000000000000a1"))) == TREE
    assert set(by_id(exported(traced, "00000000000000A3"))) == TREE
    assert set(by_id(exported(traced, "ff"))) == {LAST}
    spans = by_id(exported(traced, "00000000000000a1"))
    assert len(spans[0xA4].links) == 1  # to what is not in the tree


@pytest.mark.parametrize(
    ("text", "message"),
    [("b", "no request b"), ("xyz", "is no id"), ("", "is no id"), ("0" * 17, "is no id")],
)
def test_a_request_that_is_not_there(traced, text, message):
    with pytest.raises(UsageError, match=message):
        select_spans(traced, text)


def test_an_ambiguous_request(tmp_path):
    row = {"kind": "server", "tgid": 1, "start_ns": at(0), "duration_ns": 1}
    traced = make_traced(
        tmp_path / "a.scope", [{**row, "span_id": 0xAB00 << 48}, {**row, "span_id": 0xAC00 << 48}]
    )
    with pytest.raises(UsageError, match="2 requests have an id that begins with a "):
        select_spans(traced, "a")
    assert select_spans(traced, "ab").spans.height == 1


def test_json_is_the_protocols_own_form(traced):
    lines = [data for data, _ in otlp.json_lines(traced, select_spans(traced), batch=4)]
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    spans = [
        span
        for line in lines
        for resource in json.loads(line)["resourceSpans"]
        for span in resource["scopeSpans"][0]["spans"]
    ]
    assert len(spans) == len(SPAN_ROWS)
    job = next(span for span in spans if span["spanId"] == "00000000000000a6")
    assert job["parentSpanId"] == "00000000000000a3"
    assert len(job["traceId"]) == 32 and int(job["traceId"], 16)
    assert job["kind"] == 5
    assert job["status"] == {"code": 2, "message": "connection refused"}
    assert job["startTimeUnixNano"] == str(at(200_000) + META.clock.realtime_offset_ns)
    assert {"key": "thread.id", "value": {"intValue": "300"}} in job["attributes"]


def as_protobuf_json(value: Any) -> Any:
    """OTLP/JSON with the ids in base64, as protobuf's own JSON parser takes them."""
    if isinstance(value, dict):
        return {
            key: base64.b64encode(bytes.fromhex(each)).decode()
            if key in ("traceId", "spanId", "parentSpanId")
            else as_protobuf_json(each)
            for key, each in value.items()
        }
    return [as_protobuf_json(each) for each in value] if isinstance(value, list) else value


def test_json_says_the_same_as_protobuf(traced):
    selection = select_spans(traced)
    lines = otlp.json_lines(traced, selection, batch=4)
    messages = otlp.protobuf_messages(traced, selection, batch=4)
    for (line, spans), (message, same) in zip(lines, messages, strict=True):
        parsed = Parse(json.dumps(as_protobuf_json(json.loads(line))), ExportTraceServiceRequest())
        # the parser sets a status that is empty, and protobuf has none then
        for span in by_id(parsed).values():
            if not span.status.code:
                span.ClearField("status")
        assert parsed == ExportTraceServiceRequest.FromString(message)
        assert spans == same


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "kind": st.sampled_from(["server", "client", "consumer", "fault"]),
                "tgid": st.integers(0, 2**32 - 1),
                "protocol": st.sampled_from([None, "http", "redis", "mysql", "dns", ""]),
                "operation": st.none() | st.text(),
                "detail": st.none() | st.text() | st.text().map("GET {}".format),
                "start_ns": st.integers(-(2**62), 2**62),
                "duration_ns": st.none() | st.integers(-5, 2**60),
                "status": st.none() | st.text() | st.integers().map(str),
                "error": st.none() | st.text(),
                "peer": st.none() | st.text(),
            }
        ),
        max_size=5,
    )
)
def test_whatever_spans_hold_both_forms_are_right(tmp_path_factory, rows):
    numbered = [{**row, "span_id": number} for number, row in enumerate(rows, start=1)]
    traced = make_traced(tmp_path_factory.mktemp("any") / "a.scope", numbered, [])
    spans = by_id(exported(traced))
    assert set(spans) == set(range(1, len(rows) + 1))
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in spans.values())
    for line, _ in otlp.json_lines(traced, select_spans(traced)):
        Parse(json.dumps(as_protobuf_json(json.loads(line))), ExportTraceServiceRequest())
