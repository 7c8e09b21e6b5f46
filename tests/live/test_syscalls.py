"""System calls: known programs make known numbers of them, and each one is one row."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.live.recording import PROGRAMS, Session, Target, attached, compiled, no_losses

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("each_transport")]

MASK = 2**64 - 1
ERRNO = {"ENOENT": 2, "EBADF": 9, "EINVAL": 22, "ENOSYS": 38}
X86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="needs x86-64, to make 32-bit calls"
)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The program that makes the calls."""
    return compiled("calls", tmp_path_factory.mktemp("calls"))


def record(calls: Path, directory: Path, *arguments: object, **more: Any) -> Session:
    """Record one run of the program with these arguments; options after `options=`."""
    with (
        Target(calls, *arguments) as target,
        attached(directory, target, *more.get("options", ())) as session,
    ):
        session.note = target.work()
    no_losses(session)
    return session


def counted(session: Session, tag: int, times: int, **expected: Any) -> pl.DataFrame:
    """The rows of the counted getppid calls with this tag: exactly those, complete, in order."""
    rows = session.table("syscalls").filter(name="getppid", arg0=tag)
    assert rows["arg1"].to_list() == list(range(times))
    assert rows["arg2"].to_list() == [~i & MASK for i in range(times)]
    assert rows["status"].unique().to_list() == ["complete"]
    for column, value in expected.items():
        assert rows[column].unique().to_list() == [value]
    return rows


def test_counts_results_and_arguments(calls, tmp_path):
    session = record(calls, tmp_path, "counts")
    pid = session.target
    counted(session, 1, 1009, tgid=pid, tid=pid, result=os.getpid(), error=None, number=110)
    rows = session.table("syscalls").filter(tgid=pid)
    expected = {
        "openat": (503, "ENOENT", [(-100 - i) & MASK for i in range(503)]),
        "dup3": (307, "EINVAL", list(range(307))),
        "mprotect": (101, "EINVAL", [0x8000000000000001] * 101),
        "syscall_4095": (53, "ENOSYS", [0x1234567890ABCDEF] * 53),
        "close": (211, "EBADF", [0xFFFFFFF0 + (i & 7) for i in range(211)]),
    }
    for name, (number, error, first) in expected.items():
        found = rows.filter(name=name, error=error)
        assert len(found) == number
        assert found["arg0"].to_list() == first
        assert found["result"].unique().to_list() == [-ERRNO[error]]
        assert found["status"].unique().to_list() == ["complete"]
    third = rows.filter(name="dup3")
    assert third.select("arg1", "arg2").unique().height == 307
    assert third["arg2"].unique().to_list() == [0x7EADBEEF]
    # in time: one after the other, none inside another
    begun = rows.filter(pl.col("status") == "complete")
    ended = begun["start_ns"] + begun["duration_ns"]
    assert (begun["start_ns"][1:] >= ended[:-1]).all()
    assert (begun["duration_ns"] > 0).all()
    # the gate itself, and the end
    first_row, last_row = rows.row(0, named=True), rows.row(-1, named=True)
    assert (first_row["name"], first_row["status"]) == ("read", "began_before")
    assert (first_row["result"], first_row["arg2"]) == (1, 1)
    assert (last_row["name"], last_row["status"], last_row["arg0"]) == (
        "exit_group",
        "no_return",
        0,
    )
    assert rows.filter(pl.col("status") != "complete").height == 2


def test_threads(calls, tmp_path):
    session = record(calls, tmp_path, "threads")
    tids = {counted(session, 10 + i, 211, tgid=session.target)["tid"][0] for i in range(7)}
    assert len(tids) == 7
    assert session.target not in tids
    # a thread's first row is its own, and its last one is its exit
    rows = session.table("syscalls")
    for tid in tids:
        own = rows.filter(tid=tid)
        assert own["name"][0] in ("rseq", "set_robust_list")
        assert (own["name"][-1], own["status"][-1]) == ("exit", "no_return")
        assert own.filter(pl.col("name").is_in(["clone", "clone3"])).is_empty()


@pytest.mark.parametrize("follow", [True, False])
def test_children(calls, tmp_path, follow):
    session = record(calls, tmp_path, "children", options=[] if follow else ["--no-follow"])
    counted(session, 1, 307, tgid=session.target)
    rows = session.table("syscalls")
    if not follow:
        assert rows["tgid"].unique().to_list() == [session.target]
        assert session.table("processes")["tgid"].unique().to_list() == [session.target]
        return
    for i in range(13):
        child = counted(session, 100 + i, 101, result=session.target)["tgid"][0]
        # nothing but its own calls
        assert rows.filter(tgid=child)["name"].to_list() == ["getppid"] * 101 + ["exit_group"]
    assert rows["tgid"].n_unique() == 14


