"""A target that knows its own Python stack at any moment, and writes it into a file as it goes.

    self_stack.py FILE SECONDS THREADS DEPTH

Each thread has a part of FILE: a log of when it was where. An entry is (CLOCK_MONOTONIC ns, node,
kind): at that time the stack was exactly that of the node, and this function's own helpers. Before
and after whatever changes the stack there is an entry, so between two entries that differ the
stack was one of the two, or one on the way between them, and between two of the same node it was that
all the time. Nothing has to be tolerated in time. Kinds:

    ENTER   the first moment in a frame, also of a generator that goes on
    HERE    before and after something is called
    SPIN    until the next entry it is in a loop on the lines that are marked `# spin`
    LEAVE   the last moment in a frame: of the next entry's node there may be another one in between
    MADE    a coroutine was made, whose frame was on the stack for a moment (from 3.11 on)

Lines that call a function of the tree are marked `# calls NAME`. Runs in CPython 3.8 and later, in
pure Python, and neither looks at frames nor traces itself: that changes them.

Says `ready`, and after its gate works for SECONDS; then tells for each thread its tid, how many
entries it has, its nodes as [parent, name, silent], and its CPU time in seconds. A silent node makes
no entries itself.
"""

import functools
import json
import mmap
import socket
import struct
import sys
import threading
import time

ENTER, HERE, SPIN, LEAVE, MADE = 1, 2, 3, 4, 5
ENTRY = struct.Struct("<qIHH")
ENTRIES = 1 << 22  # of each thread
# long enough for the clock to tick in it, short enough for all of the tree to have its share
ROUNDS = range(2000)
HEAVY_ROUNDS = range(10_000)
WAIT_SECONDS = 0.002
# How far apart the calls of a kind are: enough for each message to be the head of a turn.
APART_NS = 15_000_000

pack, now = ENTRY.pack_into, time.monotonic_ns


class Log:
    """The log of one thread: where its next entry goes, and the nodes that it met."""

    def __init__(self, memory, number):
        self.memory = memory
        self.first = self.at = number * ENTRIES * ENTRY.size
        self.end = self.first + ENTRIES * ENTRY.size
        self.nodes = [(0, NAMES["run_tree"], False)]
        self.children = {}
        self.tid = 0
        self.cpu_seconds = 0.0


def here(log, node, kind):
    pack(log.memory, log.at, now(), node, kind, 0)
    log.at += 16


def met(log, parent, name, silent=True):
    """The node of a frame; as it stands, of one that makes no entry itself."""
    if (parent, name) not in log.children:
        log.children[parent, name] = len(log.nodes)
        log.nodes.append((parent, NAMES[name], silent))
    return log.children[parent, name]


def begin(log, parent, name):
    node = met(log, parent, name, silent=False)
    here(log, node, ENTER)
    return node


# ---- the tree ------------------------------------------------------------------------------------


def leaf(log, parent):
    node = begin(log, parent, "leaf")
    here(log, node, SPIN)  # spin
    for _ in ROUNDS:  # spin
        pass  # spin
    here(log, node, LEAVE)  # spin


def descend(log, parent, depth):
    node = begin(log, parent, "descend")
    if depth % 5 == 0:
        here(log, node, SPIN)  # spin
        for _ in ROUNDS:  # spin
            pass  # spin
        here(log, node, HERE)  # spin
    if depth:
        descend(log, node, depth - 1)  # calls descend
        here(log, node, HERE)
    else:
        here(log, node, SPIN)  # spin
        for _ in HEAVY_ROUNDS:  # spin
            pass  # spin
        here(log, node, HERE)  # spin
    here(log, node, LEAVE)


def inner_numbers(log, parent, number):
    node = begin(log, parent, "inner_numbers")
    for value in range(number):
        leaf(log, node)  # calls leaf
        here(log, node, LEAVE)
        yield value
        here(log, node, ENTER)
    here(log, node, LEAVE)


def numbers(log, parent):
    node = begin(log, parent, "numbers")
    here(log, node, SPIN)  # spin
    for _ in ROUNDS:  # spin
        pass  # spin
    here(log, node, LEAVE)  # spin
    yield 0
    here(log, node, ENTER)
    yield from inner_numbers(log, node, 3)  # calls inner_numbers
    here(log, node, LEAVE)


def consume(log, parent):
    node = begin(log, parent, "consume")
    for _ in numbers(log, node):  # calls numbers
        here(log, node, SPIN)  # spin
        for _ in ROUNDS:  # spin
            pass  # spin
        here(log, node, HERE)  # spin
    here(log, node, LEAVE)


