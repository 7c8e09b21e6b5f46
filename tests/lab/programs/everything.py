"""Does a known number of everything that all loaders record; see tests/live/recording.py for the gate."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time

GETPPIDS, PIPED, UNIX, TCP, UDP, SLEEPS, MISSING = 23, 29, 19, 17, 5, 7, 11


def descend(*command: str) -> int:
    """Fork a child that executes a command, or is killed if there is none; its wait status."""
    child = os.fork()
    if child == 0:
        if command:
            os.execv(command[0], command)  # noqa: S606 - its arguments are fixed
        signal.pause()
    if not command:
        time.sleep(0.2)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def exchange(one: socket.socket, other: socket.socket, times: int) -> None:
    """Requests and answers, each in one piece."""
    for number in range(times):
        one.sendall(b"request %d\n" % number)
        other.recv(4096)
        other.sendall(b"answer %d\n" % number + b"." * 700)
        one.recv(4096)


def main() -> None:
    """Wait at the gate, then work."""
    pipe = os.pipe()
    before = socket.socketpair()
    before[0].sendall(b"seven b")  # in the queue when the recording begins
    print("ready", flush=True)
    sys.stdin.read(1)

    for _ in range(GETPPIDS):
        os.getppid()
    for number in range(PIPED):
        os.write(pipe[1], b"x" * (number + 1))
        os.read(pipe[0], 4096)
    before[1].recv(4096)
    exchange(*before, UNIX)
    exchange(*socket.socketpair(), UNIX)
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        exchange(client, server.accept()[0], TCP)
        client.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(UDP):
                sender.sendto(b"datagram", receiver.getsockname())
                receiver.recv(100)
    one, other = socket.socketpair()
    one.sendmsg([b"in ", b"three ", b"pieces"])
    other.recv(100)
    os.writev(pipe[1], [b"two ", b"more"])
    os.readv(pipe[0], [bytearray(3), bytearray(100)])
    with socket.socket() as refused:
        refused.connect_ex(("127.0.0.1", 1))
    for _ in range(SLEEPS):
        time.sleep(0.01)
    for _ in range(MISSING):
        with contextlib.suppress(OSError):
            os.open("/nonexistent", os.O_RDONLY)
    thread = threading.Thread(target=os.getppid)
    thread.start()
    thread.join()
    statuses = [descend("/bin/true"), descend("/bin/sh", "-c", "exit 3"), descend()]
    print(json.dumps({"statuses": statuses}), flush=True)


main()
