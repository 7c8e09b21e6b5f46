"""What works on this machine: every check tries the thing, instead of comparing versions.

For each family of probes a small process is started and recorded, and what it did is counted.
Nothing else is recorded, and nothing stays loaded.
"""

import ctypes
import os
import platform
import resource
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from scope_ebpf.errors import FormatError, ScopeError
from scope_ebpf.families import FAMILIES
from scope_ebpf.loaders import bcc, cgroups, extras, privileges, tls
from scope_ebpf.loaders.bindings import library
from scope_ebpf.loaders.capture import (
    HOT_BYTES_IN_ALL,
    WIDE_BYTES_IN_ALL,
    check_layout,
)
from scope_ebpf.loaders.kernel import counts_as_locked
from scope_ebpf.loaders.libbpf import BpfObject
from scope_ebpf.loaders.message_calls import number_of
from scope_ebpf.loaders.python.calls import try_breakpoint
from scope_ebpf.loaders.python.checks import InterpreterReport, report_file, report_process
from scope_ebpf.loaders.python.files import interpreters_in_path
from scope_ebpf.loaders.python.interpreters import NotReady, Unsupported
from scope_ebpf.loaders.targets import INITIAL_PID_NAMESPACE, find_target
from scope_ebpf.loaders.transport import OBJECT, PERF_OBJECT
from scope_ebpf.loaders.trial import AT_LEAST, RINGS, TIMES, record_workload

# include/linux/proc_ns.h: the inodes of the namespaces that the kernel boots with.
INITIAL_USER_NAMESPACE = 0xEFFFFFFD

BCC_PROGRAM = """
#include <linux/sched.h>
int on_exit(struct bpf_raw_tracepoint_args *ctx) { return sizeof(struct task_struct) == 0; }
"""

WHAT_IS_COUNTED = {
    "processes": "exits of a process",
    "syscalls": "getppid calls",
    "messages": "messages",
    "tls": "writes through TLS",
    "offcpu": "sleeps",
    "samples": "stacks of sleeps",
    "contexts": "logical contexts",
    "gil": "waits for the GIL",
}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: what was tried.
        works: whether it works; None if it is told for information only.
        detail: the fact.
        cause: why it does not work or matters; empty if there is nothing to say.
        fix: the next step, if there is one.
        family: this is a family of probes.
    """

    name: str
    works: bool | None
    detail: str
    cause: str = ""
    fix: str = ""
    family: bool = False


@dataclass(frozen=True)
class InterpreterCheck(Check):
    """What can be recorded of one CPython; `works` only tells of a process that the user named."""


def examine(*tgids: int) -> list[Check]:
    """Check everything, in an order in which each check may explain the next one. Takes a second.

    Never raises for what it examines, and needs no privileges to tell which are missing.

    Args:
        tgids: processes whose interpreters are looked at, too, beside those in PATH.

    Raises:
        TargetError: one of these is no process that can be traced.
    """
    checks = [
        check_libbpf(),
        check_object(),
        check_object(PERF_OBJECT, "programs over perf"),
        check_kernel_btf(),
        check_capabilities(),
        check_namespace("user", INITIAL_USER_NAMESPACE),
        check_namespace("pid", INITIAL_PID_NAMESPACE),
        check_memory(),
    ]
    obstacle = next((check for check in checks if _explains_refusals(check)), None)
    checks += [check_family(family, obstacle) for family in FAMILIES]
    checks += [tell_transport(name, obstacle) for name in ("rings", "perf")]
    checks += [
        check_rings(obstacle),
        tell_lockdown(),
        tell_cgroups(),
        tell_breakpoints(),
        check_bcc(),
        tell_tracefs(),
        tell_settings(),
        tell_statistics(),
    ]
    checks += [check_interpreter_of(tgid) for tgid in tgids]
    checks += [tell_interpreter(path) for path in interpreters_in_path()]
    return checks


def families(checks: list[Check]) -> dict[str, bool]:
    """Whether each family works, by its name."""
    return {check.name: check.works is True for check in checks if check.family}


# ---- what is needed ----


def check_libbpf() -> Check:
    """Load libbpf and ask for its version."""
    try:
        version = library().version().decode()
    except ScopeError as error:
        return failed("libbpf", error)
    return Check("libbpf", True, f"libbpf {version}")


def check_object(path: Path = OBJECT, name: str = "programs") -> Check:
    """Open the programs and compare their records with those that Python reads."""
    try:
        with BpfObject(path) as opened:
            check_layout(opened)
            count = len(opened.program_names())
    except ScopeError as error:
        return failed(name, error)
    return Check(name, True, f"{path.name}: {count} programs, whose records Python knows")


def check_kernel_btf() -> Check:
    """Load the kernel's type information as libbpf does it for a program."""
    name = "kernel BTF"
    try:
        handle = library().kernel_btf()
    except ScopeError as error:
        return failed(name, error)
    if not handle:
        return Check(
            name,
            False,
            f"no type information of Linux {platform.release()}",
            "/sys/kernel/btf/vmlinux is not there or not readable",
            "mount /sys, or boot a kernel with CONFIG_DEBUG_INFO_BTF, as Debian's and Ubuntu's",
        )
    library().btf_free(handle)
    return Check(name, True, f"Linux {platform.release()} on {platform.machine()}")


