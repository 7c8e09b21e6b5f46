"""Every CPython of the machine, looked at from outside, against what it says of itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scope_ebpf.cpython.offsets import CODE_TAG, Layout
from scope_ebpf.loaders.python import interpreters, slots
from scope_ebpf.loaders.python.binaries import PythonBinary, read_binary
from scope_ebpf.loaders.python.interpreters import (
    Interpreter,
    NotReady,
    Unsupported,
    find_interpreter,
    threads,
)
from scope_ebpf.loaders.python.memory import (
    AddressError,
    ProcessGoneError,
    ProcessMemory,
    mappings,
)
from scope_ebpf.records import InterpreterFlags
from tests.live.pythons import Python, pythons, started

pytestmark = pytest.mark.live

EVERY = pytest.mark.parametrize("python", pythons(), ids=str)

# Threads that wait in known functions, and answers to what is asked on stdin, one line of JSON each.
PROGRAM = """
import contextvars, json, os, sys, threading, time
r, w = os.pipe()
spinning = False
def innermost():
    os.read(r, 1)
class Middle:
    def method(self, name):
        return [innermost() for _ in range(1)]
def generated():
    yield Middle().method("x")
def outer():
    for _ in generated():
        pass
def spin():
    while spinning:
        sum(range(50))
def add(count, target=outer):
    for _ in range(count):
        threading.Thread(target=target, daemon=True).start()
    time.sleep(0.1)
def named(code):
    return getattr(code, "co_qualname", code.co_name)
def stack(ident):
    frame, frames = sys._current_frames()[ident], []
    while frame is not None:
        code = frame.f_code
        frames.append([named(code), code.co_filename, code.co_firstlineno, frame.f_lasti,
                       code.co_argcount, code.co_flags])
        frame = frame.f_back
    return frames
def report():
    idents = {t.ident: t.native_id for t in threading.enumerate()}
    me = threading.get_ident()
    return {"idents": idents, "version": sys.version_info[:3], "modules": id(sys.modules),
            "stacks": {i: stack(i) for i in idents if i != me}, "main": os.getpid()}
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    word, _, count = line.strip().partition(" ")
    answer = None
    if word == "add":
        add(int(count))
        answer = report()
    elif word == "spin":
        spinning = True
        add(int(count), spin)
    elif word == "still":
        spinning = False
        time.sleep(0.1)
    elif word == "fork":
        answer = os.fork()
        if answer == 0:
            time.sleep(30)
            os._exit(0)
    elif word == "reap":
        os.kill(int(count), 9)
        os.waitpid(int(count), 0)
    elif word == "context":
        contextvars.ContextVar("v").set(1)
    elif word == "enter":
        entered = threading.Thread(target=contextvars.copy_context().run, args=(time.sleep, 60))
        entered.daemon = True
        entered.start()
        time.sleep(0.1)
    elif word == "loop":
        import asyncio
        async def sleeps():
            await asyncio.sleep(60)
        threading.Thread(target=asyncio.run, args=(sleeps(),), daemon=True).start()
        time.sleep(0.3)
    elif word == "import":
        __import__(count)
    print(json.dumps(answer), flush=True)
