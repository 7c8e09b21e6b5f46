"""record --all: everything but the recorder, short-lived processes, used-again numbers, containers.

One recording of a guest with systemd and its services; the tests look at parts of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scope_ebpf.analysis.numbers import LifeOf, process_lives
from scope_ebpf.analysis.services import add_services, service_lives
from scope_ebpf.recording.reader import Recording, open_recording
from tests.lab.sums import WRONG, sums_are_right

pytestmark = [pytest.mark.lab, pytest.mark.systemd, pytest.mark.timeout(400)]
COMMAND = "/usr/local/bin/scope-ebpf"
CGROUPS = Path("/sys/fs/cgroup")
PID_MAX = Path("/proc/sys/kernel/pid_max")
# The kernel begins anew at 300, so that each number is used several times.
LOW_PID_MAX = 620
SHORT_LIVED = 503
QUERIES, REQUESTS, TLS_WRITES = 23, 17, 29
ID = "4f1c2d3e5a6b" + "0" * 52
POD = "1b2c3d4e_0000_4000_8000_00000000000f"
CONTAINERS = {
    "docker": f"system.slice/docker-{ID}.scope",
    "podman": f"machine.slice/libpod-{ID}.scope/container",
    "containerd": f"kubepods.slice/kubepods-pod{POD}.slice/cri-containerd-{ID}.scope",
    "lxc": "lxc.payload.web",
}
PLACES = {
    "docker": "docker 4f1c2d3e5a6b",
    "podman": "podman 4f1c2d3e5a6b",
    "containerd": "pod 1b2c3d4e, containerd 4f1c2d3e5a6b",
    "lxc": "lxc web",
}
APPLICATION = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]
"""
# Both ends of TLS in one process, over a socket pair; the library is loaded long after the recording began.
TLS = """
import socket, ssl, sys, threading, time
folder, count = sys.argv[1], int(sys.argv[2])
server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
client = ssl.create_default_context(cafile=f"{folder}/cert.pem")
client.check_hostname = False
time.sleep(15)
left, right = socket.socketpair()
def serve():
    with server.wrap_socket(right, server_side=True) as end:
        for _ in range(count):
            end.recv(100)
            end.sendall(b"world!!")
thread = threading.Thread(target=serve)
thread.start()
with client.wrap_socket(left, server_hostname="localhost") as end:
    for _ in range(count):
        end.sendall(b"hello")
        end.recv(100)
    thread.join()
"""


@dataclass
class Known:
    """What the guest was made to do."""

    recording: Recording
    recorder: int
    running: dict[int, tuple[str, str]] = field(default_factory=dict)  # comm and cgroup, by tgid
    children: list[tuple[int, str]] = field(default_factory=list)  # tgid and program
    contained: dict[str, int] = field(default_factory=dict)
    noted: dict[str, Any] = field(default_factory=dict)

    def table(self, name: str) -> pl.DataFrame:
        frame = self.recording.table(name)
        return self.recording.collect(frame.sort(frame.collect_schema().names()[0]))


def run(*command: object, **options: Any) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True, text=True, check=False, timeout=120, **options,
    )  # fmt: skip
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return str(done.stdout)