def check_capabilities(held: privileges.Capabilities | None = None) -> Check:
    """Which capabilities are missing, and whether they could be had."""
    name = "capabilities"
    try:
        sets = privileges.current() if held is None else held
    except ScopeError as error:
        return failed(name, error)
    absent = privileges.missing(sets.effective)
    if not absent:
        return Check(name, True, "all that are needed: " + listed(privileges.NEEDED))
    verb = "is" if len(absent) == 1 else "are"
    purposes = []
    if set(absent) - set(privileges.NEEDED_TO_LOOK):
        purposes.append("load and attach programs")
    if set(absent) & set(privileges.NEEDED_TO_LOOK):
        purposes.append("look at processes of other users")
    if set(absent) <= sets.bounding:
        fix = "run it with sudo, or as a service with AmbientCapabilities=" + " ".join(
            privileges.NEEDED
        )
    else:
        options = " ".join(f"--cap-add={item.removeprefix('CAP_')}" for item in absent)
        fix = f"run it on the host, or start the container with {options}"
    return Check(
        name,
        False,
        f"{listed(absent)} {verb} missing",
        "the kernel asks for that to " + " and to ".join(purposes),
        fix,
    )


def check_namespace(kind: str, initial: int) -> Check:
    """BPF counts capabilities (user) and tgids (pid) in the namespace of the host."""
    name = f"{kind} namespace"
    try:
        inode = os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError as error:
        return Check(
            name,
            False,
            f"cannot look at /proc/self/ns/{kind}",
            error.strerror or str(error),
            "mount /proc: `sudo mount -t proc proc /proc`",
        )
    if inode == initial:
        return Check(name, True, "the host's")
    cause, fix = {
        "user": ("capabilities do not count for BPF in it", "run it outside, as root of the host"),
        "pid": (
            "probes see the host's process numbers, which differ from the ones in here",
            "run it on the host, or start the container with --pid=host",
        ),
    }[kind]
    return Check(name, False, "not the host's, so this runs in a container", cause, fix)


def check_memory(meminfo: str | None = None) -> Check:
    """Whether there is room for the rings of a recording with default sizes."""
    name, need = "memory", HOT_BYTES_IN_ALL + WIDE_BYTES_IN_ALL
    try:
        text = Path("/proc/meminfo").read_text() if meminfo is None else meminfo
        free = available_bytes(text)
    except (OSError, FormatError) as error:
        return Check(name, False, "cannot read /proc/meminfo", str(error), "mount /proc")
    detail = f"{free >> 20} MiB available, and the rings take about {need >> 20} MiB"
    if free >= 2 * need:
        return Check(name, True, detail)
    return Check(
        name,
        False,
        detail,
        "less than twice that is left, so recording may push others out of memory",
        "free memory first",
    )


def available_bytes(meminfo: str) -> int:
    """MemAvailable of the text of /proc/meminfo, in bytes.

    Raises:
        FormatError: it is not there.
    """
    for line in meminfo.split("\n"):
        fields = line.split()
        if fields[:1] == ["MemAvailable:"] and len(fields) > 1:
            digits = fields[1]
            if digits.isascii() and digits.isdecimal() and len(digits) < 20:
                return int(digits) << 10
    raise FormatError("it has no MemAvailable line")


# ---- families ----


