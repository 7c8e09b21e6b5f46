"""BCC on each kernel of the lab: the same rows as libbpf's of the same work, and programs of the user's."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from scope_ebpf import records
from scope_ebpf.families import BCC_FAMILIES
from tests.conftest import OPTIONAL
from tests.lab.recorded import ATTACH_SECONDS, FIRST_WITHOUT_BCC, KERNEL
from tests.live import recording
from tests.live.recording import Target, attached

# a compile takes up to two minutes in an emulated guest
pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

PROGRAMS = Path(__file__).with_name("programs")
EVERYTHING = (sys.executable, PROGRAMS / "everything.py")
# GETPPIDS: 23 of the main thread, one of another, and one that /bin/sh makes when it begins
GETPPIDS, MISSING, SLEEPS = 25, 11, 7
OFFERED = KERNEL < FIRST_WITHOUT_BCC
loader_is_offered = pytest.mark.skipif(
    not OFFERED, reason=OPTIONAL + "--loader bcc is refused here, as test_refusal finds"
)


def record(directory, *options):
    """Record the workload; the session."""
    directory.mkdir()
    with (
        Target(*EVERYTHING) as target,
        attached(directory, target, *options, attach_seconds=ATTACH_SECONDS) as session,
    ):
        target.work()
    assert session.table("losses").is_empty()
    return session


def recorded(tmp_path_factory, *options):
    """The session of one loader."""
    families = ("--families", ",".join(BCC_FAMILIES))
    return record(tmp_path_factory.mktemp("loader") / "it", *families, *options)


@pytest.fixture(scope="module")
def bcc(tmp_path_factory):
    """The work recorded by BCC where it can, and by a program of the user's beside it."""
    own = ("--bcc-probe", PROGRAMS / "getppids.c")
    return recorded(tmp_path_factory, "--loader", "bcc" if OFFERED else "libbpf", *own)


@pytest.fixture(scope="module")
def libbpf(tmp_path_factory):
    """The same work recorded by libbpf."""
    return recorded(tmp_path_factory, "--loader", "libbpf")


@loader_is_offered
def test_meta_tells_the_loader(bcc, libbpf):
    assert bcc.recording.meta.loader == "bcc"
    assert libbpf.recording.meta.loader == "libbpf"


