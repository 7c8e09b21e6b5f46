"""Tells small stories as recordings: who connected to whom, what was said, who waited or died."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scope_ebpf import open_recording
from scope_ebpf.recording.reader import Recording
from scope_ebpf.records import ContextKind
from scope_ebpf.syscalls import syscall_names
from tests.pure.recordings import at, make_recording

US = 1_000
MS = 1_000_000
NUMBERS = {name: number for number, name in syscall_names("x86_64").items()}


@dataclass
class Link:
    """A TCP connection with an id, a descriptor and a position at each end."""

    client: int
    server: int
    port: int
    number: int
    tids: dict[bool, int]
    positions: dict[bool, int]

    def end(self, *, client: bool) -> int:
        """The id of one end's connection."""
        return 2 * self.number + (0 if client else 1)


@dataclass
class Story:
    """Collects the rows of a recording. Times are nanoseconds since its start."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    links: int = 0
    told: list[dict[str, Any]] = field(default_factory=list)

    def row(self, table: str, **columns: Any) -> None:
        """One row of a table."""
        self.rows.setdefault(table, []).append(columns)

    def process(self, tgid: int, command_line: str, comm: str = "python") -> None:
        """A process that runs already."""
        self.row("processes", time_ns=at(0), event=0, tgid=tgid, tid=tgid, comm=comm,
                 command_line=command_line)  # fmt: skip

    def fork(self, parent: int, child: int, time_ns: int) -> None:
        """A process forks another."""
        self.row("processes", time_ns=at(time_ns), event=1, tgid=child, tid=child,
                 parent_tgid=parent, parent_tid=parent, comm="python")  # fmt: skip

    def exit(self, tgid: int, time_ns: int, signal: int | None = None) -> None:
        """A process ends."""
        self.row("processes", time_ns=at(time_ns), event=4, tgid=tgid, tid=tgid, comm="python",
                 signal=signal, exit_code=None if signal else 0)  # fmt: skip

    def call(self, tgid: int, name: str, time_ns: int, tid: int | None = None, **more: Any) -> None:
        """A system call of 1 µs."""
        self.row("syscalls", start_ns=at(time_ns), duration_ns=US, tgid=tgid, tid=tid or tgid,
                 number=NUMBERS[name], **more)  # fmt: skip
        self.told.append({"start_ns": at(time_ns), "tgid": tgid, "tid": tid or tgid, "context": 0})

    def context(
        self, tgid: int, context: int, time_ns: int, *, parent: int = 0, tid: int | None = None,
        kind: ContextKind = ContextKind.CONTEXT_COPIED,
    ) -> int:  # fmt: skip
        """A logical context is made, or met; returns it."""
        self.row("contexts", time_ns=at(time_ns), tgid=tgid, tid=tid or tgid, context=context,
                 parent=parent, kind=int(kind))  # fmt: skip
        return context

    def hand(
        self, tgid: int, item: int, time_ns: int, *, put: bool, tid: int | None = None,
        context: int = 0,
    ) -> None:  # fmt: skip
        """A thread puts a work item into a queue, or gets it."""
        self.row("handoffs", time_ns=at(time_ns), tgid=tgid, tid=tid or tgid, context=context,
                 put=put, item=item)  # fmt: skip

    def link(
        self, client: int, server: int, port: int, *, client_tid: int = 0, server_tid: int = 0
    ) -> Link:
        """A connection between two recorded processes."""
        self.links += 1
        number = self.links
        link = Link(client, server, port, number, {True: client_tid or client, False: server_tid or server},
                    {True: 100_000 * number, False: 7_000 * number})  # fmt: skip
        to_server, to_client = 1000 + 2 * number, 1001 + 2 * number
        near = {"local_address": "127.0.0.1", "remote_address": "127.0.0.1", "kind": "tcp"}
        self.row("connections", time_ns=at(0), connection=link.end(client=True), tgid=client,
                 local_port=40_000 + number, remote_port=port, inode=link.end(client=True),
                 send_stream=to_server, receive_stream=to_client, **near)  # fmt: skip
        self.row("connections", time_ns=at(0), connection=link.end(client=False), tgid=server,
                 local_port=port, remote_port=40_000 + number, inode=link.end(client=False),
                 send_stream=to_client, receive_stream=to_server, **near)  # fmt: skip
        return link

    def message(
        self, link: Link, *, by_client: bool, receive: bool, time_ns: int, data: bytes,
        end: int, wait_ns: int = 0, tid: int | None = None, turn: bool = True, context: int = 0,
    ) -> None:  # fmt: skip
        """One message as one end saw it; a receive has waited `wait_ns` before `time_ns`."""
        tgid = link.client if by_client else link.server
        self.told.append({"start_ns": at(time_ns - wait_ns), "tgid": tgid,
                              "tid": tid or link.tids[by_client], "context": context})  # fmt: skip
        self.row(
            "messages", start_ns=at(time_ns - wait_ns), duration_ns=wait_ns, tgid=tgid,
            tid=tid or link.tids[by_client], number=NUMBERS["recvfrom" if receive else "sendto"],
            fd=link.end(client=by_client), receive=receive, turn=turn, exact=True,
            length_bytes=len(data), stream_end=end % 2**32, connection=link.end(client=by_client),
            payload=data if data and turn else None,
        )  # fmt: skip

    def say(
        self, link: Link, data: bytes, time_ns: int, *, by_client: bool, delay_ns: int = 5 * US,
        wait_ns: int = 0, tid: int | None = None, sender_only: bool = False, turn: bool = True,
        other_tid: int | None = None, context: int = 0, other_context: int = 0,
    ) -> None:  # fmt: skip
        """One end sends, the other one has it a little later; each in a logical context."""
        link.positions[by_client] += len(data)
        end = link.positions[by_client]
        self.message(link, by_client=by_client, receive=False, time_ns=time_ns, data=data, end=end,
                     tid=tid, turn=turn, context=context)  # fmt: skip
        if not sender_only:
            self.message(link, by_client=not by_client, receive=True, time_ns=time_ns + delay_ns,
                         data=data, end=end, wait_ns=wait_ns, tid=other_tid, turn=turn,
                         context=other_context)  # fmt: skip

    def ask(
        self, link: Link, request: bytes, response: bytes, time_ns: int, took_ns: int,
        *, tid: int | None = None, server_tid: int | None = None, context: int = 0,
        read_in: int | None = None,
    ) -> None:  # fmt: skip
        """A request and its response: it is sent at `time_ns`, answered after `took_ns`.

        The client asks in `context`, and receives in `read_in`, or the same.
        """
        self.say(
            link, request, time_ns, by_client=True, tid=tid, other_tid=server_tid, context=context
        )
        self.say(link, response, time_ns + took_ns, by_client=False, tid=server_tid, other_tid=tid,
                 other_context=context if read_in is None else read_in)  # fmt: skip

    def close(self, link: Link, time_ns: int, *, by_client: bool) -> None:
        """The other end reads the end of the stream."""
        end = link.positions[by_client]
        self.message(
            link, by_client=not by_client, receive=True, time_ns=time_ns, data=b"", end=end
        )

    def record(self, path: Path, **changes: Any) -> Recording:
        """The recording; it tells contexts if any call was in one."""
        if any(call["context"] for call in self.told):
            # the kernel tells changes only, which is the same
            self.rows["flows"] = sorted(self.told, key=lambda call: call["start_ns"])
        changes = {"families": ["processes", "syscalls", "messages", "offcpu"], **changes}
        return open_recording(make_recording(path, self.rows, per_segment=1000, **changes))


def http(line: str, body: bytes = b"", *headers: str) -> bytes:
    """A request."""
    lines = [f"{line} HTTP/1.1", "Host: shop", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer(status: str = "200 OK", body: bytes = b"{}") -> bytes:
    """A response."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def query(sql: str) -> bytes:
    """A simple query of PostgreSQL."""
    text = sql.encode() + b"\0"
    return b"Q" + (len(text) + 4).to_bytes(4, "big") + text


def selected(rows: int) -> bytes:
    """PostgreSQL's answer to a SELECT without the rows themselves."""
    tag = f"SELECT {rows}".encode() + b"\0"
    return b"C" + (len(tag) + 4).to_bytes(4, "big") + tag + b"Z\0\0\0\x05I"


def resp(*words: str) -> bytes:
    """A command of Redis."""
    parts = [f"${len(word)}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n{''.join(parts)}".encode()
