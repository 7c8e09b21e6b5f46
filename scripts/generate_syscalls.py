#!/usr/bin/env python3
"""Writes scope_ebpf/syscall_tables.py: names of system calls, errnos and signals.

    scripts/generate_syscalls.py > scope_ebpf/syscall_tables.py     (or: make generate)

The numbers come from the kernel's user-space headers (Debian: linux-libc-dev), and calls newer than
the oldest headers that we support from `ADDED` below. The output is the same for any headers from
Linux 5.15 on. It needs an x86 header directory; where there is none it exits with status 77, as
test runners expect of a test that cannot run here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

INCLUDE = Path("/usr/include")
X86 = INCLUDE / "x86_64-linux-gnu"
NOT_POSSIBLE_HERE = 77

OLDEST_CALL = 448  # process_mrelease: in every header from Linux 5.15 on
NEWEST_CALL = 469  # file_setattr: the last call of the release below
NEWEST_RELEASE = "6.18"

ALL = ("x86_64", "i386", "aarch64")


class Added(NamedTuple):
    """One system call that the oldest supported headers do not know yet."""

    number: int
    name: str
    release: str
    machines: tuple[str, ...] = ALL


# From arch/x86/entry/syscalls/syscall_{32,64}.tbl and scripts/syscall.tbl. Some numbers were
# reserved on a machine before, or without, a call behind them: the release is the first one in
# which any of the three machines has the call.
ADDED = (
    Added(335, "uretprobe", "6.11", ("x86_64",)),
    Added(336, "uprobe", "6.18", ("x86_64",)),
    Added(449, "futex_waitv", "5.16"),
    Added(450, "set_mempolicy_home_node", "5.17"),
    Added(451, "cachestat", "6.5"),
    Added(452, "fchmodat2", "6.6"),
    Added(453, "map_shadow_stack", "6.6"),
    Added(454, "futex_wake", "6.7"),
    Added(455, "futex_wait", "6.7"),
    Added(456, "futex_requeue", "6.7"),
    Added(457, "statmount", "6.8"),
    Added(458, "listmount", "6.8"),
    Added(459, "lsm_get_self_attr", "6.8"),
    Added(460, "lsm_set_self_attr", "6.8"),
    Added(461, "lsm_list_modules", "6.8"),
    Added(462, "mseal", "6.10"),
    Added(463, "setxattrat", "6.13"),
    Added(464, "getxattrat", "6.13"),
    Added(465, "listxattrat", "6.13"),
    Added(466, "removexattrat", "6.13"),
    Added(467, "open_tree_attr", "6.15"),
    Added(468, "file_getattr", "6.17"),
    Added(469, "file_setattr", "6.17"),
)

# include/linux/errno.h: no header for user space has these, because no user ever sees them. A
# tracepoint does: it runs before the signal code turns the restart codes into EINTR or a restart.
KERNEL_ERRNOS = {
    512: "ERESTARTSYS",
    513: "ERESTARTNOINTR",
    514: "ERESTARTNOHAND",
    515: "ENOIOCTLCMD",
    516: "ERESTART_RESTARTBLOCK",
    517: "EPROBE_DEFER",
    518: "EOPENSTALE",
    519: "ENOPARAM",
    521: "EBADHANDLE",
    522: "ENOTSYNC",
    523: "EBADCOOKIE",
    524: "ENOTSUPP",
    525: "ETOOSMALL",
    526: "ESERVERFAULT",
    527: "EBADTYPE",
    528: "EJUKEBOX",
    529: "EIOCBQUEUED",
    530: "ERECALLCONFLICT",
    531: "ENOGRACE",
}

# The header of each machine, with what that machine's own asm/unistd.h defines before including
# it. arm64 takes the generic list; the x86 bitsperlong.h, which says 64, serves for it as well.
UNISTD: dict[str, tuple[str, tuple[str, ...]]] = {
    "x86_64": ("asm/unistd_64.h", ()),
    "i386": ("asm/unistd_32.h", ()),
    "aarch64": (
        "asm-generic/unistd.h",
        (
            "__ARCH_WANT_RENAMEAT",
            "__ARCH_WANT_NEW_STAT",
            "__ARCH_WANT_SET_GET_RLIMIT",
            "__ARCH_WANT_SYS_CLONE3",
            "__ARCH_WANT_MEMFD_SECRET",
        ),
    ),
}

# What the headers define beside calls: where the generic list ends, and where the range for calls
# of one architecture starts.
NOT_CALLS = {"syscalls", "arch_specific_syscall"}


def definitions(header: str, defines: tuple[str, ...] = ()) -> dict[str, str]:
    """The macros that the header leaves defined, as the preprocessor sees them."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        sys.exit("cannot read the kernel headers: no C compiler; install gcc or clang, or set CC")
    # -undef and -nostdinc: the same result whatever this machine is.
    command = [compiler, "-E", "-dM", "-undef", "-nostdinc", "-D__x86_64__"]
    command += [f"-D{name}" for name in defines]
    command += ["-I", str(INCLUDE), "-I", str(X86), "-x", "c", "-"]
    source = f"#include <{header}>\n"
    result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"cannot read <{header}>: {compiler} failed:\n{result.stderr}")
    return dict(re.findall(r"^#define (\w+)[ \t]+(\w+)$", result.stdout, re.MULTILINE))


