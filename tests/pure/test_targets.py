"""What /proc tells of targets: lines of any program that chose its own name and arguments."""

from __future__ import annotations

import doctest
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scope_ebpf.errors import FormatError, TargetError
from scope_ebpf.loaders import targets
from scope_ebpf.loaders.targets import (
    LiveProcesses,
    check_pid_namespace,
    check_same,
    find_target,
    parse_stat,
    split_arguments,
)

pytestmark = pytest.mark.pure

ENOUGH_SECONDS = 10.0
# A process that goes on in another thread when its first one has ended.
WITHOUT_LEADER = """
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print("ready", flush=True)
exit_this_thread = 60 if os.uname().machine == "x86_64" else 93
ctypes.CDLL(None).syscall(exit_this_thread, 0)
"""


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def wait_until(condition) -> None:
    deadline = time.monotonic() + ENOUGH_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state_of(tgid: int) -> str:
    return parse_stat((Path("/proc") / str(tgid) / "stat").read_text())[1][0]


def test_examples_in_the_documentation():
    assert doctest.testmod(targets).failed == 0


def test_stat_of_this_process():
    comm, fields = parse_stat(Path("/proc/self/stat").read_text())
    assert comm == Path("/proc/self/comm").read_text().removesuffix("\n")
    assert fields[0] == "R"
    assert int(fields[1]) == os.getppid()


@given(
    st.integers(1, 2**22),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=16),
    st.lists(st.integers(-(2**63), 2**64 - 1), max_size=50),
)
@example(1, ") R 1 2 (", [3])
@example(1, "\n", [3])
def test_any_comm(pid, comm, numbers):
    """A comm may hold spaces and parentheses; only what follows the last one counts."""
    text = " ".join([f"{pid} ({comm}) S", *map(str, numbers)]) + "\n"
    assert parse_stat(text) == (comm, ["S", *map(str, numbers)])


@given(st.text(max_size=80))
@example("")
@example("()")
@example(")(")
@example("1 (a)")
@example("(a) S 1")
@example("x (a) S 1")
def test_any_text(text):
    try:
        comm, fields = parse_stat(text)
    except FormatError as error:
        sentence = str(error)
        assert "\n" not in sentence
    else:
        assert f"({comm})" in text
        assert fields


def test_arguments():
    assert split_arguments(b"") == ()
    assert split_arguments(b"\0") == ()
    assert split_arguments(b"nginx: worker\0\0\0") == ("nginx: worker",)
    assert split_arguments(b"a\0\0b\0") == ("a", "", "b")
    assert split_arguments(b"postgres: writer   ") == ("postgres: writer   ",)
    assert split_arguments(b"caf\xc3\xa9\0\xff\0") == ("café", "\\xff")


@given(st.lists(st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"")), min_size=1))
def test_any_arguments(parts):
    found = split_arguments(b"".join(part + b"\0" for part in parts))
    while parts and not parts[-1]:
        parts = parts[:-1]  # zeros that are left of a longer title
    assert len(found) == len(parts)
    for part, text in zip(parts, found, strict=True):
        text.encode()  # printable anywhere: no half of a surrogate pair
        if part.isascii():
            assert text == part.decode()


@given(st.binary(max_size=100))
def test_any_command_line(data):
    for text in split_arguments(data):
        assert "\0" not in text
        text.encode()


def test_a_target(sleeper):
    wait_until(lambda: find_target(sleeper.pid).comm == "sleep")  # until it has executed
    found = find_target(sleeper.pid)
    assert (found.tgid, found.comm, found.arguments) == (sleeper.pid, "sleep", ("sleep", "60"))


def refusal(tgid: int) -> str:
    with pytest.raises(TargetError) as caught:
        find_target(tgid)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_target(sleeper):
    sleeper.kill()
    sleeper.wait()
    for tgid in (sleeper.pid, 4_194_305, 2**31 - 1, 2**80):
        text = refusal(tgid)
        assert text.startswith(f"cannot attach to process {tgid}: there is none with that id; ")


def test_a_thread():
    hold = threading.Event()
    thread = threading.Thread(target=hold.wait)
    thread.start()
    try:
        text = refusal(thread.native_id or 0)
        pid = os.getpid()
        assert text.endswith(f"it is a thread of process {pid}; attach to {pid}")
    finally:
        hold.set()
        thread.join()


def test_this_process():
    assert "that is this recorder; " in refusal(os.getpid())


def test_a_zombie():
    process = subprocess.Popen(["true"])
    try:
        wait_until(lambda: state_of(process.pid) == "Z")
        assert "true has ended and waits for its parent; " in refusal(process.pid)
    finally:
        process.wait()


def test_a_process_without_its_first_thread():
    with subprocess.Popen(
        ["python3", "-c", WITHOUT_LEADER], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            wait_until(lambda: state_of(process.pid) == "Z")
            assert find_target(process.pid).tgid == process.pid
            with LiveProcesses((process.pid,)) as live:
                assert live.any()
                process.kill()
                wait_until(lambda: not live.any())
        finally:
            process.kill()


def test_a_thread_of_the_kernel():
    """kthreadd is process 2 of the kernel's own namespace; in a container there may be none."""
    try:
        if Path("/proc/2/comm").read_text() != "kthreadd\n":
            pytest.skip("process 2 is not kthreadd: this is a pid namespace of its own")
    except FileNotFoundError:
        pytest.skip("there is no process 2: this is a pid namespace of its own")
    assert "kthreadd is a thread of the kernel, not a process; " in refusal(2)


def test_another_pid_namespace(monkeypatch):
    monkeypatch.setattr(targets, "INITIAL_PID_NAMESPACE", 1)
    with pytest.raises(TargetError, match="run scope-ebpf on the host, or in a container with"):
        check_pid_namespace()


def test_live_processes(sleeper):
    before = len(os.listdir("/proc/self/fd"))
    with (
        subprocess.Popen(["sleep", "60"]) as other,
        LiveProcesses((sleeper.pid, other.pid)) as live,
    ):
        assert live.any()
        other.kill()
        other.wait()
        assert live.any()
        sleeper.send_signal(signal.SIGSTOP)  # a stopped one has not ended
        assert live.any()
        sleeper.kill()
        wait_until(lambda: not live.any())  # a zombie has
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_same_process_and_another_one(sleeper):
    target = find_target(sleeper.pid)
    check_same((target,))
    later = replace(target, started_ticks=(target.started_ticks or 0) - 1)
    with pytest.raises(TargetError, match="another one has its id; look up the one that you mean"):
        check_same((target, later))
    check_same((replace(later, started_ticks=None),))  # not known: that of `run`, which holds it
    sleeper.kill()
    sleeper.wait()
    check_same((target,))  # the kernel will find nothing to record


def test_nobody_lives(sleeper):
    sleeper.kill()
    sleeper.wait()
    with LiveProcesses((sleeper.pid,)) as live:
        assert not live.any()
