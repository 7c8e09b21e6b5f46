"""Makes sockets and pipes of many kinds, moves a few bytes over each, and notes what it did.

    sockets.py SCENARIO DIRECTORY [ARGUMENTS]

Everything is in one process and one thread, so that the order is known.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Note = dict[str, Any]


def gate() -> None:
    print("ready", flush=True)
    sys.stdin.read(1)


def tell(notes: Any) -> None:
    print(json.dumps(notes), flush=True)


class End:
    """One end, by its descriptor; remembers what moved."""

    def __init__(
        self, label: str, fd: int, expected: Note | None = None, exact: bool = True
    ) -> None:
        self.label, self.fd, self.exact = label, fd, exact
        self.inode = os.fstat(fd).st_ino
        self.expected = expected or {}
        self.moved: list[tuple[str, int]] = []

    def write(self, size: int) -> None:
        self.moved.append(("send", os.write(self.fd, bytes(size))))

    def read(self, size: int) -> int:
        got = len(os.read(self.fd, size))
        self.moved.append(("receive", got))
        return got

    def close(self) -> None:
        os.close(self.fd)

    def note(self) -> Note:
        # the link in /proc names the same inode
        return {
            "label": self.label,
            "fd": self.fd,
            "inode": self.inode,
            "expected": self.expected,
            "moved": self.moved,
            "exact": self.exact,
        }


def tcp_pair(
    family: int, address: str, target: str | None = None
) -> tuple[socket.socket, socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        if target is None:
            client = socket.create_connection((address, port))
        else:
            client = socket.create_connection((target, port))
        return client, listener.accept()[0]


def plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def inet_ends(label: str, kind: str, a: socket.socket, b: socket.socket) -> list[End]:
    ends = []
    for side, end in (("client", a), ("server", b)):
        local, remote = end.getsockname(), end.getpeername()
        expected = {
            "kind": kind,
            "local_address": plain(local[0]),
            "local_port": local[1],
            "remote_address": plain(remote[0]),
            "remote_port": remote[1],
            "local_path": None,
            "remote_path": None,
            "peer_inode": None,
        }
        ends.append(End(f"{label} {side}", end.detach(), expected, kind == "tcp"))
    return ends


def unix_pair(
    name: str | bytes, kind: int = socket.SOCK_STREAM
) -> tuple[socket.socket, socket.socket]:
    with socket.socket(socket.AF_UNIX, kind) as listener:
        listener.bind(name)
        listener.listen()
        client = socket.socket(socket.AF_UNIX, kind)
        client.connect(name)
        return client, listener.accept()[0]


def unix_ends(
    label: str, kind: str, a: socket.socket, b: socket.socket, path: str | None
) -> list[End]:
    inodes = [os.fstat(end.fileno()).st_ino for end in (a, b)]
    places: list[tuple[str | None, str | None]] = [(None, path), (path, None)]
    return [
        End(
            f"{label} {side}",
            end.detach(),
            {
                "kind": kind,
                "local_path": local,
                "remote_path": remote,
                "peer_inode": other,
                "local_address": None,
                "remote_port": None,
            },
            kind == "unix",
        )
        for side, end, other, (local, remote) in zip(
            ("client", "server"), (a, b), inodes[::-1], places, strict=True
        )
    ]


def udp_pair(directory: Path) -> tuple[socket.socket, socket.socket]:
    a, b = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for end in (a, b):
        end.bind(("127.0.0.1", 0))
    a.connect(b.getsockname())
    b.connect(a.getsockname())
    return a, b


def all_ends(directory: Path) -> list[list[End]]:
    """Pairs of ends of every kind."""
    path, abstract = str(directory / "identity"), f"scope-ebpf-{os.getpid()}"
    ends = [
        inet_ends("tcp4", "tcp", *tcp_pair(socket.AF_INET, "127.0.0.1")),
        inet_ends("tcp6", "tcp", *tcp_pair(socket.AF_INET6, "::1")),
        inet_ends("tcp-mapped", "tcp", *tcp_pair(socket.AF_INET6, "::", "127.0.0.1")),
        unix_ends("unix-path", "unix", *unix_pair(path), path),
        unix_ends("unix-abstract", "unix", *unix_pair(f"\0{abstract}"), f"@{abstract}"),
        unix_ends("unix-pair", "unix", *socket.socketpair(), None),
        unix_ends(
            "unix-datagram", "unix-datagram", *socket.socketpair(type=socket.SOCK_DGRAM), None
        ),
        inet_ends("udp", "udp", *udp_pair(directory)),
    ]
    reading, writing = os.pipe()
    nothing = {"local_address": None, "local_path": None, "netns": None, "peer_inode": None}
    pipe = [End("pipe", fd, {"kind": "pipe", **nothing}) for fd in (writing, reading)]
    return [*ends, pipe]


def identity(directory: Path, when: str) -> list[Note]:
    if when == "before":
        pairs = all_ends(directory)
        gate()
    else:
        gate()
        pairs = all_ends(directory)
    notes = []
    for a, b in pairs:
        assert os.readlink(f"/proc/self/fd/{a.fd}").endswith(f":[{a.inode}]")
        a.write(101)
        assert b.read(1000) == 101
        if a.label == "pipe":
            # one row for both ends
            note = a.note()
            note["moved"] += b.moved
            note["fd"] = None
            note["fds"] = [a.fd, b.fd]
            notes.append(note)
            continue
        b.write(53)
        assert a.read(1000) == 53
        notes += [a.note(), b.note()]
    return notes


def tcp_ends(directory: Path) -> dict[str, Note]:
    gate()
    notes: dict[str, Note] = {}

    def made(name: str) -> tuple[socket.socket, socket.socket, End, End]:
        a, b = tcp_pair(socket.AF_INET, "127.0.0.1")
        return a, b, End(f"{name} client", a.fileno()), End(f"{name} server", b.fileno())

    # the receiver reads when data and end of file are there
    a, b, client, server = made("fin-with-data")
    client.write(1009)
    client.write(503)
    a.shutdown(socket.SHUT_WR)
    wait_for_state(server.fd, "CLOSE_WAIT")
    assert server.read(503) == 503
    assert server.read(10000) == 1009
    assert server.read(100) == 0
    assert server.read(100) == 0
    notes |= {end.label: end.note() for end in (client, server)}
    a.close()
    b.close()

    # the client reads its answer when the connection is gone for the kernel already
    a, b, client, server = made("both-closed")
    client.write(101)
    a.shutdown(socket.SHUT_WR)
    assert server.read(1000) == 101
    assert server.read(1000) == 0
    server.write(307)
    server.write(401)
    b.close()
    wait_for_state(client.fd, "CLOSE")
    assert client.read(307) == 307
    assert client.read(1000) == 401
    assert client.read(1000) == 0
    notes |= {end.label: end.note() for end in (client, server)}
    a.close()
    return notes


def wait_for_state(fd: int, name: str) -> None:
    """Until the socket is in that state: the first byte of struct tcp_info, include/net/tcp_states.h."""
    states = {"CLOSE": 7, "CLOSE_WAIT": 8}
    found = socket.socket(fileno=fd)
    try:
        while found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != states[name]:
            os.sched_yield()
    finally:
        found.detach()


def reuse(directory: Path, kind: str, rounds: str) -> list[list[Note]]:
    gate()
    makers: dict[str, Callable[[int], list[End]]] = {
        "tcp-port": reuse_port,
        "unix-path": lambda number: reuse_path(directory),
        "unix-pair": lambda number: [End("", end.detach()) for end in socket.socketpair()],
        "unix-unaccepted": lambda number: reuse_unaccepted(directory, number),
        "pipe": lambda number: [End("", fd) for fd in os.pipe()[::-1]],
        "fd": reuse_fd,
    }
    notes = []
    for number in range(int(rounds)):
        ends = makers[kind](number)
        if ends[0].moved:
            pass  # it has talked already
        elif kind == "pipe":
            writing, reading = ends
            size = 1 + number % 97
            writing.write(size)
            assert reading.read(1000) == size
            writing.moved += reading.moved
        else:
            for a, b in (ends, ends[::-1]):
                size = 1 + number % 89
                a.write(size)
                assert b.read(1000) == size
        for end in ends:
            end.close()
        notes.append([end.note() for end in ends[: 1 if kind == "pipe" else None]])
    return notes


def reuse_port(number: int) -> list[End]:
    """The same four numbers again: a reset leaves no TIME_WAIT behind."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    ports = PORTS
    with listener:
        listener.bind(("127.0.0.1", ports[0] if ports else 0))
        listener.listen()
        client.bind(("127.0.0.1", ports[1] if ports else 0))
        client.connect(listener.getsockname())
        if not ports:
            ports += [listener.getsockname()[1], client.getsockname()[1]]
        server = listener.accept()[0]
    reset = struct.pack("ii", 1, 0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    return [End("", client.detach()), End("", server.detach())]


PORTS: list[int] = []


def reuse_path(directory: Path) -> list[End]:
    path = directory / "reused"
    path.unlink(missing_ok=True)
    return [End("", end.detach()) for end in unix_pair(str(path))]


def reuse_unaccepted(directory: Path, number: int) -> list[End]:
    """A client talks to a listener that never accepts; then pairs get the addresses of its sockets."""
    path = directory / "unaccepted"
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    end = End("", client.fileno())
    end.write(1 + number % 83)
    # the kernel hands out what was freed last; so each order gives another socket the address
    for closed in (listener, client) if number % 2 else (client, listener):
        closed.close()
    spare = [socket.socket(socket.AF_UNIX) for _ in range(number // 2 % 2)]
    pairs = [[End("", made.detach()) for made in socket.socketpair()] for _ in range(2)]
    for a, b in (*pairs, *(pair[::-1] for pair in pairs)):
        a.write(2 + number % 79)
        assert b.read(1000) == 2 + number % 79
    for unused in spare:
        unused.close()
    # its number is free, and is closed below like the others
    end.fd = os.open(directory, os.O_RDONLY)
    return [end, *pairs[0], *pairs[1]]


def reuse_fd(number: int) -> list[End]:
    """One descriptor, by turns a TCP socket, a Unix socket and a socket of another family."""
    kind = number % 3
    if kind == 0:
        return [End("", end.detach()) for end in tcp_pair(socket.AF_INET, "127.0.0.1")]
    if kind == 1:
        return [End("", end.detach()) for end in socket.socketpair()]
    return [End("", end.detach()) for end in tcp_pair(socket.AF_INET6, "::1")]


def others(directory: Path) -> list[Note]:
    """Sockets whose ranges cannot be compared: rows are there, and say so."""
    a, b = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for end in (a, b):
        end.bind(("127.0.0.1", 0))
    stream, other = unix_pair(str(directory / "packets"), socket.SOCK_SEQPACKET)
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    netlink.bind((0, 0))
    gate()
    notes = []

    def note(kind: str, found: socket.socket, *moved: tuple[str, int]) -> None:
        end = End(kind, found.fileno(), {"kind": kind})
        end.moved = list(moved)
        notes.append(end.note())

    for size in (1, 211, 1009):
        assert a.sendto(bytes(size), b.getsockname()) == size
        assert len(b.recvfrom(2000)[0]) == size
        assert stream.send(bytes(size)) == size
        assert len(other.recv(2000)) == size
    # RTM_GETLINK for all: struct nlmsghdr and rtgenmsg
    request = struct.pack("=IHHIIB3x", 20, 18, 0x301, 1, 0, 0)
    assert netlink.send(request) == len(request)
    got = len(netlink.recv(1 << 16))
    note("udp", a, *(("send", size) for size in (1, 211, 1009)))
    note("udp", b, *(("receive", size) for size in (1, 211, 1009)))
    note("unix-seqpacket", stream, *(("send", size) for size in (1, 211, 1009)))
    note("unix-seqpacket", other, *(("receive", size) for size in (1, 211, 1009)))
    note("netlink", netlink, ("send", len(request)), ("receive", got))
    return notes


def crowd(directory: Path) -> list[Note]:
    """More buffers wait in the queue than the probes walk through."""
    a, b = (End("", end.detach()) for end in socket.socketpair())
    for _ in range(265):
        os.write(a.fd, b"x")
    gate()
    assert b.read(3) + b.read(1000) == 265
    a.write(7)
    b.read(1000)
    return [a.note(), b.note()]


def blocked(directory: Path, kind: str, who: str, size: str) -> Note:
    """A child is inside a read or write when the recording begins; then both talk in turns."""
    if kind == "tcp4":
        ends = [(end.detach(),) * 2 for end in tcp_pair(socket.AF_INET, "127.0.0.1")]
    elif kind == "unix-pair":
        ends = [(end.detach(),) * 2 for end in socket.socketpair()]
    else:
        (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
        ends = [(read_a, write_a), (read_b, write_b)]
    (read_mine, write_mine), (read_theirs, write_theirs) = ends
    length = int(size)
    filled = 0
    if who == "short-writer":
        os.set_blocking(write_theirs, False)
        try:
            while True:
                filled += os.write(write_theirs, bytes(4096))
        except BlockingIOError:
            os.set_blocking(write_theirs, True)
    child = os.fork()
    if child == 0:
        if who == "reader":
            assert os.read(read_theirs, length) == bytes(length)
        else:
            sent = 0
            while sent < length:
                sent += os.write(write_theirs, bytes(length - sent))
        for number in range(20):
            assert len(os.read(read_theirs, 1000)) == number + 1
            assert os.write(write_theirs, bytes(2 * number + 1)) == 2 * number + 1
        os._exit(0)
    calls = {"reader": "0", "writer": "1", "short-writer": "1"}
    while Path(f"/proc/{child}/syscall").read_text().split()[0] != calls[who]:
        os.sched_yield()
    gate()
    if who == "reader":
        assert os.write(write_mine, bytes(length)) == length
    else:
        left = filled + length
        while left:
            left -= len(os.read(read_mine, min(left, 100_003)))
    for number in range(20):
        assert os.write(write_mine, bytes(number + 1)) == number + 1
        assert len(os.read(read_mine, 1000)) == 2 * number + 1
    assert os.waitpid(child, 0)[1] == 0
    return {
        "child": child,
        "filled": filled,
        "length": length,
        "inodes": [os.fstat(fd).st_ino for end in ends for fd in end],
    }


def reconnect(directory: Path) -> list[Note]:
    """One socket, connected to one place after the other."""
    gate()
    notes = []
    for kind, label in ((socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")):
        found = socket.socket(socket.AF_INET, kind)
        for number in range(3):
            with socket.socket(socket.AF_INET, kind) as other:
                other.bind(("127.0.0.1", 0))
                if kind == socket.SOCK_STREAM:
                    other.listen()
                    if number:
                        disconnect(found)
                found.connect(other.getsockname())
                end = End(label, found.fileno())
                end.write(7 + number)
                end.expected = {
                    "kind": label,
                    "local_port": found.getsockname()[1],
                    "remote_port": other.getsockname()[1],
                }
                notes.append(end.note())
        found.close()
    return notes


def disconnect(found: socket.socket) -> None:
    """connect() to AF_UNSPEC, which Python has no form for."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(found.fileno(), bytes(16), 16) == 0, os.strerror(ctypes.get_errno())


SCENARIOS: dict[str, Callable[..., Any]] = {
    "identity": identity,
    "tcp-ends": tcp_ends,
    "reuse": reuse,
    "others": others,
    "reconnect": reconnect,
    "crowd": crowd,
    "blocked": blocked,
}


def main() -> None:
    scenario, directory, *arguments = sys.argv[1:]
    tell(SCENARIOS[scenario](Path(directory), *arguments))


if __name__ == "__main__":
    main()
