"""`scope-ebpf stack`: where the threads and tasks of a live Python process are at this moment."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from scope_ebpf.cli import output
from scope_ebpf.cli.units import cut, printable

if TYPE_CHECKING:
    from rich.text import Text

    from scope_ebpf.loaders.python.frames import Frame
    from scope_ebpf.loaders.python.look import Look, NativeThread, Thread
    from scope_ebpf.loaders.python.tasks import Task

EXAMPLES = """\b
Examples:
  sudo scope-ebpf stack --pid 4242
  sudo scope-ebpf stack --pid 4242 --all-tasks     also what suspended asyncio tasks wait for
  sudo scope-ebpf stack --pid 4242 --json | jq '.threads[] | {tid, does}'
"""
MOST_NAME = 44
LEAST_FILE = 16
SHOWN_NAMES = 5
REPEATS = 3  # a frame that repeats itself more often is shown once, with how often
LONGEST_CYCLE = 8
INDENT = "    "


@click.command(epilog=EXAMPLES)
@click.option("--pid", type=click.IntRange(1), required=True, metavar="PID", help="The process.")
@click.option(
    "--all-tasks",
    is_flag=True,
    help="Also show asyncio tasks that are suspended, with what they await.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def stack(pid: int, all_tasks: bool, as_json: bool) -> None:
    """Show what each thread of a Python process does right now, and its Python stack.

    The process is read from outside: it is not stopped, and nothing is loaded into it or into the kernel.
    The innermost frame comes first. A thread that runs on while it is read is looked at until two
    readings agree; if they do not, its stack is marked, since it may be of no single moment.
    """
    from scope_ebpf.loaders.python.look import look_at

    look = look_at(pid, all_tasks=all_tasks)
    with output.results():
        if as_json:
            click.echo(json.dumps(document(look), indent=2, ensure_ascii=False))
            return
        console = output.console()
        for line in lines(look, output.width()):
            console.print(line, soft_wrap=True)


def document(look: Look) -> dict[str, Any]:
    """What --json prints."""
    held = [thread.tid for thread in look.threads if thread.holds_gil]
    parts = asdict(look)
    return {
        **parts,
        "version": ".".join(map(str, look.version)),
        "gil_held_by": held[0] if held else None,
    }


def lines(look: Look, width: int) -> Iterator[Text]:
    """The screen, line by line."""
    from rich.text import Text

    name = printable(" ".join(look.arguments)) or "(its command line is empty)"
    version = f"Python {'.'.join(map(str, look.version))}"
    head = f"process {look.pid}  "
    room = max(width - len(head) - len(version) - 2, LEAST_FILE)
    yield Text.assemble((head, "bold"), cut(name, room), "  ", (version, "dim"))
    for thread in look.threads:
        yield Text()
        yield from _thread(thread, width)
    if look.native_threads:
        yield Text()
        yield from _native(look.native_threads)
    if look.tasks is not None:
        yield Text()
        yield from _tasks(look.tasks, width)
    if look.not_shown:
        yield Text()
        yield Text(f"Not shown: {'; '.join(map(printable, look.not_shown))}.", style="dim")


def _thread(thread: Thread, width: int) -> Iterator[Text]:
    from rich.text import Text

    names = [name for name in (thread.name, thread.comm) if name]
    name = printable(names[0]) if names else ""
    if thread.interpreter:
        name += f" (interpreter {thread.interpreter})"
    if not thread.holds_gil and not thread.waits_for_gil:
        style = "green" if thread.state == "running" else "cyan"
    else:
        style = "yellow" if thread.waits_for_gil else "green"
    yield Text.assemble(
        (f"thread {thread.tid or '(ended)'}", "bold"),
        f"  {cut(name, MOST_NAME)}  " if name else "  ",
        (printable(thread.does), style),
    )
    if thread.stack.torn and thread.stack.frames:
        yield Text(f"{INDENT}(it ran on while it was read: this may be of no single moment)", "red")
    yield from _frames(thread.stack.frames, width)
    if thread.stack.cut:
        told = "more frames could not be read" if thread.stack.frames else "could not be read"
        yield Text(f"{INDENT}({told})", style="red")
    elif not thread.stack.frames:
        yield Text(f"{INDENT}(no Python frames)", style="dim")


def _frames(frames: Sequence[Frame], width: int) -> Iterator[Text]:
    from rich.text import Text

    shown = list(_folded([(_name(frame), _place(frame)) for frame in frames]))
    longest = max((len(name) for name, _, _ in shown if name is not None), default=0)
    column = min(longest, MOST_NAME, max(width // 2 - len(INDENT), LEAST_FILE))
    for name, place, repeats in shown:
        if name is None:
            yield Text(f"{INDENT}{place}, {repeats} more times", style="dim")
            continue
        room = max(width - len(INDENT) - column - 2, LEAST_FILE)
        yield Text.assemble(
            INDENT, (f"{cut(name, column):{column}}", "bold"), "  ", _end_of(place, room)
        )


def _folded(frames: list[tuple[str, str]]) -> Iterator[tuple[str | None, str, int]]:
    """Frames with repetitions told as a number: of one, or of a few that call each other.

    >>> list(_folded([("f", "a.py:2")] * 1000))
    [('f', 'a.py:2', 1), (None, '… the last frame', 999)]
    >>> list(_folded([("f", "2"), ("g", "4")] * 50))[2:]
    [(None, '… the last 2 frames', 49)]
    """
    at = 0
    while at < len(frames):
        size, times = _cycle(frames, at)
        for name, place in frames[at : at + size]:
            yield name, place, 1
        if times > 1:
            what = "frame" if size == 1 else f"{size} frames"
            yield None, f"… the last {what}", times - 1
        at += size * times


def _cycle(frames: list[tuple[str, str]], at: int) -> tuple[int, int]:
    """How many frames from here on repeat themselves, and how often they are there."""
    for size in range(1, LONGEST_CYCLE + 1):
        times = 1
        part = frames[at : at + size]
        while frames[at + times * size : at + (times + 1) * size] == part:
            times += 1
        if times > REPEATS:
            return size, times
    return 1, 1


def _name(frame: Frame) -> str:
    return "(could not be read)" if frame.name is None else printable(frame.name)


def _place(frame: Frame) -> str:
    if frame.file is None:
        return "?"
    line = "" if frame.line is None else f":{frame.line}"
    return printable(frame.file) + line


def _end_of(text: str, room: int) -> str:
    """The text, or its end and an ellipsis: of a path the end tells more.

    >>> _end_of("/srv/app/views.py:12", 20), _end_of("/srv/app/views.py:12", 14)
    ('/srv/app/views.py:12', '…/views.py:12')
    """
    if len(text) <= room:
        return text
    end = text[-(room - 1) :]
    _, slash, rest = end.partition("/")
    if slash and not end.startswith("/"):
        return f"…/{rest}"
    return f"…{end}"


def _native(threads: Sequence[NativeThread]) -> Iterator[Text]:
    """Threads without Python, those that do the same in one line."""
    from rich.text import Text

    def key(thread: NativeThread) -> tuple[str, str]:
        return thread.comm, thread.does

    for (comm, does), members in groupby(sorted(threads, key=key), key):
        tids = [str(thread.tid) for thread in members]
        label = "thread" if len(tids) == 1 else f"{len(tids)} threads"
        shown = ", ".join(tids[:SHOWN_NAMES]) + (", …" if len(tids) > SHOWN_NAMES else "")
        yield Text.assemble(
            (f"{label} without Python", "bold"), f"  {printable(comm)} ({shown})  ", does
        )


def _tasks(tasks: Sequence[Task], width: int) -> Iterator[Text]:
    """Tasks, those that stand at the same place together."""
    from rich.text import Text

    if not tasks:
        yield Text("no asyncio tasks", style="bold")
        return
    yield Text(f"{len(tasks)} asyncio task{'' if len(tasks) == 1 else 's'}", style="bold")
    groups: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        key = (task.state, task.awaits, task.torn, tuple(task.frames))
        groups.setdefault(key, []).append(task)
    for members in groups.values():
        first = members[0]
        yield Text()
        names = [printable(task.name) if task.name else "(no name)" for task in members]
        more = len(names) - SHOWN_NAMES
        label = ", ".join(cut(name, MOST_NAME) for name in names[:SHOWN_NAMES])
        label += f" and {more} more" if more > 0 else ""
        each = "each " if len(members) > 1 else ""
        yield Text.assemble(
            ("task " if len(members) == 1 else f"{len(members)} tasks ", "bold"),
            (label, "bold"),
            "  ",
            (each + _task_state(first), "cyan" if first.state == "waiting" else "green"),
        )
        if first.torn:
            yield Text(f"{INDENT}(it ran on while it was read)", "red")
        yield from _frames(first.frames, width)


def _task_state(task: Task) -> str:
    told = {
        "waiting": f"awaits {task.awaits}",
        "ready": "is ready, waits for its turn",
        "running": "runs in a thread above",
        "created": "has not begun",
        "ended": "ends",
    }
    return printable(told.get(task.state, task.state))
