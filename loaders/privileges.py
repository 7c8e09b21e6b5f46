"""Linux capabilities: which this process has, which tracing needs, and giving them up again.

Recording needs four: CAP_BPF and CAP_PERFMON to load and attach programs, CAP_SYS_PTRACE and
CAP_DAC_READ_SEARCH to look at the processes of other users in /proc and at /sys/kernel/tracing.
Nothing else that root may do is needed. Numbers and meaning: include/uapi/linux/capability.h and
capabilities(7).
"""

import ctypes as c
import errno
import os
import pwd
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scope_ebpf.errors import FormatError, ScopeError
from scope_ebpf.loaders.bindings import library
from scope_ebpf.loaders.kernel import has_multi_uprobes
from scope_ebpf.loaders.perf import open_bpf_output

_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
PERFMON BPF CHECKPOINT_RESTORE
"""
CAPABILITIES = tuple(f"CAP_{name}" for name in _NAMES.split())  # by number
NEEDED_TO_LOAD = ("CAP_BPF", "CAP_PERFMON")
NEEDED_TO_LOOK = ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")
NEEDED = NEEDED_TO_LOAD + NEEDED_TO_LOOK
PURPOSES = {
    "CAP_BPF": "loads BPF programs and maps",
    "CAP_PERFMON": "lets them read the kernel's memory, and attaches them",
    "CAP_SYS_ADMIN": "loads and attaches BPF programs on kernels before 5.8",
    "CAP_SYS_PTRACE": "looks at other users' processes in /proc and in their memory",
    "CAP_DAC_READ_SEARCH": "reads their programs and libraries, to find where probes go",
}
# What also does, because the kernel asks for either of the two.
STAND_INS = {
    "CAP_BPF": "CAP_SYS_ADMIN",
    "CAP_PERFMON": "CAP_SYS_ADMIN",
    "CAP_DAC_READ_SEARCH": "CAP_DAC_OVERRIDE",
}
SETS = {
    "CapEff": "effective",
    "CapPrm": "permitted",
    "CapInh": "inheritable",
    "CapBnd": "bounding",
    "CapAmb": "ambient",
}

# linux/prctl.h
PR_SET_KEEPCAPS = 8
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
# linux/capability.h: the version whose sets have 64 bits, as two elements of 32.
CAPABILITY_VERSION_3 = 0x20080522

# (uid_t)-1 means "leave as it is" to the system calls, so no user has that number.
NO_UID = 0xFFFFFFFF


class User(NamedTuple):
    """Whom a file belongs to or a process runs as."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Account:
    """A user, with what the password database says of it."""

    user: User
    name: str | None
    home: str
    shell: str
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Capabilities:
    """The capability sets of one thread."""

    effective: frozenset[str]
    permitted: frozenset[str]
    inheritable: frozenset[str]
    bounding: frozenset[str]
    ambient: frozenset[str]


@dataclass(frozen=True)
class Dropped:
    """What is left after drop_after_attaching()."""

    user: User
    """Whom this process runs as now; its new files belong to that user."""
    kept: frozenset[str]
    """Capabilities of the calling thread and of the threads that it starts from now on."""
    threads_with_more: int
    """Older threads of this process that still hold more than that."""


def names_of(mask: int) -> frozenset[str]:
    """The names of the capabilities in a mask; those that have no name yet are CAP_ and a number.

    >>> sorted(names_of(1 << 39 | 1 << 0))
    ['CAP_BPF', 'CAP_CHOWN']
    """
    return frozenset(
        CAPABILITIES[bit] if bit < len(CAPABILITIES) else f"CAP_{bit}"
        for bit in range(mask.bit_length())
        if mask >> bit & 1
    )


