"""The doctor on this machine: as root, with just the needed capabilities, and with less."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scope_ebpf.errors import LoadError
from scope_ebpf.families import FAMILIES
from scope_ebpf.loaders.capture import Capture, CaptureOptions
from scope_ebpf.loaders.doctor import examine, families
from scope_ebpf.loaders.privileges import NEEDED, NEEDED_TO_LOOK
from scope_ebpf.loaders.python.calls import try_breakpoint
from scope_ebpf.loaders.transport import OBJECT

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give privileges up"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)"),
]

CHECKOUT = Path(__file__).resolve().parents[2]
NOBODY = 65534
DOCTOR = "from scope_ebpf.cli.doctor import doctor; doctor()"
# What the recorder does, in short: attach, drop, and see what still works. One older thread waits.
RECORDER = """
import json, os, sys, threading
from pathlib import Path
from scope_ebpf.errors import ScopeError
from scope_ebpf.loaders.capture import Capture, CaptureOptions
from scope_ebpf.loaders.privileges import current, drop_after_attaching

target, file = int(sys.argv[1]), Path(sys.argv[2])
hold = threading.Event()
threading.Thread(target=hold.wait, daemon=True).start()
with Capture(CaptureOptions(tgids=(target,), hot_slots=1024, wide_slots=1024)) as capture:
    capture.start()
    left = drop_after_attaching(os.environ)
    marked = [int(row["tgid"]) for row in capture.mark_tasks()]
    capture.stop()
    capture.drain()
file.write_text("recorded")
try:
    Capture(CaptureOptions(hot_slots=1024, wide_slots=1024)).close()
    loads = True
except ScopeError:
    loads = False
from_thread = []
late = threading.Thread(target=lambda: from_thread.extend(sorted(current().permitted)))
late.start()
late.join()
print(json.dumps({
    "user": left.user,
    "kept": sorted(left.kept),
    "threads_with_more": left.threads_with_more,
    "marked": marked,
    "loads": loads,
    "environ": "MARK=" in Path(f"/proc/{target}/environ").read_text(),
    "descriptors": len(os.listdir(f"/proc/{target}/fd")),
    "sets": {key: sorted(value) for key, value in vars(current()).items()},
    "from_thread": from_thread,
    "no_new_privs": "NoNewPrivs:\\t1" in Path("/proc/thread-self/status").read_text(),
}))
hold.set()
"""
CHILD = """
import json, os
from scope_ebpf.loaders.privileges import become_invoking_user, invoking_account
account = invoking_account(os.environ)
child = os.fork()
if child == 0:
    environment = become_invoking_user(os.environ, account)
    print_it = "import json, os; from pathlib import Path; print(json.dumps(["
    print_it += "os.getresuid(), os.getresgid(), os.getgroups(), dict(os.environ),"
    print_it += "Path('/proc/self/status').read_text()]))"
    os.execve("/usr/bin/python3", ["python3", "-I", "-c", print_it], environment)
os.waitpid(child, 0)
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code of the checkout; an environment without what sudo left in ours."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SUDO_")}
    clean |= {"PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=clean, check=False
    )


def with_capabilities(names: tuple[str, ...]) -> list[str]:
    """The start of a command line that runs the rest as nobody, with those capabilities only."""
    chosen = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)])
    return [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        f"--inh-caps={chosen}",
        f"--ambient-caps={chosen}",
        f"--bounding-set={chosen}",
        "--",
    ]


def needs_readable_checkout() -> None:
    """A checkout below a closed home cannot be read by nobody without CAP_DAC_READ_SEARCH."""
    code = f"import os, click, numpy; os.stat({str(OBJECT)!r})"
    if run(*with_capabilities(()), sys.executable, "-c", code).returncode != 0:
        pytest.skip("optional: needs a checkout and .venv that other users may read")


def doctor_says(*prefix: str) -> tuple[int, dict[str, bool], dict[str, dict[str, object]]]:
    """Exit code, families, and checks by their name."""
    result = run(*prefix, sys.executable, "-c", DOCTOR, "--json")
    assert result.stderr == ""
    document = json.loads(result.stdout)
    return (
        result.returncode,
        document["families"],
        {check["name"]: check for check in document["checks"]},
    )


@pytest.fixture
def target():
    """A process of root, to be looked at."""
    with subprocess.Popen(
        ["sleep", "60"], env={"MARK": "1", "PATH": os.environ["PATH"]}
    ) as process:
        yield process.pid
        process.kill()


def held_of_bpf() -> list[str]:
    """What this process holds open or mapped of BPF, which is what keeps it in the kernel."""
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return [text for text in [*links, *mapped] if "bpf-" in text or "bpf_" in text]


def test_as_root():
    code, working, checks = doctor_says()
    assert working == dict.fromkeys(FAMILIES, True), checks
    assert code == 0
    assert checks["capabilities"]["works"] is True
    assert "23 of 23" in str(checks["syscalls"]["detail"])
    told = str(checks["breakpoints"]["detail"])
    try:
        try_breakpoint()
    except LoadError:
        assert told == "cannot watch calls"
    else:
        assert re.search(r"at \d+\.\d us each", told)