def system_calls(machine: str) -> dict[int, str]:
    """Number -> name on one machine, up to the newest call that this generator knows."""
    macros = definitions(*UNISTD[machine])
    calls: dict[int, str] = {}
    for macro, value in macros.items():
        if not macro.startswith("__NR_") or (name := macro.removeprefix("__NR_")) in NOT_CALLS:
            continue
        # __NR_fcntl is __NR3264_fcntl is 25.
        number = int(macros.get(value, value))
        if number <= NEWEST_CALL:
            calls[number] = name
    if OLDEST_CALL not in calls:
        sys.exit(
            f"the kernel headers in {INCLUDE} are too old: call {OLDEST_CALL} is missing for "
            f"{machine}; install headers of Linux 5.15 or newer"
        )
    for added in ADDED:
        if machine in added.machines and calls.setdefault(added.number, added.name) != added.name:
            sys.exit(
                f"call {added.number} of {machine} is {calls[added.number]} in {INCLUDE} but "
                f"{added.name} in ADDED; correct {Path(__file__).name}"
            )
    return dict(sorted(calls.items()))


def errnos() -> dict[int, str]:
    """Number -> name of every errno; x86 and arm64 use the generic numbers."""
    names = {
        int(value): macro
        for macro, value in definitions("asm-generic/errno.h").items()
        # Aliases (EWOULDBLOCK is EAGAIN) have a name for a value.
        if re.fullmatch(r"E[A-Z0-9]+", macro) and value.isdecimal()
    }
    return dict(sorted((names | KERNEL_ERRNOS).items()))


def signals() -> dict[int, str]:
    """Number -> name of every signal, with the names that kill -l of bash prints from 34 on."""
    names = {
        int(value): macro
        for macro, value in definitions("asm-generic/signal.h").items()
        if re.fullmatch(r"SIG[A-Z0-9]+", macro) and value.isdecimal() and int(value) < 32
    }
    names[6] = "SIGABRT"  # also SIGIOT
    names[31] = "SIGSYS"  # also SIGUNUSED, in older headers
    # glibc keeps the first two real-time signals for itself, and counts SIGRTMIN from the third.
    names |= {32: "SIGCANCEL", 33: "SIGSETXID", 34: "SIGRTMIN", 64: "SIGRTMAX"}
    names |= {34 + above: f"SIGRTMIN+{above}" for above in range(1, 16)}
    names |= {64 - below: f"SIGRTMAX-{below}" for below in range(1, 15)}
    return dict(sorted(names.items()))


def rows(table: dict[int, str], comments: dict[int, str] | None = None) -> str:
    """The table as the lines of a dict display."""
    lines = []
    for number, name in table.items():
        comment = (comments or {}).get(number)
        lines.append(f'    {number}: "{name}",' + (f"  # {comment}" if comment else ""))
    return "\n".join(lines)


def main() -> None:
    """Prints the module."""
    if not (X86 / "asm" / "unistd_64.h").exists():
        print(f"no x86 kernel headers in {X86}: linux-libc-dev has them", file=sys.stderr)
        sys.exit(NOT_POSSIBLE_HERE)
    print(
        f'"""System calls up to Linux {NEWEST_RELEASE}, errnos and signals: numbers to names.\n\n'
        "Generated by scripts/generate_syscalls.py. Do not edit: change that script, then run\n"
        "`make generate`. Read these tables through scope_ebpf.syscalls.\n"
        '"""\n\n'
        "from typing import Final"
    )
    for machine in UNISTD:
        since = {a.number: f"Linux {a.release}" for a in ADDED if machine in a.machines}
        calls = rows(system_calls(machine), since)
        print(f"\n{machine.upper()}: Final[dict[int, str]] = {{\n{calls}\n}}")
    print(f"\nERRNOS: Final[dict[int, str]] = {{\n{rows(errnos())}\n}}")
    print(f"\nSIGNALS: Final[dict[int, str]] = {{\n{rows(signals())}\n}}")


if __name__ == "__main__":
    main()