"""


def ask(process: subprocess.Popen[str], line: str) -> Any:
    """What the target answers to a line."""
    assert process.stdin and process.stdout
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def ready(process: subprocess.Popen[str]) -> Interpreter:
    """The interpreter of a target that has said that it is ready."""
    assert process.stdout
    assert json.loads(process.stdout.readline()) == "ready"
    return found(process.pid)


def found(tgid: int) -> Interpreter:
    """The interpreter of a process that must have one."""
    interpreter = find_interpreter(tgid)
    assert isinstance(interpreter, Interpreter), interpreter
    return interpreter


def test_there_are_pythons():
    """The tests below would be none, and pass, if the search were wrong."""
    assert len(pythons()) > 0
    assert all(python.version >= (3, 8) for python in pythons())


# ---- frames, read with nothing but the layout ----


def text(memory: ProcessMemory, layout: Layout, address: int) -> str:
    """A compact str."""
    state = memory.u8(address + layout.unicode_state) >> layout.unicode_kind_shift
    kind, compact, plain = state & 7, state >> 3 & 1, state >> 4 & 1
    assert compact
    begin = layout.unicode_ascii if plain else layout.unicode_compact
    data = memory.read(address + begin, memory.i64(address + layout.unicode_length) * kind)
    return data.decode({1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}[kind])


def walk(memory: ProcessMemory, layout: Layout, tstate: int) -> list[list[Any]]:
    """The frames of a thread, as stack() in the target reports them."""
    frame = memory.u64(tstate + layout.tstate_frame)
    if layout.cframe_frame is not None:
        frame = memory.u64(frame + layout.cframe_frame)
    frames = []
    while frame:
        code = memory.u64(frame + layout.frame_code) & ~CODE_TAG
        shim = (
            layout.first_shim is not None
            and layout.frame_owner is not None
            and memory.u8(frame + layout.frame_owner) >= layout.first_shim
        )
        if not shim:
            if layout.code_instructions is None:
                lasti = memory.i32(frame + layout.frame_instruction) * layout.lasti_unit
            else:
                lasti = memory.u64(frame + layout.frame_instruction) - code
                lasti -= layout.code_instructions
            name = layout.code_name if layout.code_qualname is None else layout.code_qualname
            frames.append(
                [
                    text(memory, layout, memory.u64(code + name)),
                    text(memory, layout, memory.u64(code + layout.code_file)),
                    memory.i32(code + layout.code_first_line),
                    lasti,
                    memory.i32(code + layout.code_argcount),
                    memory.i32(code + layout.code_flags),
                ]
            )
        frame = memory.u64(frame + layout.frame_previous)
    return frames


@EVERY
def test_threads_and_frames(python: Python):
    """All threads with their numbers, also those that begin later, and the frames that they wait in."""
    with started(python, PROGRAM) as process:
        first = ready(process)
        assert first.version == python.version
        for count in (3, 2):
            said = ask(process, f"add {count}")
            interpreter = found(process.pid)
            assert interpreter.tss == first.tss
            assert interpreter.address == first.address and interpreter.gil == first.gil
            seen = threads(interpreter)
            assert {str(thread.thread_id): thread.tid for thread in seen} == said["idents"]
            with ProcessMemory(process.pid) as memory:
                layout = interpreter.layout
                modules = memory.u64(interpreter.address + layout.interpreter_modules)
                assert modules == said["modules"]
                for thread in seen:
                    assert memory.u64(thread.thread_id + first.tss) == thread.tstate
                    if thread.tid != process.pid:
                        frames = walk(memory, layout, thread.tstate)
                        assert frames == said["stacks"][str(thread.thread_id)]
                        assert [frame[0].rpartition(".")[2] for frame in frames][:1] == [
                            "innermost"
                        ]
        assert len(seen) == 6


@EVERY
def test_record(python: Python):
    """What the kernel is told agrees with the interpreter that was found."""
    with started(python, PROGRAM) as process:
        interpreter = ready(process)
        record, layout = interpreter.record, interpreter.layout
        flags = InterpreterFlags(int(record["flags"]))
        assert int(record["version"]) == 0x300 | python.minor
        assert int(record["tss"]) == interpreter.tss
        assert int(record["gil"]) == interpreter.gil
        assert int(record["gil_bytes"]) == 208
        assert InterpreterFlags.INTERPRETER_STACKS | InterpreterFlags.INTERPRETER_GIL in flags
        assert (InterpreterFlags.INTERPRETER_HEAP_FRAMES in flags) == (python.minor <= 10)
        assert (InterpreterFlags.INTERPRETER_CFRAME in flags) == (python.minor in (11, 12))
        assert InterpreterFlags.INTERPRETER_GREENLETS not in flags
        assert (int(record["thread_tid"]) > 0) == (python.minor <= 10)
        assert (int(record["tstate_native_thread_id"]) > 0) == (python.minor >= 11)
        with ProcessMemory(process.pid) as memory:
            (thread,) = threads(interpreter)
            if layout.tstate_native_thread_id is not None:
                native = memory.u64(thread.tstate + layout.tstate_native_thread_id)
                assert native == process.pid
            assert memory.u32(thread.thread_id + interpreter.thread_tid) == process.pid
            if (
                layout.tstate_datastack_chunk is not None
                and layout.tstate_datastack_top is not None
            ):
                assert layout.chunk_size is not None
                chunk = memory.u64(thread.tstate + layout.tstate_datastack_chunk)
                top = memory.u64(thread.tstate + layout.tstate_datastack_top)
                assert chunk < top <= chunk + memory.u64(chunk + layout.chunk_size)


@EVERY
def test_gil(python: Python):
    """Where the GIL should be something is that is held, in turn by the threads that run."""
    with started(python, PROGRAM) as process:
        interpreter = ready(process)
        layout = interpreter.layout
        ask(process, "spin 2")
        spinning = {thread.tstate for thread in threads(interpreter)}
        holders, locked = set(), 0
        with ProcessMemory(process.pid) as memory:
            switches = memory.u64(interpreter.gil + layout.gil_switch_number)
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                locked += memory.i32(interpreter.gil + layout.gil_locked)
                holders.add(memory.u64(interpreter.gil + layout.gil_holder))
                time.sleep(0.003)
            assert memory.u64(interpreter.gil + layout.gil_switch_number) > switches
        assert locked > 0
        assert holders <= spinning and len(holders) >= 2
        ask(process, "still")
        time.sleep(0.1)
        with ProcessMemory(process.pid) as memory:
            assert memory.i32(interpreter.gil + layout.gil_locked) == 0


@EVERY
def test_contexts(python: Python):
    """The flag is set once a thread has entered a context, or runs an event loop: nothing less."""
    with started(python, PROGRAM) as process:
        assert not ready(process).contexts
        ask(process, "context")
        ask(process, "import asyncio")
        interpreter = found(process.pid)
        assert not interpreter.contexts
        with ProcessMemory(process.pid) as memory:
            (thread,) = threads(interpreter)
            context = memory.u64(thread.tstate + interpreter.layout.tstate_context)
            assert interpreter.context_type
            assert memory.u64(context + interpreter.layout.object_type) == interpreter.context_type
            assert memory.i32(context + interpreter.layout.context_entered) == 0
        ask(process, "enter")
        interpreter = found(process.pid)
        assert interpreter.contexts
        assert int(interpreter.record["flags"]) & InterpreterFlags.INTERPRETER_CONTEXTS
    with started(python, PROGRAM) as process:
        ready(process)
        ask(process, "loop")
        assert found(process.pid).contexts


@EVERY
def test_forked_child(python: Python):
    """A child has its parent's layout and addresses, and one thread: its own."""
    with started(python, PROGRAM) as process:
        ready(process)
        ask(process, "add 2")
        parent = found(process.pid)
        child = ask(process, "fork")
        try:
            deadline = time.monotonic() + 10
            # the kernel writes its tid into its struct pthread when it first runs
            while (interpreter := found(child)).thread_tid == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert interpreter.record.tobytes() == parent.record.tobytes()
            while len(threads(interpreter)) > 1 and time.monotonic() < deadline:
                time.sleep(0.01)  # it forgets the others' states in PyOS_AfterFork_Child()
            assert [thread.tid for thread in threads(interpreter)] == [child]
        finally:
            ask(process, f"reap {child}")
        assert find_interpreter(child) is None