@pytest.mark.skipif(OFFERED, reason=OPTIONAL + "--loader bcc works here")
def test_refusal(tmp_path):
    """Where programs can be interrupted by other tasks it says so, and records nothing."""
    families = ("--families", "processes", "--loader", "bcc")
    command = [recording.COMMAND, "run", "-o", tmp_path / "a.scope", *families, "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert "cannot record with --loader bcc on Linux" in done.stderr
    assert "use --loader libbpf" in done.stderr
    assert not (tmp_path / "a.scope").exists()


def counted(session, table, *columns, **chosen) -> Counter[tuple[object, ...]]:
    """How often each combination of columns is in a table."""
    rows = session.table(table)
    for name, values in chosen.items():
        rows = rows.filter(pl.col(name).is_in(values))
    return Counter(rows.select(columns).iter_rows())


@loader_is_offered
def test_the_same_processes(bcc, libbpf):
    columns = ("event", "command_line", "exit_code", "signal", "comm")
    expected, found = (counted(session, "processes", *columns) for session in (libbpf, bcc))
    assert found == expected
    assert sum(expected.values()) >= 11


@loader_is_offered
def test_the_same_system_calls(bcc, libbpf):
    columns = ("name", "error", "status")
    expected, found = (counted(session, "syscalls", *columns) for session in (libbpf, bcc))
    # waiting for a lock or a child is one call or more, as it happens
    as_it_happens = {"futex", "wait4", "rt_sigreturn", "restart_syscall"}
    for rows in (expected, found):
        for key in [key for key in rows if key[0] in as_it_happens]:
            del rows[key]
    assert found == expected
    assert found["getppid", None, "complete"] == GETPPIDS
    assert found["clock_nanosleep", None, "complete"] == SLEEPS + 1


def messages_in_order(session: recording.Session) -> pl.DataFrame:
    """The messages, with the time since the one before of the same end and direction."""
    since = pl.col("start_ns").diff().over("connection", "direction")
    return session.table("messages").sort("start_ns").with_columns(since.alias("since_ns"))


@loader_is_offered
def test_the_same_messages(bcc, libbpf):
    expected, found = map(messages_in_order, (libbpf, bcc))
    columns = ("direction", "kind", "name", "length_bytes", "exact", "peek")
    assert found.select(columns).rows() == expected.select(columns).rows()
    assert len(expected) > 200
    # whatever comes so late begins a turn: on a slow machine that may be any message, in one of them only
    in_time = [
        pl.Series(rows["since_ns"].fill_null(0) <= records.RecordLimits.TURN_GAP_NS)
        for rows in (expected, found)
    ]
    compared = in_time[0] & in_time[1]
    # of payloads the length: what stands for redacted words is another in each recording
    turn = (pl.col("turn"), pl.col("payload").bin.size())
    turns = [rows.filter(compared).select(turn).rows() for rows in (expected, found)]
    assert turns[0] == turns[1]
    assert sum(begins for begins, _ in turns[0]) > 30


@loader_is_offered
def test_the_same_ranges(bcc, libbpf):
    """Every byte that was sent is one that was received, in both."""
    for session in (libbpf, bcc):
        matched = session.recording.collect(session.recording.messages_matched())
        reasons = Counter(matched["unmatched"].to_list())
        assert reasons[None] > 100, reasons


@loader_is_offered
def test_the_same_connects(bcc, libbpf):
    columns = ("kind", "remote_address", "error")
    expected, found = (counted(session, "connects", *columns) for session in (libbpf, bcc))
    assert found == expected
    assert found["tcp", "127.0.0.1", "ECONNREFUSED"] == 1


@loader_is_offered
def test_the_same_sleeps(bcc, libbpf):
    for session in (libbpf, bcc):
        rows = session.table("offcpu").filter(name="clock_nanosleep", status="complete", state="S")
        assert len(rows) == SLEEPS + 1
        assert rows["duration_ns"].min() >= 10_000_000


def test_own_program(bcc):
    """Its rows are those of the table syscalls, with the columns of its struct."""
    session = bcc
    tables = session.recording.tables
    assert tables[-2:] == ("getppids_calls", "getppids_ring")
    calls = session.table("getppids_calls")
    assert dict(calls.schema) == {
        "time_ns": pl.Int64, "ts": pl.UInt64, "tgid": pl.UInt32, "tid": pl.UInt32, "number": pl.Int64,
        "leader": pl.Boolean, "comm": pl.String, "bytes": pl.List(pl.UInt8), "pair": pl.List(pl.Int16),
    }  # fmt: skip
    known = session.table("syscalls").filter(name="getppid")
    assert calls.select("tgid", "tid").rows() == known.select("tgid", "tid").rows()
    # it ran at the begin of each call, before or after ours: when the thread's call before had ended
    ended = known.select(end=pl.col("start_ns") + pl.col("duration_ns"), tid="tid").with_columns(
        before=pl.col("end").shift(1).over("tid").fill_null(session.recording.meta.started_ns)
    )
    assert calls["ts"].is_between(ended["before"], ended["end"]).all()
    assert calls["leader"].sum() == GETPPIDS - 1
    assert set(calls["comm"]) <= {"python", "python3", "Thread-1 (getpp", "sh"}
    assert calls["bytes"].to_list() == [[0, 7, 0, 0]] * GETPPIDS
    assert calls["pair"].to_list() == [[-3, 0]] * GETPPIDS
    ring = session.table("getppids_ring")
    assert ring.rows() == calls.drop("time_ns").rows()
    (first, second) = session.recording.meta.own_tables
    assert (first.source, first.output, second.output) == ("getppids.c", "calls", "ring")


def test_nothing_is_left(bcc):
    """Afterwards nothing of ours is in the kernel."""
    if not Path("/usr/sbin/bpftool").exists():
        pytest.skip("optional: there is no bpftool in this guest")
    shown = subprocess.run(["bpftool", "prog"], capture_output=True, text=True, check=True).stdout
    assert "on_sys_exit" not in shown and "scope_on_fork" not in shown


def test_bad_source(tmp_path):
    source = tmp_path / "bad.c"
    source.write_text(
        "struct row { u64 value; };\nBPF_PERF_OUTPUT(rows);\n"
        "int kprobe__do_nanosleep(void *ctx)\n{\n"
        "    struct row row = {};\n    row.wrong = 1;\n"
        "    rows.perf_submit(ctx, &row, sizeof(row));\n    return 0;\n}\n"
    )
    command = [recording.COMMAND, "run", "-o", tmp_path / "a.scope", "--bcc-probe", source, "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    first, *words = done.stderr.splitlines()
    assert first == "error: cannot compile bad.c: the compiler found an error; mend what it says:"
    assert "bad.c:6:9: error: no member named 'wrong' in 'struct row'" in words[0]
    assert not (tmp_path / "a.scope").exists()