def test_with_the_needed_capabilities_only():
    needs_readable_checkout()
    code, working, checks = doctor_says(*with_capabilities(NEEDED))
    assert working == dict.fromkeys(FAMILIES, True), checks
    assert (code, checks["capabilities"]["works"]) == (0, True)


@pytest.mark.parametrize("absent", NEEDED)
def test_the_one_that_is_missing_is_named(absent):
    needs_readable_checkout()
    held = tuple(name for name in NEEDED if name != absent)
    code, working, checks = doctor_says(*with_capabilities(held))
    assert checks["capabilities"]["detail"] == f"{absent} is missing"
    loads = absent in NEEDED_TO_LOOK
    assert working == dict.fromkeys(FAMILIES, loads)
    assert code == (0 if loads else 1)
    if not loads:
        assert checks["syscalls"]["cause"] == f"capabilities: {absent} is missing"


def test_without_any():
    needs_readable_checkout()
    result = run(*with_capabilities(()), sys.executable, "-c", DOCTOR)
    assert result.returncode == 1
    assert result.stderr == ""
    assert "Traceback" not in result.stdout
    words = " ".join(result.stdout.split())
    assert "CAP_BPF, CAP_PERFMON, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH are missing" in words
    assert result.stdout.count("FAILS") == 1 + len(FAMILIES)


def test_nothing_stays_loaded():
    assert held_of_bpf() == []
    with Capture(CaptureOptions(hot_slots=1024, wide_slots=1024)):
        assert held_of_bpf() != []
    assert families(examine())["syscalls"]
    assert held_of_bpf() == []


def test_root_through_sudo_becomes_the_user(tmp_path, target):
    os.chown(tmp_path, NOBODY, NOBODY)
    file = tmp_path / "file"
    result = run(
        sys.executable,
        "-c",
        RECORDER,
        str(target),
        str(file),
        SUDO_UID=str(NOBODY),
        SUDO_GID=str(NOBODY),
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["user"] == [NOBODY, NOBODY]
    assert said["kept"] == said["from_thread"] == sorted(NEEDED_TO_LOOK)
    assert said["sets"]["effective"] == said["sets"]["permitted"] == sorted(NEEDED_TO_LOOK)
    assert said["sets"]["bounding"] == said["sets"]["inheritable"] == said["sets"]["ambient"] == []
    assert said["threads_with_more"] == 0
    assert said["marked"] == [target]
    assert (said["environ"], said["descriptors"] > 0) == (True, True)
    assert said["no_new_privs"] is True
    assert said["loads"] is False
    assert (file.stat().st_uid, file.stat().st_gid) == (NOBODY, NOBODY)


def test_root_without_sudo_stays_root_and_counts_the_threads_it_missed(tmp_path, target):
    result = run(sys.executable, "-c", RECORDER, str(target), str(tmp_path / "file"))
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["user"] == [0, 0]
    assert said["sets"]["permitted"] == said["from_thread"] == sorted(NEEDED_TO_LOOK)
    assert said["threads_with_more"] >= 1  # the one that waited meanwhile
    assert said["loads"] is False


def test_another_user_with_the_needed_capabilities_records_and_drops(tmp_path, target):
    needs_readable_checkout()
    os.chown(tmp_path, NOBODY, NOBODY)
    arguments = [sys.executable, "-c", RECORDER, str(target), str(tmp_path / "file")]
    result = run(*with_capabilities(NEEDED), *arguments)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["user"] == [NOBODY, NOBODY]
    assert said["kept"] == said["from_thread"] == sorted(NEEDED_TO_LOOK)
    assert said["marked"] == [target]
    assert (said["environ"], said["loads"]) == (True, False)


def test_child_of_run_becomes_the_user():
    result = run(
        sys.executable,
        "-c",
        CHILD,
        SUDO_UID=str(NOBODY),
        SUDO_GID=str(NOBODY),
        SUDO_USER="x",
        SUDO_COMMAND="y",
        HOME="/root",
    )
    uids, gids, groups, environment, status = json.loads(result.stdout)
    assert uids == gids == [NOBODY] * 3
    assert 0 not in groups
    assert not [key for key in environment if key.startswith("SUDO_")]
    assert (environment["USER"], environment["LOGNAME"]) == ("nobody", "nobody")
    assert environment["HOME"] != "/root"
    assert "CapPrm:\t0000000000000000" in status
    assert "NoNewPrivs:\t0" in status


def test_child_of_run_does_not_inherit_ambient_capabilities():
    needs_readable_checkout()
    result = run(*with_capabilities(NEEDED), sys.executable, "-c", CHILD)
    *_, environment, status = json.loads(result.stdout)
    assert "CapPrm:\t0000000000000000" in status
    assert environment["PYTHONPATH"] == str(CHECKOUT)