@EVERY
def test_threads_come_and_go(python: Python):
    """A look while threads begin and end all the time finds the same interpreter each time."""
    program = """
import threading, time
print(1, flush=True)
while True:
    some = [threading.Thread(target=time.sleep, args=(0.0005,)) for _ in range(6)]
    for thread in some: thread.start()
    for thread in some: thread.join()
"""
    with started(python, program) as process:
        assert process.stdout and process.stdout.readline()
        records = set()
        for _ in range(53):
            interpreter = found(process.pid)
            records.add(interpreter.record.tobytes())
            seen = threads(interpreter)
            assert process.pid in [thread.tid for thread in seen]
        assert len(records) == 1


@EVERY
def test_subinterpreter(python: Python):
    """Threads of all interpreters are found, the main one's first."""
    program = """
import sys, threading, time
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
def run():
    interpreters.run_string(interpreters.create(), "import time; time.sleep(30)")
threading.Thread(target=run, daemon=True).start()
time.sleep(0.3)
print(1, flush=True)
time.sleep(30)
"""
    with started(python, program) as process:
        assert process.stdout and process.stdout.readline()
        interpreter = found(process.pid)
        seen = threads(interpreter)
        layout = interpreter.layout
        with ProcessMemory(process.pid) as memory:
            owners = [memory.u64(thread.tstate + layout.tstate_interpreter) for thread in seen]
            assert owners[:2] == [interpreter.address] * 2
            assert len(owners) == 3 and owners[2] != interpreter.address
            assert memory.i64(owners[2] + layout.interpreter_id) > 0
            assert seen[1].tid == process.pid and seen[0].tid == seen[2].tid
            # up to 3.11 a thread's slot keeps the state that it had first (Python/pystate.c)
            slot = memory.u64(seen[2].thread_id + interpreter.tss)
            assert slot == seen[0 if python.minor <= 11 else 2].tstate


