"""Faults: what is refused, reset, silent or dead becomes a span with that error, and blames its cause."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from typing import Any

import polars as pl
import pytest

from tests.live.recording import PROGRAMS, Target, attached, no_losses, python_target

pytestmark = pytest.mark.live

FAMILIES = ("--unredacted", "--families", "processes,syscalls,messages")
PATIENCE_NS = 300_000_000
REFUSED = "ECONNREFUSED: connection refused: nobody listens there"
UNCLEAR = "closed before any byte: refused, unreachable or given up"
NOT_IN_TIME = "not connected in time: given up here"
GAVE_UP = "no response in time: gave up here"
NEVER_RECEIVED = "sent, but never received by fault_backend"


@dataclass
class Recorded:
    """A recording of the driver, and what the driver told."""

    note: dict[str, Any]
    spans: pl.DataFrame
    edges: pl.DataFrame

    def handler(self, name: str) -> dict[str, Any]:
        """The web application's span of one request."""
        found = self.spans.filter(kind="server", service="fault_web", detail=f"GET /{name}")
        return found.row(0, named=True) if len(found) == 1 else pytest.fail(str(found))

    def calls(self, name: str) -> list[dict[str, Any]]:
        """What that request's handler asked of others."""
        handler = self.handler(name)
        within = pl.col("start_ns").is_between(
            handler["start_ns"], handler["start_ns"] + handler["duration_ns"]
        )
        return self.spans.filter(within, kind="client", service="fault_web").to_dicts()

    def last_call(self, name: str) -> dict[str, Any]:
        """The last of them; the request failed, and it is its child."""
        call, handler = self.calls(name)[-1], self.handler(name)
        assert (handler["status"], self.note["statuses"][name][0]) == ("500", 500)
        assert (call["parent_id"], call["edge"]) == (handler["span_id"], "calls")
        assert call["state"] == "no_response"
        return call

    def blames(self, span: dict[str, Any]) -> list[dict[str, Any]]:
        """The spans that a span is caused by, with the edge's evidence as `proof`."""
        edges = self.edges.filter(effect_id=span["span_id"], edge="caused_by")
        causes = edges.select(span_id="cause_id", proof="evidence", why="reason")
        return self.spans.join(causes, on="span_id").sort("start_ns").to_dicts()

    def chain(self, name: str) -> list[str]:
        """From a failed request down to what it all came from: kinds of spans."""
        span, kinds = self.handler(name), []
        while causes := self.blames(span):
            span = causes[0]
            kinds.append(span["kind"])
        return kinds


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """All failures in one recording."""
    directory = tmp_path_factory.mktemp("faults")
    with (
        python_target("fault_driver", directory) as target,
        attached(directory, target, *FAMILIES) as session,
    ):
        note = target.work()
    no_losses(session)
    recording = session.recording
    return Recorded(note, recording.spans().collect(), recording.edges().collect())


def test_the_first_requests_are_fine(recorded):
    for name in ("first", "unix_first", "pooled", "unused"):
        assert recorded.handler(name)["error"] is None
        assert [call["error"] for call in recorded.calls(name)] in ([None], [None, None])


@pytest.mark.parametrize(
    ("name", "error", "server"),
    [
        ("refused", REFUSED, "first"),
        ("refused_timeout", UNCLEAR, "first"),
        ("unix_refused", REFUSED, "fourth"),
    ],
)
def test_a_connection_is_refused_since_the_server_was_killed(recorded, name, error, server):
    call = recorded.last_call(name)
    assert (call["operation"], call["error"], call["peer"]) == ("connect", error, "fault_backend")
    assert call["protocol"] == "http"
    (fault,) = recorded.blames(call)
    assert (fault["kind"], fault["tgid"]) == ("fault", recorded.note["pids"][server])
    assert (fault["status"], fault["proof"]) == ("SIGKILL", "derived")
    assert recorded.chain(name) == ["client", "fault"]


def test_asyncio_is_refused(recorded):
    """An event loop's calls are guessed to be its request's: they are shown, and not blamed."""
    (call,) = recorded.calls("refused_asyncio")
    handler = recorded.handler("refused_asyncio")
    assert (call["error"], call["parent_id"]) == (UNCLEAR, handler["span_id"])
    assert call["evidence"] == "guess"
    (fault,) = recorded.blames(call)
    assert fault["tgid"] == recorded.note["pids"]["first"]
    assert recorded.blames(handler) == []


