"""scope-ebpf run: the command's own world is left as it is, and recorded from its first call on."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import scope_ebpf
from scope_ebpf.recording.reader import Recording
from tests.live.recording import COMMAND, compiled

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The program that makes known calls."""
    return compiled("calls", tmp_path_factory.mktemp("calls"))


def run(
    path: Path, *command: object, options: tuple[object, ...] = (), **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command under trace; returns when it has ended."""
    arguments = [COMMAND, "run", "-o", path, *options, "--", *command]
    return subprocess.run(
        [str(argument) for argument in arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **more,
    )  # fmt: skip


def opened(path: Path) -> Recording:
    """The recording, which must be complete."""
    recording = scope_ebpf.open_recording(path)
    recording.check()
    assert recording.meta.complete
    return recording


@pytest.mark.parametrize(
    ("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 128 + 9)]
)
def test_exit_code(command, code, tmp_path):
    path = tmp_path / "run.scope"
    result = run(path, "sh", "-c", f"echo its output; {command}")
    assert result.returncode == code, result.stderr
    # stdout is the command's, and the summary goes elsewhere
    assert result.stdout == "its output\n"
    assert "syscalls" in result.stderr
    rows = opened(path).processes.collect()
    end = rows.filter(event="exit")
    assert end["exit_code"].to_list() == [None if code > 128 else code]
    assert end["signal"].to_list() == [9 if code > 128 else None]


def test_command_not_found(tmp_path):
    path = tmp_path / "run.scope"
    result = run(path, "no-such-command-of-scope-ebpf", "--option")
    assert result.returncode == 127
    assert result.stdout == ""
    assert result.stderr.startswith("error: cannot run no-such-command-of-scope-ebpf: ")
    assert len(result.stderr.splitlines()) == 1
    assert not path.exists()


def test_command_not_executable(tmp_path):
    path, file = tmp_path / "run.scope", tmp_path / "file"
    file.write_text("text")
    result = run(path, file)
    assert result.returncode == 126
    assert len(result.stderr.splitlines()) == 1
    assert str(file) in result.stderr
    assert not path.exists()


def test_from_the_first_instruction(calls, tmp_path):
    """The execve is the first event, and every call after it is there, and none before it."""
    path = tmp_path / "run.scope"
    result = run(path, calls, "go-on")
    assert (result.returncode, result.stdout) == (0, "{}\n"), result.stderr
    recording = opened(path)
    processes = recording.processes.collect()
    assert processes["event"].to_list() == ["exec", "exit"]
    tgid = processes["tgid"][0]
    assert processes["command_line"][0] == f"{calls} go-on"
    rows = recording.syscalls.sort("start_ns").collect()
    assert rows["tgid"].unique().to_list() == [tgid]
    # the dynamic loader's first call
    assert rows["name"][0] == "brk"
    assert rows["start_ns"][0] >= processes["time_ns"][0]
    assert rows.filter(name="getppid", arg0=3)["arg1"].to_list() == list(range(307))
    assert rows["name"].to_list().count("execve") == 0
    assert (rows["name"][-1], rows["status"][-1]) == ("exit_group", "no_return")
    # as many as another tracer sees, when there is one
    if shutil.which("strace"):
        trace = tmp_path / "strace"
        subprocess.run(
            ["strace", "-o", trace, calls, "go-on"], check=True, stdout=subprocess.DEVNULL
        )
        names = [line.partition("(")[0] for line in trace.read_text().splitlines()]
        names = [name for name in names if not name.startswith("+++")]
        assert names[0] == "execve"
        assert rows["name"].to_list() == names[1:]


@pytest.mark.parametrize("follow", [True, False])
def test_children(tmp_path, follow):
    path = tmp_path / "run.scope"
    options = () if follow else ("--no-follow",)
    result = run(path, "sh", "-c", "true; /bin/true; /bin/true; exit 0", options=options)
    assert result.returncode == 0
    events = opened(path).processes.collect()["event"].to_list()
    assert events.count("exec") == (3 if follow else 1)
    assert events.count("fork") == (2 if follow else 0)
    assert events.count("exit") == (3 if follow else 1)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user can reach, unlike tmp_path."""
    directory = Path(tempfile.mkdtemp(prefix="scope-ebpf-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_under_sudo(open_directory):
    """The command runs as the invoking user, and the recording is that user's alone."""
    user = pwd.getpwnam("nobody")
    path = open_directory / "run.scope"
    environment = {**os.environ, "SUDO_UID": str(user.pw_uid), "SUDO_GID": str(user.pw_gid)}
    environment |= {"SUDO_USER": "nobody", "SUDO_COMMAND": "scope-ebpf"}
    script = 'id -u; id -g; grep -E "^(Uid|Gid|CapEff|CapAmb|NoNewPrivs)" /proc/self/status; env'
    result = run(path, "sh", "-c", script, env=environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == [str(user.pw_uid), str(user.pw_gid)]
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert set(status["Uid"].split()) == {str(user.pw_uid)}
    assert set(status["Gid"].split()) == {str(user.pw_gid)}
    assert int(status["CapEff"], 16) == int(status["CapAmb"], 16) == 0
    assert status["NoNewPrivs"] == "0", "sudo would not work in the command"
    told = dict(line.split("=", 1) for line in lines if "=" in line and ":\t" not in line)
    assert told["USER"] == told["LOGNAME"] == "nobody"
    assert not any(name.startswith("SUDO_") for name in told)
    for place in (path, *path.rglob("*")):
        found = place.lstat()
        assert (found.st_uid, found.st_gid) == (user.pw_uid, user.pw_gid), place
        assert stat.S_IMODE(found.st_mode) == (0o700 if place.is_dir() else 0o600), place
    recording = opened(path)
    assert recording.rows("syscalls") > 100
    # giving root up happens before the exec, and is not in the recording
    names = recording.syscalls.collect()["name"].unique().to_list()
    assert not {"setresuid", "setresgid", "setgroups"} & set(names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_go_to_the_command(number, tmp_path):
    """Ctrl-C reaches the whole foreground group, SIGTERM only scope-ebpf: the command ends by both."""
    path, mark = tmp_path / "run.scope", tmp_path / "mark"
    script = f"trap 'exit 43' INT TERM; touch {mark}; while :; do sleep 0.05; done"
    command = [COMMAND, "run", "-o", path, "--", "sh", "-c", script]
    with subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            while not mark.exists():
                assert process.poll() is None
                time.sleep(0.01)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            _, talk = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 43, talk
    rows = opened(path).processes.collect()
    assert rows.filter(event="exit", exit_code=43).height == 1
    assert "Traceback" not in talk
