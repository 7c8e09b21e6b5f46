"""The user's own probes: counts, arguments, texts and durations are what the programs did."""

from __future__ import annotations

import contextlib
import json
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import scope_ebpf
from scope_ebpf.errors import FormatError
from scope_ebpf.loaders import libbpf
from scope_ebpf.loaders.capture import Capture, CaptureOptions
from scope_ebpf.loaders.hit_families import program_files
from scope_ebpf.loaders.probed_files import ProbedFile
from scope_ebpf.loaders.usdt import UsdtSite, read_sites
from scope_ebpf.probe_specs import parse_probe
from scope_ebpf.recording.python_tables import Descriptions
from scope_ebpf.recording.tables import Payloads, wide_frames
from scope_ebpf.records import LossKind
from tests.live.recording import (
    COMMAND,
    Session,
    Target,
    attached,
    compiled,
    no_losses,
    scope_ebpf_command,
)

pytestmark = pytest.mark.live

TIMES, DEPTH, NAP_NS = 23, 7, 1_000_000  # as in programs/usdt.c
READY_SECONDS = 30


@pytest.fixture(scope="module", params=["-pie", "-no-pie"])
def program(request, tmp_path_factory):
    return compiled("usdt", tmp_path_factory.mktemp("usdt"), request.param)


def hits(session: Session, probe: str) -> pl.DataFrame:
    frame = session.table("hits").filter(pl.col("probe") == probe)
    assert frame["tgid"].unique().to_list() in ([], [session.target])
    return frame


def sites_of(path: Path) -> list[UsdtSite]:
    """USDT probes of a file; none if it is no program."""
    try:
        return read_sites(ProbedFile(path))
    except FormatError:
        return []


def probing(directory: Path, target: Target, *specs: str, more: tuple[object, ...] = ()):
    options = [part for spec in specs for part in ("--probe", spec)]
    return attached(directory, target, "--families", "processes", *options, *more)


def test_usdt_counts_and_semaphores(program, tmp_path):
    """A program that asks its semaphore hits the probe only while somebody listens."""
    with Target(program) as target:
        with probing(
            tmp_path,
            target,
            f"usdt:{program}:scope_test:counted",
            f"usdt:{program}:scope_test:both",
        ) as session:
            note = target.work()
        no_losses(session)
    assert note["listened"] == TIMES
    counted = hits(session, "scope_test:counted")
    assert counted["arguments"].to_list() == [[str(number)] for number in range(TIMES)]
    assert counted["duration_ns"].null_count() == TIMES
    assert counted["time_ns"].is_sorted()
    assert set(counted["context"]) == {0}
    # two sites, with arguments in different places
    both = hits(session, "scope_test:both")
    assert both["arguments"].to_list() == [
        [str(number), "1"] if number % 2 else ["0", str(number)] for number in range(TIMES)
    ]
    described = session.recording.meta.probes
    assert len(described) == 3
    assert "with a semaphore" in described[0]
    assert session.recording.meta.tables["hits"].rows == 2 * TIMES


def test_nobody_listens(program, tmp_path):
    """Without its probe the program does not even get to it, and a semaphore is given back."""
    with Target(program) as target, probing(tmp_path, target, f"usdt:{program}:scope_test:both"):
        assert target.work()["listened"] == 0
    # the semaphore of a process that outlives the recording counts down again
    with Target(program) as target:
        path = tmp_path / "second.scope"
        with scope_ebpf_command(
            path, "attach", "--pid", target.pid, "-o", path, "--families", "processes",
            "--probe", f"usdt:{program}:scope_test:counted",
        ) as session:  # fmt: skip
            session.stop()
        assert session.wait() == 0
        assert target.work() == {"listened": 0, "left": 0, "sum": note_sum(program)}


def note_sum(program: Path) -> int:
    with Target(program) as target:
        return int(target.work()["sum"])


