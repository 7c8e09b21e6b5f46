"""Blocks threads in all kinds of frames, and tells what each one's stack is, by sys._getframe()."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

DEPTH = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
stacks: dict[str, list[list[object]]] = {}
recorded = threading.Semaphore(0)
never = threading.Lock()
never.acquire()
other = threading.Lock()
reader, writer = os.pipe()
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(1)
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
child = subprocess.Popen([sys.executable, "-c", "import os; os.read(0, 1)"], stdin=subprocess.PIPE)


def here():
    """Remembers the stack of the caller, whose next step in the same line is to block."""
    frames: list[list[object]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        name = getattr(code, "co_qualname", code.co_name)
        frames.append([name, code.co_filename, frame.f_lineno])
        frame = frame.f_back
    stacks[threading.current_thread().name] = frames
    recorded.release()
    return 1


def in_lock():
    with other:
        try:
            never.acquire(here())
        finally:
            pass


# fmt: off
class Method:
    """Frames of methods, of a property, of a lambda and of a comprehension."""

    @property
    def value(self):
        return [
            (lambda number: self.block(  # noqa: PLC3002, PLW0108 - frames of all kinds
                number,
            ))(number)
            for number in (1, 2)
        ]

    def block(self, number):
        return os.read(reader, here())


def generate(count):
    if count:
        yield from generate(count - 1)
    else:
        yield server.recv(here())


def in_generator():
    return [number + 1
            for number in
            generate(5)]


def deep(count):
    # a comment, and a statement over lines
    return (
        deep(count - 1)
        if count
        else time.sleep(1000 * here())
    )


# fmt: on
def in_sort():
    """A frame that C calls."""
    sorted([2, 1], key=lambda number: listener._accept(*[][: here() - 1]))  # type: ignore[attr-defined]


def in_child():
    os.waitpid(child.pid, 0 * here())


SOURCE = """

def n\u00e4ive_\u540d\u524d():
    return \\
        here() and client.recv(1)

def \U00020000wide():
    return n\u00e4ive_\u540d\u524d()

\U00020000wide()
"""


def in_other_names():
    name = "/srv/caf\u00e9/\u540d\u524d \U0001f40d.py"
    exec(compile(SOURCE, name, "exec"), {"here": here, "client": client})  # noqa: S102 - of this file


class Threaded(threading.Thread):
    """A thread with a name that is no identifier."""

    def run(self):
        self._target()  # type: ignore[attr-defined]


for name, target in [
    ("lock", in_lock),
    ("method", lambda: Method().value),
    ("generator", in_generator),
    ("deep", lambda: deep(DEPTH)),
    ("sort", in_sort),
    ("child", in_child),
    ("\u540d\u524d", in_other_names),
]:
    sys.setrecursionlimit(DEPTH + 500)
    threading.stack_size(64 << 20)
    Threaded(target=target, name=name, daemon=True).start()
    if not recorded.acquire(timeout=20):
        sys.exit(1)


def tell():
    """Prints all stacks."""
    print(json.dumps(stacks), flush=True)
    return 1


def main():
    print("ready", flush=True)
    sys.stdin.read(1)
    os.read(0, here() and tell())


try:
    main()
finally:
    child.kill()
