"""`scope-ebpf stack` on every CPython of this machine: against what the targets say of themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from click.testing import CliRunner

from scope_ebpf.cli.stack import stack
from scope_ebpf.errors import ScopeError, TargetError
from scope_ebpf.loaders.python.interpreters import Interpreter as Found
from scope_ebpf.loaders.python.interpreters import find_interpreter
from scope_ebpf.loaders.python.look import Look, look_at
from scope_ebpf.loaders.python.memory import ProcessMemory
from scope_ebpf.loaders.python.objects import Objects, Unreadable
from tests.live.pythons import Python, pythons
from tests.live.recording import PROGRAMS, Target
from tests.live.roots import clear, running

pytestmark = pytest.mark.live

PATIENCE_SECONDS = 10
# co_name up to 3.10, then co_qualname
HOLDER_RUN = {False: "run", True: "Thread.run"}
Result = TypeVar("Result")


@pytest.fixture(params=pythons(), ids=str)
def python(request) -> Iterator[Python]:
    yield request.param
    clear(request.param)


@contextmanager
def target(python: Python, name: str, *arguments: object) -> Iterator[Target]:
    with Target(*running(python, PROGRAMS / f"{name}.py", *arguments)) as process:
        yield process


def soon(ask: Callable[[], Result | None]) -> Result:
    """The first answer; threads need a moment until they block."""
    end = time.monotonic() + PATIENCE_SECONDS
    while (answer := ask()) is None:
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return answer


def listed(frames: Any) -> list[list[object]]:
    return [[frame.name, frame.file, frame.line] for frame in frames]


def test_objects_of_every_layout_are_read(python) -> None:
    with target(python, "stack_objects") as process:
        process.open_gate()
        note = process.note()
        found = find_interpreter(process.pid)
        assert isinstance(found, Found)
        with ProcessMemory(process.pid) as memory:
            objects = Objects(memory, found.layout)
            for address, kind, text in note["values"]:
                value = objects.value(address)
                assert objects.type_name(address) == kind
                assert (value.hex() if isinstance(value, bytes) else str(value)) == text
            for address, items in note["containers"].values():
                assert sorted(objects.items(address)) == items
            for address, pairs in note["dicts"].values():
                assert [list(pair) for pair in objects.pairs(address)] == pairs
            for address, name, value in note["attributes"]:
                try:
                    assert objects.attribute(address, name) == value
                except Unreadable:
                    assert value is None, name
            for address, referent in note["references"]:
                assert objects.referent(address) == referent


def test_garbage_is_unreadable(python) -> None:
    with target(python, "stack_objects") as process:
        process.open_gate()
        none = process.note()["none"]
        found = find_interpreter(process.pid)
        assert isinstance(found, Found)
        with ProcessMemory(process.pid) as memory:
            objects = Objects(memory, found.layout)
            reads = [objects.text, objects.integer, objects.items, objects.data, objects.referent]
            for address in (0, 1, 8, none + 8, found.runtime, found.address, 1 << 63, 2**64 - 8):
                for read in [*reads, objects.value, lambda a: list(objects.pairs(a))]:
                    with pytest.raises(Unreadable):
                        read(address)  # type: ignore[operator]


def test_stacks_are_exactly_those_that_the_threads_tell(python) -> None:
    with target(python, "stack_threads") as process:
        process.open_gate()
        note = process.note()
        words = {
            "MainThread": r"reads from fd 0 \(pipe\)",
            "lock": "waits for a lock",
            "method": r"reads from fd \d+ \(pipe\)",
            "generator": r"reads from fd \d+ \(TCP 127.0.0.1:\d+ to 127.0.0.1:\d+\)",
            "deep": r"sleeps( for \d+\.\d s( more)?)?",
            "sort": r"waits for a connection on fd \d+ \(TCP 127.0.0.1:\d+, listening\)",
            "child": r"waits for child process \d+",
            "名前": r"reads from fd \d+ \(TCP 127.0.0.1:\d+ to 127.0.0.1:\d+\)",
        }

        def blocked() -> Look | None:
            look = look_at(process.pid)
            still = all(
                re.fullmatch(words[thread.name or ""], thread.does) for thread in look.threads
            )
            return look if still else None

        look = soon(blocked)
        assert {thread.name for thread in look.threads} == set(note)
        for thread in look.threads:
            assert thread.name is not None
            assert listed(thread.stack.frames) == note[thread.name], thread.name
            assert not thread.stack.torn and not thread.stack.cut
            assert not thread.holds_gil and not thread.waits_for_gil
        deep = next(thread for thread in look.threads if thread.name == "deep")
        assert len(deep.stack.frames) > 2000
        if python.minor >= 11:
            method = next(thread for thread in look.threads if thread.name == "method")
            assert method.stack.frames[0].name == "Method.block"
        assert look.native_threads == []
        assert look.version == python.version


def test_threads_that_run_are_read_whole_or_marked(python) -> None:
    climbing = re.compile(
        r"(climb )*churn (Thread\.)?run (Thread\.)?_bootstrap_inner (Thread\.)?_bootstrap"
    )
    counting = re.compile(r"count (Thread\.)?run (Thread\.)?_bootstrap_inner (Thread\.)?_bootstrap")
    seen: Counter[str] = Counter()
    with target(python, "stack_busy") as process:
        lines = (PROGRAMS / "stack_busy.py").read_text().splitlines()
        process.wait_until_blocked()  # its first thread does not want the GIL any more
        for _ in range(40):
            look = look_at(process.pid)
            by_name = {thread.name: thread for thread in look.threads}
            assert set(by_name) == {"MainThread", "count", "churn", "asleep"}
            holders = [thread for thread in look.threads if thread.holds_gil]
            seen["held"] += len(holders) == 1
            tids = {thread.tid for thread in look.threads}
            for thread in look.threads:
                if found := re.fullmatch(r"waits for the GIL, held by thread (\d+)", thread.does):
                    seen["waits"] += int(found[1]) in tids - {thread.tid}
                    assert thread.name in ("count", "churn") and thread.waits_for_gil
                if thread.name in ("count", "churn"):
                    seen["torn"] += thread.stack.torn
                    if thread.stack.torn:
                        continue
                    names = " ".join(frame.name or "?" for frame in thread.stack.frames)
                    assert (counting if thread.name == "count" else climbing).fullmatch(names)
                    for frame in thread.stack.frames:
                        if frame.name in ("climb", "churn"):
                            assert frame.line is not None
                            assert re.search("climb|depth|while", lines[frame.line - 1])
                    seen["depths"] |= 1 << min(names.count("climb"), 50)
        asleep, main = by_name["asleep"], by_name["MainThread"]
        assert asleep.does.startswith("sleeps") and main.does == "reads from fd 0 (pipe)"
    # each thread is looked at in its own moment, so the GIL may change hands between them
    assert seen["held"] >= 3
    assert seen["waits"] >= 3
    assert seen["torn"] <= 20
    assert seen["depths"].bit_count() >= 4


def test_a_thread_that_holds_the_gil_in_a_system_call_is_told(python) -> None:
    with target(python, "stack_holder") as process:

        def blocked() -> Look | None:
            look = look_at(process.pid)
            waits = [thread for thread in look.threads if thread.waits_for_gil]
            return look if waits and any(t.syscall == "read" for t in look.threads) else None

        look = soon(blocked)
        by_name = {thread.name: thread for thread in look.threads}
        holder, waiter = by_name["holder"], by_name["MainThread"]
        assert holder.holds_gil
        assert re.fullmatch(r"reads from fd \d+ \(pipe\), and holds the GIL meanwhile", holder.does)
        assert [frame.name for frame in holder.stack.frames[:2]] == [
            "hold",
            HOLDER_RUN[python.minor > 10],
        ]
        assert waiter.does == f"waits for the GIL, held by thread {holder.tid}"


def test_a_process_that_changes_all_the_time_never_ends_in_a_traceback(python) -> None:
    looks = 0
    refusals: list[str] = []
    with target(python, "stack_churn") as process:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            begin = time.monotonic()
            try:
                look = look_at(process.pid, all_tasks=True)
            except TargetError as told:
                refusals.append(str(told))
                continue
            finally:
                assert time.monotonic() - begin < 5
            looks += 1
            names = {frame.name for task in look.tasks or () for frame in task.frames}
            assert names <= {None, "worker", "step", "main", "sleep", "gather", "__sleep0", "walk"}
            assert process.pid in {thread.tid for thread in look.threads}
        process.process.kill()
        process.process.wait()
        with pytest.raises(TargetError, match="there is none with that id"):
            look_at(process.pid, all_tasks=True)
    assert looks >= 5
    assert all("try again" in told for told in refusals)


def test_tasks_are_exactly_those_that_asyncio_tells(python) -> None:
    with target(python, "stack_tasks") as process:
        process.open_gate()
        note = process.note()
        _compare_tasks(look_at(process.pid, all_tasks=True), note, python.minor >= 12)


def test_tasks_of_uvloop() -> None:
    pytest.importorskip("uvloop")
    command = [sys.executable, PROGRAMS / "stack_tasks.py", "uvloop"]
    with Target(*command) as process:
        process.open_gate()
        note = process.note()
        _compare_tasks(look_at(process.pid, all_tasks=True), note, sys.version_info >= (3, 12))


def _compare_tasks(look: Look, note: dict[str, Any], eager: bool) -> None:
    assert look.tasks is not None
    # 3.15's all_tasks() leaves out a task that is made in Python
    assert {task.name for task in look.tasks} == {*note, "in Python"}
    for task in look.tasks:
        assert task.name is not None
        if task.name not in note:
            continue
        assert listed(task.frames) == note[task.name], task.name
        assert not task.torn
    by_name = {task.name: task for task in look.tasks}
    assert len(look.tasks) >= 300 and "done" not in by_name
    assert ("eager" in by_name) == eager
    assert by_name["created"].state == "created" and by_name["turns"].state == "ready"
    assert by_name["nested"].state == "waiting" and by_name["nested"].awaits == "a future"
    assert by_name["for a task"].awaits == "task nested"
    assert by_name["for two"].awaits == "all of task nested, task over (gather)"
    assert len(by_name["nested"].frames) == 9


def test_without_being_asked_tasks_are_only_pointed_at(python) -> None:
    with target(python, "stack_tasks") as process:
        process.open_gate()
        process.note()
        look = look_at(process.pid)
        assert look.tasks is None
        assert look.not_shown == ["suspended tasks of asyncio (--all-tasks shows them)"]


def test_the_screen_and_json(python) -> None:
    with target(python, "stack_threads", 50) as process:
        process.open_gate()
        note = process.note()
        process.wait_until_blocked()
        arguments = ["--pid", str(process.pid)]
        done = CliRunner().invoke(stack, [*arguments, "--json"], catch_exceptions=False)
        document = json.loads(done.stdout)
        frames = {t["name"]: t["stack"]["frames"] for t in document["threads"]}
        for name, told in note.items():
            assert [[f["name"], f["file"], f["line"]] for f in frames[name]] == told
        assert document["version"] == ".".join(map(str, python.version))
        screen = CliRunner().invoke(stack, arguments, catch_exceptions=False).stdout
        assert "\x1b" not in screen
        assert f"process {process.pid}  " in screen
        assert "näive_名前" in screen and "/srv/café/名前 🐍.py:5" in screen
        assert "… the last frame, 49 more times" in screen
        assert len(re.findall(r"^    in_sort  +/", screen, re.M)) == 1


def test_the_process_is_left_as_it_was(python) -> None:
    with target(python, "stack_busy") as process:
        status = Path(f"/proc/{process.pid}/status")
        before = status.read_text()
        look_at(process.pid, all_tasks=True)
        assert "TracerPid:\t0" in before and "TracerPid:\t0" in status.read_text()
        assert process.process.poll() is None


@pytest.mark.parametrize("command", [["sleep", "100"], ["bash", "-c", "read line; true"]])
def test_what_is_no_python_is_told(command) -> None:
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            with pytest.raises(TargetError, match=r"no CPython is mapped in it; `pgrep"):
                soon(lambda: _look_when_executed(process.pid, command[0]))
        finally:
            process.kill()


def _look_when_executed(pid: int, name: str) -> Look | None:
    if not os.readlink(f"/proc/{pid}/exe").endswith(name):
        return None
    return look_at(pid)


def test_what_is_gone_is_told() -> None:
    process = subprocess.Popen(["true"])
    try:
        with pytest.raises(TargetError, match="it has ended and waits for its parent"):
            soon(lambda: look_at(process.pid) if _ended(process.pid) else None)
    finally:
        process.wait()
    with pytest.raises(TargetError, match="there is none with that id"):
        look_at(process.pid)


def _ended(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_thread_is_told_from_a_process() -> None:
    command = [sys.executable, PROGRAMS / "stack_busy.py"]
    with Target(*command) as process:
        tids = [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
        tid = next(tid for tid in tids if tid != process.pid)
        with pytest.raises(TargetError, match=f"thread of process {process.pid}; look at that one"):
            look_at(tid)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_no_permission_is_told() -> None:
    with Target(sys.executable, PROGRAMS / "stack_busy.py") as process:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            try:
                look_at(process.pid)
                os.write(writer, b"it looked")
            except ScopeError as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        told = os.read(reader, 1000).decode()
        os.close(reader)
        os.close(writer)
    assert told.startswith(f"cannot look into process {process.pid}: ")
    assert told.endswith("run as root or grant CAP_SYS_PTRACE")