def test_all_forms_of_arguments(program, tmp_path):
    """Registers, memory, constants of all sizes and signs; what cannot be read is null, and is said."""
    specs = [f"usdt:{program}:scope_test:{name}" for name in ("registers", "memory", "others")]
    with Target(program) as target:
        with probing(tmp_path, target, *specs, f"usdt:{program}:scope_test:counted") as session:
            target.work()
        no_losses(session)
    expected = {
        "registers": [
            str(0x1122334455667788), str(0x55667788), str(0x7788), str(0x77), str(0x88 - 256),
            str(0xAABBCCDDEEFF0011), str(0xEEFF0011), str(0x11),
        ],
        "memory": [
            "-5", str(0x3333333300000003), "-4", "-4", "1234567",
            str(0xFFFF8005), str(0xFFFF8005 - (1 << 32)), "2",
        ],
        "others": ["-7", "7", "255", "-1", None, None, None],
    }  # fmt: skip
    for name, arguments in expected.items():
        rows = hits(session, f"scope_test:{name}")["arguments"].to_list()
        assert rows == [arguments] * TIMES, name
    others = session.recording.meta.probes[2]
    assert "argument 5 cannot be read: %xmm0" in others
    assert "argument 7 cannot be read: the file has no symbol nowhere" in others


SDT_PROGRAM = """
#include <stdio.h>
#include <unistd.h>
#include <sys/sdt.h>
struct row { short s; unsigned char c; const char *name; };
int main(void)
{
	struct row rows[2] = {{-3, 200, "zero"}, {-4, 201, "one"}};
	volatile double ratio = 0.5;
	char gate;
	puts("ready"); fflush(stdout);
	if (read(0, &gate, 1) != 1)
		return 1;
	for (int i = 0; i < 23; i++) {
		struct row *row = rows + i % 2;
		DTRACE_PROBE6(real, six, i, row->s, row->c, row->name, -1L << 40, ratio * i);
		DTRACE_PROBE(real, none);
	}
	puts("{}");
	return 0;
}
"""


def test_the_header_of_systemtap(tmp_path):
    """What a compiler makes of the real <sys/sdt.h>."""
    program = tmp_path / "real"
    built = subprocess.run(
        ["gcc", "-w", "-O2", "-o", program, "-x", "c", "-"],
        input=SDT_PROGRAM, text=True, check=False, capture_output=True,
    )  # fmt: skip
    if "sys/sdt.h" in built.stderr:
        pytest.skip("optional: needs <sys/sdt.h>: apt install systemtap-sdt-dev")
    assert built.returncode == 0, built.stderr
    specs = [f"usdt:{program}:real:six(int,short,uchar,str,long,f64)", f"usdt:{program}:real:none"]
    with (
        Target(program) as target,
        probing(tmp_path, target, *specs, more=("--unredacted",)) as session,
    ):
        target.work()
    assert hits(session, "real:six")["arguments"].to_list() == [
        [str(n), str(-3 - n % 2), str(200 + n % 2), ["zero", "one"][n % 2], str(-1 << 40), str(n / 2)]
        for n in range(TIMES)
    ]  # fmt: skip
    assert hits(session, "real:none")["arguments"].to_list() == [[]] * TIMES


@pytest.mark.parametrize("redacted", [True, False])
def test_texts(program, redacted, tmp_path):
    spec = f"usdt:{program}:scope_test:text(sql, str, long)"
    with Target(program) as target:
        with probing(tmp_path, target, spec, more=() if redacted else ("--unredacted",)) as session:
            target.work()
        no_losses(session)
    rows = hits(session, "scope_test:text")["arguments"].to_list()
    assert len(rows) == TIMES
    assert [row[2] for row in rows] == [str(-number) for number in range(TIMES)]
    assert all(row[1] is None for row in rows[1::2])  # a null pointer
    first, others = rows[0], rows[1:]
    assert first[0] == "x" * 215 + "…"  # two texts share the room
    if redacted:
        assert all(row[0].startswith("SELECT '?") for row in others)
        assert all(row[0].endswith(others[0][0][-23:]) for row in others)
        assert "FROM t WHERE n = ?" in others[0][0]
        assert all(row[1].startswith("?") and "caf" not in row[1] for row in rows[::2])
        stored = b"".join(part.read_bytes() for part in session.path.rglob("*") if part.is_file())
        assert b"hunter2" not in stored and b"4711" not in stored
    else:
        assert {row[0] for row in others} == {"SELECT 'hunter2' FROM t WHERE n = 4711"}
        assert {row[1] for row in rows[::2]} == {"café"}


