"""A workload whose every number is known: what the tests of the lab record.

    workload.py FOLDER [PART...]

Says `ready`, waits for a byte on stdin, does the parts in the order of PARTS, and tells in JSON what the
kernel chose (ids, ports, addresses). How much it does stands in the constants below, which the tests import.
Only the standard library is used, and only what every kernel of the lab has. What Python itself calls
besides (memory, locks, imports) is not counted: the counted calls carry marks in their arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

NUMBERS = {
    "x86_64": {
        "getppid": 110,
        "close": 3,
        "openat": 257,
        "dup3": 292,
        "futex": 202,
        "clock_nanosleep": 230,
    },
    "aarch64": {
        "getppid": 173,
        "close": 57,
        "openat": 56,
        "dup3": 24,
        "futex": 98,
        "clock_nanosleep": 115,
    },
}
NO_SUCH_CALL = 511  # no kernel has one of that number

# Calls of the main thread; each has its place in the row as an argument.
GETPPIDS = 1009
FAILING = {"close": (211, "EBADF"), "openat": (101, "ENOENT"), "dup3": (53, "EINVAL")}
UNKNOWN_CALLS = 23
FIRST_FD = 1_000_000_000
MAIN_TAG, THREAD_TAG, CHILD_TAG, TASK_TAG, BUSY_TAG = 1000, 2000, 3000, 4000, 5000

THREADS, CALLS_PER_THREAD = 5, 23
CHILDREN, CALLS_PER_CHILD = 11, 13
EXECS = 3
EXEC_PROGRAM = "/bin/true"
EXEC_WORD = "scope-lab"
FAILED_EXEC_CODE = 77
KILLED_BY = signal.SIGKILL

# TCP: connections, and the turns of the first one; the next one has one more each.
CONNECTIONS, FIRST_TURNS = 7, 5
ASKED_BYTES, ANSWERED_BYTES = 101, 10_007
UNIX_TURNS, UNIX_BYTES = 17, 251
DATAGRAMS, DATAGRAM_BYTES = 13, 77
PIPE_TURNS, PIPE_BYTES = 31, 64
VECTORS, VECTOR_BYTES = 3, (10, 20, 30)
SENDFILES, SENDFILE_BYTES = 3, 500

REFUSED, NO_SOCKET = 17, 5

SLEEPS = tuple(3_000_000 + 1_000_000 * (number % 4) for number in range(19))
TIMEOUTS, TIMEOUT_NS = 11, 4_000_000
LOCKS, HELD_NS, LEAST_LOCKED_NS = 7, 30_000_000, 15_000_000

TASKS, CALLS_PER_TASK = 5, 7
BUSY_NS = 600_000_000

FUTEX_WAIT_PRIVATE = 128
PR_SET_NAME = 15
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
NUMBER = NUMBERS.get(platform.machine(), {})

Note = dict[str, Any]


def call(number: int, *arguments: int) -> int:
    """A system call as it is, without what a library would make of it."""
    return int(LIBC.syscall(number, *map(ctypes.c_long, arguments)))


def count(tag: int, times: int) -> None:
    """So many getppid calls; the kernel ignores the arguments, the rows have them."""
    for turn in range(times):
        call(NUMBER["getppid"], tag, turn, ~turn)


def turns(connection: int) -> int:
    """Turns of that TCP connection."""
    return FIRST_TURNS + connection


def name_thread(name: str) -> None:
    """Call the running thread so."""
    LIBC.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)


# ---- parts ----


def calls(_: str) -> Note:
    """Known system calls, of which most fail."""
    path = ctypes.create_string_buffer(b"/scope-lab-is-not-there")
    count(MAIN_TAG, GETPPIDS)
    for turn in range(FAILING["close"][0]):
        call(NUMBER["close"], FIRST_FD + turn)
    for turn in range(FAILING["openat"][0]):
        # an absolute path: the descriptor of a directory does not matter
        call(NUMBER["openat"], FIRST_FD + turn, ctypes.addressof(path), os.O_RDONLY)
    for turn in range(FAILING["dup3"][0]):
        call(NUMBER["dup3"], turn, turn, 0)  # onto itself: EINVAL
    for turn in range(UNKNOWN_CALLS):
        call(NO_SUCH_CALL, turn)
    return {}


def threads(_: str) -> Note:
    """Threads with names, one after the other."""
    tids = []

    def work(number: int) -> None:
        tids.append(threading.get_native_id())
        count(THREAD_TAG + number, CALLS_PER_THREAD)

    for number in range(THREADS):
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        thread.join()
    return {"tids": tids}


def forks(_: str) -> Note:
    """Children that end with their number, and one that a signal ends."""
    pids = []
    for number in range(CHILDREN):
        pid = os.fork()
        if not pid:
            count(CHILD_TAG + number, CALLS_PER_CHILD)
            os._exit(number)
        pids.append(pid)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == number
    killed = os.fork()
    if not killed:
        os.kill(os.getpid(), KILLED_BY)
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -KILLED_BY
    return {"pids": pids, "killed": killed}


def execs(_: str) -> Note:
    """Children that execute a program, and one whose program is missing."""
    pids = []
    for number in range(EXECS):
        pid = os.fork()
        if not pid:
            os.execv(EXEC_PROGRAM, [EXEC_PROGRAM, EXEC_WORD, str(number)])  # noqa: S606
        pids.append(pid)
        assert os.waitpid(pid, 0)[1] == 0
    failed = os.fork()
    if not failed:
        with contextlib.suppress(FileNotFoundError):
            os.execv("/scope-lab-is-not-there", ["missing"])  # noqa: S606
        os._exit(FAILED_EXEC_CODE)
    os.waitpid(failed, 0)
    return {"pids": pids, "failed": failed}


def ends(a: socket.socket, b: socket.socket) -> list[Note]:
    """What tells the two ends apart in a recording."""
    return [
        {
            "inode": os.fstat(end.fileno()).st_ino,
            "port": end.getsockname()[1] if end.family == socket.AF_INET else None,
        }
        for end in (a, b)
    ]


def talk(
    client: socket.socket, server: socket.socket, times: int, asked: int, answered: int
) -> None:
    """Question and answer; both ends are here, so that each read finds all that was written."""
    for _ in range(times):
        client.sendall(bytes(asked))
        assert len(server.recv(1 << 17)) == asked
        server.sendall(bytes(answered))
        assert len(client.recv(1 << 17)) == answered


def tcp(_: str) -> Note:
    """Connections over TCP, one after the other; the last one's client closes first, as all do."""
    notes = []
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for number in range(CONNECTIONS):
            client = socket.create_connection(listener.getsockname())
            server = listener.accept()[0]
            began_ns = time.monotonic_ns()
            talk(client, server, turns(number), ASKED_BYTES, ANSWERED_BYTES)
            notes.append(
                {"ends": ends(client, server), "talked_ns": time.monotonic_ns() - began_ns}
            )
            client.close()
            assert server.recv(1) == b""
            server.close()
    return {"connections": notes}