def check_family(family: str, obstacle: Check | None = None, transport: str = "auto") -> Check:
    """Record a small process of our own with one family of probes, and count.

    Args:
        family: one of FAMILIES.
        obstacle: a check that failed before and explains it if the kernel refuses.
        transport: how records are to come out of the kernel.
    """
    if obstacle is not None and obstacle.name == "pid namespace":
        # A process number of ours would name a stranger's process on the host.
        return _blamed(family, "not tried", obstacle)
    if family == "tls" and not any(map(tls.library_sites, tls.find_libraries([os.getpid()]))):
        return Check(family, True, "no libssl is here, so there is nothing to record", family=True)
    try:
        found = record_workload(family, transport)
    except ScopeError as error:
        if obstacle is not None:
            return _blamed(family, str(error).partition(": ")[0], obstacle)
        return failed(family, error, family=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Check(family, False, "cannot run the process to record", str(error), "", family=True)
    expected = 1 if family == "processes" else TIMES
    detail = f"recorded {found} of {expected} {WHAT_IS_COUNTED[family]}"
    if family in AT_LEAST and found > expected:  # a busy host adds some
        detail = f"recorded {found} {WHAT_IS_COUNTED[family]}, of at least {expected}"
    if found == expected or (family in AT_LEAST and found > expected):
        return Check(family, True, detail, family=True)
    return Check(
        family,
        False,
        detail,
        "the probes are attached, but do not see everything on this kernel",
        "report it as a bug, with the output of `scope-ebpf doctor --json`",
        family=True,
    )


def tell_transport(transport: str, obstacle: Check | None = None) -> Check:
    """Whether records come out of the kernel through `rings` or `perf`; one of them is enough."""
    check = check_family("syscalls", obstacle, transport)
    return replace(check, name=f"transport {transport}", works=check.works or None, family=False)


# ---- extras ----


def check_rings(obstacle: Check | None = None) -> Check:
    """Record messages that go through io_uring, in the way that is chosen for that, and count.

    Args:
        obstacle: as for check_family().
    """
    name = "extra io_uring"
    if obstacle is not None:
        return Check(name, None, "not tried", f"{obstacle.name}: {obstacle.detail}")
    if refusal := rings_refused():
        return Check(name, None, "no process like this one can use it", refusal)
    way = extras.choose()
    if not way.name:
        return Check(name, None, "messages are not seen", way.reasons)
    try:
        found = record_workload(RINGS)
    except (ScopeError, OSError, subprocess.SubprocessError) as error:
        return Check(name, False, "cannot record messages through it", str(error))
    if found != TIMES:
        return Check(
            name,
            False,
            f"recorded {found} of {TIMES} messages, by {way.name}",
            "the probes are attached, but do not see everything on this kernel",
            "report it as a bug, with the output of `scope-ebpf doctor --json`",
        )
    detail = f"recorded {found} of {TIMES} messages; they are seen by {way.seen}"
    return Check(name, True, detail, way.reasons)


def rings_refused() -> str:
    """Why this process may not make an io_uring; empty if it may."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    ring = int(call(number_of("io_uring_setup"), 1, ctypes.create_string_buffer(120)))
    if ring < 0:
        number = ctypes.get_errno()
        setting = _read(Path("/proc/sys/kernel/io_uring_disabled"))
        return os.strerror(number) + (
            f"; kernel.io_uring_disabled is {setting}" if setting not in {None, "0"} else ""
        )
    os.close(ring)
    return ""


# ---- interpreters ----


def check_interpreter_of(tgid: int) -> InterpreterCheck:
    """What can be recorded of the CPython in a process.

    Raises:
        TargetError: there is no such process, or it cannot be traced.
    """
    name = f"process {tgid}"
    target = find_target(tgid)
    try:
        report = report_process(tgid)
    except ScopeError as error:
        check = failed(name, error)
        return InterpreterCheck(name, False, check.detail, check.cause, check.fix)
    if isinstance(report, InterpreterReport):
        check = _told(report, works=True)
        return replace(check, detail=f"{report.name.partition(': ')[2]}, {check.detail}", name=name)
    if isinstance(report, Unsupported):
        fix = "record its processes, syscalls and messages: these need to know nothing of it"
        return InterpreterCheck(name, False, "not to be looked into", report.reason, fix)
    if isinstance(report, NotReady):
        return InterpreterCheck(name, None, "its Python is still starting", "", "ask again")
    return InterpreterCheck(name, None, f"{target.comm} has no CPython in it")


def tell_interpreter(path: Path) -> InterpreterCheck:
    """What can be recorded of processes with an interpreter that is in PATH."""
    try:
        return _told(report_file(path), works=None)
    except ScopeError as error:
        check = failed(path.name, error)
        return InterpreterCheck(path.name, None, check.detail, check.cause, check.fix)


def _told(report: InterpreterReport, *, works: bool | None) -> InterpreterCheck:
    facts = [report.path]
    if report.recorded:
        facts.append(f"records {listed(report.recorded)}")
    if report.usdt:
        facts.append(f"has static probes for {listed(report.usdt)}")
    notes = [f"not recorded: {clause}" for clause in report.missing]
    if report.slow:
        notes.append(f"probes that cost 10 us per call: {listed(report.slow)}")
    return InterpreterCheck(report.name, works, "; ".join(facts), "; ".join(notes))


# ---- for information ----


def tell_lockdown(path: Path = Path("/sys/kernel/security/lockdown")) -> Check:
    """The kernel's lockdown mode, which only stops us when it is `confidentiality`."""
    name, text = "lockdown", _read(path)
    if text is None:
        return Check(
            name, None, "not told: securityfs is not mounted, or the kernel has no lockdown"
        )
    mode = text.partition("[")[2].partition("]")[0] or text
    if mode != "confidentiality":
        return Check(name, None, f"{mode}, which allows tracing")
    return Check(
        name,
        None,
        mode,
        "programs may not read the kernel's memory in this mode, which tracing has to",
        "boot with lockdown=integrity",
    )


def tell_cgroups() -> Check:
    """Whether `record --cgroup` can name its targets."""
    name = "cgroup v2"
    try:
        where = cgroups.mount_point()
        if where is not None:
            return Check(name, None, f"mounted at {where}")
        fact, step = cgroups.absence()
    except OSError as error:
        fact, step = f"the mounts cannot be read: {error.strerror}", "mount /proc"
    return Check(name, None, f"not mounted: {fact}", "record --cgroup needs it", step)


def tell_breakpoints() -> Check:
    """Whether `attach --calls` can watch calls, tried on this process itself."""
    name = "breakpoints"
    try:
        trap_ns = try_breakpoint()
    except ScopeError as error:
        return replace(failed(name, error), works=None)
    return Check(
        name, None, f"those in hardware work, at {trap_ns / 1000:.1f} us each: for --calls"
    )


def check_bcc() -> Check:
    """Compile a small program with BCC, and load it: for --bcc-probe and --loader bcc."""
    name = "loader bcc"
    try:
        program = bcc.compile_program(BCC_PROGRAM, "a small program")
        try:
            bcc.load_function(program, "on_exit")
        finally:
            bcc.clean_up(program)
    except ScopeError as error:
        # nothing else needs it: it is not offered, and the cause says why
        return replace(failed(name, error), works=None)
    version = bcc.load_bcc().__version__
    try:
        bcc.check_kernel(platform.release())
    except ScopeError as error:
        refused = failed(name, error)
        detail = f"{refused.detail}; BCC {version} compiles for this kernel: --bcc-probe"
        return replace(refused, works=None, detail=detail)
    return Check(name, True, f"BCC {version} compiles for this kernel: --bcc-probe, --loader bcc")


def tell_tracefs(mounts: Path = cgroups.MOUNTS) -> Check:
    """Whether tracefs is mounted."""
    lines = [line.split() for line in (_read(mounts) or "").split("\n")]
    found = [fields[1] for fields in lines if len(fields) > 2 and fields[2] == "tracefs"]
    detail = f"mounted at {found[0]}" if found else "not mounted"
    return Check("tracefs", None, f"{detail}; none of the families above needs it")


def tell_settings() -> Check:
    """Settings that are often suspected when something is refused."""
    kernel = Path("/proc/sys/kernel")
    values = [
        f"{key}={_read(kernel / key) or 'absent'}"
        for key in ("unprivileged_bpf_disabled", "perf_event_paranoid")
    ]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit >> 10} KiB"
    return Check(
        "settings",
        None,
        f"{', '.join(values)}, memlock {shown}",
        "unprivileged_bpf_disabled does not bind who has the capabilities; with perf_event_paranoid=3"
        " kernels of some distributions ask for CAP_SYS_ADMIN; "
        + (
            "before Linux 5.11 BPF counts as locked memory of who lacks CAP_SYS_RESOURCE"
            if counts_as_locked()
            else "BPF does not count as locked memory since Linux 5.11"
        ),
    )