@pytest.mark.parametrize("follow", [True, False])
def test_children_that_exist_before(calls, tmp_path, follow):
    session = record(calls, tmp_path, "older", options=[] if follow else ["--no-follow"])
    counted(session, 1, 307, tgid=session.target)
    rows = session.table("syscalls")
    if not follow:
        assert rows["tgid"].unique().to_list() == [session.target]
        return
    for i in range(5):
        child = counted(session, 100 + i, 101, result=session.target)["tgid"][0]
        counted(session, 200 + i, 101, result=child)
    assert rows["tgid"].n_unique() == 11


@pytest.mark.parametrize("mode", ["exec", "exec-from-thread"])
def test_exec_goes_on(calls, tmp_path, mode):
    session = record(calls, tmp_path, mode)
    counted(session, 1, 211, tgid=session.target, tid=session.target)
    if mode == "exec-from-thread":
        assert counted(session, 2, 101, tgid=session.target)["tid"][0] != session.target
    counted(session, 3, 307, tgid=session.target, tid=session.target)
    execs = session.table("syscalls").filter(name="execve")
    assert execs.select("tgid", "tid", "result", "status").rows() == [
        (session.target, session.target, 0, "complete")
    ]


@X86
def test_32_bit_calls_of_a_64_bit_program(calls, tmp_path):
    probe = subprocess.run([calls, "compat"], input=b"x", capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(
            "optional: needs a kernel that takes 32-bit system calls (CONFIG_IA32_EMULATION)"
        )
    session = record(calls, tmp_path, "compat")
    rows = session.table("syscalls").filter(pl.col("number") >= 0x8000)
    parents = rows.filter(name="getppid")
    assert parents["number"].unique().to_list() == [0x8000 + 64]
    assert parents["arg0"].unique().to_list() == [0xFFFFFFF0]
    assert parents["arg1"].to_list() == list(range(307))
    assert parents["arg2"].to_list() == [~i & 0xFFFFFFFF for i in range(307)]
    assert parents["result"].unique().to_list() == [os.getpid()]
    others = rows.filter(name="epoll_ctl")
    assert others["arg1"].to_list() == list(range(101))
    assert others["error"].null_count() == 0
    assert len(rows) == 307 + 101


@X86
def test_32_bit_program(tmp_path):
    program = tmp_path / "narrow"
    source = PROGRAMS / "narrow.c"
    flags = ["-m32", "-nostdlib", "-static", "-O1", "-fno-pic", "-fno-stack-protector"]
    built = subprocess.run(
        ["gcc", *flags, "-o", program, source], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"optional: needs a gcc that builds 32-bit programs: {built.stderr[-200:]}")
    if subprocess.run([program], input=b"x", capture_output=True, check=False).returncode:
        pytest.skip("optional: needs a kernel that runs 32-bit programs (CONFIG_IA32_EMULATION)")
    session = record(program, tmp_path)
    rows = session.table("syscalls")
    assert (rows["number"] >= 0x8000).all()
    assert rows.select("name", "status").rows() == [
        ("read", "began_before"),
        *[("getppid", "complete")] * 211,
        *[("write", "complete")] * 54,
        ("exit_group", "no_return"),
    ]
    parents = rows.filter(name="getppid")
    assert parents["arg1"].to_list() == list(range(211))
    assert parents["arg2"].to_list() == [~i & 0xFFFFFFFF for i in range(211)]
    failed = rows.filter(name="write", error="EBADF")
    assert failed["arg0"].unique().to_list() == [0xFFFFFFFF]
    assert failed["arg2"].to_list() == list(range(53))


def test_refused_by_seccomp(calls, tmp_path):
    session = record(calls, tmp_path, "refused")
    counted(session, 1, 101)
    rows = session.table("syscalls")
    refused = rows.filter(status="refused")
    for name, tag, number, result in (("getppid", 2, 211, -77), ("syncfs", None, 53, 0)):
        found = refused.filter(name=name)
        assert len(found) == number
        assert found["result"].unique().to_list() == [result]
        assert found["duration_ns"].unique().to_list() == [0]
        if tag:
            assert found["arg0"].unique().to_list() == [tag]
            assert found["arg1"].to_list() == list(range(number))
        else:
            assert found["arg0"].to_list() == list(range(number))
    assert len(refused) == 211 + 53
    allowed = rows.filter(name="getpgid")
    assert allowed["status"].unique().to_list() == ["complete"]
    assert allowed["arg1"].to_list() == list(range(307))
    assert (rows["start_ns"].diff().drop_nulls() >= 0).all()


def test_newborn_children_have_only_their_own_calls(calls, tmp_path):
    session = record(calls, tmp_path, "births")
    rows = session.table("syscalls")
    makers = ["clone", "clone3", "fork", "vfork"]
    for tag in range(100, 105):
        children = rows.filter(name="getppid", arg0=tag)["tgid"].unique(maintain_order=True)
        assert len(children) == 23
        for child in children:
            own = rows.filter(tgid=child)
            assert own.filter(name="getppid")["arg1"].to_list() == list(range(11))
            assert own.filter(pl.col("name").is_in(makers)).is_empty()
            assert own["status"][-1] == "no_return"
            assert set(own["status"][:-1]) == {"complete"}
            if tag < 104:
                assert own["name"].to_list() == ["getppid"] * 11 + ["exit_group"]
            else:
                assert own.filter(name="execve")["result"].to_list() == [0]
                # posix_spawn's child works before it executes
                assert own["name"][0] != "execve"
    made = rows.filter(pl.col("name").is_in(makers), tgid=session.target)
    assert len(made) == 5 * 23
    assert (made["result"] > 0).all()
    assert rows["tgid"].n_unique() == 1 + 5 * 23


def test_signal_handlers(calls, tmp_path):
    """Each return from a handler is one row of rt_sigreturn, and nothing else comes of it."""
    session = record(calls, tmp_path, "signalled")
    counted(session, 1, 211)
    rows = session.table("syscalls").filter(tgid=session.target)
    returns = rows.filter(name="rt_sigreturn")
    assert len(returns) == 211
    assert returns["status"].unique().to_list() == ["complete"]
    assert rows.filter(name="tgkill")["result"].to_list() == [0] * 211
    assert rows["status"].value_counts().filter(pl.col("status") != "complete")[
        "count"
    ].to_list() == [1, 1]


def test_interrupted_calls(calls, tmp_path):
    session = record(calls, tmp_path, "interrupted")
    rows = session.table("syscalls").filter(tgid=session.target)
    reads = rows.filter(pl.col("name") == "read", pl.col("arg0") > 0)
    # -ERESTARTSYS, as the kernel has it inside: three times the call began anew, the fourth one failed
    assert reads["result"].to_list() == [-512] * 4
    sleeps = rows.filter(name="clock_nanosleep")
    assert sleeps["result"].to_list() == [-516]
    assert (reads["duration_ns"] > 10_000_000).all()
    assert rows.filter(name="rt_sigreturn").height == 5
    assert rows.filter(status="refused").is_empty()


def test_open_at_the_end(calls, tmp_path):
    with Target(calls, "stays") as target, attached(tmp_path, target) as session:
        target.open_gate()
        target.note()
        session.stop(signal.SIGINT)
        session.wait()
    no_losses(session)
    rows = session.table("syscalls")
    waiting = rows.filter(name="pause")
    assert sorted(waiting["status"]) == ["open", "throughout"]
    meta = session.recording.meta
    assert meta.ended_ns is not None
    for row in waiting.rows(named=True):
        assert row["result"] == 0
        assert (row["arg0"], row["arg1"], row["arg2"]) == (1, 2, 3)
        end = row["start_ns"] + row["duration_ns"]
        assert meta.started_ns < row["start_ns"] < end <= meta.ended_ns
    last = rows.filter(tgid=target.pid, tid=target.pid).row(-1, named=True)
    assert (last["name"], last["status"]) == ("read", "open")
    assert rows.filter(status="open").height == 2


def test_attach_to_busy_threads(calls, tmp_path):
    """From the first call that was seen on none is missing, and none is taken for another."""
    session = record(calls, tmp_path, "busy", options=["--payload-bytes", 0])
    rows = session.table("syscalls")
    assert rows.filter(status="refused").is_empty()
    for i, total in enumerate(session.note):
        own = rows.filter(name="getppid", arg0=50 + i).sort("start_ns")
        begin = own["arg1"][0]
        assert own["arg1"].to_list() == list(range(begin, total))
        assert own["status"].to_list().count("began_before") <= 1
        assert own["status"][1:].unique().to_list() == ["complete"]
