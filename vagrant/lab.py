#!/usr/bin/env python3
"""The lab: runs tests of this checkout on other kernels, each in a virtual machine of its own.

    vagrant/lab.py image                       # as root: makes the disk, unless it is there
    vagrant/lab.py run 6.1                     # tests/lab on that kernel
    vagrant/lab.py run 6.1 tests/lab/test_kernels.py -k doctor
    vagrant/lab.py run 6.1 --systemd --command 'systemctl list-units'
    vagrant/lab.py all                         # every kernel, then a table of what works

QEMU boots a kernel of Debian's directly, without a boot loader or an initrd, from a disk whose
changes are thrown away. The guest has no network. What it shall do comes as a tar on its second
disk, what it found goes as a tar to its third, and its exit code goes over a serial port. Nothing
but the image is shared, so any number of guests may run at once, and none needs root.

Exit codes: the one of the tests; 124 if the guest did not finish in time; 125 if it ended without
telling one, for example by a kernel panic; 2 if it could not be started.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
LAB = ROOT / "build" / "lab"
IMAGES = LAB / "images"
RESULTS = LAB / "results"
QEMU = "qemu-system-x86_64"

# What `make lab-all` runs. More can be named, by what their release begins with.
KERNELS = ("5.10", "6.1", "6.12", "newest")
# What the image is made of, beside the packages of the day it is made on.
IMAGE_SOURCES = ("image.sh", "provision.sh", "guest/start", "guest/lab-job.service")
# image.sh gives the disk this signature.
DISK_ID = "5c09eb9f"
RESULTS_BYTES = 512 << 20
# Not /tmp: it may be in memory, and the guest's changes of its disk come here.
WORK = Path("/var/tmp")  # noqa: S108  # in folders of a name of their own
WORK_PREFIX = "scope-lab-"
KEPT_RESULTS = 40
# Checkouts that share build/lab, or branches, may want several.
KEPT_IMAGES = 3

TIMED_OUT = 124
NO_EXIT_CODE = 125
MISUSED = 2
DISK_LOST = "the emulated disk stopped to answer"

# Lines of the console that are shown of a guest that failed.
CONSOLE_LINES = 60
# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG = 1


class LabError(Exception):
    """The guest could not be started; the message is one sentence with the next step."""


@dataclass(frozen=True)
class Image:
    """One disk with its kernels.

    Attributes:
        folder: where it is.
        kernels: name in the lab -> release, oldest first.
    """

    folder: Path
    kernels: dict[str, str]

    def release(self, kernel: str) -> str:
        """The release of a kernel that the user named, in full, by its start or by its name."""
        for name, release in self.kernels.items():
            if kernel in {name, release} or re.match(re.escape(kernel) + r"[.-]", release):
                return release
        raise LabError(
            f"the lab has no kernel {kernel!r}: it has {', '.join(self.kernels)};"
            " name one of these, or add it to vagrant/provision.sh"
        )


@dataclass(frozen=True)
class Guest:
    """How a guest is started.

    Attributes:
        kernel: which one, as the user named it.
        systemd: boot systemd, with the services of the image, instead of a small init.
        memory_mib: of the guest.
        cpus: virtual CPUs.
        timeout_seconds: from the start of QEMU to its end.
        parameters: further ones for the kernel.
    """

    kernel: str
    systemd: bool = False
    memory_mib: int = 1024
    cpus: int = 1
    timeout_seconds: float = 600
    parameters: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a guest left.

    Attributes:
        exit_code: of the job, or one of ours.
        folder: its results, its output and its console.
        seconds: from the start of QEMU to its end.
        cpu_seconds: of QEMU, which is how long it would take on an idle machine without KVM.
        problem: why there is no exit code of the job; empty if there is one.
    """

    exit_code: int
    folder: Path
    seconds: float
    cpu_seconds: float
    problem: str = ""


# ---- the image ----


def image_key() -> str:
    """A hash of what the image is made of: scripts, and the requirements in pyproject.toml."""
    digest = hashlib.sha256()
    for name in IMAGE_SOURCES:
        digest.update((ROOT / "vagrant" / name).read_bytes())
    # Only these sections: a setting of ruff makes no other image.
    text = (ROOT / "pyproject.toml").read_text()
    digest.update(text.partition("\n[project]\n")[2].partition("\n[project.scripts]")[0].encode())
    return digest.hexdigest()[:16]