def parse_status(text: str) -> Capabilities:
    """The capability sets in the text of /proc/PID/status. Kernels before 4.3 have no ambient set.

    Raises:
        FormatError: a set is missing, or is not 1 to 16 hexadecimal digits.
    """
    found: dict[str, frozenset[str]] = {"ambient": frozenset()}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if not colon or key not in SETS:
            continue
        digits = value.strip()
        if not 1 <= len(digits) <= 16 or set(digits) - set("0123456789abcdefABCDEF"):
            raise FormatError(
                f"cannot read capabilities: {key} is {digits[:40]!r}, not a hexadecimal number;"
                " is /proc the kernel's own?"
            )
        found[SETS[key]] = names_of(int(digits, 16))
    absent = sorted(key for key, name in SETS.items() if name not in found)
    if absent:
        raise FormatError(
            f"cannot read capabilities: the status has no {', '.join(absent)};"
            " is /proc the kernel's own?"
        )
    return Capabilities(**found)


def current() -> Capabilities:
    """The capability sets of the calling thread.

    Raises:
        FormatError: /proc is not mounted or does not look as it should.
    """
    try:
        text = Path("/proc/thread-self/status").read_text()
    except OSError as error:
        raise FormatError(
            f"cannot read capabilities from /proc: {error.strerror}; mount it with"
            " `mount -t proc proc /proc`"
        ) from error
    return parse_status(text)


def highest_capability() -> int:
    """The number of this kernel's newest capability; 39 (CAP_BPF) came with Linux 5.8."""
    try:
        return int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    except (OSError, ValueError):
        return len(CAPABILITIES) - 1


def missing(
    held: Iterable[str], wanted: Iterable[str] = NEEDED, highest: int | None = None
) -> tuple[str, ...]:
    """Those of `wanted` that neither are held nor have a stand-in that is.

    On a kernel that has no CAP_BPF or CAP_PERFMON, CAP_SYS_ADMIN is named in their place.

    >>> missing({"CAP_BPF", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"}, highest=40)
    ('CAP_PERFMON',)
    >>> missing({"CAP_DAC_OVERRIDE"}, highest=37)
    ('CAP_SYS_ADMIN', 'CAP_SYS_PTRACE')
    """
    have = frozenset(held)
    newest = highest_capability() if highest is None else highest
    absent: dict[str, None] = {}
    for name in wanted:
        if name in have or STAND_INS.get(name) in have:
            continue
        absent[STAND_INS[name] if CAPABILITIES.index(name) > newest else name] = None
    return tuple(absent)


def require(held: Iterable[str], action: str, wanted: Iterable[str] = NEEDED) -> None:
    """Refuse to begin an action without what it needs.

    Raises:
        ScopeError: it names what is missing, and what for.
    """
    absent = missing(held, wanted)
    if absent:
        first = f"{absent[0]} is missing, which {PURPOSES[absent[0]]}"
        others = f" (and {', '.join(absent[1:])})" if absent[1:] else ""
        grant = "them" if others else "it"
        raise ScopeError(f"cannot {action}: {first}{others}; run as root, or grant {grant}")


def parse_id(text: str | None) -> int | None:
    """A user or group number from the environment, or None if it is not one.

    >>> parse_id("1000"), parse_id("-1"), parse_id("4294967295"), parse_id("")
    (1000, None, None, None)
    """
    if text is None or not 1 <= len(text) <= 10 or not (text.isascii() and text.isdecimal()):
        return None
    number = int(text)
    return number if number < NO_UID else None


def invoking_user(environment: Mapping[str, str], uid: int | None = None) -> User:
    """The user behind sudo if this process is root through sudo, else the one it runs as.

    SUDO_UID and SUDO_GID only count together, as numbers, and only for root (`uid`, by default that
    of this process): anybody can set them.

    >>> invoking_user({"SUDO_UID": "1000", "SUDO_GID": "100"}, uid=0)
    User(uid=1000, gid=100)
    """
    effective = os.geteuid() if uid is None else uid
    sudo_uid, sudo_gid = (
        parse_id(environment.get("SUDO_UID")),
        parse_id(environment.get("SUDO_GID")),
    )
    if effective == 0 and sudo_uid is not None and sudo_gid is not None:
        return User(sudo_uid, sudo_gid)
    return User(effective, os.getegid())


