"""What goes wrong while a recording runs: what it holds is whole, and counted exactly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest

from scope_ebpf.loaders.privileges import NEEDED_TO_LOOK, parse_status
from tests.live.failures import (
    BESIDES,
    COMMAND,
    NOBODY,
    Counter,
    Recorder,
    attach,
    counted,
    lost,
    opened,
    table,
    wait_until,
)
from tests.live.test_failures import folder, mounted, process_with_id

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount and to become other users"),
]
__all__ = ["folder", "mounted"]  # fixtures

CALLS_ONLY = ("--families", "syscalls")
ENDLESS = 10**9
LONG = 1_500_007
COUNT = 20_011
FORKS = 2003
FORKER = f"""
import os
os.write(1, b"ready\\n")
os.read(0, 1)
for number in range({FORKS}):
    child = os.fork()
    if child == 0:
        os._exit(number & 127)
    os.waitpid(child, 0)
os.write(1, b"done\\n")
os.read(0, 1)
"""


def emitted(recording) -> int:
    """System calls that the probes saw: stored and lost."""
    return int(recording.rows("syscalls")) + lost(recording, "syscalls")


def summary(folder: Path) -> str:
    with Recorder(folder, "summary", "test.scope") as recorder:
        assert recorder.code == 0, recorder.err
        assert recorder.err == ""
        return recorder.out


# ---- the disk ------------------------------------------------------------------------------------


def test_a_disk_that_becomes_full(folder, mounted, tmp_path):
    place = mounted(folder / "mnt", "size=4m")
    with (
        Counter(ENDLESS, tmp_path / "progress") as target,
        attach(place, target.pid, options=CALLS_ONLY) as recorder,
    ):
        recorder.attached()
        target.go()
        recorder.process.wait(60)
        made = target.progress() + 256
        sentence = recorder.refusal()
    assert sentence.startswith("cannot write to test.scope: No space left on device; ")
    assert recorder.out == ""
    assert "recording ended early" in recorder.err
    recording = opened(place)
    assert recording.meta.complete is False
    assert recording.meta.ended_ns is not None
    assert recording.meta.notes == [f"recording ended early: {sentence}"]
    numbers = counted(recording)
    assert recording.meta.tables["syscalls"].rows == recording.rows("syscalls")
    assert len(numbers) in (recording.rows("syscalls"), recording.rows("syscalls") - 1)
    # what was drained after the disk was full is counted: that is all there was
    unwritten = recording.meta.tables["syscalls"].lost
    assert unwritten > 0
    assert numbers[-1] < len(numbers) + unwritten <= made
    assert not (place / "test.scope" / ".reserve").exists()
    assert "recording ended early" in summary(place)


def fill(place: Path) -> None:
    """Take all room of a disk."""
    with open(place / "hog", "wb", buffering=0) as hog:
        for size in (1 << 16, 4096, 1):
            with suppress(OSError):
                while hog.write(bytes(size)):
                    pass


def test_a_disk_that_becomes_full_to_the_last_byte(folder, mounted):
    """Even the counts at the end find their room."""
    place = mounted(folder / "mnt", "size=1m")
    with Counter(COUNT) as target, attach(place, target.pid, options=CALLS_ONLY) as recorder:
        recorder.attached()
        wait_until((place / "test.scope" / "meta.json").exists)
        wait_until(lambda: list((place / "test.scope" / "processes").glob("*.parquet")))
        fill(place)
        target.count_through()
        recorder.process.wait(60)
        assert "No space left on device" in recorder.refusal()
    recording = opened(place)
    assert recording.meta.ended_ns is not None
    stored, unwritten = recording.rows("syscalls"), recording.meta.tables["syscalls"].lost
    # it may have ended before all calls were made
    assert 0 < stored + unwritten <= COUNT + BESIDES
    assert unwritten > 0


def test_the_directory_is_removed(folder):
    with Counter(ENDLESS) as target, attach(folder, target.pid) as recorder:
        recorder.attached()
        target.go()
        wait_until(lambda: list((folder / "test.scope" / "syscalls").glob("*.parquet")))
        while (folder / "test.scope").exists():  # a segment may come while it is removed
            shutil.rmtree(folder / "test.scope", ignore_errors=True)
        recorder.process.wait(60)
        sentence = recorder.refusal()
    assert sentence.startswith("cannot write to test.scope: No such file or directory; ")
    assert list(folder.iterdir()) == []


def test_a_table_of_it_is_removed(folder):
    with Counter(ENDLESS) as target, attach(folder, target.pid, options=CALLS_ONLY) as recorder:
        recorder.attached()
        target.go()
        wait_until(lambda: list((folder / "test.scope" / "syscalls").glob("*.parquet")))
        (folder / "test.scope" / "syscalls").rename(folder / "moved")
        recorder.process.wait(60)
        assert "cannot write to test.scope: " in recorder.refusal()
    recording = opened(folder)
    assert recording.meta.complete is False
    assert recording.rows("processes") == 1


# ---- targets -------------------------------------------------------------------------------------


def test_a_target_that_is_killed_within_a_call(folder):
    with Counter(23) as target, attach(folder, target.pid) as recorder:
        recorder.attached()
        target.count_through()
        target.process.kill()
        target.process.wait()
        assert recorder.code == 0  # by itself
    recording = opened(folder)
    assert recording.meta.complete
    assert counted(recording) == list(range(23))
    (row,) = table(recording, "processes").filter(pl.col("event") == "exit").to_dicts()
    assert (row["tgid"], row["signal"], row["exit_code"]) == (target.pid, 9, None)
    calls = table(recording, "syscalls").sort("start_ns")
    assert calls["name"].to_list() == ["read", *["close"] * 23, "write", "read"]
    assert calls["status"][0] == "began_before"


def test_a_target_that_ends_before_the_writer_is_ready(folder):
    with Counter(23) as target, attach(folder, target.pid) as recorder:
        recorder.attached(says_so=False)
        target.process.kill()
        target.process.wait()
        assert recorder.code == 0
    recording = opened(folder)
    assert recording.meta.complete
    assert table(recording, "processes")["event"].to_list()[-1] == "exit"


def test_a_target_that_executes_another_program(folder):
    with (
        subprocess.Popen(["sh", "-c", "read x; exec sleep 0.3"], stdin=subprocess.PIPE) as target,
        attach(folder, target.pid) as recorder,
    ):
        recorder.attached()
        assert target.stdin is not None
        target.stdin.write(b"x\n")
        target.stdin.close()
        assert recorder.code == 0
    rows = table(opened(folder), "processes").sort("time_ns").to_dicts()
    assert [row["event"] for row in rows] == ["alive", "exec", "exit"]
    assert {row["tgid"] for row in rows} == {target.pid}
    assert rows[1]["command_line"] == "sleep 0.3"
    assert (rows[2]["exit_code"], rows[2]["comm"]) == (0, "sleep")


class Forker(Counter):
    """FORKS children, one after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.pid = self.process.pid
        self._expect(b"ready\n")
        wait_until(lambda: self.state() == "S")