def close_over(log, parent):
    node = begin(log, parent, "close_over")

    def closure(inside):
        mine = begin(log, inside, "closure")
        here(log, mine, SPIN)  # spin
        for _ in ROUNDS:  # spin
            pass  # spin
        here(log, mine, HERE)  # spin
        leaf(log, mine)  # calls leaf
        here(log, mine, LEAVE)

    here(log, node, HERE)
    closure(node)  # calls closure
    here(log, node, HERE)
    functools.partial(closure, node)()  # calls closure
    here(log, node, LEAVE)


def fail(log, parent, depth):
    node = begin(log, parent, "fail")
    here(log, node, SPIN)  # spin
    for _ in ROUNDS:  # spin
        pass  # spin
    here(log, node, HERE)  # spin
    if depth == 0:
        raise ValueError
    fail(log, node, depth - 1)  # calls fail


def catch(log, parent):
    node = begin(log, parent, "catch")
    try:
        fail(log, node, 4)  # calls fail
    except ValueError:
        here(log, node, SPIN)  # spin
        for _ in ROUNDS:  # spin
            pass  # spin
        here(log, node, HERE)  # spin
    here(log, node, LEAVE)


def weigh(log, parent, item):
    node = begin(log, parent, "weigh")
    here(log, node, SPIN)  # spin
    for _ in ROUNDS:  # spin
        pass  # spin
    here(log, node, LEAVE)  # spin
    return -item


def by_c(log, parent):
    """Python called by C: key functions, map, a lambda, and a C function that runs long itself."""
    node = begin(log, parent, "by_c")
    sorted((3, 1, 2), key=functools.partial(weigh, log, node))  # calls weigh
    here(log, node, HERE)
    inside = met(log, node, "<lambda>")
    here(log, node, HERE)
    list(map(lambda _: leaf(log, inside), (1, 2)))  # noqa: C417  # calls <lambda>  # calls leaf
    here(log, node, SPIN)  # spin
    sum(HEAVY_ROUNDS)  # spin
    here(log, node, HERE)  # spin
    here(log, node, LEAVE)


def comprehend(log, parent):
    """A comprehension is a function of its own up to 3.11; a generator expression always is."""
    node = begin(log, parent, "comprehend")
    inside = met(log, node, "<listcomp>") if sys.version_info < (3, 12) else node
    here(log, node, HERE)
    [leaf(log, inside) for _ in range(3)]  # calls <listcomp>  # calls leaf
    here(log, node, HERE)
    inside = met(log, node, "<genexpr>")
    here(log, node, HERE)
    sum(weigh(log, inside, item) for item in (1, 2))  # calls <genexpr>  # calls weigh
    here(log, node, LEAVE)


class Thing:
    """Calls that the interpreter makes without C in between, from 3.11 to 3.13 one kind more each."""

    def __init__(self, log, parent):
        node = begin(log, parent, "__init__")
        self.log = log
        self.parent = parent
        here(log, node, SPIN)  # spin
        for _ in ROUNDS:  # spin
            pass  # spin
        here(log, node, HERE)  # spin
        leaf(log, node)  # calls leaf
        here(log, node, LEAVE)

    @property
    def value(self):
        node = begin(self.log, self.parent, "value")
        here(self.log, node, SPIN)  # spin
        for _ in ROUNDS:  # spin
            pass  # spin
        here(self.log, node, LEAVE)  # spin
        return 1

    def __getitem__(self, key):
        node = begin(self.log, self.parent, "__getitem__")
        here(self.log, node, SPIN)  # spin
        for _ in ROUNDS:  # spin
            pass  # spin
        here(self.log, node, LEAVE)  # spin
        return key

    def __lt__(self, other):
        node = begin(self.log, self.parent, "__lt__")
        here(self.log, node, SPIN)  # spin
        for _ in ROUNDS:  # spin
            pass  # spin
        here(self.log, node, LEAVE)  # spin
        return True


def objects(log, parent):
    node = begin(log, parent, "objects")
    for _ in range(3):
        thing = Thing(log, node)  # calls __init__
        here(log, node, HERE)
        thing.value  # noqa: B018  # calls value
        here(log, node, HERE)
        thing[1]  # calls __getitem__
        here(log, node, HERE)
        sorted((thing, thing))  # calls __lt__
        here(log, node, HERE)
    here(log, node, LEAVE)


