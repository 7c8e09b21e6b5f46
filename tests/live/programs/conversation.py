"""Two processes that talk over one connection by every call there is, and note what each call did.

    conversation.py TRANSPORT MODE SEED DIRECTORY [WAITING]

TRANSPORT: see TRANSPORTS. MODE: `steps` (each send is read to its end before the next begins) or
`flood` (both directions at once, cut anew at the receiver). With WAITING the connection exists before
the gate, with so many bytes sent and not yet received in each direction (0: none); without it, it is
made behind the gate. Process A is this one, B a child that is forked before the gate.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

STREAM_BYTES = 6_000_000
PIPE_BYTES = 65536
# /usr/include/linux/tcp.h: to choose the initial sequence number of a socket
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_SEND_QUEUE = 19, 20, 21, 2

libc = ctypes.CDLL(None, use_errno=True)


class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class MsgHdr(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.POINTER(IoVec)),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class MMsgHdr(ctypes.Structure):
    _fields_ = [("header", MsgHdr), ("length", ctypes.c_uint)]


def checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def cut(data: bytes, parts: int) -> list[bytes]:
    """Data in up to so many pieces of unequal size, none of them empty."""
    edges = sorted({len(data) * (i * i) // (parts * parts) for i in range(1, parts)} | {len(data)})
    return [data[a:b] for a, b in zip([0, *edges], edges, strict=False) if b > a]


def vectors(buffers: list[Any]) -> Any:
    """An iovec for buffers; they have to be kept until it was used."""
    array = (IoVec * len(buffers))()
    for element, buffer in zip(array, buffers, strict=True):
        element.base, element.length = ctypes.addressof(buffer), len(buffer)
    return array


def headers(buffers: list[Any]) -> Any:
    """One mmsghdr of one piece for each buffer."""
    array = (MMsgHdr * len(buffers))()
    for element, buffer in zip(array, buffers, strict=True):
        element.header.iov = vectors([buffer])
        element.header.iov_count = 1
    return array


def writable(data: bytes) -> Any:
    return (ctypes.c_char * len(data)).from_buffer_copy(data)


def room(size: int, parts: int) -> list[Any]:
    return [(ctypes.c_char * len(piece))() for piece in cut(bytes(size), parts)]


def filled(buffers: list[Any], size: int) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)[:size]


class End:
    """One end of a connection, in one process; notes every call."""

    def __init__(self, reading: int, writing: int, directory: Path) -> None:
        self.reading, self.writing = reading, writing
        self.notes: list[dict[str, Any]] = []
        self.directory = directory
        self.sent = self.received = 0
        self._lock = threading.Lock()

    def note(self, call: str, direction: str, size: int, length: int, **more: Any) -> None:
        fd = self.writing if direction == "send" else self.reading
        with self._lock:
            self.notes.append(
                {
                    "name": call,
                    "fd": fd,
                    "inode": os.fstat(fd).st_ino,
                    "tid": threading.get_native_id(),
                    "direction": direction,
                    # where in this direction's bytes it begins
                    "offset": self.sent if direction == "send" else self.received,
                    "size": size,
                    "length": length,
                    "peek": False,
                    **more,
                }
            )

    def socket(self, fd: int) -> socket.socket:
        """A Python socket of the same descriptor, which does not close it."""
        found = socket.socket(fileno=fd)
        found.settimeout(None)
        return found

    # every way to send; each returns how much it took

    def write(self, data: bytes) -> int:
        return os.write(self.writing, data)

    def writev(self, data: bytes) -> int:
        return os.writev(self.writing, cut(data, 5))

    def pwritev2(self, data: bytes) -> int:
        buffers = [writable(piece) for piece in cut(data, 3)]
        pieces = vectors(buffers)
        return checked(libc.pwritev2(self.writing, pieces, len(pieces), ctypes.c_long(-1), 0))

    def vmsplice(self, data: bytes) -> int:
        # the pages stay shared with the pipe, so the buffer must stay as it is
        self.kept = getattr(self, "kept", [])
        self.kept.append([writable(piece) for piece in cut(data, 2)])
        pieces = vectors(self.kept[-1])
        return checked(libc.vmsplice(self.writing, pieces, len(pieces), 0))

    def sendto(self, data: bytes) -> int:
        found = self.socket(self.writing)
        try:
            return found.send(data)
        finally:
            found.detach()

    def sendmsg(self, data: bytes) -> int:
        found = self.socket(self.writing)
        try:
            return found.sendmsg(cut(data, 4))
        finally:
            found.detach()

    def sendmmsg(self, data: bytes) -> int:
        buffers = [writable(piece) for piece in cut(data, 6)]
        array = headers(buffers)
        count = checked(libc.sendmmsg(self.writing, array, len(array), 0))
        return sum(element.length for element in array[:count])

    def sendfile(self, data: bytes) -> int:
        # a file of its own: the queue holds the file's pages, not a copy
        with tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
            file.write(data)
            return os.sendfile(self.writing, file.fileno(), 0, len(data))

    def splice(self, data: bytes) -> int:
        source, sink = os.pipe()
        try:
            taken = os.write(sink, data[:PIPE_BYTES])
            return splice(source, self.writing, taken)
        finally:
            os.close(source)
            os.close(sink)

    # every way to receive; each returns the bytes

    def read(self, size: int) -> bytes:
        return os.read(self.reading, size)

    def readv(self, size: int) -> bytes:
        buffers = room(size, 5)
        got = checked(libc.readv(self.reading, vectors(buffers), len(buffers)))
        return filled(buffers, got)

    def preadv2(self, size: int) -> bytes:
        buffers = room(size, 3)
        pieces = vectors(buffers)
        got = checked(libc.preadv2(self.reading, pieces, len(pieces), ctypes.c_long(-1), 0))
        return filled(buffers, got)

    def recvfrom(self, size: int, flags: int = 0) -> bytes:
        found = self.socket(self.reading)
        try:
            return found.recv(size, flags)
        finally:
            found.detach()

    def recvmsg(self, size: int, flags: int = 0) -> bytes:
        buffers = [bytearray(len(piece)) for piece in cut(bytes(size), 4)]
        found = self.socket(self.reading)
        try:
            got = found.recvmsg_into(buffers, 0, flags)[0]
        finally:
            found.detach()
        return b"".join(buffers)[:got]

    def recvmmsg(self, size: int, flags: int = 0) -> bytes:
        # MSG_WAITFORONE: take what is there after the first
        buffers = room(size, 6)
        array = headers(buffers)
        flags |= socket.MSG_WAITFORONE if hasattr(socket, "MSG_WAITFORONE") else 0x10000
        count = checked(libc.recvmmsg(self.reading, array, len(array), flags, None))
        return b"".join(
            bytes(buffer)[: element.length]
            for buffer, element in zip(buffers[:count], array[:count], strict=True)
        )

    def take_splice(self, size: int) -> bytes:
        source, sink = os.pipe()
        try:
            moved = splice(self.reading, sink, min(size, PIPE_BYTES))
            data = b""
            while len(data) < moved:
                data += os.read(source, moved - len(data))
            return data
        finally:
            os.close(source)
            os.close(sink)

    def send(self, call: str, data: bytes) -> int:
        """One call; returns how much it took."""
        length = int(getattr(self, call)(data))
        self.note(call, "send", len(data), length)
        self.sent += length
        return length

    def receive(self, call: str, size: int, flags: int = 0) -> bytes:
        """One call; returns what it brought."""
        if call == "splice":
            data = self.take_splice(size)
            self.note(call, "receive", size, len(data))
        else:
            data = getattr(self, call)(size, flags) if flags else getattr(self, call)(size)
            self.note(call, "receive", size, len(data), peek=bool(flags & socket.MSG_PEEK))
        if not flags & socket.MSG_PEEK:
            self.received += len(data)
        return bytes(data)


def splice(source: int, target: int, size: int) -> int:
    return checked(libc.splice(source, None, target, None, ctypes.c_size_t(size), 0))


# ---- transports: each returns both ends as (descriptor to read, descriptor to write) ----------------

Descriptors = tuple[int, int]


def tcp(family: int, address: str, first_sequence: int | None = None) -> list[Descriptors]:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen()
        client = socket.socket(family, socket.SOCK_STREAM)
        if first_sequence is not None:
            client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)
            client.setsockopt(
                socket.IPPROTO_TCP, TCP_QUEUE_SEQ, first_sequence.to_bytes(4, sys.byteorder)
            )
            client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
        client.connect(listener.getsockname())
        server = listener.accept()[0]
    return [(end, end) for end in (client.detach(), server.detach())]


def unix(directory: Path, name: str) -> list[Descriptors]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        client = socket.socket(socket.AF_UNIX)
        client.connect(name)
        server = listener.accept()[0]
    return [(end, end) for end in (client.detach(), server.detach())]


def pair(kind: int) -> list[Descriptors]:
    return [(end.detach(),) * 2 for end in socket.socketpair(socket.AF_UNIX, kind)]


def pipes() -> list[Descriptors]:
    (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
    return [(read_a, write_a), (read_b, write_b)]


def fifos(directory: Path) -> list[Descriptors]:
    ends = []
    for name in ("ab", "ba"):
        os.mkfifo(directory / name)
        reading = os.open(directory / name, os.O_RDONLY | os.O_NONBLOCK)
        ends.append((reading, os.open(directory / name, os.O_WRONLY)))
        os.set_blocking(reading, True)
    (read_b, write_a), (read_a, write_b) = ends
    return [(read_a, write_a), (read_b, write_b)]


TRANSPORTS: dict[str, Callable[[Path], list[Descriptors]]] = {
    "tcp4": lambda _: tcp(socket.AF_INET, "127.0.0.1"),
    "tcp6": lambda _: tcp(socket.AF_INET6, "::1"),
    "tcp-wrap": lambda _: tcp(socket.AF_INET, "127.0.0.1", 2**32 - 100_003),
    "unix-path": lambda directory: unix(directory, str(directory / "listener")),
    "unix-abstract": lambda directory: unix(directory, f"\0scope-ebpf-test-{directory}"[:100]),
    "unix-pair": lambda _: pair(socket.SOCK_STREAM),
    "pipe": lambda _: pipes(),
    "fifo": fifos,
}

ANY_SEND = ["write", "writev", "pwritev2", "sendfile", "splice"]
ANY_RECEIVE = ["read", "readv", "preadv2", "splice"]
SOCKET_SEND = [*ANY_SEND, "sendto", "sendmsg", "sendmmsg"]
SOCKET_RECEIVE = [*ANY_RECEIVE, "recvfrom", "recvmsg", "recvmmsg"]
PIPE_SEND = [*ANY_SEND, "vmsplice"]
FLAGGED = ["recvfrom", "recvmsg"]
# the bytes are never in the process's memory; and: only the first of several messages is kept
UNSEEN = ["sendfile", "splice"]
MANY_PIECES = ["sendmmsg", "recvmmsg"]


def stream_bytes(seed: int, sender: str) -> bytes:
    """What the process sends on its way through the conversation."""
    return random.Random(f"{seed} {sender}").randbytes(STREAM_BYTES)


def is_pipe(transport: str) -> bool:
    return transport in ("pipe", "fifo")


def some_size(rng: random.Random, limit: int) -> int:
    """Small and large sizes alike often."""
    return min(limit, max(1, int(2 ** rng.uniform(0, limit.bit_length()))))


def steps(me: str, end: End, other: socket.socket, transport: str, seed: int) -> None:
    """Lock-step: both processes play the same plan; `other` is the way to agree on it."""
    rng = random.Random(f"{seed} plan")
    sends = PIPE_SEND if is_pipe(transport) else SOCKET_SEND
    receives = ANY_RECEIVE if is_pipe(transport) else SOCKET_RECEIVE
    streams = {name: stream_bytes(seed, name) for name in "AB"}
    plan = [(call, None) for call in sends] + [(None, call) for call in receives]
    for number in range(6 * len(plan)):
        sender = rng.choice("AB") if number >= 8 else "AB"[number % 2]
        fixed_send, fixed_receive = plan[number % len(plan)]
        call = fixed_send or rng.choice(sends)
        size = some_size(rng, 30_000)
        cuts = rng.choice([1, 1, 1, 2, 5])
        peek = rng.choice([None, None, None, *FLAGGED])
        ways = [fixed_receive or rng.choice(receives)]
        ways += [rng.choice(receives) for _ in range(cuts - 1)]
        if me == sender:
            length = end.send(call, streams[me][end.sent : end.sent + size])
            other.sendall(length.to_bytes(8, "little"))
            assert other.recv(1)
            continue
        left = int.from_bytes(other.recv(8, socket.MSG_WAITALL), "little")
        offset, begin = end.received, end.received
        if peek and not is_pipe(transport):
            data = end.receive(peek, max(1, left // 2), socket.MSG_PEEK)
            assert data == streams[sender][offset : offset + len(data)]
        part = max(1, left // cuts)
        while left:
            way = ways.pop(0) if ways else rng_free_way(receives, left)
            size = left if not ways else min(part, left)
            whole = socket.MSG_WAITALL if way in FLAGGED and size == left else 0
            data = end.receive(way, size, whole)
            left -= len(data)
            wanted = streams[sender][end.received - len(data) : end.received]
            assert data == wanted, f"{way} brought wrong bytes at {begin}"
        other.send(b"y")


def rng_free_way(receives: list[str], left: int) -> str:
    """A choice that does not use the random numbers that both processes share."""
    return receives[left % len(receives)]


def flood(me: str, end: End, other: socket.socket, transport: str, seed: int) -> None:
    """Each process sends in one thread and receives in another, cut at will."""
    sends = PIPE_SEND if is_pipe(transport) else SOCKET_SEND
    receives = ANY_RECEIVE if is_pipe(transport) else SOCKET_RECEIVE
    you = "B" if me == "A" else "A"
    mine, theirs = stream_bytes(seed, me), stream_bytes(seed, you)
    begin_receive = end.received
    total = 1_500_000

    def send_all() -> None:
        rng = random.Random(f"{seed} {me} sends")
        while end.sent < total:
            size = min(some_size(rng, 400_000), total - end.sent)
            end.send(rng.choice(sends), mine[end.sent : end.sent + size])

    sending = threading.Thread(target=send_all)
    sending.start()
    rng = random.Random(f"{seed} {me} receives")
    got = [theirs[:begin_receive]]
    while end.received < total:
        size = min(some_size(rng, 400_000), total - end.received)
        way, flags = rng.choice(receives), 0
        if way in FLAGGED:
            flags = rng.choice([0, socket.MSG_WAITALL])
        got.append(end.receive(way, size, flags))
    sending.join()
    assert b"".join(got) == theirs[:total], "the bytes came in disorder"
    other.send(b"y")
    assert other.recv(1)


def finish(me: str, end: End, other: socket.socket, transport: str) -> None:
    """A closes its way to B first; both read to the end of file."""
    for turn in "AB":
        if me == turn:
            if is_pipe(transport):
                os.close(end.writing)
            else:
                found = end.socket(end.writing)
                found.shutdown(socket.SHUT_WR)
                found.detach()
            other.send(b"y")
            assert other.recv(1)
        else:
            assert other.recv(1)
            assert end.receive("read", 100) == b""
            other.send(b"y")


def talk(me: str, end: End, other: socket.socket, transport: str, mode: str, seed: int) -> None:
    {"steps": steps, "flood": flood}[mode](me, end, other, transport, seed)
    finish(me, end, other, transport)
    notes = {"process": me, "tgid": os.getpid(), "notes": end.notes}
    notes |= {"sent": end.sent, "received": end.received}
    (end.directory / f"notes-{me}").write_text(json.dumps(notes))


def main() -> None:
    transport, mode, seed, directory = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    waiting = int(sys.argv[5]) if len(sys.argv) > 5 else None
    ends: list[Descriptors] = []
    if waiting is not None:
        ends = TRANSPORTS[transport](directory)
        for (_, writing), name in zip(ends, "AB", strict=True):
            if waiting:
                assert os.write(writing, stream_bytes(seed, name)[:waiting]) == waiting
    mine, theirs = socket.socketpair()
    gate, opened = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(gate, 1)
    else:
        print("ready", child, flush=True)
        sys.stdin.read(1)
    if waiting is None:
        # made by A, handed to B as descriptors
        if child:
            ends = TRANSPORTS[transport](directory)
            socket.send_fds(mine, [b"d"], [fd for end in ends for fd in end])
        else:
            mine.close()
    if child == 0:
        os.close(opened)
        if waiting is None:
            descriptors = socket.recv_fds(theirs, 1, 4)[1]
            ends = [(descriptors[0], descriptors[1]), (descriptors[2], descriptors[3])]
        mine.close()
        end = prepare(ends, 1, directory, waiting)
        talk("B", end, theirs, transport, mode, seed)
        os._exit(0)
    theirs.close()
    os.write(opened, b"x")
    os.close(opened)
    end = prepare(ends, 0, directory, waiting)
    talk("A", end, mine, transport, mode, seed)
    assert os.waitpid(child, 0)[1] == 0, "B failed"
    print(json.dumps({"child": child}), flush=True)


def prepare(ends: list[Descriptors], which: int, directory: Path, waiting: int | None) -> End:
    """One's own end; the other one is closed, so that the end of file can come."""
    reading, writing = ends[which]
    for fd in {*ends[1 - which]} - {reading, writing}:
        os.close(fd)
    end = End(reading, writing, directory)
    end.sent = waiting or 0
    if waiting:
        # what waits is read in pieces first, before anything else moves
        half = waiting // 2
        for size in (half, waiting - half):
            end.receive("read", size)
    return end


if __name__ == "__main__":
    main()
