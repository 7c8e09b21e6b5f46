"""Calls functions that are watched, and tells when. Runs in every CPython from 3.8 on, without packages."""

import contextlib
import functools
import json
import os
import sys
import threading
import time
import traceback
import warnings

COUNT = 23
CALLS = []  # type: ignore[var-annotated]


def work(mode, number=0, *, text="x"):
    """What the mode says."""
    if mode == "sleep":
        time.sleep(0.005)
    elif mode == "recurse" and number:
        return work("recurse", number - 1)
    elif mode == "raise":
        time.sleep(0.001)
        raise ValueError(number)
    elif mode == "warn":  # looks a line of this frame up, as an exception does
        warnings.warn("warned", stacklevel=1)
        number += sys._getframe().f_lineno * 0
        time.sleep(0.002)
    elif mode == "gate":
        sys.stdin.read(1)
    elif mode == "handle":
        try:
            raise KeyError(number)
        except KeyError:
            time.sleep(0.002)
    elif mode == "finally":
        try:
            work("raise", number)
        finally:
            time.sleep(0.002)
    return number


def show(value, other=None):
    """Does nothing with values."""
    return other


def steps(count):
    """A generator."""
    yield from range(count)


async def waited(number):
    """A coroutine."""
    return number


class Shop:
    """Has methods of all kinds."""

    @functools.wraps(work)
    def not_used(self):
        """Refers to another function."""

    @staticmethod
    def total(a, b):
        """A static method."""
        return a + b

    @classmethod
    def make(cls, name):
        """A class method."""
        return cls()

    @property
    def size(self):
        """A property."""
        return 1

    def price(self, item):
        """A method."""
        return item


class Bigger(Shop):
    """Inherits."""


def decorated(function):
    """A decorator as most are."""

    @functools.wraps(function)
    def inner(*arguments):
        return function(*arguments)

    return inner


@decorated
def wrapped(a):
    """Is wrapped."""
    return a


def call(mode, number=0, **more):
    """Call work(), and note when."""
    begin = time.monotonic_ns()
    try:
        work(mode, number, **more)
    except ValueError:
        end = time.monotonic_ns()
        time.sleep(0.004)  # the exception is still there, and the call is over
    else:
        end = time.monotonic_ns()
    CALLS.append((mode, number, threading.get_ident(), begin, end))


def noise():
    """Touch what is touched by calls, without one."""
    for _ in range(COUNT):
        found = [work.__code__, work.__code__.co_firstlineno]
        traceback.extract_stack()
        found.append(functools.partial(work, "plain"))


def in_thread(gate):
    """Wait, then call."""
    gate.wait()
    for number in range(COUNT):
        call("thread", number)


def do_work():
    """All modes of work()."""
    gate = threading.Event()
    threads = [threading.Thread(target=in_thread, args=(gate,)) for _ in range(2)]
    threads[0].start()
    ready()
    threads[1].start()  # after the breakpoints were set
    for number in range(COUNT):
        call("plain", number, text=f"text {number}")
        noise()
        call("sleep", number)
        call("raise", number)
        call("warn", number)
        call("handle", number)
        call("finally", number)
    call("recurse", COUNT)
    gate.set()
    for thread in threads:
        thread.join()
    if os.fork() == 0:
        for number in range(COUNT):
            work("child", number)
        os._exit(0)
    os.wait()
    kept = []
    try:
        work("raise", -1)
    except ValueError as error:
        kept.append(error)
    work("last")
    return {"calls": CALLS}


VALUES = (
    None, True, False, 0, 1, -1, 2**30, -(2**45), 2**62, -(2**62), 2**200, 1.5, -0.0, b"", b"by\0tes",
    "", "ascii", "na\xefve", "\u65e5\u672c", "\U0001f600!", "long" * 50, [1], COUNT,
)  # fmt: skip


def do_show():
    """Every kind of value."""
    ready()
    for value in VALUES:
        show(value, "behind")
    return {}


def do_names():
    """Functions that have other names than their own."""
    shop = Bigger()
    ready()
    for number in range(COUNT):
        shop.price(number)
        Shop.total(number, 2)
        Bigger.make("x")
        assert shop.size == 1
        wrapped(number)
        list(steps(number))
        with contextlib.suppress(StopIteration):
            waited(number).send(None)
    return {}


def do_endless():
    """A child that was there before calls, and so do its threads; then a call does not end."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)
        for number in range(COUNT):
            work("child", number)
        os._exit(0)
    os.close(reading)
    ready()
    os.close(writing)
    os.wait()
    print(json.dumps("begun"), flush=True)
    work("gate") if len(sys.argv) < 3 else None
    return {}


def ready():
    """Stand at the gate."""
    print("ready", flush=True)
    sys.stdin.read(1)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(globals()["do_" + sys.argv[1]]()), flush=True)
