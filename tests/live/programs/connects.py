"""Connects sockets of many kinds, to what listens and what does not, and notes what each call gave.

    connects.py DIRECTORY

Everything is in one thread, so that the order is known.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

TIMES = 23
Note = dict[str, Any]
libc = ctypes.CDLL(None, use_errno=True)


class Notes:
    """What was called, in order."""

    def __init__(self) -> None:
        self.all: list[Note] = []

    def connect(
        self, label: str, kind: str, end: socket.socket, place: Any, **expected: Any
    ) -> int:
        """Connect, and note the call; returns the result, 0 or -errno."""
        error = end.connect_ex(place)
        self.add(label, kind, end.fileno(), os.fstat(end.fileno()).st_ino, -error, **expected)
        return -error

    def add(self, label: str, kind: str, fd: int, inode: int, result: int, **expected: Any) -> None:
        self.all.append(
            {
                "label": label,
                "kind": kind,
                "fd": fd,
                "inode": inode,
                "result": result,
                "error": errno.errorcode[-result] if result else None,
                "remote_address": expected.get("address"),
                "remote_port": expected.get("port"),
                "remote_path": expected.get("path"),
            }
        )


def listening(family: int, address: Any) -> socket.socket:
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen(64)
    return listener


def closed_port(family: int, address: str) -> int:
    with socket.socket(family) as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])


def main() -> None:
    directory = Path(sys.argv[1])
    four = listening(socket.AF_INET, ("127.0.0.1", 0))
    six = listening(socket.AF_INET6, ("::1", 0))
    path, longest = str(directory / "s"), "l" * 108
    named = listening(socket.AF_UNIX, path)
    abstract = f"scope-ebpf-{os.getpid()}"
    hidden = listening(socket.AF_UNIX, f"\0{abstract}")
    port, port6 = four.getsockname()[1], six.getsockname()[1]
    refused, refused6 = (
        closed_port(socket.AF_INET, "127.0.0.1"),
        closed_port(socket.AF_INET6, "::1"),
    )
    print("ready", flush=True)
    sys.stdin.read(1)
    notes = Notes()
    for _ in range(TIMES):
        for label, place in (("tcp", port), ("refused", refused)):
            with socket.socket() as end:
                where = ("127.0.0.1", place)
                notes.connect(label, "tcp", end, where, address="127.0.0.1", port=place)
        with socket.socket(socket.AF_UNIX) as end:
            notes.connect("unix", "unix", end, path, path=path)
    for label, place in (("tcp6", port6), ("refused6", refused6)):
        with socket.socket(socket.AF_INET6) as end:
            notes.connect(label, "tcp", end, ("::1", place), address="::1", port=place)
    with socket.socket(socket.AF_INET6) as end:
        mapped = ("::ffff:127.0.0.1", port)
        notes.connect("mapped", "tcp", end, mapped, address="127.0.0.1", port=port)
    with socket.socket(socket.AF_UNIX) as end:
        missing = str(directory / "missing")
        notes.connect("missing", "unix", end, missing, path=missing)
    with socket.socket(socket.AF_UNIX) as end:
        # a path without a zero at its end, which Python does not make
        libc.connect(end.fileno(), struct.pack("=H108s", socket.AF_UNIX, longest.encode()), 110)
        inode = os.fstat(end.fileno()).st_ino
        notes.add("longest", "unix", end.fileno(), inode, -ctypes.get_errno(), path=longest)
    with socket.socket(socket.AF_UNIX) as end:
        notes.connect("abstract", "unix", end, f"\0{abstract}", path=f"@{abstract}")
    for label, place in (("nonblocking", port), ("nonblocking-refused", refused)):
        with socket.socket() as end:
            end.setblocking(False)
            where = ("127.0.0.1", place)
            notes.connect(label, "tcp", end, where, address="127.0.0.1", port=place)
            # the result of the first call is taken by a second one
            notes.connect(f"{label}-again", "tcp", end, where, address="127.0.0.1", port=place)
    with socket.socket(type=socket.SOCK_DGRAM) as end:
        where = ("127.0.0.1", refused)
        notes.connect("udp", "udp", end, where, address="127.0.0.1", port=refused)
        # to AF_UNSPEC, which Python has no form for: it disconnects
        assert libc.connect(end.fileno(), bytes(16), 16) == 0
        notes.add("disconnect", "udp", end.fileno(), os.fstat(end.fileno()).st_ino, 0)
    with socket.socket() as end:
        assert libc.connect(end.fileno(), ctypes.c_void_p(8), 16) == -1
        inode = os.fstat(end.fileno()).st_ino
        notes.add("bad-address", "tcp", end.fileno(), inode, -ctypes.get_errno())
        short = struct.pack("=HH", socket.AF_INET, refused)
        assert libc.connect(end.fileno(), short, len(short)) == -1
        notes.add("too-short", "tcp", end.fileno(), inode, -ctypes.get_errno())
    # rows of syscalls only: another family, a file, and no descriptor at all
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.connect((0, 0))
    with open(os.devnull) as file:
        assert libc.connect(file.fileno(), bytes(16), 16) == -1
    assert libc.connect(-1, bytes(16), 16) == -1
    for end in (four, six, named, hidden):
        end.close()
    print(json.dumps({"notes": notes.all, "calls": len(notes.all) + 3}), flush=True)


if __name__ == "__main__":
    main()