def test_a_storm_of_forks(folder):
    options = ("--families", "processes")
    with Forker() as target, attach(folder, target.pid, options=options) as recorder:
        recorder.attached()
        target.count_through()
        assert recorder.stop() == 0
    recording = opened(folder)
    assert lost(recording, "processes") == recording.meta.lost_tasks == 0
    rows = table(recording, "processes").sort("time_ns")
    children = rows.filter(pl.col("tgid") != target.pid)
    for event in ("fork", "exit"):
        assert children.filter(pl.col("event") == event)["tgid"].n_unique() == FORKS
    assert len(children) == 2 * FORKS
    exits = children.filter(pl.col("event") == "exit")["exit_code"].to_list()
    assert exits == [number & 127 for number in range(FORKS)]
    assert (children["parent_tgid"] == target.pid).all()


def test_a_storm_of_forks_while_the_recorder_stands_still(folder):
    """Its ring for rare events is small with long payloads: what does not fit is counted."""
    options = ("--families", "processes", "--payload-bytes", "32768")
    with Forker() as target, attach(folder, target.pid, options=options) as recorder:
        recorder.attached()
        wait_until(lambda: list((folder / "test.scope" / "processes").glob("*.parquet")))
        recorder.process.send_signal(signal.SIGSTOP)
        target.count_through()
        recorder.process.send_signal(signal.SIGCONT)
        assert recorder.stop() == 0
    recording = opened(folder)
    missing = lost(recording, "processes")
    assert missing > 0
    assert recording.rows("processes") + missing == 1 + 2 * FORKS


