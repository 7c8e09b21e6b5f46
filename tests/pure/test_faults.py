"""What failed and why: attempts to connect, requests without a response, ends of processes, peers."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scope_ebpf.recording.reader import Recording
from tests.pure.recordings import at
from tests.pure.stories import MS, US, Link, Story, answer, http, resp
from tests.pure.test_chains import NGINX, REDIS, WEB, cast, one, spans_of

pytestmark = pytest.mark.pure

FD, INODE = 9, 900
LOCAL = "127.0.0.1"
IN_PROGRESS, ALREADY, AGAIN, REFUSED = -115, -114, -11, -111
UNCLEAR = "closed before any byte: refused, unreachable or given up"


def connect(story: Story, time_ns: int, result: int = 0, **more: Any) -> None:
    """The web application calls connect()."""
    row = {"tgid": WEB, "tid": more.get("tgid", WEB), "fd": FD, "inode": INODE, "kind": "tcp",
           "remote_address": LOCAL, "remote_port": 6379, "duration_ns": US, **more}  # fmt: skip
    story.row("connects", start_ns=at(time_ns), result=result, **row)


def close(story: Story, time_ns: int, fd: int = FD) -> None:
    """The web application closes a descriptor."""
    story.call(WEB, "close", time_ns, arg0=fd)


def lose(story: Story) -> None:
    """A message was lost."""
    story.rows["losses"] = [{"time_ns": at(0), "table": "messages", "lost": 1}]


def caused_by(recording: Recording) -> set[tuple[int, int]]:
    """Causes and effects."""
    found = recording.edges().collect().filter(pl.col("edge") == "caused_by")
    return set(found.select("cause_id", "effect_id").rows())


def connects_of(recording: Recording) -> list[dict[str, Any]]:
    """The spans of failed attempts to connect."""
    return [span for span in spans_of(recording) if span["operation"] == "connect"]


# connecting


def test_an_attempt_that_a_poll_waited_for_in_vain(tmp_path: Path):
    story = cast()
    connect(story, MS, IN_PROGRESS)
    story.row("syscalls", start_ns=at(MS + 5 * US), duration_ns=300 * MS, tgid=WEB, tid=WEB,
              number=7, arg1=1, result=0)  # fmt: skip
    close(story, 302 * MS)
    (span,) = connects_of(story.record(tmp_path / "a.scope"))
    assert (span["error"], span["state"]) == ("not connected in time: given up here", "no_response")
    assert span["duration_ns"] == 301 * MS + US
    assert span["peer"] == "127.0.0.1:6379"


def test_a_blocking_attempt_with_a_time_limit(tmp_path: Path):
    """SO_SNDTIMEO."""
    story = cast()
    connect(story, MS, IN_PROGRESS, duration_ns=50 * MS)
    close(story, 60 * MS)
    (span,) = connects_of(story.record(tmp_path / "a.scope"))
    assert span["error"] == "not connected in time: given up here"


def test_an_attempt_that_ended_without_a_byte(tmp_path: Path):
    story = cast()
    connect(story, MS, IN_PROGRESS)
    close(story, 2 * MS)
    (span,) = connects_of(story.record(tmp_path / "a.scope"))
    assert (span["error"], span["status"]) == (UNCLEAR, None)


def test_an_attempt_that_the_end_of_its_process_ended(tmp_path: Path):
    story = cast()
    connect(story, MS, IN_PROGRESS)
    story.exit(WEB, 5 * MS)
    (span,) = connects_of(story.record(tmp_path / "a.scope"))
    assert (span["error"], span["duration_ns"]) == (UNCLEAR, 4 * MS)


def test_an_attempt_that_is_still_under_way_is_no_fault(tmp_path: Path):
    story = cast()
    connect(story, MS, IN_PROGRESS)
    assert connects_of(story.record(tmp_path / "a.scope")) == []


def test_an_attempt_that_succeeded_later(tmp_path: Path):
    story = cast()
    link = story.link(WEB, REDIS, 6379)
    connect(story, MS, IN_PROGRESS, inode=link.end(client=True))
    story.ask(link, resp("GET", "a"), b"$1\r\nb\r\n", 3 * MS, MS)
    close(story, 9 * MS)
    recording = story.record(tmp_path / "a.scope")
    assert connects_of(recording) == []
    call = one(spans_of(recording), kind="client")
    assert call["start_ns"] == at(MS), "a request includes the connection that was made for it"


@pytest.mark.parametrize("name", ["getpeername", "shutdown"])
def test_a_socket_that_was_seen_to_be_connected(tmp_path: Path, name: str):
    story = cast()
    connect(story, MS, IN_PROGRESS)
    story.call(WEB, name, 2 * MS, arg0=FD)
    close(story, 3 * MS)
    assert connects_of(story.record(tmp_path / "a.scope")) == []


def test_a_look_whether_somebody_listens(tmp_path: Path):
    """Between two connections to the same place that were used."""
    story = cast()
    connect(story, 5 * MS, IN_PROGRESS)
    close(story, 6 * MS)
    for time_ns in (MS, 10 * MS):
        link = story.link(WEB, REDIS, 6379)
        connect(story, time_ns, inode=link.end(client=True), fd=20)
        story.ask(link, resp("GET", "a"), b"$1\r\nb\r\n", time_ns + MS, MS)
    assert connects_of(story.record(tmp_path / "a.scope")) == []


def test_an_attempt_is_one_span_however_often_it_is_asked_for(tmp_path: Path):
    story = cast()
    results = {1: IN_PROGRESS, 2: ALREADY, 3: REFUSED, 8: IN_PROGRESS, 9: REFUSED}
    for time_ms, result in results.items():
        connect(story, time_ms * MS, result)
    close(story, 20 * MS)
    first, second = connects_of(story.record(tmp_path / "a.scope"))
    assert [first["start_ns"], second["start_ns"]] == [at(MS), at(8 * MS)]
    assert [first["duration_ns"], second["duration_ns"]] == [2 * MS + US, MS + US]
    assert first["status"] == second["status"] == "ECONNREFUSED"


def test_a_unix_listener_whose_queue_is_full(tmp_path: Path):
    story = cast()
    connect(story, MS, AGAIN, kind="unix", remote_address=None, remote_port=None, remote_path="/s")
    close(story, 2 * MS)
    (span,) = connects_of(story.record(tmp_path / "a.scope"))
    assert span["error"] == "EAGAIN: the queue of connections that wait there is full"
    assert span["detail"] == "connect /s"


def test_what_was_lost_may_have_been_the_messages(tmp_path: Path):
    story = cast()
    connect(story, MS, IN_PROGRESS)
    close(story, 2 * MS)
    lose(story)
    assert connects_of(story.record(tmp_path / "a.scope")) == []


def test_a_server_that_was_killed_and_came_back(tmp_path: Path):
    """The one that listens later does not hide why nobody did."""
    story = cast()
    first = story.link(WEB, REDIS, 6379)
    story.ask(first, resp("GET", "a"), b"$1\r\nb\r\n", MS, MS)
    story.exit(REDIS, 5 * MS, signal=9)
    connect(story, 6 * MS, REFUSED)
    story.fork(NGINX, 51, 20 * MS)
    again = story.link(WEB, 51, 6379)
    story.ask(again, resp("GET", "a"), b"$1\r\nb\r\n", 30 * MS, MS)
    recording = story.record(tmp_path / "a.scope")
    (span,) = connects_of(recording)
    fault = one(spans_of(recording), kind="fault")
    assert (fault["span_id"], span["span_id"]) in caused_by(recording)


@pytest.mark.parametrize("again", [False, True])
def test_a_call_that_was_made_again_is_not_why(tmp_path: Path, again: bool):
    story = cast()
    outer, cache = story.link(1, WEB, 8000), story.link(WEB, REDIS, 6379)
    story.ask(cache, resp("GET", "a"), b"$1\r\nb\r\n", MS, MS)
    story.say(outer, http("GET /a"), 10 * MS, by_client=True)
    connect(story, 11 * MS, REFUSED)
    if again:
        story.ask(cache, resp("GET", "a"), b"$1\r\nb\r\n", 12 * MS, MS)
    story.say(outer, answer("500 Internal Server Error"), 20 * MS, by_client=False)
    recording = story.record(tmp_path / "a.scope")
    (call,) = connects_of(recording)
    failed = one(spans_of(recording), kind="server", service="web")
    assert call["parent_id"] == failed["span_id"]
    assert ((call["span_id"], failed["span_id"]) in caused_by(recording)) is not again


# silence


def asked(story: Story) -> Link:
    """A connection on which one request was answered, and a second one is sent and read."""
    link = story.link(WEB, REDIS, 6379)
    story.ask(link, resp("GET", "a"), b"$1\r\nb\r\n", MS, MS)
    story.say(link, resp("GET", "b"), 10 * MS, by_client=True)
    return link


def wait(story: Story, name: int, time_ns: int, took_ns: int, result: int, **more: Any) -> None:
    """A call of the web application that waits."""
    story.row("syscalls", start_ns=at(time_ns), duration_ns=took_ns, tgid=WEB, tid=WEB, number=name,
              result=result, **more)  # fmt: skip


@pytest.mark.parametrize(
    ("waits", "error", "duration_ns"),
    [
        ([("poll", 0)], "no response in time: gave up here", 101 * MS),
        ([("poll", 1), ("poll", 0)], "no response in time: gave up here", 101 * MS),
        ([("recvfrom", AGAIN)], "no response in time: gave up here", 101 * MS),
        ([("poll", 0), ("poll", 1)], "closed here without a response", 110 * MS + US),
        ([], "closed here without a response", 110 * MS + US),
    ],
)
def test_a_client_that_gives_up(tmp_path: Path, waits: Any, error: str, duration_ns: int):
    story = cast()
    link = asked(story)
    fd = link.end(client=True)
    took_ns = 100 * MS // max(len(waits), 1)
    for nth, (name, result) in enumerate(waits):
        number, arg0 = {"poll": (7, 2**46), "recvfrom": (45, fd)}[name]
        wait(story, number, 11 * MS + nth * took_ns, took_ns, result, arg0=arg0, arg1=1)
    close(story, 120 * MS, fd)
    span = one(spans_of(story.record(tmp_path / "a.scope")), kind="client", detail="GET b")
    assert (span["error"], span["state"]) == (error, "no_response")
    assert span["duration_ns"] == duration_ns


def test_what_the_server_did_after_its_client_had_given_up(tmp_path: Path):
    story = cast()
    link = asked(story)
    wait(story, 7, 11 * MS, 100 * MS, 0, arg1=1)
    close(story, 112 * MS, link.end(client=True))
    story.exit(REDIS, 113 * MS, signal=9)
    recording = story.record(tmp_path / "a.scope")
    spans = spans_of(recording)
    call = one(spans, kind="client", detail="GET b")
    server, fault = one(spans, kind="server", detail="GET b"), one(spans, kind="fault")
    assert server["error"] == "its process ended before it was done"
    assert caused_by(recording) == {(fault["span_id"], server["span_id"])}
    assert call["error"] == "no response in time: gave up here"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (None, "sent, but never received by redis"),
        ("received", "closed here without a response"),
        ("died", "closed here without a response"),
        ("lost", "closed here without a response"),
    ],
)
def test_bytes_that_never_arrived(tmp_path: Path, change: str | None, error: str):
    story = cast()
    link = story.link(WEB, REDIS, 6379)
    story.ask(link, resp("GET", "a"), b"$1\r\nb\r\n", MS, MS)
    story.say(link, resp("GET", "b"), 10 * MS, by_client=True, sender_only=change != "received")
    if change == "died":
        story.exit(REDIS, 11 * MS, signal=9)
    if change == "lost":
        lose(story)
    close(story, 50 * MS, link.end(client=True))
    span = one(spans_of(story.record(tmp_path / "a.scope")), kind="client", detail="GET b")
    assert span["error"] == error


def test_a_request_that_is_on_its_way_when_the_recording_ends(tmp_path: Path):
    story = cast()
    link = story.link(WEB, REDIS, 6379)
    story.ask(link, resp("GET", "a"), b"$1\r\nb\r\n", MS, MS)
    story.say(link, resp("GET", "b"), 10 * MS, by_client=True, sender_only=True)
    span = one(spans_of(story.record(tmp_path / "a.scope")), kind="client", detail="GET b")
    assert (span["error"], span["state"]) == (None, "open")


# peers


def end(story: Story, number: int, tgid: int, data: list[tuple[bytes, bool]], **more: Any) -> None:
    """One end of a connection of which the other one was not recorded, and what it moved."""
    story.row("connections", time_ns=at(0), connection=number, tgid=tgid, inode=more.pop("inode", number),
              send_stream=2 * number, receive_stream=2 * number + 1, **more)  # fmt: skip
    for nth, (bytes_, receive) in enumerate(data):
        story.row("messages", start_ns=at((nth + 1) * MS), tgid=tgid, tid=tgid, receive=receive, turn=True,
                  length_bytes=len(bytes_), stream_end=100, connection=number, payload=bytes_)  # fmt: skip


ASKS = [(resp("GET", "a"), False), (b"$1\r\nb\r\n", True)]
SERVES = [(resp("GET", "a"), True), (b"$1\r\nb\r\n", False)]
DNS_ASKS = b"\xab\xcd\x01\0\0\x01\0\0\0\0\0\0\x04shop\x05local\0\0\x01\0\x01"
DNS_SAYS = b"\xab\xcd\x81\x83\0\x01\0\0\0\0\0\0\x04shop\x05local\0\0\x01\0\x01"


@pytest.mark.parametrize(
    ("place", "peer"),
    [
        ({"kind": "tcp", "remote_address": LOCAL, "remote_port": 6379}, "127.0.0.1:6379"),
        ({"kind": "tcp", "remote_address": "::1", "remote_port": 6379}, "[::1]:6379"),
        ({"kind": "unix", "remote_path": "/run/redis.sock"}, "/run/redis.sock"),
        ({"kind": "unix", "remote_path": "@redis"}, "@redis"),
        ({"kind": "unix"}, None),
    ],
)
def test_a_server_that_is_not_recorded(tmp_path: Path, place: dict[str, Any], peer: str | None):
    story = cast()
    end(story, 7, WEB, ASKS, **place)
    assert one(spans_of(story.record(tmp_path / "a.scope")), kind="client")["peer"] == peer


def test_the_other_end_of_a_socket_without_a_path(tmp_path: Path):
    """A pair of sockets, or a server's view of its client."""
    story = cast()
    end(story, 7, WEB, ASKS, kind="unix", inode=70, peer_inode=80)
    end(story, 8, REDIS, SERVES, kind="unix", inode=80, peer_inode=70)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    assert one(spans, kind="client")["peer"] == "redis"
    assert one(spans, kind="server")["peer"] == "web"


