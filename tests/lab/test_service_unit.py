"""scope-ebpf.service under systemd: no root, four capabilities, a quota, and a journal that can be read."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scope_ebpf.loaders import privileges
from scope_ebpf.recording.meta import read_meta
from scope_ebpf.recording.reader import open_recording
from scope_ebpf.recording.rotation import disk_bytes
from tests.lab.recorded import FIRST_WITH_RINGS, KERNEL
from tests.lab.sums import sums_are_right

pytestmark = [pytest.mark.lab, pytest.mark.systemd, pytest.mark.timeout(400)]
UNIT = Path("/etc/systemd/system/scope-ebpf.service")
FOLDER = Path("/var/lib/private/scope-ebpf")
SOURCE = Path(__file__).resolve().parents[2] / "scripts"
COMMAND = "/usr/local/bin/scope-ebpf"
START_SECONDS = 120
# Above 2, which is the default of Debian's kernels, these open perf events for CAP_SYS_ADMIN only.
PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
REFUSING, ALLOWING = "3", "2"
# From then on a uprobe needs no perf event, but later ones record system calls by such events.
LINKED_UPROBES, CALLS_BY_EVENTS = (6, 6), (7, 0)
# As little as is taken: the test fills it.
QUOTA = 8 << 20


def run(*command: object, check: bool = True) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=START_SECONDS,
    )
    assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout + done.stderr


def shown(name: str) -> str:
    return run("systemctl", "show", "-p", name, "--value", "scope-ebpf").strip()


def journal() -> str:
    return run("journalctl", "-u", "scope-ebpf", "-o", "cat", "--no-pager")


def recordings() -> list[Path]:
    return sorted(FOLDER.glob("host-*.scope"))


def dropped_until(path: Path) -> int | None:
    """Until when a running recording dropped its rows; None: it did not, or has just begun."""
    return read_meta(path).dropped_until_ns if (path / "meta.json").exists() else None


def drop_in(text: str) -> None:
    folder = UNIT.with_name("scope-ebpf.service.d")
    folder.mkdir(exist_ok=True)
    (folder / "test.conf").write_text(f"[Service]\n{text}\n")
    run("systemctl", "daemon-reload")


@pytest.fixture(scope="module")
def unit() -> Iterator[None]:
    """The unit as `make install-service` puts it there, with a small quota."""
    asked = PARANOID.read_text()
    PARANOID.write_text(REFUSING)
    said = run(SOURCE / "install_service.sh", "install", COMMAND, UNIT.parent)
    wanted = KERNEL < LINKED_UPROBES or KERNEL >= CALLS_BY_EVENTS
    assert (f"sysctl kernel.perf_event_paranoid={ALLOWING}" in said) == wanted
    # where it would not start at all, or lose calls
    if KERNEL < FIRST_WITH_RINGS or KERNEL >= CALLS_BY_EVENTS:
        PARANOID.write_text(ALLOWING)
    record = f"{COMMAND} record --all --into /var/lib/scope-ebpf"
    drop_in(f"ExecStart=\nExecStart={record} --keep {QUOTA}\nRestart=no")
    yield
    run("systemctl", "stop", "scope-ebpf", check=False)
    run(SOURCE / "install_service.sh", "uninstall", COMMAND, UNIT.parent)
    PARANOID.write_text(asked)


def test_it_starts_records_stops_and_starts_anew(unit):
    run("systemctl", "start", "scope-ebpf")
    assert shown("ActiveState") == "active"
    recorder = int(shown("MainPID"))
    status = Path(f"/proc/{recorder}/status").read_text()
    held = privileges.parse_status(status)
    # no root, and nothing else than what it needs; what it executes would have nothing
    assert held.effective == held.permitted == held.bounding == set(privileges.NEEDED)
    assert held.ambient == held.inheritable == frozenset()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    assert "0" not in fields["Uid"].split()
    assert fields["NoNewPrivs"].strip() == "1" and fields["Seccomp"].strip() == "2"
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    deadline = time.monotonic() + 60
    while " rows, lost 0" not in shown("StatusText"):
        assert time.monotonic() < deadline, shown("StatusText")
        time.sleep(1)
    run("systemctl", "restart", "scope-ebpf")
    first, second = recordings()
    run("systemctl", "stop", "scope-ebpf")
    assert shown("Result") == "success" or not sums_are_right()
    recording = open_recording(first)
    recording.check()
    processes = recording.collect(recording.processes)
    assert recording.meta.complete and recording.meta.scope == "host"
    assert recorder not in processes["tgid"].to_list()
    own = processes.filter(tgid=child.pid, event="exec")
    assert own["comm"].to_list() == ["true"]
    services = {
        "postgres": "postgresql@15-main.service",
        "redis-server": "redis-server.service",
        "cron": "cron.service",
    }
    for comm, service in services.items():
        paths = processes.filter(comm=comm, event="alive")["cgroup"].unique().to_list()
        assert len(paths) == 1 and paths[0].endswith(f"/{service}"), (comm, paths)
    assert read_meta(second).complete
    # what people read: where it records to, and what came of it
    lines = journal().splitlines()
    assert (
        sum(line.startswith("recording host to /var/lib/scope-ebpf/host-") for line in lines) == 2
    )
    if sums_are_right():
        assert any(line.startswith("kept") and "nothing was dropped" in line for line in lines)
    assert not any("Traceback" in line for line in lines)
    assert oct(first.stat().st_mode & 0o777) == "0o700"


def test_the_quota_holds_for_all_recordings(unit):
    """Those of earlier runs go first, then the oldest rows; and never is more there than is allowed."""
    assert len(recordings()) == 2
    filler = recordings()[0] / "filler"
    # an earlier run took half of the quota
    filler.write_bytes(os.urandom(QUOTA // 2))
    run("systemctl", "start", "scope-ebpf")
    newest = recordings()[-1]
    program = "import os\nwhile True:\n    os.getppid(); os.stat('/')"
    busy = subprocess.Popen(["/usr/bin/python3", "-c", program])
    most = 0
    try:
        deadline = time.monotonic() + 240
        while dropped_until(newest) is None:
            assert time.monotonic() < deadline, (most, shown("StatusText"))
            most = max(most, disk_bytes(FOLDER))
            time.sleep(0.5)
    finally:
        busy.kill()
        busy.wait()
        run("systemctl", "stop", "scope-ebpf")
    assert recordings() == [newest]
    assert 0 < most <= QUOTA
    recording = open_recording(newest)
    recording.check()
    assert recording.meta.complete
    assert sum("was removed, as the quota has it" in note for note in recording.meta.notes) == 2
    assert recording.meta.tables["syscalls"].dropped > 0
    processes = recording.collect(recording.processes)
    assert processes.filter(tgid=busy.pid)["event"].to_list()[0] in {"alive", "fork"}
    assert "were dropped" in journal() or not sums_are_right()


@pytest.mark.parametrize("absent", privileges.NEEDED)
def test_each_capability_is_needed_and_its_lack_is_said(unit, absent):
    """Without it nothing is recorded, and what is said names it and what it is for."""
    rest = " ".join(name for name in privileges.NEEDED if name != absent)
    name = f"without-{absent.lower().replace('_', '-')}"
    command = ["systemd-run", "--quiet", "--wait", "--pipe", f"--unit={name}"]
    command += ["-p", "DynamicUser=yes", "-p", f"StateDirectory={name}"]
    command += ["-p", f"AmbientCapabilities={rest}", "-p", f"CapabilityBoundingSet={rest}"]
    command += ["-p", "NoNewPrivileges=yes", "-p", "LimitMEMLOCK=infinity"]
    path = f"/var/lib/{name}/test"
    done = subprocess.run(
        [*command, COMMAND, "record", "--all", "--duration", "2s", "-o", path],
        capture_output=True, text=True, check=False, timeout=START_SECONDS,
    )  # fmt: skip
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert f"{absent} is missing, which {privileges.PURPOSES[absent]}" in done.stderr, done.stderr


def test_what_the_kernel_refuses_is_said(unit):
    """Perf events for one who is not root: they carry records on old kernels, uprobes on others."""
    PARANOID.write_text(REFUSING)
    journal_before = len(journal())
    run("systemctl", "start", "scope-ebpf", check=False)
    if KERNEL < FIRST_WITH_RINGS:
        assert shown("Result") == "exit-code"
        lines = [line for line in journal()[journal_before:].splitlines() if "error: " in line]
        assert len(lines) == 1 and lines[0].endswith("`sysctl kernel.perf_event_paranoid=2`"), lines
        return
    run("systemctl", "stop", "scope-ebpf")
    notes = open_recording(recordings()[-1]).meta.notes
    refused = [note for note in notes if f"kernel.perf_event_paranoid is {REFUSING}" in note]
    assert any(note.startswith("what runs on a CPU is not sampled") for note in refused), notes
    of_tls = [note for note in refused if note.startswith("TLS through ")]
    assert bool(of_tls) == (KERNEL < LINKED_UPROBES), notes


def test_the_sandbox(unit, row):
    report = json.loads(run("systemd-analyze", "security", "--json=short", "scope-ebpf.service"))
    exposure = sum(float(item["exposure"] or 0) for item in report)
    score = run("systemd-analyze", "security", "--no-pager", "scope-ebpf.service").splitlines()[-1]
    value = float(score.split(":")[-1].split()[0])
    assert value <= 2.0, score
    assert exposure > 0
    row("service scope-ebpf.service", True, f"systemd-analyze security: {value}")