class Pause:
    """What a coroutine awaits to be stopped."""

    # given from outside: an __init__ of Python would be a frame that the log does not have
    log = None
    parent = 0

    def __await__(self):
        node = begin(self.log, self.parent, "__await__")
        here(self.log, node, LEAVE)
        yield
        here(self.log, node, ENTER)
        here(self.log, node, LEAVE)


async def pausing(log, parent):
    node = begin(log, parent, "pausing")
    leaf(log, node)  # calls leaf
    here(log, node, LEAVE)


async def working(log, parent, pause):
    node = begin(log, parent, "working")
    await pausing(log, node)  # calls pausing
    here(log, node, SPIN)  # spin
    for _ in ROUNDS:  # spin
        pass  # spin
    here(log, node, HERE)  # spin
    pause.parent = node
    here(log, node, HERE)
    await pause  # calls __await__
    here(log, node, HERE)
    leaf(log, node)  # calls leaf
    here(log, node, LEAVE)


def drive(log, parent):
    """Steps of a coroutine, as an event loop makes them."""
    node = begin(log, parent, "drive")
    pause = Pause()
    pause.log = log
    here(log, node, HERE)
    step = working(log, node, pause)  # calls working
    here(log, met(log, node, "working", silent=False), MADE)
    here(log, node, HERE)
    step.send(None)  # calls working
    here(log, node, SPIN)  # spin
    for _ in ROUNDS:  # spin
        pass  # spin
    here(log, node, HERE)  # spin
    try:
        step.send(None)  # calls working
    except StopIteration:
        here(log, node, HERE)
    here(log, node, LEAVE)


def wait(log, parent):
    """A call that blocks long enough for its stack to be taken."""
    node = begin(log, parent, "wait")
    time.sleep(WAIT_SECONDS)
    here(log, node, LEAVE)


def send(log, parent, ends):
    node = begin(log, parent, "send")
    ends[0].send(b"a message")
    ends[1].recv(64)
    here(log, node, LEAVE)


BRANCHES = (leaf, consume, close_over, catch, by_c, comprehend, objects, drive)


def run_tree(log, seconds, depth, ends):
    """The root: all of a thread's log lies within this call."""
    here(log, 0, ENTER)
    end_ns = now() + seconds * 1_000_000_000
    sent_ns = 0
    while now() < end_ns:
        # whatever a round may take, it fits
        if log.at + (1 << 16) * ENTRY.size > log.end:
            raise MemoryError("the log is too small for so many seconds")
        for branch in BRANCHES:
            here(log, 0, HERE)
            branch(log, 0)  # calls any
            here(log, 0, HERE)
        descend(log, 0, depth)  # calls descend
        here(log, 0, HERE)
        if now() - sent_ns > APART_NS:
            here(log, 0, HERE)
            wait(log, 0)  # calls wait
            here(log, 0, HERE)
            send(log, 0, ends)  # calls send
            here(log, 0, HERE)
            sent_ns = now()
    here(log, 0, LEAVE)


def main():
    """Prepare, wait at the gate, work, tell."""
    path, seconds, threads, depth = sys.argv[1], *map(int, sys.argv[2:])
    with open(path, "w+b") as file:
        file.truncate(threads * ENTRIES * ENTRY.size)
        memory = mmap.mmap(file.fileno(), 0)
    logs = [Log(memory, number) for number in range(threads)]
    sys.setrecursionlimit(10_000)
    print("ready", flush=True)
    sys.stdin.read(1)

    def work(log):
        log.tid = threading.get_native_id()
        ends = socket.socketpair()
        begun = time.thread_time()
        run_tree(log, seconds, depth, ends)
        log.cpu_seconds = time.thread_time() - begun

    others = [threading.Thread(target=work, args=(log,)) for log in logs[1:]]
    for thread in others:
        thread.start()
    work(logs[0])
    for thread in others:
        thread.join()
    told = [
        [log.tid, (log.at - log.first) // ENTRY.size, log.nodes, log.cpu_seconds] for log in logs
    ]
    print(json.dumps(told), flush=True)


def names_of(code):
    """The names by which functions are known: co_qualname, up to 3.10 co_name."""
    for constant in code.co_consts:
        if hasattr(constant, "co_name") and constant.co_name != "Log":
            yield constant.co_name, getattr(constant, "co_qualname", constant.co_name)
            yield from names_of(constant)


with open(__file__) as own:
    # of two with the same name, such as lambdas, the first one is the tree's
    NAMES = dict(reversed(list(names_of(compile(own.read(), __file__, "exec")))))

if __name__ == "__main__":
    main()