def test_greenlets():
    """The flag is set where the extension is mapped and data stacks tell greenlets apart."""
    if importlib.util.find_spec("greenlet") is None:
        pytest.skip("optional: no greenlet here")
    for module in ("time", "greenlet"):
        program = f"import {module}, time; print(1, flush=True); time.sleep(30)"
        python = Python(Path(sys.executable), sys.version_info[:3])
        with started(python, program) as process:
            assert process.stdout and process.stdout.readline()
            interpreter = found(process.pid)
            flag = int(interpreter.record["flags"]) & InterpreterFlags.INTERPRETER_GREENLETS
            assert interpreter.greenlets == (module == "greenlet")
            assert bool(flag) == (interpreter.greenlets and sys.version_info >= (3, 11))


@EVERY
def test_starting(python: Python):
    """An interpreter that is just starting is NotReady, and then it is ready."""
    seen: list[Interpreter | NotReady | Unsupported | None] = []
    for _ in range(5):
        with started(python, "import time; time.sleep(20)") as process:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                state = find_interpreter(process.pid)
                if not seen or type(seen[-1]) is not type(state):
                    seen.append(state)
                if isinstance(state, Interpreter):
                    break
        assert isinstance(seen[-1], Interpreter)
        if any(isinstance(state, NotReady) for state in seen):
            break
        seen.clear()
    kinds = [type(state) for state in seen]
    if python.root is not None and kinds[0] is type(None):  # chroot itself, before it executes it
        kinds = kinds[1:]
    assert kinds == [NotReady, Interpreter]


def test_stopped_before_its_first_instruction():
    """A program linked with libpython is NotReady even before the library is mapped."""
    linked = [
        python
        for python in pythons()
        if python.root is None and not isinstance(read_binary(python.path.resolve()), PythonBinary)
    ]
    if not linked:
        pytest.skip("optional: no Python here is linked with a libpython")
    for python in linked[:1]:
        with started(python, "") as process:
            os.kill(process.pid, signal.SIGSTOP)
            assert isinstance(find_interpreter(process.pid), NotReady)


def test_no_python():
    """A process that is none is None, and that is known at once."""
    sleeper = shutil.which("sleep")
    assert sleeper is not None
    with subprocess.Popen([sleeper, "20"]) as process:
        try:
            assert find_interpreter(process.pid) is None
            taken = []
            for _ in range(50):
                began = time.perf_counter()
                find_interpreter(process.pid)
                taken.append(time.perf_counter() - began)
            assert min(taken) < 0.0003
        finally:
            process.kill()
    assert find_interpreter(process.pid) is None


@EVERY
def test_warm_cache(python: Python):
    """Once its file is known, a process is looked up in less than 2 ms."""
    with started(python, PROGRAM) as process:
        ready(process)
        ask(process, "add 8")
        taken = []
        for _ in range(20):
            began = time.perf_counter()
            found(process.pid)
            taken.append(time.perf_counter() - began)
        assert min(taken) < 0.002


def test_deleted_program(tmp_path: Path):
    """A program that was replaced while it ran, as by an upgrade, is read as it is mapped."""
    static = [
        python
        for python in pythons()
        if python.root is None and isinstance(read_binary(python.path.resolve()), PythonBinary)
    ]
    if not static:
        pytest.skip("optional: no Python here has its interpreter in the program itself")
    copy = tmp_path / "replaced"
    shutil.copy(static[0].path.resolve(), copy)
    home = str(static[0].path.parent.parent)
    python = Python(copy, static[0].version)
    with started(python, PROGRAM, environment={"PYTHONHOME": home}) as process:
        assert process.stdout and json.loads(process.stdout.readline()) == "ready"
        copy.unlink()
        interpreters._binaries.clear()
        interpreter = found(process.pid)
        assert interpreter.version == python.version
        assert interpreter.path.endswith("replaced (deleted)")
        binary = read_binary(interpreter.file)
        assert isinstance(binary, PythonBinary) and binary.version == python.version