def test_the_same_loopback_address_in_another_namespace_is_another_place(tmp_path: Path):
    story = cast()
    end(story, 7, WEB, ASKS, kind="tcp", remote_address=LOCAL, remote_port=6379, netns=1)
    end(story, 8, REDIS, SERVES, kind="tcp", local_address=LOCAL, local_port=6379, netns=2)
    end(story, 9, NGINX, ASKS, kind="tcp", remote_address=LOCAL, remote_port=6379, netns=2)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    assert one(spans, kind="client", tgid=WEB)["peer"] == "127.0.0.1:6379"
    assert one(spans, kind="client", tgid=NGINX)["peer"] == "redis"


def test_two_services_at_one_address_are_not_told_apart(tmp_path: Path):
    story = cast()
    end(story, 7, 1, [(http("GET /a"), False), (answer(), True)], kind="tcp",
        remote_address=LOCAL, remote_port=8000)  # fmt: skip
    for number, tgid in ((8, WEB), (9, NGINX)):
        end(story, number, tgid, [(http("GET /a"), True), (answer(), False)], kind="tcp",
            local_address=LOCAL, local_port=8000)  # fmt: skip
    spans = spans_of(story.record(tmp_path / "a.scope"))
    assert one(spans, kind="client")["peer"] == "127.0.0.1:8000"


