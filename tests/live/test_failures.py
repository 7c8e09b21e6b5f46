"""What goes wrong before a recording begins: each time one sentence that says what to do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scope_ebpf.loaders.privileges import NEEDED
from tests.live.failures import (
    CHECKOUT,
    NOBODY,
    Counter,
    Recorder,
    attach,
    counted,
    opened,
    wait_until,
)

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount and to become other users"),
]


@pytest.fixture
def folder(tmp_path):
    """Where the recorder runs; what it says is kept beside it."""
    place = tmp_path / "work"
    place.mkdir()
    return place


@pytest.fixture
def target():
    with Counter(23) as counter:
        yield counter


def nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


def with_capabilities(names) -> list[str]:
    """A command's beginning that runs the rest as nobody with those capabilities."""
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv (util-linux)")
    code = f"import os, click, numpy; os.stat({str(CHECKOUT / 'probes')!r})"
    chosen = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)])
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    sets = [f"--{kind}={chosen}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    plain = [*prefix, "--", sys.executable, "-c", code]
    if subprocess.run(plain, capture_output=True, check=False).returncode != 0:
        pytest.skip("optional: needs a checkout and .venv that other users may read")
    return [*prefix, *sets, "--"]


# ---- targets -------------------------------------------------------------------------------------


def test_a_target_that_never_was(folder):
    with attach(folder, 2**22 + 1) as recorder:
        sentence = recorder.refused()
    assert sentence.startswith("cannot attach to process 4194305: there is none with that id; ")
    assert nothing_left(folder)


def test_a_target_that_is_gone(folder, target):
    target.process.kill()
    target.process.wait()
    with attach(folder, target.pid) as recorder:
        assert "there is none with that id" in recorder.refused()
    assert nothing_left(folder)


def test_one_of_two_is_not_there(folder, target):
    with attach(folder, target.pid, 2**22 + 1) as recorder:
        assert "process 4194305" in recorder.refused()
    assert nothing_left(folder)


@pytest.mark.parametrize("pid", ["0", "-1", "x", "", "1.5"])
def test_what_is_no_process_id(folder, pid):
    with Recorder(folder, "attach", f"--pid={pid}") as recorder:
        assert recorder.code == 2
        assert recorder.err.count("Error: Invalid value for '--pid'") == 1
    assert nothing_left(folder)


def test_a_target_that_ends_between_look_up_and_attach(folder):
    """The recorder is stopped when it has looked it up: it has made its directory then."""
    with Counter(1) as target, attach(folder, target.pid) as recorder:
        wait_until((folder / "test.scope").exists)
        recorder.process.send_signal(signal.SIGSTOP)
        held = bool(recorder.links())
        target.process.kill()
        target.process.wait()
        recorder.process.send_signal(signal.SIGCONT)
        if held:
            pytest.skip("optional: the recorder was too quick: it had attached already")
        assert recorder.refused().startswith(
            f"cannot attach to process {target.pid}: it has ended meanwhile; "
        )
    assert nothing_left(folder)


def test_an_id_that_another_process_has_by_the_time(folder):
    """The same, and the id is used again at once."""
    with Counter(1) as target, attach(folder, target.pid) as recorder:
        wait_until((folder / "test.scope").exists)
        recorder.process.send_signal(signal.SIGSTOP)
        held = bool(recorder.links())
        target.process.kill()
        target.process.wait()
        with process_with_id(target.pid) as other:
            assert other.pid == target.pid
            recorder.process.send_signal(signal.SIGCONT)
            if held:
                other.kill()
                pytest.skip("optional: the recorder was too quick: it had attached already")
            try:
                sentence = recorder.refused()
            finally:
                other.kill()
    assert sentence.startswith(
        f"cannot attach to process {target.pid}: it has ended meanwhile, and"
    )
    assert nothing_left(folder)


def process_with_id(pid: int) -> subprocess.Popen[bytes]:
    """A process with that free id: the kernel gives out the first free one after ns_last_pid."""
    file = Path("/proc/sys/kernel/ns_last_pid")
    for _ in range(200):
        try:
            file.write_text(str(pid - 1))
        except OSError as error:
            pytest.skip(f"optional: needs to set the last process id: {error}")
        # vfork and exec at once, so that nothing of Python lies between
        process = subprocess.Popen(["sleep", "60"])
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    pytest.skip("optional: others were quicker each time")


def test_a_thread(folder):
    code = (
        "import threading, time; t = threading.Thread(target=time.sleep, args=(60,), daemon=True)"
    )
    code += "; t.start(); print(t.native_id, flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            tid = int(process.stdout.readline())
            with attach(folder, tid) as recorder:
                sentence = recorder.refused()
        finally:
            process.kill()
    pid = process.pid
    assert sentence == f"cannot attach to {tid}: it is a thread of process {pid}; attach to {pid}"
    assert nothing_left(folder)


def test_a_thread_of_the_kernel(folder):
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("optional: process 2 is not kthreadd here")
    with attach(folder, 2) as recorder:
        assert "kthreadd is a thread of the kernel, not a process" in recorder.refused()
    assert nothing_left(folder)


def test_a_zombie(folder):
    with subprocess.Popen(["true"]) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")
        with attach(folder, process.pid) as recorder:
            assert "true has ended and waits for its parent" in recorder.refused()
    assert nothing_left(folder)


def test_the_recorder_itself(folder):
    script = 'exec "$0" -m scope_ebpf attach --pid $$ -o test'
    with Recorder(folder, command=("sh", "-c", script, sys.executable)) as recorder:
        assert "that is this recorder" in recorder.refused()
    assert nothing_left(folder)


def test_control_characters_in_names_do_not_reach_the_terminal(folder):
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\x1b[2Jx\\n'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            arguments = ("attach", "--pid", process.pid, "--duration", "100ms")
            with Recorder(folder, *arguments) as recorder:
                assert recorder.code == 0
        finally:
            process.kill()
    for text in (recorder.out, recorder.err):
        assert "\x1b" not in text
    assert "\\x1b[2Jx\\n" in recorder.err


def test_another_pid_namespace(folder, target):
    if subprocess.run(["unshare", "--pid", "--fork", "true"], check=False).returncode != 0:
        pytest.skip("optional: needs unshare --pid")
    prefix = ("unshare", "--pid", "--fork", "--mount-proc")
    with attach(folder, target.pid, prefix=prefix) as recorder:
        assert "this is a container with process ids of its own" in recorder.refused()
    assert nothing_left(folder)


# ---- where to ------------------------------------------------------------------------------------


def test_relative_and_absolute_places(folder, target):
    (folder / "deep").mkdir()
    for name in ("one", "two.scope", "./three", "deep/four", str(folder / "five.scope"), "a[b]*é"):
        arguments = ("attach", "--pid", target.pid, "--duration", "10ms", "-o", name)
        with Recorder(folder, *arguments) as recorder:
            assert recorder.code == 0, recorder.err
            path = name if name.endswith(".scope") else f"{name}.scope"
            assert opened(folder, path).meta.complete
            assert path.removeprefix("./") in recorder.err


def test_without_a_name(folder, target):
    with Recorder(folder, "attach", "--pid", target.pid, "--duration", "10ms") as recorder:
        assert recorder.code == 0
    (path,) = folder.iterdir()
    comm = Path(f"/proc/{target.pid}/comm").read_text().strip()
    assert path.name.startswith(f"{comm}-{target.pid}-")
    assert opened(folder, path.name).meta.complete


@pytest.mark.parametrize("name", ["", ".", "/", ".."])
def test_names_that_are_none(folder, target, name):
    with Recorder(folder, "attach", "--pid", target.pid, "-o", name) as recorder:
        assert recorder.refused(code=2).startswith(f"cannot name a recording '{name}'")
    assert nothing_left(folder)


@pytest.mark.parametrize("kind", ["directory", "file", "link", "dangling"])
def test_what_exists_is_not_overwritten(folder, target, kind):
    path = folder / "test.scope"
    if kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("/" if kind == "link" else "nowhere")
    with attach(folder, target.pid) as recorder:
        sentence = recorder.refused()
    assert sentence.startswith(
        "will not overwrite test.scope: it exists; choose another name with -o"
    )
    assert [entry.name for entry in folder.iterdir()] == ["test.scope"]
    assert path.is_symlink() == (kind in ("link", "dangling"))
    assert kind != "file" or path.read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing/test", "No such file or directory"),
        ("file/test", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("/proc/test", "No such file or directory"),
    ],
)
def test_places_where_nothing_can_be(folder, target, name, cause):
    (folder / "file").write_text("")
    with Recorder(folder, "attach", "--pid", target.pid, "-o", name) as recorder:
        assert (
            recorder.refused()
            == f"cannot create {name}.scope: {cause}; choose another place with -o"
        )
    assert [entry.name for entry in folder.iterdir()] == ["file"]


def test_a_read_only_mount(folder, target, mounted):
    place = mounted(folder / "mnt", "ro,size=1m")
    with Recorder(folder, "attach", "--pid", target.pid, "-o", place / "test") as recorder:
        assert "test.scope: Read-only file system; choose another place" in recorder.refused()


def test_a_disk_that_is_full_from_the_start(folder, target, mounted):
    place = mounted(folder / "mnt", "size=64k")
    (place / "hog").write_bytes(bytes(48 << 10))
    with Recorder(folder, "attach", "--pid", target.pid, "-o", place / "test") as recorder:
        recorder.process.wait(30)
        assert "No space left on device" in recorder.refusal()
    assert [entry.name for entry in place.iterdir()] == ["hog"]


@pytest.fixture
def mounted():
    """Mounts a tmpfs; it is gone afterwards."""
    places: list[Path] = []

    def mount(place: Path, options: str) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if subprocess.run(command, check=False).returncode != 0:
            pytest.skip("needs to mount a tmpfs")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


def test_a_directory_of_somebody_else(folder, target):
    prefix = with_capabilities(NEEDED)
    os.chmod(folder, 0o755)  # noqa: S103 - to be looked into, not written to
    with attach(folder, target.pid, prefix=prefix) as recorder:
        assert recorder.refused() == (
            "cannot create test.scope: Permission denied; choose another place with -o"
        )
    assert nothing_left(folder)


# ---- what is missing -----------------------------------------------------------------------------


def test_another_user_with_the_four_capabilities_records(folder, target):
    prefix = with_capabilities(NEEDED)
    os.chown(folder, NOBODY, NOBODY)
    with attach(folder, target.pid, prefix=prefix) as recorder:
        recorder.attached()
        target.count_through()
        assert recorder.stop() == 0
    assert counted(opened(folder)) == list(range(23))
    assert (folder / "test.scope").stat().st_uid == NOBODY


@pytest.mark.parametrize("held", [(), NEEDED[:1], NEEDED[1:]], ids=["none", "bpf", "others"])
def test_without_capabilities_it_says_which_to_grant(folder, target, held):
    prefix = with_capabilities(held)
    os.chown(folder, NOBODY, NOBODY)
    with attach(folder, target.pid, prefix=prefix) as recorder:
        sentence = recorder.refused()
    assert "permission denied; run as root, or grant CAP_BPF and CAP_PERFMON" in sentence
    assert nothing_left(folder)


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to be broken."""
    place = tmp_path / "package"
    ignored = shutil.ignore_patterns("__pycache__", "*.c", "*.h")
    shutil.copytree(CHECKOUT / "scope_ebpf", place / "scope_ebpf", ignore=ignored)
    return place


def with_package(package: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(package)}


def test_the_copy_of_the_package_works(folder, target, package):
    options = ["--duration", "10ms"]
    with attach(folder, target.pid, environment=with_package(package), options=options) as recorder:
        assert recorder.code == 0


def test_without_the_object(folder, target, package):
    (package / "scope_ebpf" / "probes" / "capture.bpf.o").unlink()
    with attach(folder, target.pid, environment=with_package(package)) as recorder:
        sentence = recorder.refused()
    assert "capture.bpf.o: No such file or directory; run `make build`" in sentence
    assert nothing_left(folder)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"\0stream_end\0", b"\0stream_enD\0", "its record message differs from this version's"),
        (b"\0seen_before\0", b"\0seen_beforE\0", "its record marked_task differs"),
        (b"\0offcpu\0", b"\0offcpU\0", "built from other sources"),
    ],
)
def test_an_object_from_other_sources(folder, target, package, old, new, says):
    file = package / "scope_ebpf" / "probes" / "capture.bpf.o"
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new))
    with attach(folder, target.pid, environment=with_package(package)) as recorder:
        sentence = recorder.refused()
    assert says in sentence
    assert "`make build`" in sentence
    assert nothing_left(folder)


@pytest.mark.parametrize("length", [0, 100, 20_000])
def test_an_object_that_was_cut_off(folder, target, package, length):
    file = package / "scope_ebpf" / "probes" / "capture.bpf.o"
    file.write_bytes(file.read_bytes()[:length])
    with attach(folder, target.pid, environment=with_package(package)) as recorder:
        assert "`make build`" in recorder.refused()
    assert nothing_left(folder)


def test_too_few_descriptors(folder, target):
    script = 'ulimit -n 20; exec "$0" -m scope_ebpf attach --pid "$1" -o test'
    command = ("sh", "-c", script, sys.executable, str(target.pid))
    with Recorder(folder, command=command) as recorder:
        assert "cannot load capture.bpf.o: " in recorder.refused()
    assert nothing_left(folder)