@EVERY
def test_other_pid_namespace(python: Python):
    """Threads of a process in a PID namespace of its own have the numbers that they have in ours."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("optional: no unshare")
    command = [unshare, "--pid", "--fork", "--kill-child", *python.command("-c", PROGRAM)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as outside:
        try:
            assert outside.stdout and json.loads(outside.stdout.readline()) == "ready"
            children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text()
            (tgid,) = map(int, children.split())
            said = ask(outside, "add 2")
            assert said["main"] == 1
            seen = threads(found(tgid))
            tids = {int(name) for name in os.listdir(f"/proc/{tgid}/task")}
            assert {thread.tid for thread in seen} == tids and len(tids) == 3
        finally:
            outside.kill()


def test_unsupported():
    """Versions that are older than the table are refused with the reason."""
    old = [
        path
        for path in Path.home().glob(".pyenv/versions/*/bin/python*")
        if path.name in ("python2.7", "python3.6", "python3.7")
    ]
    if not old:
        pytest.skip("optional: no Python older than 3.8 here")
    for path in old:
        command = [str(path), "-c", "import sys; print(1); sys.stdout.flush(); sys.stdin.read()"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout and process.stdout.readline()
            state = find_interpreter(process.pid)
            process.kill()
        assert isinstance(state, Unsupported)
        assert path.name.removeprefix("python") in state.reason and "3.8" in state.reason


@EVERY
def test_a_wrong_table_is_noticed(python: Python, monkeypatch: pytest.MonkeyPatch):
    """What is not where the table has it is searched, or the process is refused: never used."""
    with started(python, PROGRAM) as process:
        right = ready(process)
        ask(process, "context")
        layout = right.layout

        def wrong(**changes: Any) -> Interpreter | NotReady | Unsupported | None:
            changed = dataclasses.replace(layout, **changes)
            monkeypatch.setattr(interpreters, "_layout", lambda binary: changed)
            return find_interpreter(process.pid)

        for name in ("tstate_interpreter", "interpreter_modules"):
            state = wrong(**{name: getattr(layout, name) + 8})
            assert isinstance(state, Unsupported) and "layout is not that of" in state.reason
        state = wrong(tstate_context=layout.tstate_context + 16)
        assert isinstance(state, Interpreter)
        assert int(state.record["tstate_context"]) == layout.tstate_context
        monkeypatch.undo()
        monkeypatch.setattr(slots, "GLIBC_SPECIFIC", slots.GLIBC_SPECIFIC + 16)
        monkeypatch.setattr(slots, "READ_FS", b"none")
        ask(process, "add 2")
        state = find_interpreter(process.pid)
        if python.minor < 15:  # there the running thread may have it in two places
            assert isinstance(state, Interpreter)
        if isinstance(state, Interpreter):
            assert state.tss == right.tss


# ---- memory ----


def test_memory(tmp_path: Path):
    """Reads are exact, and what cannot be read is an error of its own kind."""
    with started(pythons()[-1], PROGRAM) as process:
        interpreter = ready(process)
        with ProcessMemory(process.pid) as memory:
            (mapping, *_) = [
                mapping for mapping in mappings(process.pid) if mapping.path == interpreter.path
            ]
            with mapping.open_path(process.pid).open("rb") as file:
                assert memory.read(mapping.start, 4096) == file.read(4096)
            assert memory.string(mapping.start + 1, 3) == b"ELF"
            many = memory.read_many([mapping.start, 8, mapping.start], 4)
            assert many.tobytes() == b"\x7fELF\0\0\0\0\x7fELF"
            assert len(memory.read_many([mapping.start] * 2500, 4)) == 2500
            for address in (8, 1 << 63, -8):
                with pytest.raises(AddressError):
                    memory.read(address, 8)
            process.kill()
            process.wait()
            with pytest.raises(ProcessGoneError):
                memory.read(mapping.start, 8)
        with pytest.raises(ProcessGoneError):
            ProcessMemory(process.pid)