def test_functions(program, tmp_path):
    many = f"uprobe:{program}:many(int, str, ulong, ptr, short, char, long, uint)"
    at_entry = f"uprobe:{program}:fall(int)"
    with Target(program) as target:
        with probing(
            tmp_path,
            target,
            many,
            at_entry,
            f"uretprobe:{program}:fall(int)",
            f"uretprobe:{program}:name_of(str)",
            more=("--unredacted",),
        ) as session:
            target.work()
        no_losses(session)
    name = program.name
    assert hits(session, f"{name}:many")["arguments"].to_list() == [
        [str(number - 11), "password", str(1 << 40), "0xdeadbeef", "-3", "-1", str(-1 << 40), "4000000000"]
        for number in range(TIMES)
    ]  # fmt: skip
    falls = hits(session, f"{name}:fall")
    assert falls["arguments"].to_list() == [[str(depth)] for depth in range(DEPTH, -1, -1)]
    # sorted by their begin; the outermost call takes longest, and contains the others
    returns = hits(session, f"{name}:fall:return")
    results = [0]
    for depth in range(1, DEPTH + 1):
        results.append(-depth - results[-1])
    assert returns["arguments"].to_list() == [[str(result)] for result in reversed(results)]
    durations = returns["duration_ns"].to_list()
    assert durations == sorted(durations, reverse=True)
    assert all(duration >= (DEPTH + 1 - place) * NAP_NS for place, duration in enumerate(durations))
    assert durations[0] < 1_000_000_000
    ends = returns.select(pl.col("time_ns") + pl.col("duration_ns")).to_series()
    assert ends.is_sorted(descending=True)
    # each entry is seen shortly before or after the probe of the return sees it
    gaps = (returns["time_ns"] - falls["time_ns"]).abs()
    assert (gaps < NAP_NS).all()
    names = hits(session, f"{name}:name_of:return")
    assert names["arguments"].to_list() == [["odd"] if n % 2 else [None] for n in range(TIMES)]
    assert names["duration_ns"].null_count() == 0
    described = session.recording.meta.probes
    assert len(described) == 4
    assert all(" at 0x" in text for text in described)


