"""--keep and --keep-for: the oldest rows go, and what remains opens and reads right, at every moment."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import polars as pl
import psutil
import pytest

from scope_ebpf.analysis.summary import summarize
from scope_ebpf.recording.directory import recording_path
from scope_ebpf.recording.meta import read_meta
from scope_ebpf.recording.reader import open_recording
from scope_ebpf.recording.rotation import disk_bytes
from tests.live.recording import scope_ebpf_command

pytestmark = pytest.mark.live
KEEP = 8 << 20
# One connection of each kind for all the time, a thread in a context of asyncio, and a child now and then.
BUSY = """
import asyncio, contextvars, json, os, socket, subprocess, sys, time
seconds = float(sys.argv[1])
a, b = socket.socketpair()
listener = socket.create_server(("127.0.0.1", 0))
c = socket.create_connection(listener.getsockname())
d, _ = listener.accept()
def exchange():
    for _ in range(500):
        a.send(b"hello"); b.recv(9); c.send(b"ping"); d.recv(9)
async def main():
    ends = time.monotonic() + seconds
    rounds = children = 0
    while time.monotonic() < ends:
        exchange()
        rounds += 1
        if rounds % 50 == 0:
            subprocess.run(["true"])
            children += 1
    return rounds, children
print(json.dumps([os.getpid(), *asyncio.run(main())]))
"""


def busy(seconds: float) -> list[str]:
    return [sys.executable, "-c", BUSY, str(seconds)]


def test_the_oldest_rows_go_and_the_rest_reads_right(tmp_path):
    path = tmp_path / "quota.scope"
    most, opened = 0, 0
    with scope_ebpf_command(path, "run", "--keep", KEEP, "-o", path, "--", *busy(12)) as session:
        while session.process.poll() is None:
            most = max(most, disk_bytes(path))
            if (path / "meta.json").exists():
                # while old segments vanish
                recording = open_recording(path)
                opened += recording.collect(recording.processes).height > 0
            time.sleep(0.2)
    recording = session.recording
    tgid, rounds, children = json.loads(session.out.splitlines()[0])
    assert 0 < most <= KEEP
    assert opened > 20
    meta = recording.meta
    dropped_until = meta.dropped_until_ns
    assert dropped_until is not None and dropped_until > meta.started_ns
    counts = meta.tables["messages"]
    # emitted = stored + dropped + lost: 4 calls of 500 each
    own = session.table("messages").filter(tgid=tgid)
    assert counts.dropped > 0 and counts.lost == 0
    assert counts.rows + counts.dropped >= rounds * 2000
    assert own.filter(pl.col("start_ns") < dropped_until - 10**9).is_empty()
    # what remains is whole: nothing before it is needed
    assert own.filter(pl.col("kind").is_null()).is_empty()
    assert set(own["kind"].unique()) >= {"tcp", "unix"}
    processes = session.table("processes")
    life = processes.filter(tgid=tgid, tid=tgid)
    assert life["event"].to_list() == ["alive", "exit"]
    assert "-c" in life["command_line"][0]
    assert 0 < processes.filter(comm="true", event="exec").height < children
    samples = session.table("samples").filter(tgid=tgid).drop_nulls("stack")
    stacks = session.table("stacks")
    assert samples.height > 10
    assert samples.join(stacks, on=["tgid", "stack"], how="anti").is_empty()
    codes = session.table("codes").filter(tgid=tgid)
    used = stacks.filter(tgid=tgid)["codes"].explode().unique()
    assert set(used) <= set(codes["code"])
    assert "exchange" in codes["name"].to_list()
    assert session.table("interpreters").filter(tgid=tgid).height == 1
    # the task's context did not change for a long time, and is still known
    assert set(own["context"].unique()) - {0}
    found = summarize(recording)
    assert found.keep_bytes == KEEP and found.dropped_rows == sum(
        table.dropped for table in meta.tables.values()
    )
    assert any(
        line.startswith("kept") and "were dropped" in line
        for line in session.out.splitlines() + session.talk
    )


def test_what_is_older_goes(tmp_path):
    path = tmp_path / "time.scope"
    options = ("--keep-for", "5s", "-o", path, "--families", "processes,syscalls")
    with scope_ebpf_command(path, "run", *options, "--", *busy(14)) as session:
        pass
    meta = session.recording.meta
    assert (
        meta.keep_ns == 5 * 10**9
        and meta.dropped_until_ns is not None
        and meta.ended_ns is not None
    )
    # a sixteenth goes at once, and a segment is a second
    assert 4.9e9 < meta.ended_ns - meta.dropped_until_ns < 7.5e9


def test_it_opens_after_the_recorder_was_killed(tmp_path):
    """Wherever it was: with segments half removed, and counts that were not written any more."""
    for number in range(4):
        path = tmp_path / f"killed{number}.scope"
        with scope_ebpf_command(
            path, "run", "--keep", KEEP, "-o", path, "--", *busy(20)
        ) as session:
            deadline = time.monotonic() + 30
            while not (path / "meta.json").exists() or read_meta(path).dropped_until_ns is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(0.21 * number)
            commands = psutil.Process(session.process.pid).children()
            session.process.kill()
            session.process.wait()
            for command in commands:  # nobody need wait for its end
                command.kill()
        recording = open_recording(path)
        recording.check()
        assert not recording.meta.complete
        assert recording.collect(recording.messages.filter(pl.col("kind").is_null())).is_empty()
        assert recording.collect(recording.processes.filter(event="alive")).height > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--keep", "7M"), "give 8M or more"),
        (("--keep", "plenty"), "is no size; write it like 500M or 2G"),
        (("--keep-for", "1s"), "is too short; give 5s or more"),
    ],
)
def test_quotas_that_cannot_be(tmp_path, options, why):
    command = [
        sys.executable,
        "-m",
        "scope_ebpf",
        "run",
        *options,
        "-o",
        tmp_path / "a",
        "--",
        "true",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and why in done.stderr
    assert not recording_path(tmp_path / "a").exists()