def unix(folder: str) -> Note:
    """A Unix socket with a path."""
    path = os.path.join(folder, "lab.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(path)
        server = listener.accept()[0]
    os.unlink(path)
    talk(client, server, UNIX_TURNS, UNIX_BYTES, 2 * UNIX_BYTES)
    noted = ends(client, server)
    client.close()
    server.close()
    return {"path": path, "ends": noted}


def udp(_: str) -> Note:
    """Datagrams from one end to the other."""
    a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    b = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for end in (a, b):
        end.bind(("127.0.0.1", 0))
    a.connect(b.getsockname())
    b.connect(a.getsockname())
    for _turn in range(DATAGRAMS):
        a.send(bytes(DATAGRAM_BYTES))
        assert len(b.recv(4096)) == DATAGRAM_BYTES
    noted = ends(a, b)
    a.close()
    b.close()
    return {"ends": noted}


def pipes(folder: str) -> Note:
    """A child that answers each message by two bytes for one; then vectors, and sendfile."""
    to_child, from_child = os.pipe(), os.pipe()
    inodes = [os.fstat(pair[0]).st_ino for pair in (to_child, from_child)]
    child = os.fork()
    if not child:
        for number in range(PIPE_TURNS):
            assert len(os.read(to_child[0], 4096)) == PIPE_BYTES + number
            os.write(from_child[1], bytes(2 * (PIPE_BYTES + number)))
        os._exit(0)
    for number in range(PIPE_TURNS):
        os.write(to_child[1], bytes(PIPE_BYTES + number))
        assert len(os.read(from_child[0], 4096)) == 2 * (PIPE_BYTES + number)
    assert os.waitpid(child, 0)[1] == 0
    for fd in (*to_child, *from_child):
        os.close(fd)

    read_end, write_end = os.pipe()
    inodes.append(os.fstat(read_end).st_ino)
    for _ in range(VECTORS):
        whole = os.writev(write_end, [bytes(length) for length in VECTOR_BYTES])
        parts = [bytearray(length) for length in VECTOR_BYTES]
        assert os.readv(read_end, parts) == whole == sum(VECTOR_BYTES)
    path = os.path.join(folder, "lab.file")
    with open(path, "wb") as file:
        file.write(bytes(SENDFILE_BYTES))
    with open(path, "rb") as file:
        for _ in range(SENDFILES):
            assert os.sendfile(write_end, file.fileno(), 0, SENDFILE_BYTES) == SENDFILE_BYTES
            assert len(os.read(read_end, 4096)) == SENDFILE_BYTES
    os.unlink(path)
    os.close(read_end)
    os.close(write_end)
    return {"child": child, "inodes": inodes}


def connects(folder: str) -> Note:
    """Connections that nobody takes."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        port = bound.getsockname()[1]
        for _ in range(REFUSED):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
                assert client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
    path = os.path.join(folder, "missing.sock")
    for _ in range(NO_SOCKET):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            assert client.connect_ex(path) == errno.ENOENT
    return {"port": port, "path": path}


class Timespec(ctypes.Structure):
    """struct timespec."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def waits(_: str) -> Note:
    """A thread that sleeps, one that waits for a word that nobody changes, and some for a lock."""
    note: Note = {"locks": []}
    word = ctypes.c_uint32(0)

    def sleep() -> None:
        name_thread("lab-sleeper")
        note["sleeper"] = threading.get_native_id()
        # not time.sleep(): that waits for a moment, which is over when the thread was preempted before
        for length in SLEEPS:
            asked = Timespec(0, length)
            call(NUMBER["clock_nanosleep"], time.CLOCK_MONOTONIC, 0, ctypes.addressof(asked), 0)

    def time_out() -> None:
        name_thread("lab-futex")
        note["waiter"] = threading.get_native_id()
        limit = Timespec(0, TIMEOUT_NS)
        for _turn in range(TIMEOUTS):
            address = ctypes.addressof(word)
            call(NUMBER["futex"], address, FUTEX_WAIT_PRIVATE, 0, ctypes.addressof(limit))

    def take(lock: threading.Lock, told: Note) -> None:
        name_thread("lab-lock")
        told["tid"] = threading.get_native_id()
        told["began_ns"] = time.monotonic_ns()
        with lock:
            told["ended_ns"] = time.monotonic_ns()

    for work in (sleep, time_out):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    for _turn in range(LOCKS):
        lock, told = threading.Lock(), dict[str, Any]()
        with lock:
            thread = threading.Thread(target=take, args=(lock, told))
            thread.start()
            while "began_ns" not in told:
                time.sleep(0.001)
            time.sleep(HELD_NS / 1e9)
        thread.join()
        note["locks"].append(told)
    return note | {"word": ctypes.addressof(word)}


def tasks(_: str) -> Note:
    """Tasks of asyncio, which take turns."""

    async def lab_task(number: int) -> None:
        for turn in range(CALLS_PER_TASK):
            call(NUMBER["getppid"], TASK_TAG + number, turn, ~turn)
            await asyncio.sleep(0)

    async def together() -> None:
        await asyncio.gather(*(lab_task(number) for number in range(TASKS)))

    asyncio.run(together())
    return {}


def lab_busy(until_ns: int) -> int:
    """Compute until this thread has had so much of the CPU, rarely looking at its clock: that is a call."""
    total = 0
    while time.thread_time_ns() < until_ns:
        for number in range(50_000):
            total += number
    return total


def busy(_: str) -> Note:
    """Nothing but Python code, between two marks."""
    began_ns = time.thread_time_ns()
    count(BUSY_TAG, 1)
    lab_busy(began_ns + BUSY_NS)
    count(BUSY_TAG + 1, 1)
    return {"cpu_ns": time.thread_time_ns() - began_ns}


# Forks come before threads: a child of a process with threads has only one of them.
PARTS: dict[str, Callable[[str], Note]] = {
    part.__name__: part
    for part in (calls, forks, execs, tcp, unix, udp, pipes, connects, threads, waits, tasks, busy)
}


def main() -> None:
    folder, *chosen = sys.argv[1:]
    print("ready", flush=True)
    os.read(0, 1)
    notes = {name: part(folder) for name, part in PARTS.items() if name in (chosen or PARTS)}
    print(json.dumps({"pid": os.getpid(), **notes}), flush=True)


if __name__ == "__main__":
    main()
