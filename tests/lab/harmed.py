"""A target that checks itself all the time: harmed.py FOLDER. One line of JSON at the end of its stdin.

Each round uses what probes sit on: threads and locks, tasks of asyncio, pipes, sockets, a child, sleeps,
files. What comes out is compared with what must come out; the first difference ends it with an exception.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path

BYTES = 4099
# Between rounds, as a multiple of what a round takes: recorders need the one CPU of the guest, too.
PAUSE = 3


def through_pipe(data: bytes) -> bytes:
    """What comes out of a pipe that a thread writes to."""
    there, back = os.pipe()
    thread = threading.Thread(target=os.write, args=(back, data))
    thread.start()
    found = b""
    while len(found) < len(data):
        found += os.read(there, len(data))
    thread.join()
    os.close(there)
    os.close(back)
    return found


def through_socket(data: bytes) -> bytes:
    """What comes back over a connection of TCP."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as server,
    ):
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        found = b""
        while part := server.recv(1 << 16):
            found += part
    return found


def through_child(data: bytes) -> bytes:
    """What a child makes of it: the exit code is a sum."""
    pid = os.fork()
    if not pid:
        os._exit(sum(data) % 251)
    return bytes([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])])


def through_tasks(data: bytes) -> bytes:
    """Tasks that each give a part."""

    async def part(index: int) -> bytes:
        await asyncio.sleep(0)
        return data[index::7]

    async def together() -> list[bytes]:
        return await asyncio.gather(*map(part, range(7)))

    found = bytearray(len(data))
    for index, piece in enumerate(asyncio.run(together())):
        found[index::7] = piece
    return bytes(found)


def check(folder: Path, number: int) -> None:
    """One round, and a pause that must be as long as was asked for."""
    began = time.monotonic()
    data = (hashlib.sha256(str(number).encode()).digest() * 200)[:BYTES]
    file = folder / "harmed"
    file.write_bytes(data)
    assert file.read_bytes() == data
    assert through_pipe(data) == data
    assert through_socket(data) == data
    assert through_tasks(data) == data
    assert through_child(data) == bytes([sum(data) % 251])
    slept = time.monotonic()
    pause = PAUSE * (slept - began)
    time.sleep(pause)
    assert time.monotonic() - slept >= pause


def main() -> None:
    folder = Path(sys.argv[1])
    open_files = len(os.listdir("/proc/self/fd"))
    check(folder, 0)
    print("ready", flush=True)
    rounds = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        rounds += 1
        check(folder, rounds)
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert threading.active_count() == 1
    print(json.dumps({"rounds": rounds}), flush=True)


if __name__ == "__main__":
    main()
