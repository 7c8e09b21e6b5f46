"""Suspends asyncio tasks in all kinds of ways, and tells what each one is, by what they say themselves."""

import asyncio
import gc
import json
import os
import sys
import types

WRAPPERS = ("coroutine_wrapper", "async_generator_asend", "async_generator_athrow", "FutureIter")
GENERATORS = {types.CoroutineType: "cr", types.GeneratorType: "gi", types.AsyncGeneratorType: "ag"}
AWAITED = {"cr": "cr_await", "gi": "gi_yieldfrom", "ag": "ag_await"}
COUNT = 300


def chain(awaited):
    """Frames of what is awaited, innermost first."""
    frames = []
    while awaited is not None:
        kind = GENERATORS.get(type(awaited))
        if kind is not None:
            frame = getattr(awaited, kind + "_frame")
            code = frame.f_code
            frames.append(
                [getattr(code, "co_qualname", code.co_name), code.co_filename, frame.f_lineno]
            )
            awaited = getattr(awaited, AWAITED[kind])
        elif type(awaited).__name__ in WRAPPERS:
            awaited = next((r for r in gc.get_referents(awaited) if type(r) in GENERATORS), None)
        else:
            break
    return frames[::-1]


class Step:
    """Awaits by a method, which is a generator."""

    def __init__(self, future):
        self.future = future

    def __await__(self):
        return (yield from self.future)


class Resource:
    async def __aenter__(self):
        await leaf(self)

    async def __aexit__(self, *_):
        pass

    def __await__(self):
        return forever().__await__()


def forever():
    return asyncio.get_event_loop().create_future()


async def leaf(future):
    return await future


async def nested(depth, future):
    if depth:
        return await nested(
            depth - 1,
            future,
        )
    return await leaf(future)


async def numbers():
    try:
        yield 1
        await asyncio.sleep(1000)
    finally:
        pass


async def over():
    async for number in numbers():
        assert number


async def thrown():
    made = numbers()
    async for _ in made:
        break
    await forever()


async def within():
    async with Resource():
        pass


@types.coroutine
def old_style(future):
    yield from future


def futures(future):
    while True:
        yield future


@types.coroutine
def by_hand(future):
    # another generator is on its stack, but it does not await that one
    for each in futures(future):
        each._asyncio_future_blocking = True
        yield each


async def wrapped(awaitable):
    await awaitable


async def turns():
    while True:
        await asyncio.sleep(0)


async def quick():
    return 1


class Own(asyncio.Task):  # type: ignore[type-arg]  # 3.8 has no Task[...]
    """A task of another class."""


def look(loop, told):
    """Called by the loop, outside of all tasks: tells, and stands still."""
    late = loop.create_task(quick(), name="created")
    note = {}
    for task in asyncio.all_tasks(loop):
        note[task.get_name()] = chain(task.get_coro())
    print(json.dumps(note), flush=True)
    os.read(0, 1)
    late.cancel()
    loop.stop()


async def main():
    loop = asyncio.get_running_loop()
    make = loop.create_task
    tasks = [
        make(nested(7, forever()), name="nested"),
        make(over(), name="over"),
        make(thrown(), name="thrown"),
        make(within(), name="within"),
        make(wrapped(Step(forever())), name="step"),
        make(wrapped(old_style(forever())), name="old style"),
        make(wrapped(by_hand(forever())), name="by hand"),
        make(turns(), name="turns"),
        make(asyncio.sleep(1000), name="sl\u00e9ep \u540d"),
        Own(leaf(forever()), loop=loop, name="own"),
        asyncio.tasks._PyTask(leaf(forever()), loop=loop, name="in Python"),  # type: ignore[attr-defined]
        make(quick(), name="done"),
    ]
    many = [make(leaf(forever()), name=f"many {number}") for number in range(COUNT)]
    tasks.append(make(leaf(tasks[0]), name="for a task"))
    tasks.append(make(wrapped(asyncio.gather(*tasks[:2])), name="for two"))
    if hasattr(asyncio, "eager_task_factory"):
        loop.set_task_factory(asyncio.eager_task_factory)
        tasks.append(loop.create_task(nested(2, forever()), name="eager"))
        loop.set_task_factory(None)
    for _ in range(20):
        await asyncio.sleep(0)
    loop.call_soon(look, loop, many)
    await forever()


print("ready", flush=True)
sys.stdin.read(1)
maker: types.ModuleType = asyncio
if sys.argv[1:] == ["uvloop"]:
    import uvloop

    maker = uvloop
loop = maker.new_event_loop()
asyncio.set_event_loop(loop)
kept = loop.create_task(main(), name="main")
loop.run_forever()