def invoking_account(environment: Mapping[str, str]) -> Account:
    """The invoking user with name, home, shell and groups; one that has no entry: its group only.

    Call it before a fork: the look-up may take locks (NSS) that another thread holds at the fork.
    """
    user = invoking_user(environment)
    try:
        entry = pwd.getpwuid(user.uid)
    except KeyError:
        return Account(user, None, "/", "/bin/sh", (user.gid,))
    groups = tuple(os.getgrouplist(entry.pw_name, user.gid))
    return Account(user, entry.pw_name, entry.pw_dir or "/", entry.pw_shell or "/bin/sh", groups)


def become_invoking_user(
    environment: Mapping[str, str], account: Account | None = None
) -> dict[str, str]:
    """Give up root for good, in the child of `scope-ebpf run` between fork and exec.

    Sets groups, gid and uid to those of the invoking user and clears the ambient capabilities, so
    that the program that is executed next has what it would have without us. Fork the child before
    drop_after_attaching(): what that sets (no_new_privs) is inherited and breaks sudo in the child.

    Args:
        environment: the environment of this process.
        account: invoking_account(environment), if it was looked up before the fork.

    Returns:
        The environment for the program: HOME, USER, LOGNAME and SHELL of the user and no SUDO_*;
        without sudo as it was. PATH stays what sudo made of it.

    Raises:
        ScopeError: the kernel refused, for example in a user namespace without that user.
    """
    who = invoking_account(environment) if account is None else account
    _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    if os.geteuid() == who.user.uid:
        return dict(environment)
    _change_user(who)
    result = {key: value for key, value in environment.items() if not key.startswith("SUDO_")}
    result.update(HOME=who.home, SHELL=who.shell)
    for key in ("USER", "LOGNAME"):
        result.pop(key, None)
        if who.name is not None:
            result[key] = who.name
    return result


def drop_after_attaching(
    environment: Mapping[str, str], keep: Iterable[str] = NEEDED_TO_LOOK
) -> Dropped:
    """Give up for good what is not needed once the probes are attached.

    Attached iterators can still be run, maps be read and written, links be destroyed, and /proc of
    any process be read. To attach more later, pass `keep=NEEDED`; where the kernel attaches uprobes by
    perf events and opens none for CAP_PERFMON, CAP_SYS_ADMIN is kept then, if it is held. From then on
    nothing that this process executes can gain privileges.

    Root through sudo becomes the invoking user: files that the process makes from then on belong to
    that user, and neither CAP_CHOWN nor root is kept. So make the recording's directory before, and
    give it to invoking_user(). glibc changes the user of every thread, which takes all capabilities
    from all threads but the calling one. Afterwards the process leaves no core file, and programs
    of that user cannot ptrace it (it is not dumpable).

    Limit: without sudo the user stays, and then only the calling thread and those that it starts
    later are reached, since capset() is per thread. numpy (OpenBLAS) starts threads when it is
    imported unless OPENBLAS_NUM_THREADS=1, and so does polars: import it later.
    `threads_with_more` counts what is left. And root without capabilities still owns root's files.

    Raises:
        ScopeError: the kernel refused to change the user or to lower the capabilities.
    """
    before = current()
    wanted = set(keep)
    if not _iterators_run_without(before):
        wanted.add("CAP_BPF")
    if "CAP_PERFMON" in wanted and not _uprobes_attach_without(before):
        wanted.add("CAP_SYS_ADMIN")
    wanted |= {STAND_INS[name] for name in wanted - before.permitted if name in STAND_INS}
    kept = before.permitted & wanted
    if "CAP_SETPCAP" in before.permitted:
        for number in range(highest_capability() + 1):
            _prctl(PR_CAPBSET_DROP, number)
    account = invoking_account(environment)
    if os.geteuid() != account.user.uid and {"CAP_SETUID", "CAP_SETGID"} <= before.permitted:
        _prctl(PR_SET_KEEPCAPS, 1)  # counts for the calling thread only
        _change_user(account)
        _prctl(PR_SET_KEEPCAPS, 0)
    _set_capabilities(kept, kept)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    left = current()
    if left.permitted != kept or left.effective != kept:
        raise ScopeError(
            "cannot give up capabilities: the kernel kept"
            f" {', '.join(sorted(left.permitted - kept)) or 'too few'}; report this as a bug"
        )
    return Dropped(User(os.geteuid(), os.getegid()), kept, _threads_with_more(kept))