def tell_statistics() -> Check:
    """Whether somebody left the kernel's run-time statistics of BPF programs on."""
    name, value = "bpf_stats", _read(Path("/proc/sys/kernel/bpf_stats_enabled"))
    if value in {None, "0"}:
        return Check(name, None, "off")
    return Check(
        name,
        None,
        "on",
        "it makes each run of every BPF program dearer",
        "run `sudo sysctl kernel.bpf_stats_enabled=0` unless somebody measures",
    )


# ---- wording ----


def failed(name: str, error: ScopeError, *, family: bool = False) -> Check:
    """A check from an error, whose message is `fact: cause; next step`."""
    fact, _, rest = str(error).partition(": ")
    cause, _, fix = rest.partition("; ")
    return Check(name, False, fact, cause, fix, family)


def listed(names: Iterable[str]) -> str:
    """A, B and C."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _explains_refusals(check: Check) -> bool:
    """Whether a kernel that refuses programs does so for this."""
    if check.works is not False:
        return False
    if check.name == "capabilities":
        return any(name in check.detail for name in (*privileges.NEEDED_TO_LOAD, "CAP_SYS_ADMIN"))
    return check.name in {"libbpf", "programs", "kernel BTF", "user namespace", "pid namespace"}


def _blamed(family: str, detail: str, obstacle: Check) -> Check:
    """A family that fails for what an earlier check found."""
    fix = f"mend {obstacle.name} first, see there"
    return Check(family, False, detail, f"{obstacle.name}: {obstacle.detail}", fix, True)


def _read(path: Path) -> str | None:
    """A small file of the kernel, stripped; None if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None