def test_a_place_within_a_function(program, tmp_path):
    """By its offset and by its address; in the middle of an instruction it is refused."""
    address = int(
        next(
            line.split()[0]
            for line in subprocess.run(
                ["nm", program], check=True, capture_output=True, text=True
            ).stdout.splitlines()
            if line.endswith(" forms_memory")
        ),
        16,
    )
    start = int(
        next(
            line.split()[0]
            for line in subprocess.run(
                ["nm", program], check=True, capture_output=True, text=True
            ).stdout.splitlines()
            if line.endswith(" hit_forms")
        ),
        16,
    )
    specs = [f"uprobe:{program}:{address:#x}", f"uprobe:{program}:hit_forms+{address - start:#x}"]
    with (
        Target(program) as target,
        probing(tmp_path, target, *specs, f"usdt:{program}:scope_test:registers") as session,
    ):
        target.work()
    assert len(hits(session, f"{program.name}:{address:#x}")) == TIMES
    assert len(hits(session, f"{program.name}:hit_forms+{address - start:#x}")) == TIMES
    for spec in (f"uprobe:{program}:{start + 2:#x}", f"uprobe:{program}:hit_forms+0x2"):
        result = subprocess.run(
            [COMMAND, "run", "-o", tmp_path / "no.scope", "--probe", spec, "--", "true"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 2
        assert "lies within an instruction" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_only_recorded_threads(program, tmp_path):
    """Another process that runs the same file is not recorded, although it hits the probe."""
    with (
        Target(program) as target,
        Target(program) as other,
        probing(tmp_path, target, f"usdt:{program}:scope_test:counted") as session,
    ):
        assert other.work()["listened"] == TIMES
        target.work()
    assert len(hits(session, "scope_test:counted")) == TIMES


def test_a_file_of_another_mount_namespace(program, tmp_path):
    """As in a container: the path leads through /proc/PID/root, and not to our file of that name."""
    copy = tmp_path / "copy"
    shutil.copy(program, copy)
    hidden = tmp_path / "hidden"
    hidden.write_bytes(b"not this one")
    script = 'mount --bind "$0" "$1" && exec "$1"'
    with Target("unshare", "--mount", "sh", "-c", script, copy, hidden) as target:
        spec = f"usdt:/proc/{target.pid}/root{hidden}:scope_test:counted"
        with probing(tmp_path, target, spec) as session:
            assert target.work()["listened"] == TIMES
    assert len(hits(session, "scope_test:counted")) == TIMES


def test_what_must_be_single_stepped_is_said(program, tmp_path):
    where = f"{program}:hit_forms+0x1"  # behind the push: a mov
    with Target(program) as target, probing(tmp_path, target, f"uprobe:{where}") as session:
        target.work()
    (note,) = session.recording.meta.notes
    assert where in note
    assert "single-step" in note
    assert "single-step" in session.recording.meta.probes[0]


def test_the_list_of_probes(program):
    command = [COMMAND, "probes", program]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["scope_test:both", "i32,", "i32", "2"] in lines
    assert "scope-ebpf attach --pid PID --probe" in shown.stderr
    printed = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert {"probe": "scope_test:text", "arguments": ["u64", "u64", "i64"], "sites": 1} in rows
    for path, words in ((program.with_name("usdt-pi"), "did you mean"), ("/bin/true", "no USDT")):
        result = subprocess.run(
            [COMMAND, "probes", path], check=False, capture_output=True, text=True
        )
        assert result.returncode == 2
        assert words in result.stderr


def test_a_command_from_its_start(program, tmp_path):
    path = tmp_path / "run.scope"
    result = subprocess.run(
        [COMMAND, "run", "-o", path, "--probe", f"usdt:{program}:scope_test:counted", "--", program],
        input="x", check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert f'"listened": {TIMES}' in result.stdout
    listed = subprocess.run(
        [COMMAND, "events", path, "hits", "--csv"], check=True, capture_output=True, text=True
    )
    assert listed.stdout.count("scope_test:counted") == TIMES


def test_kernels_without_multi_uprobes(program, monkeypatch):
    """Before 6.6 each uprobe is a perf event, with its own cookie and semaphore."""
    monkeypatch.setattr(libbpf, "has_multi_uprobes", lambda: False)
    specs = [
        f"usdt:{program}:scope_test:counted",
        f"usdt:{program}:scope_test:both",
        f"uretprobe:{program}:fall(int)",
    ]
    with Target(program) as target:
        options = CaptureOptions(
            tgids=(target.pid,),
            families=("processes",),
            probes=tuple(parse_probe(spec) for spec in specs),
        )
        with Capture(options) as capture:
            capture.start()
            assert target.work()["listened"] == TIMES
            capture.stop()
            found = hits_of(capture)
    assert len(found.filter(probe="scope_test:counted")) == TIMES
    assert len(found.filter(probe="scope_test:both")) == TIMES
    returns = found.filter(probe=f"{program.name}:fall:return")
    assert len(returns) == DEPTH + 1
    assert (returns["duration_ns"] > NAP_NS).all()


def hits_of(capture: Capture) -> pl.DataFrame:
    """The rows of hits that are in a capture's rings."""
    frames = wide_frames(
        capture.drain().wide, Payloads(), Descriptions(), lambda _: None, capture.places.kinds()
    )
    return frames["hits"]


def test_emitted_is_stored_plus_lost(program):
    spec = parse_probe(f"usdt:{program}:scope_test:counted")
    with Target(program) as target:
        options = CaptureOptions(
            tgids=(target.pid,),
            families=("processes",),
            probes=(spec,) * 4,
            wide_slots=64,
        )
        with Capture(options) as capture:
            capture.start()
            target.work()
            capture.stop()
            kept, lost = len(hits_of(capture)), int(capture.lost()[:, LossKind.LOSS_HITS].sum())
    assert 0 < kept < 4 * TIMES
    assert kept + lost == 4 * TIMES


# ---- families ----


def interpreters(*, probes: bool) -> list[Path]:
    """Interpreters of this machine that were built with probes, or without."""
    found = {Path(sys.executable).resolve()}
    folders = [Path("/usr/bin"), Path("/usr/local/bin"), *Path.home().glob(".pyenv/versions/*/bin")]
    for folder in folders:
        found |= {path.resolve() for path in folder.glob("python3.*") if path.suffix[1:].isdigit()}
    return [path for path in sorted(found) if has_probes(path) == probes]


def has_probes(program: Path) -> bool:
    """As a running process of it shows."""
    with Target(program, "-I", "-c", "print('ready', flush=True); input()") as target:
        files = program_files([target.pid], [], interpreters=True)
    names = {site.name for file in files for site in sites_of(file)}
    return {"gc__start", "gc__done"} <= names


GC_PROGRAM = """
import gc, sys
gc.disable()
print("ready", flush=True)
sys.stdin.read(1)
for number in range(23):
    ring = []
    ring.append(ring)
    del ring
    gc.collect(number % 3)
import colorsys
try:
    import there_is_no_such_module
except ImportError:
    pass
print("{}")
"""


def test_garbage_collections(tmp_path):
    found = interpreters(probes=True)
    if not found:
        pytest.skip("optional: no Python here was built --with-dtrace")
    with Target(found[0], "-I", "-c", GC_PROGRAM) as target:
        with attached(tmp_path, target, "--families", "runtime") as session:
            target.work()
        no_losses(session)
    assert session.recording.meta.families == ["processes", "runtime"]
    assert session.recording.meta.notes == []
    # the last one is that of the interpreter's end
    collections = hits(session, "python:gc").head(TIMES)
    assert [row[0] for row in collections["arguments"]] == [str(n % 3) for n in range(TIMES)]
    assert all(int(row[1]) >= 1 for row in collections["arguments"])
    assert (collections["duration_ns"] > 100).all()
    assert (collections["duration_ns"] < 1_000_000_000).all()
    imports = hits(session, "python:import")
    assert imports["arguments"].to_list() == [
        ["colorsys", "true"],
        ["there_is_no_such_module", "false"],
    ]
    assert imports["duration_ns"].null_count() == 0
    events = hits(session, "python:audit")["arguments"].list.first()
    assert events.to_list().count("import") == 2


def test_garbage_collections_of_a_command(tmp_path):
    """Also of a script, which its first line has executed; not those of who starts it."""
    found = interpreters(probes=True)
    if not found:
        pytest.skip("optional: no Python here was built --with-dtrace")
    script = tmp_path / "script"
    script.write_text(f"#!{found[0]} -I\nimport gc\nfor _ in range(23): gc.collect(1)\n")
    script.chmod(0o755)
    for command, count in (([script], TIMES), (["/bin/sh", "-c", ":"], 0)):
        path = tmp_path / f"{count}.scope"
        subprocess.run(
            [COMMAND, "run", "-o", path, "--families", "runtime", "--", *command],
            check=True, capture_output=True,
        )  # fmt: skip
        recording = scope_ebpf.open_recording(path)
        frame = recording.collect(recording.hits).filter(pl.col("probe") == "python:gc")
        assert frame["arguments"].list.first().to_list().count("1") == count
        assert len(recording.meta.notes) == (count == 0)


def test_an_interpreter_without_probes_is_noted(tmp_path):
    found = interpreters(probes=False)
    if not found:
        pytest.skip("optional: all Pythons here were built --with-dtrace")
    with (
        Target(found[-1], "-c", GC_PROGRAM) as target,
        attached(tmp_path, target, "--families", "+runtime") as session,
    ):
        target.work()
    (note,) = session.recording.meta.notes
    assert str(found[-1].parent.parent) in note
    assert "was built without probes" in note
    assert session.recording.meta.families[0] == "processes"
    assert {"syscalls", "runtime"} <= set(session.recording.meta.families)
    assert hits(session, "python:gc").is_empty()


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, int]]:
    with postgres_server() as found:
        yield found


@contextlib.contextmanager
def postgres_server() -> Iterator[tuple[int, int]]:
    """A PostgreSQL of our own: the postmaster's pid, and the port."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("needs PostgreSQL's server: apt install postgresql")
    folder = programs[-1].parent
    if not any(site.provider == "postgresql" for site in sites_of(folder / "postgres")):
        pytest.skip("optional: this PostgreSQL was built without --enable-dtrace")
    user = "postgres"
    group = pwd.getpwnam(user).pw_gid
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    home = Path(tempfile.mkdtemp(prefix="scope-hits-"))
    as_user: dict[str, Any] = {"user": user, "group": group, "extra_groups": [], "cwd": "/"}
    try:
        shutil.chown(home, user)
        data = home / "data"
        subprocess.run(
            [folder / "initdb", "-D", data, "-A", "trust", "-U", "shop", "--no-sync", "--no-locale"],
            check=True, capture_output=True, **as_user,
        )  # fmt: skip
        settings = [
            f"unix_socket_directories={home}",
            "listen_addresses=127.0.0.1",
            "deadlock_timeout=200ms",
        ]
        process = subprocess.Popen(
            [folder / "postgres", "-D", data, "-p", str(port), *(p for s in settings for p in ("-c", s))],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **as_user,
        )  # fmt: skip
        try:
            wait_until_ready(port)
            yield process.pid, port
        finally:
            process.send_signal(2)
            process.wait(READY_SECONDS)
    finally:
        shutil.rmtree(home)


def wait_until_ready(port: int) -> None:
    import psycopg2

    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            connect(port).close()
            return
        except psycopg2.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def connect(port: int):
    import psycopg2

    connection = psycopg2.connect(host="127.0.0.1", port=port, user="shop", dbname="postgres")
    connection.autocommit = True
    return connection


@contextlib.contextmanager
def recording_server(directory: Path, pid: int, *options: object) -> Iterator[Session]:
    path = directory / "server.scope"
    with scope_ebpf_command(path, "attach", "--pid", pid, "-o", path, *options) as session:
        yield session
        session.stop()


def test_postgres(server, tmp_path):
    """Known numbers of queries, a wait for a lock that ends, and a deadlock that does not."""
    import psycopg2

    pid, port = server
    with recording_server(tmp_path, pid, "--families", "postgres") as session:
        one, other = connect(port), connect(port)
        with one.cursor() as first, other.cursor() as second:
            first.execute("CREATE TABLE accounts (id int PRIMARY KEY, owner text)")
            first.execute("INSERT INTO accounts VALUES (1, 'pl4nted-Secret'), (2, 'x')")
            for number in range(TIMES):
                first.execute(
                    f"SELECT owner FROM accounts WHERE owner = 'pl4nted-Secret' AND id < {90210 + number}"
                )
            # a wait that ends
            first.execute("BEGIN")
            first.execute("UPDATE accounts SET owner = 'a' WHERE id = 1")
            waiter = threading.Thread(
                target=second.execute, args=["UPDATE accounts SET owner = 'b' WHERE id = 1"]
            )
            waiter.start()
            time.sleep(0.15)
            first.execute("COMMIT")
            waiter.join()
            # a deadlock
            for cursor, row in ((first, 1), (second, 2)):
                cursor.execute("BEGIN")
                cursor.execute(f"UPDATE accounts SET owner = 'c' WHERE id = {row}")
            errors: list[BaseException] = []

            def cross() -> None:
                try:
                    second.execute("UPDATE accounts SET owner = 'd' WHERE id = 1")
                except psycopg2.errors.DeadlockDetected as error:
                    errors.append(error)

            waiter = threading.Thread(target=cross)
            waiter.start()
            time.sleep(0.05)
            try:
                first.execute("UPDATE accounts SET owner = 'd' WHERE id = 2")
            except psycopg2.errors.DeadlockDetected as error:
                errors.append(error)
            waiter.join()
            assert len(errors) == 1
            first.execute("ROLLBACK")
            second.execute("ROLLBACK")
        backends = {one.info.backend_pid, other.info.backend_pid}
        one.close()
        other.close()
    no_losses(session)
    rows = session.table("hits").filter(pl.col("tgid").is_in(list(backends)))
    count = dict(rows.group_by("probe").len().iter_rows())
    queries = rows.filter(pl.col("probe") == "postgresql:query")
    texts = queries["arguments"].list.first()
    assert texts.str.starts_with("SELECT owner FROM accounts").sum() == TIMES
    assert queries["duration_ns"].null_count() == 0
    # CREATE, INSERT, the SELECTs, 5 BEGINs to COMMITs and ROLLBACKs, 6 UPDATEs of which one failed
    assert count["postgresql:query"] == 2 + TIMES + 2 + 4 + 6 - 1
    for pair in ("query__plan", "query__execute"):
        some = rows.filter(pl.col("probe") == f"postgresql:{pair}")
        assert len(some) >= TIMES
        assert some["duration_ns"].null_count() == 0, pair
    # the wait that ended, the one that a deadlock ended for the other, and the one that failed
    waits = rows.filter(pl.col("probe") == "postgresql:lock__wait")
    assert count["postgresql:lock__wait__start"] == 3
    assert len(waits) == 2
    assert (waits["duration_ns"] > 140_000_000).any()
    assert count["postgresql:deadlock__found"] == 1
    assert count["postgresql:transaction__abort"] >= 1
    assert count["postgresql:transaction__start"] == (
        count["postgresql:transaction__commit"] + count["postgresql:transaction__abort"]
    )
    # the statement of the deadlock's victim: begun in the same thread before, never done
    (victim,) = rows.filter(pl.col("probe") == "postgresql:deadlock__found")["tid"]
    (found_ns,) = rows.filter(pl.col("probe") == "postgresql:deadlock__found")["time_ns"]
    statements = rows.filter(
        pl.col("probe") == "postgresql:statement__status",
        pl.col("tid") == victim,
        pl.col("time_ns") < found_ns,
        pl.col("arguments").list.first().is_not_null(),
    )
    assert statements["arguments"].to_list()[-1][0].startswith("UPDATE accounts SET owner = '?")
    stored = b"".join(part.read_bytes() for part in session.path.rglob("*") if part.is_file())
    assert b"pl4nted" not in stored
    assert (
        not rows["arguments"]
        .list.eval(pl.element().str.contains("pl4nted|902[1-4]"))
        .list.any()
        .any()
    )


def test_postgres_unredacted(server, tmp_path):
    """So that the test above could fail: the same text is there when it is asked for."""
    pid, port = server
    with recording_server(tmp_path, pid, "--families", "postgres", "--unredacted") as session:
        connection = connect(port)
        with connection.cursor() as cursor:
            cursor.execute("SELECT 'pl4nted-Secret'")
        connection.close()
    texts = session.table("hits").filter(pl.col("probe") == "postgresql:query")["arguments"]
    assert ["SELECT 'pl4nted-Secret'"] in texts.to_list()


def test_a_program_that_is_no_postgres(program, tmp_path):
    with Target(program) as target, attached(tmp_path, target, "--families", "postgres") as session:
        target.work()
    assert session.recording.meta.notes == [
        "postgres: none of the recorded processes ran a PostgreSQL that has probes when the recording"
        " began"
    ]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("usdt:{0}:scope_test:countd", "did you mean scope_test:counted"),
        ("usdt:/bin/true:a:b", "has no USDT probes"),
        ("usdt:{0}.no:a:b", "did you mean"),
        ("uprobe:{0}:mani", "did you mean many or main"),
        ("uprobe:/bin/true:mani", "is stripped"),
        ("uprobe:{0}:0x1", "has no code at 0x1"),
        ("uprobe:{0}:many(f64)", "vector registers"),
        ("usdt:{0}:scope_test:counted(str)", "has 4 bytes, and that type needs 8"),
        ("usdt:{0}:scope_test:counted(int,int)", "has 1 arguments"),
        ("uretprobe:{0}:many+0x4", "only a whole function returns"),
        ("uprobe:{0}:many(integer)", "there is no type 'integer'"),
        ("uprobes:{0}:many", "did you mean uprobe"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(spec, words, tmp_path_factory, tmp_path):
    program = compiled("usdt", tmp_path_factory.getbasetemp(), "-pie")
    result = subprocess.run(
        [COMMAND, "run", "-o", tmp_path / "no.scope", "--probe", spec.format(program), "--", "true"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not (tmp_path / "no.scope").exists()