def _iterators_run_without(before: Capabilities) -> bool:
    """Does this kernel let a process without CAP_BPF run iterators and use maps that it has open?

    Since 5.19 (commit c8644cd0efe7) it does; before, with kernel.unprivileged_bpf_disabled, every
    bpf() call needed it. Asked with a descriptor that is not open: EBADF means: allowed.
    """
    without = before.permitted - {"CAP_BPF", "CAP_SYS_ADMIN"}
    _set_capabilities(without, before.permitted)
    try:
        return bool(library().iterate(-1, 0) == -errno.EBADF)
    finally:
        _set_capabilities(before.permitted, before.permitted)


def _uprobes_attach_without(before: Capabilities) -> bool:
    """Can a process with CAP_PERFMON and without CAP_SYS_ADMIN attach a uprobe?

    By a link of its own it can, since 6.6. Before, that takes a perf event, and for these the kernels of
    Debian and Ubuntu ask for CAP_SYS_ADMIN if kernel.perf_event_paranoid is above 2, as it is by default.
    Asked with an event that is closed again.
    """
    if has_multi_uprobes() or "CAP_SYS_ADMIN" not in before.permitted:
        return True
    _set_capabilities(before.permitted - {"CAP_SYS_ADMIN"}, before.permitted)
    try:
        descriptor = open_bpf_output(0)
    finally:
        _set_capabilities(before.permitted, before.permitted)
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor != -errno.EACCES


def _threads_with_more(kept: frozenset[str]) -> int:
    """How many threads of this process are permitted more than that."""
    count = 0
    for status in Path("/proc/self/task").glob("*/status"):
        try:
            count += bool(parse_status(status.read_text()).permitted - kept)
        except OSError:  # it ended
            continue
    return count


def _change_user(account: Account) -> None:
    """Groups first: the right to set them goes with the user."""
    uid, gid = account.user
    try:
        os.setgroups(account.groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise ScopeError(
            f"cannot become user {account.name or uid}: {error.strerror};"
            " this needs CAP_SETUID and CAP_SETGID, and that user in this user namespace"
        ) from error


_libc = c.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> None:
    """prctl(2); its failures do not matter, since what counts is checked afterwards."""
    arguments = (argument, 0, 0, 0)
    _libc.prctl(c.c_int(option), *(c.c_ulong(value) for value in arguments))


def _mask(names: frozenset[str]) -> int:
    """The opposite of names_of()."""
    return sum(
        1 << (CAPABILITIES.index(name) if name in CAPABILITIES else int(name.removeprefix("CAP_")))
        for name in names
    )


def _set_capabilities(effective: frozenset[str], permitted: frozenset[str]) -> None:
    """capset(2) for the calling thread; the inheritable set is emptied, and so the ambient one."""
    header = (c.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    low_and_high = [
        (_mask(names) >> shift & 0xFFFFFFFF)
        for shift in (0, 32)
        for names in (effective, permitted)
    ]
    data = (c.c_uint32 * 6)(*low_and_high[:2], 0, *low_and_high[2:], 0)
    if _libc.capset(header, data) != 0:
        raise ScopeError(
            f"cannot give up capabilities: {os.strerror(c.get_errno())};"
            " a container's seccomp profile may refuse capset()"
        )
