"""Processes that take the CPU from each other in system calls, of which each tells who made it.

    preempted.py CALLS TURNS

Says `ready`, waits for a byte on stdin, and tells the ids of its children in JSON. Each child makes CALLS
calls of getppid with its number, the turn and its complement as arguments, and sleeps for a moment now and
then, so that its timer takes the CPU from another child. Then it sends TURNS messages to itself, in two
pieces that the probes put together, of which each says the same; an answer makes each of them a turn of its
connection.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

from tests.lab.workload import NUMBER, call

CHILDREN = 6
FIRST_TAG = 7000
SLEEP_EACH, SLEEP_SECONDS = 97, 0.0005
ANSWER = b"answer"
# Messages and answers, sent and received.
ROWS_PER_TURN = 4


def message(child: int, turn: int) -> tuple[bytes, bytes]:
    """The pieces of a message."""
    return b"child %04d turn %06d " % (child, turn), bytes([ord("a") + child]) * (40 + turn % 50)


def work(child: int, calls: int, turns: int) -> None:
    """What one child does."""
    for turn in range(calls):
        call(NUMBER["getppid"], FIRST_TAG + child, turn, ~turn)
        if turn % SLEEP_EACH == child:
            time.sleep(SLEEP_SECONDS)
    ours, theirs = socket.socketpair()
    for turn in range(turns):
        pieces = message(child, turn)
        os.writev(ours.fileno(), pieces)
        assert theirs.recv(4096) == b"".join(pieces)
        theirs.send(ANSWER)
        assert ours.recv(4096) == ANSWER


def main() -> None:
    calls, turns = map(int, sys.argv[1:])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    os.read(0, 1)
    pids = []
    for child in range(CHILDREN):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                work(child, calls, turns)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    sys.stdout.write(json.dumps({"pids": pids}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