def processes_now() -> dict[int, tuple[str, str]]:
    """Every process that is no thread of the kernel: its comm and cgroup, by tgid."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # only a process has memory of its own
            if not (folder / "maps").read_bytes():
                continue
            comm = (folder / "comm").read_text().rstrip("\n")
            cgroup = (folder / "cgroup").read_text().strip().removeprefix("0::")
        except OSError:
            continue
        found[int(folder.name)] = (comm, cgroup)
    return found


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Known:
    folder = tmp_path_factory.mktemp("host")
    folder.chmod(0o755)
    folder.parent.chmod(0o755)
    folder.parent.parent.chmod(0o755)
    path = folder / "host.scope"
    before = processes_now()
    recorder = subprocess.Popen(
        [COMMAND, "record", "--all", "-o", str(path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = Known(None, recorder.pid)  # type: ignore[arg-type]  # it comes at the end
    pid_max = PID_MAX.read_text()
    stderr = recorder.stderr
    assert stderr is not None
    try:
        line = stderr.readline()
        assert line.startswith("recording host to "), line + stderr.read()
        later = begin_later(folder)
        databases(found)
        containers(found)
        short_lived(found)
        web(found, folder)
        assert later.wait(120) == 0
        now = processes_now()
        found.running = {tgid: told for tgid, told in before.items() if now.get(tgid) == told}
        recorder.terminate()
        # its last act is the summary
        assert recorder.wait(120) == 0 or not sums_are_right(), stderr.read()
    finally:
        PID_MAX.write_text(pid_max)
        subprocess.run(["systemctl", "stop", "lab-web"], check=False, capture_output=True)
        recorder.kill()
        recorder.wait()
        stderr.close()
    found.recording = open_recording(path)
    found.recording.check()
    return found


def begin_later(folder: Path) -> subprocess.Popen[bytes]:
    """A program with a libssl that nobody had when the recording began."""
    library = next(Path("/usr/lib/x86_64-linux-gnu").glob("libssl.so.3"))
    (folder / "lib").mkdir()
    (folder / "lib" / library.name).write_bytes(library.read_bytes())
    run(
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
        "-keyout", folder / "key.pem", "-out", folder / "cert.pem",
    )  # fmt: skip
    return subprocess.Popen(
        ["/usr/bin/python3", "-c", TLS, str(folder), str(TLS_WRITES)],
        env={**os.environ, "LD_LIBRARY_PATH": str(folder / "lib")},
    )


def databases(found: Known) -> None:
    """A query in one connection each time: a short-lived backend of PostgreSQL."""
    script = "\n".join(f"\\c postgres\nselect {number};" for number in range(QUERIES))
    run("su", "postgres", "-c", "psql -q", input=script)
    assert run("redis-cli", "ping").strip() == "PONG"


def containers(found: Known) -> None:
    """A process in a cgroup of each form, in namespaces of its own; all is gone a moment later."""
    for name, path in CONTAINERS.items():
        cgroup = CGROUPS / path
        made = [each for each in (cgroup, *cgroup.parents) if not each.exists()]
        cgroup.mkdir(parents=True)
        script = (
            f"echo $$ >{cgroup}/cgroup.procs; exec unshare -m -p -f --mount-proc sh -c 'echo $$'"
        )
        child = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
        out, _ = child.communicate(timeout=60)
        assert (child.returncode, out.strip()) == (
            0,
            "1",
        )  # it is the first one in its pid namespace
        found.contained[name] = child.pid
        for each in made:
            each.rmdir()


def short_lived(found: Known) -> None:
    """Many processes, one after the other, whose numbers are used again and again."""
    PID_MAX.write_text(str(LOW_PID_MAX))
    began = time.monotonic()
    for number in range(SHORT_LIVED):
        program = "false" if number % 3 else "true"
        tgid = os.posix_spawn(f"/bin/{program}", [program, str(number)], {})
        _, status = os.waitpid(tgid, 0)
        assert os.waitstatus_to_exitcode(status) == (program == "false")
        found.children.append((tgid, program))
    found.noted["per_minute"] = 60 * SHORT_LIVED / (time.monotonic() - began)


def web(found: Known, folder: Path) -> None:
    """A service under gunicorn that is started while everything is recorded."""
    (folder / "orders.py").write_text(APPLICATION)
    gunicorn = ["/opt/scope/bin/gunicorn", "-w", "2", "-b", "127.0.0.1:8123", "orders:app"]
    run("systemd-run", "--unit=lab-web", f"--working-directory={folder}", *gunicorn)
    deadline = time.monotonic() + 100
    answered = 0
    while answered < REQUESTS:
        try:
            with urllib.request.urlopen("http://127.0.0.1:8123/") as answer:
                answered += answer.read() == b"hello"
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_nothing_was_lost(known):
    assert known.recording.meta.complete
    assert known.table("losses").is_empty()


def test_everything_but_the_recorder_is_there(known):
    processes = known.table("processes")
    alive = processes.filter(pl.col("event") == "alive", tid=pl.col("tgid"))
    told = {
        tgid: (comm, cgroup) for tgid, comm, cgroup in alive.select("tgid", "comm", "cgroup").rows()
    }
    assert len(known.running) > 10
    assert {tgid: told.get(tgid) for tgid in known.running} == known.running
    for table in ("processes", "syscalls", "offcpu", "messages"):
        assert known.recorder not in known.table(table)["tgid"].unique().to_list(), table
    # threads of the kernel are no processes, and neither is what has ended
    assert "kthreadd" not in processes["comm"].to_list()


def test_services_have_their_names(known):
    lives = service_lives(known.table("processes"))
    pairs = set(lives.select("service", "place").rows())
    for service, place in (
        ("postgresql", "postgresql.service"),
        ("redis", "redis-server.service"),
        ("cron", "cron.service"),
        ("nginx", "nginx.service"),
        ("systemd-journald", "systemd-journald.service"),
        # also the workers, which were forked and have executed nothing
        ("orders", "lab-web.service"),
    ):
        assert (service, place) in pairs, pairs
    inside = lives.filter(place="lab-web.service")
    assert inside["service"].unique().to_list() == ["orders"] and len(inside) >= 3


def test_each_short_lived_process_is_there_once(known, row):
    processes = known.table("processes")
    made = processes.filter(event="exec").filter(
        pl.col("command_line").str.contains("^(true|false) [0-9]+$")
    )
    own = [(tgid, program) for tgid, program in made.select("tgid", "comm").rows()]
    assert own == known.children
    ends = processes.filter(event="exit").join(made, on=["tgid", "start_boottime_ns"], how="semi")
    codes = ends.select("tgid", "comm", "exit_code").rows()
    assert codes == [(tgid, name, int(name == "false")) for tgid, name in known.children]
    born = processes.filter(event="fork").join(made, on=["tgid", "start_boottime_ns"], how="semi")
    assert len(born) == SHORT_LIVED
    row("record --all: short-lived processes", True, f"{known.noted['per_minute']:.0f} a minute")


def test_a_number_that_is_used_again_merges_nothing(known):
    """What each call belongs to is told by its argument: exit_group(0) is `true`, (1) is `false`."""
    numbers = [tgid for tgid, _ in known.children]
    assert len(set(numbers)) < len(numbers) / 1.3, "no number was used again"
    ends = known.table("syscalls").filter(name="exit_group")
    ends = ends.filter(pl.col("tgid").is_in(list(set(numbers))))
    lives = process_lives(known.table("processes"))
    life = ends.select(LifeOf(lives).expression(pl.col("start_ns"))).to_series()
    program = lives["command_line"].gather(life).str.extract("^(true|false) [0-9]+$")
    calls = ends.with_columns(program=program).drop_nulls("program")
    assert calls["program"].to_list() == [name for _, name in known.children]
    assert calls["arg0"].to_list() == [int(name == "false") for _, name in known.children]


def test_containers_are_told_by_their_cgroups(known):
    """Although each cgroup was there for a moment only."""
    processes = known.table("processes")
    lives = service_lives(processes)
    for name, tgid in known.contained.items():
        own = processes.filter(tgid=tgid)
        moved = own.filter(event="moved")
        began = moved["time_ns"][0]
        assert moved["cgroup"].to_list()[:1] == [f"/{CONTAINERS[name]}"], own
        place = lives.filter((pl.col("tgid") == tgid) & (pl.col("since_ns") <= began))["place"][-1]
        assert place == PLACES[name]
        # its child, in a pid namespace of its own, has the host's number, as everything has
        children = processes.filter(event="fork", parent_tgid=tgid)
        assert len(children) == 1 and children["cgroup"][0] == f"/{CONTAINERS[name]}"
        assert children["tgid"][0] > 1


def test_a_library_that_came_later_is_probed(known):
    rows = known.table("tls").filter(direction="send")
    lengths = rows["length_bytes"].to_list()
    notes = known.recording.meta.notes
    assert (lengths.count(5), lengths.count(7)) == (TLS_WRITES, TLS_WRITES), (lengths, notes)


def test_interpreters_that_came_later_are_met(known):
    interpreters = known.table("interpreters")
    lives = service_lives(known.table("processes"))
    named = add_services(interpreters, lives, "time_ns")
    assert "orders" in named.filter(stacks=True)["service"].to_list(), named


def test_the_summary_groups_by_service(known):
    if not sums_are_right():
        pytest.skip(WRONG)
    shown = json.loads(run(COMMAND, "summary", known.recording.path, "--json"))
    pairs = {(row["service"], row["place"]) for row in shown["services"]}
    assert ("orders", "lab-web.service") in pairs
    assert set(PLACES.values()) <= {place for _, place in pairs}, pairs


def test_the_recorder_stays_small(known, row: Callable[..., None]):
    use = known.recording.meta.recorder
    assert use.peak_rss_bytes < 400 << 20
    row("record --all: memory", True, f"{use.peak_rss_bytes / 1e6:.0f} MB")
