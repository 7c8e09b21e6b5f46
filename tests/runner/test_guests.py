"""The lab's runner with real guests: exit codes, panics, hangs, two at once, and what is left of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.runner, pytest.mark.timeout(400)]

ROOT = Path(__file__).resolve().parents[2]
LAB = [sys.executable, str(ROOT / "vagrant" / "lab.py")]
WORK = Path("/var/tmp")
KERNEL = "6.1"
PATIENCE_SECONDS = 180


def start(command: str, *options: str) -> subprocess.Popen[str]:
    """A guest that runs a shell command."""
    return subprocess.Popen(
        [*LAB, "run", KERNEL, "--command", command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: str, *options: str) -> tuple[int, str, str]:
    """The exit code, the output of the command, and what the runner said."""
    process = start(command, *options)
    out, talk = process.communicate(timeout=PATIENCE_SECONDS)
    nothing_left(process.pid)
    return process.returncode, out, talk


def nothing_left(pid: int) -> None:
    """No guest, and no file of it."""
    assert not list(WORK.glob(f"scope-lab-{pid}-*"))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert f"{WORK}/scope-lab-{pid}-" not in path.read_text()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue


def results(talk: str) -> Path:
    """The folder that the runner names."""
    found = re.search(r"results in (\S+)", talk)
    assert found is not None, talk
    return ROOT / found[1]


def test_output_exit_code_and_results():
    code, out, talk = run("uname -r; pwd; id -u; echo brought >/results/file; exit 7")
    assert code == 7
    release, *rest = out.splitlines()
    assert release.startswith(f"{KERNEL}.")
    assert rest == ["/scope", "0"]
    assert f"{KERNEL}: exit code 7 after" in talk
    assert (results(talk) / "file").read_text() == "brought\n"
    assert (results(talk) / "output.log").read_text() == out


def test_failing_test_fails_the_run():
    code, out, _ = run(
        "cd /tmp; printf 'def test(): assert 0' >test_x.py; python -m pytest test_x.py"
    )
    assert code == 1
    assert "1 failed" in out


def test_panic():
    code, out, talk = run("echo before; sleep 1; echo c >/proc/sysrq-trigger")
    assert code == 125
    assert out == "before\n"
    assert "failed: Kernel panic - not syncing: sysrq triggered crash" in talk
    assert "sysrq_handle_crash" in talk  # the console


def test_hang():
    code, out, talk = run("echo hangs; sleep 1000", "--timeout", "25")
    assert code == 124
    assert out == "hangs\n"
    assert "failed: it did not end within 25 s, and was stopped" in talk


def test_two_at_once():
    begun = [start(f"echo {n} >/results/n; cat /results/n; exit {n}") for n in (3, 4)]
    ended = [process.communicate(timeout=PATIENCE_SECONDS) for process in begun]
    assert [process.returncode for process in begun] == [3, 4]
    assert [out for out, _ in ended] == ["3\n", "4\n"]
    folders = [results(talk) for _, talk in ended]
    assert [(folder / "n").read_text() for folder in folders] == ["3\n", "4\n"]


def test_a_forgotten_process_keeps_nobody_waiting():
    code, out, _ = run("sleep 1000 & echo done")
    assert (code, out) == (0, "done\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_runner(number):
    process = start("sleep 1000")
    deadline = time.monotonic() + 30
    while not list(WORK.glob(f"scope-lab-{process.pid}-*/console")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=30)
    if number == signal.SIGKILL:
        # The guest dies with it; its folder goes when the next runner comes.
        left = list(WORK.glob(f"scope-lab-{process.pid}-*"))
        assert len(left) == 1
        assert run("true")[0] == 0
        time.sleep(0.1)
    else:
        assert process.returncode == 130
    nothing_left(process.pid)


def test_systemd():
    code, out, talk = run("systemctl is-system-running --wait; ps -o comm= -p 1", "--systemd")
    assert (code, out) == (0, "running\nsystemd\n"), talk


def test_unprivileged_user():
    if os.geteuid() != 0:
        pytest.skip("everything above ran without root")
    process = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *LAB, "run", KERNEL],
        capture_output=True,
        text=True,
        check=False,
    )
    owner = ROOT.stat().st_uid
    if owner == 65534:
        pytest.skip("the checkout is nobody's")
    # Somebody else's checkout, but the same image, read without root: only the results stop it.
    assert process.returncode == 2
    assert re.fullmatch(
        r"lab: cannot bring results to .*: permission denied; run it as the owner of this checkout\n",
        process.stderr,
    )