def test_a_server_dies_while_it_works(recorded):
    call = recorded.last_call("dies")
    assert call["error"] in {
        "the other end closed the connection without a response",
        "ECONNRESET: connection reset by the other end",
    }
    by_kind = {span["kind"]: span for span in recorded.blames(call)}
    assert by_kind.keys() == {"server", "fault"}
    assert by_kind["fault"]["tgid"] == recorded.note["pids"]["second"]
    assert by_kind["server"]["error"] == "its process ended before it was done"
    assert [span["kind"] for span in recorded.blames(recorded.handler("dies"))] == ["client"]
    assert "fault" in [span["kind"] for span in recorded.blames(by_kind["server"])]


@pytest.mark.parametrize("name", ["timeout", "receive_timeout", "poll"])
def test_a_client_gives_up(recorded, name):
    call = recorded.last_call(name)
    assert (call["error"], call["peer"]) == (GAVE_UP, "fault_backend")
    assert PATIENCE_NS <= call["duration_ns"] <= recorded.handler(name)["duration_ns"]
    # that the server was killed much later has nothing to do with it
    assert recorded.blames(call) == []
    assert recorded.chain(name) == ["client"]


def test_a_server_that_does_not_read(recorded):
    first, call = recorded.calls("stalled")
    assert first["error"] is None
    assert call == recorded.last_call("stalled")
    assert call["error"] == NEVER_RECEIVED
    assert call["duration_ns"] >= PATIENCE_NS
    assert recorded.chain("stalled") == ["client"]


def test_a_connection_is_reset(recorded):
    call = recorded.last_call("reset")
    assert call["error"] == "ECONNRESET: connection reset by the other end"
    (server,) = recorded.blames(call)
    assert (server["kind"], server["error"]) == ("server", "closed here without a response")


def test_a_pooled_connection_was_closed_by_the_server(recorded):
    call = recorded.last_call("broken_pipe")
    assert call["error"] == "EPIPE: the other end had closed the connection"
    assert recorded.chain("broken_pipe") == ["client"]


def test_a_unix_socket_that_does_not_exist(recorded):
    call = recorded.last_call("unix_missing")
    assert call["error"] == "ENOENT: there is no such socket"
    assert call["peer"] == recorded.note["places"]["unix"] + ".missing"
    assert recorded.chain("unix_missing") == ["client"]


def test_a_full_backlog(recorded):
    call = recorded.last_call("backlog")
    assert (call["operation"], call["error"]) == ("connect", NOT_IN_TIME)
    assert call["peer"] == f"127.0.0.1:{recorded.note['places']['full']}"
    assert PATIENCE_NS <= call["duration_ns"] <= recorded.handler("backlog")["duration_ns"]
    assert recorded.chain("backlog") == ["client"]


def test_no_effect_comes_before_its_cause(recorded):
    times = recorded.spans.select(
        "span_id", "start_ns", end_ns=pl.sum_horizontal("start_ns", "duration_ns")
    )
    blamed = recorded.edges.filter(edge="caused_by")
    both = blamed.join(times, left_on="cause_id", right_on="span_id").join(
        times, left_on="effect_id", right_on="span_id", suffix="_effect"
    )
    assert len(both) == len(blamed) > 15
    # another CPU may have seen the end of a process a little later
    assert (both["start_ns"] <= both["end_ns_effect"] + 5_000_000).all()


def test_dropped_packets(tmp_path):
    """Bytes that were sent and never arrived at a server that lives, and a connect() into the dark."""
    tools = ("unshare", "ip", "tc")
    missing = [
        name for name in tools if not shutil.which(name, path="/usr/sbin:/sbin:/usr/bin:/bin")
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    program = (sys.executable, PROGRAMS / "fault_driver.py", tmp_path, "dropped")
    with (
        Target("unshare", "-n", *program) as target,
        attached(tmp_path, target, *FAMILIES) as session,
    ):
        note = target.work()
    no_losses(session)
    spans = session.recording.spans().collect()
    asked = spans.filter(kind="client", service="fault_driver").sort("start_ns")
    assert asked["operation"].to_list() == ["GET /ok", "GET /ok", "connect"], json.dumps(note)
    assert asked["error"].to_list() == [None, NEVER_RECEIVED, NOT_IN_TIME]
    assert asked["peer"].to_list() == ["fault_backend"] * 3
    assert (asked["duration_ns"][1:] >= PATIENCE_NS).all()
    assert session.recording.edges().collect().filter(edge="caused_by").is_empty()