@contextmanager
def locked(path: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold a lock file, which goes away with the process."""
    # Not for writing: the user who runs may be another one than the one who built.
    if not path.exists():
        path.touch()
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


def find_image(folder: Path) -> Image | None:
    """The image in a folder, if somebody made it."""
    kernels = folder / "kernels"
    try:
        lines = kernels.read_text().splitlines()
    except OSError:
        return None
    with contextlib.suppress(PermissionError):
        os.utime(kernels)  # so that it is not among those that were not used for long
    return Image(folder, dict(line.split() for line in lines))


def make_image() -> Image:
    """Make the image, unless it is there. Of two who want it at once, one waits for the other."""
    folder = IMAGES / image_key()
    if found := find_image(folder):
        return found
    if os.geteuid() != 0:
        raise LabError(
            "the lab's image is not there, or what it is made of has changed, and only root can"
            " make one: run sudo make lab-image"
        )
    need("debootstrap", "debootstrap")
    need("mke2fs", "e2fsprogs")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with locked(LAB / "lock", exclusive=True):
        if found := find_image(folder):
            return found
        for left in LAB.glob(".making.*"):
            shutil.rmtree(left)  # of one who was killed; nothing is mounted there any more
        begin = time.monotonic()
        status = subprocess.run([ROOT / "vagrant" / "image.sh", folder], check=False).returncode
        if status != 0:
            raise LabError(f"cannot make the lab's image: image.sh failed with {status}, see above")
        say("LAB", f"made {folder.relative_to(ROOT)} in {time.monotonic() - begin:.0f} s")
        remove_unused()
        hand_over(LAB)
    image = find_image(folder)
    assert image is not None
    return image


def remove_unused() -> None:
    """Remove all images but those that were used last. A guest that runs has its files open."""
    folders = sorted(IMAGES.iterdir(), key=lambda folder: (folder / "kernels").stat().st_mtime)
    for folder in folders[:-KEPT_IMAGES]:
        shutil.rmtree(folder)


def hand_over(folder: Path) -> None:
    """Give what root made to the owner of the checkout, who has to be able to remove it."""
    owner = ROOT.stat()
    for path in (folder, *folder.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def need(command: str, package: str) -> str:
    """The path of a command.

    Raises:
        LabError: it is not installed.
    """
    path = shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise LabError(
            f"cannot run the lab: {command} is missing; install it with sudo make lab-setup,"
            f" or as the package {package}"
        )
    return path


# ---- the job ----


def tree_files() -> list[Path]:
    """What goes into the guest: tracked and new files, and what was built of probes/."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = [Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name]
    else:  # no repository, or one of another user
        names = [
            path.relative_to(ROOT)
            for path in ROOT.rglob("*")
            if path.relative_to(ROOT).parts[0] not in {".git", ".venv", "build", "dist"}
            and "__pycache__" not in path.parts
        ]
    built = [path.relative_to(ROOT) for path in (ROOT / "probes").glob("*.o")]
    if not built:
        raise LabError("there are no BPF objects to bring into the guest: run make build")
    return sorted({name for name in [*names, *built] if os.path.lexists(ROOT / name)})


def write_job(path: Path, script: str) -> None:
    """The tar on the guest's second disk: the tree as /scope, and the script as /lab-job."""
    with tarfile.open(path, "w") as tar:
        for name in tree_files():
            tar.add(ROOT / name, Path("scope") / name, recursive=False, filter=_as_root)
        entry = tarfile.TarInfo("lab-job")
        entry.size = len(script.encode())
        tar.addfile(entry, BytesIO(script.encode()))


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


def job_script(guest: Guest, release: str, command: str) -> str:
    """What the guest runs, with the environment by which a test knows where it is."""
    version = re.match(r"\d+\.\d+", release)
    settings = {
        "SCOPE_EBPF_LAB": version[0] if version else release,
        "SCOPE_EBPF_LAB_RESULTS": "/results",
        "SCOPE_EBPF_LAB_INIT": "systemd" if guest.systemd else "small",
        "SCOPE_EBPF_REQUIRE_LIVE": "1",
        # What is written now is read again by the same run only.
        "PYTHONDONTWRITEBYTECODE": "",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "100",
    }
    lines = [f"export {name}={shlex.quote(value)}" for name, value in settings.items()]
    return "\n".join([*lines, command, ""])


def pytest_command(arguments: list[str]) -> str:
    """Run tests; without any that are named, those of tests/lab."""
    words = ["/opt/scope/bin/python", "-m", "pytest", "-p", "no:cacheprovider"]
    words += ["--junitxml=/results/junit.xml", "--color=no"]
    if not any(word.startswith("tests") for word in arguments):
        words.append("tests/lab")
    return shlex.join([*words, *arguments])


# ---- the guest ----


def accelerated() -> bool:
    """Whether this machine can virtualize. A /dev/kvm that opens does not show it."""
    flags = set(re.findall(r"\b(?:vmx|svm)\b", Path("/proc/cpuinfo").read_text()))
    return bool(flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def qemu_command(guest: Guest, image: Image, work: Path) -> list[str]:
    """The guest's machine."""
    release = image.release(guest.kernel)
    words = [need(QEMU, "qemu-system-x86"), "-name", f"scope-lab-{release}"]
    if accelerated():
        words += ["-accel", "kvm", "-cpu", "host"]
    else:
        # With a thread for each CPU, a kernel that patches its own text hangs or panics under TCG.
        words += ["-accel", "tcg,thread=single"]
        # QEMU 7.2 emulates some of AVX2 wrongly: sums came out wrong in polars.
        words += ["-cpu", "max,-avx,-avx2,-fma,-f16c,-vaes"]
    words += ["-smp", str(guest.cpus), "-m", str(guest.memory_mib)]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none"]
    settings = [
        f"root=PARTUUID={DISK_ID}-01 rootfstype=ext4 rw console=ttyS0 loglevel=5",
        # A panic ends the guest at once, by -no-reboot.
        "panic=-1",
        "mitigations=off random.trust_cpu=on",
        "lab.systemd systemd.mask=serial-getty@ttyS0.service"
        if guest.systemd
        else "init=/usr/lib/lab/start",
        # last: of two that say otherwise the kernel and systemd take the later one
        guest.parameters,
    ]
    words += ["-kernel", str(image.folder / f"vmlinuz-{release}"), "-append", " ".join(settings)]
    disks = {
        "root": f"file={image.folder / 'root.img'},snapshot=on",
        "job": f"file={work / 'job.tar'},readonly=on",
        "results": f"file={work / 'results.tar'}",
    }
    words += ["-device", "nvme,serial=lab"]
    for nsid, (name, options) in enumerate(disks.items(), start=1):
        words += ["-drive", f"if=none,id={name},format=raw,{options}"]
        words += ["-device", f"nvme-ns,drive={name},nsid={nsid}"]
    for name in ("console", "output", "exit"):
        words += ["-chardev", f"file,id={name},path={work / name}", "-serial", f"chardev:{name}"]
    return words


def run_guest(guest: Guest, command: str, out: BinaryIO | None) -> Outcome:
    """Boot, run a shell command, and bring back what it left; once more if QEMU lost the disk.

    QEMU 7.2's NVMe forgot requests in 1 of the first 80 guests (5.10, on a busy host): whoever needs the
    disk then waits for ever, which is no fault of the tests.

    Raises:
        LabError: the guest could not be started.
    """
    outcome = boot_guest(guest, command, out)
    if outcome.problem == DISK_LOST:
        report(guest, outcome)
        say("LAB", "once more")
        outcome = boot_guest(guest, command, out)
    return outcome


def boot_guest(guest: Guest, command: str, out: BinaryIO | None) -> Outcome:
    """Boot, run a shell command, and bring back what it left.

    Args:
        guest: how to start it.
        command: what to run in the tree, as root.
        out: where the command's output goes while it runs.

    Raises:
        LabError: the guest could not be started.
    """
    need(QEMU, "qemu-system-x86")
    image = make_image()
    release = image.release(guest.kernel)
    with contextlib.suppress(OSError):
        RESULTS.mkdir(parents=True, exist_ok=True)
    if not os.access(RESULTS, os.W_OK):
        raise LabError(
            f"cannot bring results to {RESULTS}: permission denied;"
            " run it as the owner of this checkout"
        )
    remove_abandoned()
    prefix = f"{WORK_PREFIX}{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=WORK) as folder:
        work = Path(folder)
        write_job(work / "job.tar", job_script(guest, release, command))
        with (work / "results.tar").open("wb") as file:
            file.truncate(RESULTS_BYTES)
        (work / "output").touch()
        begin, cpu_begin = time.monotonic(), _cpu_seconds()
        with (
            (work / "qemu").open("wb") as messages,
            locked(image.folder / "kernels", exclusive=False),
        ):
            process = subprocess.Popen(
                qemu_command(guest, image, work),
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                env=os.environ | {"TMPDIR": folder},
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # nothing here has threads
            )
            try:
                stopped = follow(process, work, guest, out)
            finally:
                process.kill()
                process.wait()
        seconds, cpu_seconds = time.monotonic() - begin, _cpu_seconds() - cpu_begin
        kept = keep_results(work, release)
        code, problem = judge(work, stopped, process.returncode)
    return Outcome(code, kept, seconds, cpu_seconds, problem)


def remove_abandoned() -> None:
    """Remove what runners left that were killed; their guests died with them."""
    for folder in WORK.glob(WORK_PREFIX + "*"):
        pid = folder.name.removeprefix(WORK_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(folder, ignore_errors=True)  # another user's stays


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _die_with_parent() -> None:
    """QEMU must not outlive a runner that was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def follow(
    process: subprocess.Popen[bytes], work: Path, guest: Guest, out: BinaryIO | None
) -> tuple[int, str] | None:
    """Pass on what the guest prints until it ends; or the exit code and why it has to be stopped."""
    deadline = time.monotonic() + guest.timeout_seconds
    seen_bytes = 0
    with (work / "output").open("rb") as file:
        while True:
            ended = process.poll() is not None
            if (printed := file.read()) and out is not None:
                out.write(printed)
                out.flush()
            if ended:
                return None
            if (size := _size(work / "console")) != seen_bytes:
                seen_bytes = size
                if re.search(r"nvme nvme\d+: I/O .*timeout", _text(work / "console")):
                    return NO_EXIT_CODE, DISK_LOST
            if time.monotonic() > deadline:
                allowed = f"{guest.timeout_seconds:.0f} s"
                return TIMED_OUT, f"it did not end within {allowed}, and was stopped"
            time.sleep(0.05)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def judge(work: Path, stopped: tuple[int, str] | None, status: int) -> tuple[int, str]:
    """The exit code, and why it is not the job's."""
    told = re.search(r"exit (\d+)", _text(work / "exit"))
    if told:
        return int(told[1]), ""
    if stopped is not None:
        return stopped
    if refusal := _text(work / "qemu").strip():
        return NO_EXIT_CODE, f"QEMU says: {refusal}"
    console = _text(work / "console")
    if panic := re.search(r"Kernel panic - .*", console):
        return NO_EXIT_CODE, panic[0].strip()
    return NO_EXIT_CODE, f"it ended without an exit code (QEMU's is {status})"


def keep_results(work: Path, release: str) -> Path:
    """Unpack what the guest brought, beside what it printed, into a folder of its own."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    kept = Path(tempfile.mkdtemp(prefix=f"{release}-{stamp}-", dir=RESULTS))
    kept.chmod(0o755)
    for name in ("console", "output"):
        if (work / name).exists():
            shutil.copyfile(work / name, kept / f"{name}.log")
    try:
        # "r:": nothing is guessed; a disk that nobody wrote is half a gigabyte of zeros.
        with tarfile.open(work / "results.tar", "r:") as tar:
            # The guest runs what it is told, as root of itself only: no path may lead out of here.
            members = [
                entry
                for entry in tar.getmembers()
                if (entry.isfile() or entry.isdir())
                and not entry.name.startswith("/")
                and ".." not in Path(entry.name).parts
            ]
            for entry in members:
                entry.mode |= 0o600 if entry.isfile() else 0o700
                tar.extract(entry, kept, set_attrs=False)
    except tarfile.TarError:
        pass  # it wrote none, or only a part before it was stopped
    link = RESULTS / f".{kept.name}"
    link.symlink_to(kept.name)
    link.replace(RESULTS / release)
    folders = sorted(
        (path for path in RESULTS.iterdir() if path.is_dir() and not path.is_symlink()),
        key=lambda path: path.stat().st_mtime,
    )
    for old in folders[:-KEPT_RESULTS]:
        shutil.rmtree(old, ignore_errors=True)
    return kept


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# ---- what the user sees ----


def say(what: str, text: str) -> None:
    """A line on stderr, in the form of the Makefile's."""
    print(f"  {what:8} {text}", file=sys.stderr, flush=True)


def report(guest: Guest, outcome: Outcome) -> None:
    """One line on how it went; of a guest that failed, also what it printed."""
    shown = outcome.folder.relative_to(ROOT)
    if outcome.problem:
        printed = _text(outcome.folder / "console.log").replace("\r", "").splitlines()
        say("CONSOLE", f"the last of {len(printed)} lines of {shown}/console.log:")
        for line in printed[-CONSOLE_LINES:]:
            print(f"    {line}", file=sys.stderr)
        said = _text(outcome.folder / "output.log").strip()
        if not said:
            print("    (the job printed nothing)", file=sys.stderr)
        print(
            f"lab: the guest with Linux {guest.kernel} failed: {outcome.problem}", file=sys.stderr
        )
    word = "passed" if outcome.exit_code == 0 else f"exit code {outcome.exit_code}"
    took = f"{outcome.seconds:.0f} s ({outcome.cpu_seconds:.0f} s of CPU)"
    say("LAB", f"{guest.kernel}: {word} after {took}; results in {shown}")


def table_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """What the doctor found in a guest, and the lab's own trials: name -> row.

    A row has `works` (None: not offered), `detail` and `cause`.
    """
    rows: dict[str, dict[str, Any]] = {}
    try:
        document = json.loads((folder / "doctor.json").read_text())
    except (OSError, ValueError):
        return rows
    for check in document["checks"]:
        if check["family"] or check["name"].split()[0] in {"transport", "loader", "extra"}:
            rows[check["name"]] = check
    for path in sorted(folder.glob("row-*.json")):
        row = json.loads(path.read_text())
        rows[row["name"]] = row
    return rows


def render_table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Kernel × probe family × works, refused or not offered; the reasons stand below.

    Args:
        found: kernel -> what `table_rows` gave.
    """
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    reasons: list[str] = []
    cells = [["", *found]]
    for name in names:
        line = [name]
        for rows in found.values():
            row = rows.get(name)
            if row is None:
                line.append("not tried")
                continue
            reason = ": ".join(part for part in (row["detail"], row["cause"]) if part)
            word = {True: "works", False: "refused", None: "not offered"}[row["works"]]
            if not row["works"] or row.get("warning"):
                reason = row.get("warning") or reason
                if reason not in reasons:
                    reasons.append(reason)
                word += f" [{reasons.index(reason) + 1}]"
            line.append(word)
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    for number, reason in enumerate(reasons, start=1):
        lines += textwrap.wrap(f"[{number}] {reason}", 100, subsequent_indent="    ")
    return "\n".join(lines)


# ---- commands ----


def run(options: argparse.Namespace) -> int:
    """`lab.py run`."""
    if options.command is None:
        command = pytest_command(options.arguments)
    elif options.arguments:
        raise LabError("cannot run both tests and --command: give one of them")
    else:
        command = options.command
    guest = Guest(
        options.kernel,
        options.systemd,
        options.memory,
        options.cpus,
        options.timeout,
        options.append,
    )
    outcome = run_guest(guest, command, sys.stdout.buffer)
    report(guest, outcome)
    return outcome.exit_code


def run_all(options: argparse.Namespace) -> int:
    """`lab.py all`: one kernel after the other, then the table."""
    image = make_image()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    codes = []
    for kernel in options.kernels or KERNELS:
        guest = Guest(kernel, timeout_seconds=options.timeout, memory_mib=options.memory)
        outcome = run_guest(guest, pytest_command(options.arguments), sys.stdout.buffer)
        report(guest, outcome)
        version = re.match(r"\d+\.\d+", image.release(kernel))
        assert version is not None
        found[version[0]] = table_rows(outcome.folder)
        codes.append(outcome.exit_code)
    table = render_table(found)
    print(f"\n{table}")
    return max(codes)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("image", help="make the disk and its kernels, unless they are there")
    commands.add_parser("kernels", help="list the kernels of the image")
    one = commands.add_parser("run", help="run tests on one kernel; further arguments are pytest's")
    one.add_argument("kernel", help="as 6.1 or newest")
    one.add_argument("--command", help="run this shell command instead of tests")
    one.add_argument("--systemd", action="store_true", help="boot systemd and the services")
    one.add_argument("--cpus", type=int, default=1, help="virtual CPUs (1)")
    one.add_argument(
        "--append",
        default="",
        metavar="PARAMETERS",
        help="further ones for the kernel, as systemd.unified_cgroup_hierarchy=0",
    )
    every = commands.add_parser("all", help="run tests on every kernel, and print a table")
    every.add_argument(
        "--kernel", dest="kernels", action="append", help="only this one; repeatable"
    )
    for command in (one, every):
        command.add_argument("--memory", type=int, default=1024, help="MiB of the guest (1024)")
        command.add_argument("--timeout", type=float, default=600, help="seconds (600)")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.action in {"image", "kernels"}:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.arguments = [word for word in rest if word != "--"]
    return options


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run a command; errors of use are one line."""
    signal.signal(signal.SIGTERM, _stop)
    options = parse(sys.argv[1:])
    try:
        if options.action == "image":
            make_image()
            return 0
        if options.action == "kernels":
            for name, release in make_image().kernels.items():
                print(f"{name:7} {release}")
            return 0
        return run_all(options) if options.action == "all" else run(options)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