def test_an_id_that_is_used_again(folder):
    """One of two targets ends, and a process that is none gets its id."""
    with Counter(23) as stays, Counter(23) as goes:  # noqa: SIM117 - a recorder of both
        with attach(folder, stays.pid, goes.pid) as recorder:
            recorder.attached()
            goes.process.kill()
            goes.process.wait()
            with process_with_id(goes.pid) as other:
                try:
                    assert other.pid == goes.pid
                    stays.count_through()
                    time.sleep(0.3)
                    stays.process.kill()
                    assert recorder.code == 0  # it does not wait for the other one
                    assert other.poll() is None
                finally:
                    other.kill()
    recording = opened(folder)
    assert counted(recording) == list(range(23))
    rows = table(recording, "processes").filter(pl.col("tgid") == goes.pid).sort("time_ns")
    assert rows["event"].to_list() == ["alive", "exit"]
    assert set(table(recording, "syscalls").filter(pl.col("tgid") == goes.pid)["name"]) == {"read"}


# ---- recorders -----------------------------------------------------------------------------------


def test_two_at_once_get_every_row(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with (
        Counter(COUNT) as target,
        attach(folder, target.pid) as first,
        attach(other, target.pid) as second,
    ):
        first.attached()
        second.attached()
        assert not {identity for identity in first.ids & second.ids if identity[0] == "prog"}
        target.count_through()
        assert first.stop() == 0
        assert second.stop() == 0
    for place in (folder, other):
        recording = opened(place)
        assert counted(recording) == list(range(COUNT))
        assert lost(recording, "syscalls") == 0


def test_the_end_of_one_leaves_the_other_alone(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with (
        Counter(COUNT) as target,
        attach(folder, target.pid) as first,
        attach(other, target.pid) as second,
    ):
        first.attached()
        second.attached()
        first.process.kill()
        assert first.code == -signal.SIGKILL
        target.count_through()
        assert second.stop() == 0
    assert counted(opened(other)) == list(range(COUNT))


def test_a_recorder_that_is_killed(folder, tmp_path):
    with (
        Counter(ENDLESS, tmp_path / "progress") as target,
        attach(folder, target.pid, options=CALLS_ONLY) as recorder,
    ):
        recorder.attached()
        target.go()
        time.sleep(3)
        recorder.process.kill()
        killed_ns, made = time.monotonic_ns(), target.progress()
        assert recorder.code == -signal.SIGKILL
    recording = opened(folder)
    assert recording.meta.complete is False
    assert recording.running is False
    numbers = counted(recording)
    missing = table(recording, "losses").filter(pl.col("table") == "syscalls")["lost"].sum()
    # what is missing before the last row is counted, up to the part of a second that ended it
    assert numbers[-1] + 1 - missing <= len(numbers) <= numbers[-1] + 1
    last_ns = table(recording, "syscalls")["start_ns"].max()
    assert isinstance(last_ns, int)
    assert (killed_ns - last_ns) / 1e9 < 1.5, f"{made - numbers[-1]} of {made} calls are missing"
    said = summary(folder)
    assert "incomplete: the recorder was killed" in said


@pytest.mark.parametrize("options", [CALLS_ONLY, ()], ids=["calls", "everything"])
def test_a_recorder_that_stands_still(folder, options):
    """Rings overflow: each call is stored or counted as lost, in meta.json and in `losses`."""
    count = LONG
    with Counter(count) as target, attach(folder, target.pid, options=options) as recorder:
        recorder.attached()
        recorder.process.send_signal(signal.SIGSTOP)
        target.count_through()
        recorder.process.send_signal(signal.SIGCONT)
        assert recorder.stop() == 0
    recording = opened(folder)
    assert recording.meta.complete
    missing = lost(recording, "syscalls")
    assert missing > 0
    assert emitted(recording) == count + BESIDES
    numbers = counted(recording)
    assert count - missing <= len(numbers) <= count
    said = summary(folder)
    assert f"{missing:,}" in said
    if options:
        assert f"lost       {missing:,} events, " in said


def test_a_recorder_that_stands_still_for_a_while(folder):
    """It goes on where it was, and what comes then is all there."""
    count = LONG
    with Counter(count) as target, attach(folder, target.pid, options=CALLS_ONLY) as recorder:
        recorder.attached()
        target.go()
        for _ in range(3):
            time.sleep(0.1)
            recorder.process.send_signal(signal.SIGSTOP)
            time.sleep(0.3)
            recorder.process.send_signal(signal.SIGCONT)
        target.finish()
        assert recorder.stop() == 0
    recording = opened(folder)
    assert emitted(recording) == count + BESIDES
    assert counted(recording)[-1] == count - 1 or lost(recording, "syscalls") > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_in_good_order(folder, number):
    with Counter(COUNT) as target, attach(folder, target.pid) as recorder:
        recorder.attached()
        target.count_through()
        assert recorder.stop(number) == 0
    assert opened(folder).meta.complete
    assert counted(opened(folder)) == list(range(COUNT))
    assert recorder.out.startswith("test.scope\n")


@pytest.mark.parametrize("pause", [0, 0.02, 0.1])
def test_an_impatient_user(folder, pause):
    """The second Ctrl-C may cost the summary, but not the recording."""
    with Counter(COUNT) as target, attach(folder, target.pid) as recorder:
        recorder.attached()
        target.count_through()
        recorder.process.send_signal(signal.SIGINT)
        time.sleep(pause)
        recorder.process.send_signal(signal.SIGINT)
        assert recorder.code in (0, 130)
    assert opened(folder).meta.complete
    assert counted(opened(folder)) == list(range(COUNT))


def test_interrupts_that_are_not_for_the_recorder(folder):
    """In `run` Ctrl-C belongs to the command; the handler of polars must not count."""
    code = "import ctypes; close = ctypes.CDLL(None).close"
    code += f"; [close(1_000_000_000 + number) for number in range({LONG})]"
    code += "; import time; print('made', flush=True); time.sleep(1.5)"
    arguments = ("run", "-o", "test", *CALLS_ONLY, "--", sys.executable, "-c", code)
    with Recorder(folder, *arguments) as recorder:
        recorder.attached()
        while "made" not in recorder.out:
            recorder.process.send_signal(signal.SIGINT)
            time.sleep(0.002)
        assert recorder.code == 0, recorder.err
    recording = opened(folder)
    assert recording.meta.complete
    assert recording.meta.notes == []
    assert LONG - lost(recording, "syscalls") <= len(counted(recording)) <= LONG


@pytest.mark.parametrize("delay", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_starts(folder, number, delay):
    """Either it had not begun, and there is nothing; or there is a whole recording."""
    with Counter(23) as target, attach(folder, target.pid) as recorder:
        began = time.monotonic()
        while time.monotonic() < began + delay:
            recorder.look_for_ids()
            time.sleep(0.002)
        recorder.process.send_signal(number)
        code = recorder.code
    assert code in (0, -number)
    assert recorder.err.count("error: ") == 0
    if code == 0 or (folder / "test.scope").exists():
        assert opened(folder).meta.complete
    else:
        assert list(folder.iterdir()) == []


# ---- its own terminal ----------------------------------------------------------------------------


def record_in_shell(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Record a Counter in a shell; `$scope` does so for half a second."""
    with Counter(23) as target:
        options = f"attach --pid {target.pid} -o test --duration 500ms"
        result = subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env={**os.environ, "scope": f"{' '.join(COMMAND)} {options}"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert "Traceback" not in result.stderr + result.stdout
    assert "error: " not in result.stderr + result.stdout
    return result


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("$scope | head -1; exit ${PIPESTATUS[0]}", 0),
        ("$scope | true; exit ${PIPESTATUS[0]}", 0),
        ("$scope 2>&1 | head -1; exit ${PIPESTATUS[0]}", 0),
        ("$scope 2>&1 | true; exit ${PIPESTATUS[0]}", 0),
        ("$scope >&-", 0),
        ("$scope 2>&-", 0),
        ("$scope >&- 2>&- <&-", 0),
        ("$scope > /dev/full", 1),
        ("$scope 2> /dev/full", 0),
    ],
)
def test_nobody_reads_what_it_says(folder, script, code):
    if code:
        with Counter(23) as target, open("/dev/full", "wb") as full, Recorder(
            folder, "attach", "--pid", target.pid, "-o", "test", "--duration", "100ms",
            stdout=full,
        ) as recorder:  # fmt: skip
            assert recorder.code == code
        assert "\nerror: cannot write to stdout: No space left on device" in recorder.err
    else:
        assert record_in_shell(folder, script).returncode == 0
    assert opened(folder).meta.complete


def test_what_is_said_goes_nowhere_else(folder):
    """With stderr closed its number must not be that of another file."""
    result = record_in_shell(folder, "$scope 2>&- >&-; exit $?")
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
    recording = opened(folder)
    for file in recording.path.rglob("*"):
        assert file.is_dir() or file.suffix in (".parquet", ".json"), file


def in_terminal(folder: Path, columns: int) -> str:
    """What a terminal of that width is told."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with Counter(23) as target:
        options = ("--duration", "1600ms")
        environment = {key: os.environ[key] for key in ("PATH",)} | {"TERM": "xterm"}
        with attach(
            folder, target.pid, options=options, stderr=follower, stdout=follower,
            environment=environment | {"COLUMNS": "", "LINES": ""},
        ) as recorder:  # fmt: skip
            os.close(follower)
            parts = []
            try:
                while data := os.read(leader, 65536):
                    parts.append(data)
            except OSError:  # EIO: the last one has closed it
                pass
            assert recorder.code == 0
    os.close(leader)
    return b"".join(parts).decode()


@pytest.mark.parametrize("columns", [1, 20, 80])
def test_the_status_line_fits(folder, columns):
    said = in_terminal(folder, columns)
    summary_at = said.index("\x1b[1mtest.scope")
    lines = said[said.index("Ctrl-C ends it") : summary_at].split("\r")[1:]
    assert len(lines) >= 3  # about two a second, and the empty one
    assert columns == 1 or lines[1].lstrip().startswith("1 s")
    assert all(len(line.strip("\n")) < columns for line in lines)
    assert opened(folder).meta.complete


def test_a_terminal_that_is_closed(folder):
    """Writing to it fails then; the signal that comes with it ends the recording in good order."""
    import pty

    leader, follower = pty.openpty()
    with (
        Counter(COUNT) as target,
        attach(
            folder, target.pid, stderr=follower, stdout=follower, start_new_session=True
        ) as recorder,
    ):
        os.close(follower)
        recorder.attached(says_so=False)
        wait_until(lambda: list((folder / "test.scope").glob("processes/*.parquet")))
        os.close(leader)
        target.count_through()
        time.sleep(1.2)  # the status line was due
        assert recorder.process.poll() is None
        recorder.process.send_signal(signal.SIGHUP)
        recorder.process.wait(30)
        assert recorder.code in (0, 1)
    assert opened(folder).meta.complete
    assert counted(opened(folder)) == list(range(COUNT))


# ---- what others may see -------------------------------------------------------------------------


def modes(path: Path) -> dict[str, tuple[int, int]]:
    """Of all files: their modes and owner."""
    found = {}
    for entry in [path, *path.rglob("*")]:
        status = entry.lstat()
        assert status.st_uid == status.st_gid
        found[str(entry.relative_to(path))] = (stat.S_IMODE(status.st_mode), status.st_uid)
    return found


@pytest.mark.parametrize("sudo", [False, True], ids=["root", "sudo"])
def test_recordings_are_private(folder, sudo):
    """Whatever the umask is; and under sudo they belong to who called it."""
    environment = {"SUDO_UID": str(NOBODY), "SUDO_GID": str(NOBODY)} if sudo else {}
    owner = NOBODY if sudo else 0
    with (
        Counter(23) as target,
        attach(folder, target.pid, environment=environment, umask=0) as recorder,
    ):
        recorder.attached()
        target.count_through()
        wait_until(lambda: list((folder / "test.scope").glob("syscalls/*.parquet")))
        for mode, uid in modes(folder / "test.scope").values():
            assert (mode & 0o077, uid) == (0, owner)
        assert recorder.stop() == 0
    found = modes(folder / "test.scope")
    assert len(found) > 8
    for name, (mode, uid) in found.items():
        assert mode == (0o700 if (folder / "test.scope" / name).is_dir() else 0o600), name
        assert uid == owner, name
    assert counted(opened(folder)) == list(range(23))


@pytest.mark.parametrize("sudo", [False, True], ids=["root", "sudo"])
def test_capabilities_are_given_up(folder, sudo):
    """Of all threads, also of those that came later with polars."""
    environment = {"SUDO_UID": str(NOBODY), "SUDO_GID": str(NOBODY)} if sudo else {}
    with Counter(23) as target, attach(folder, target.pid, environment=environment) as recorder:
        recorder.attached()
        wait_until(lambda: list((folder / "test.scope").glob("processes/*.parquet")))
        statuses = [
            (thread / "status").read_text()
            for thread in Path(f"/proc/{recorder.process.pid}/task").iterdir()
        ]
        assert recorder.stop() == 0
    assert len(statuses) >= 2
    for text in statuses:
        held = parse_status(text)
        assert held.effective == held.permitted == frozenset(NEEDED_TO_LOOK)
        assert held.inheritable == held.bounding == held.ambient == frozenset()
        assert "\nNoNewPrivs:\t1\n" in text
        uid = NOBODY if sudo else 0
        assert f"\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in text


def test_payloads_stay_in_their_table(folder):
    secret = "hunter2-c0ffee"
    code = "import os; r, w = os.pipe(); os.write(1, b'ready\\n'); os.read(0, 1); "
    code += f"os.write(w, bytes.fromhex('{secret.encode().hex()}')); os.read(r, 99); os.read(0, 1)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        target.stdout.readline()
        with attach(folder, target.pid, options=["--unredacted"]) as recorder:
            recorder.attached()
            target.stdin.write(b"xx")
            target.stdin.close()
            assert recorder.code == 0
    recording = opened(folder)
    payloads = [row for row in table(recording, "messages")["payload"].to_list() if row]
    assert secret.encode() in payloads
    said = [recorder.out, recorder.err, summary(folder)]
    said.append((folder / "test.scope" / "meta.json").read_text())
    with Recorder(folder, "summary", "test.scope", "--json") as reader:
        assert reader.code == 0
        said.append(json.dumps(json.loads(reader.out)))
    for text in said:
        assert secret not in text
        assert secret.encode().hex() not in text or text is said[3] or "target" in text