def test_dns(tmp_path: Path):
    """A server that is bound to no address of its own is at all those of its host."""
    story = cast()
    story.process(53, "/usr/sbin/dnsmasq", "dnsmasq")
    end(story, 7, WEB, [(DNS_ASKS, False), (DNS_SAYS, True)], kind="udp",
        remote_address="127.0.0.53", remote_port=53)  # fmt: skip
    end(story, 8, NGINX, [(DNS_ASKS, False), (DNS_SAYS, True)], kind="udp",
        remote_address="10.0.0.1", remote_port=53)  # fmt: skip
    end(story, 9, WEB, [(DNS_ASKS, False), (DNS_SAYS, True)], kind="udp")
    spans = spans_of(story.record(tmp_path / "a.scope"))
    peers = {(span["tgid"], span["peer"]) for span in spans if span["kind"] == "client"}
    assert peers == {(WEB, "127.0.0.53:53"), (NGINX, "10.0.0.1:53"), (WEB, None)}
    end(story, 10, 53, [(DNS_ASKS, True), (DNS_SAYS, False)], kind="udp",
        local_address="0.0.0.0", local_port=53)  # fmt: skip
    spans = spans_of(story.record(tmp_path / "b.scope"))
    peers = {(span["tgid"], span["peer"]) for span in spans if span["kind"] == "client"}
    assert peers == {(WEB, "dnsmasq"), (NGINX, "10.0.0.1:53"), (WEB, None)}
