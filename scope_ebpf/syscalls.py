"""Names for the numbers in a trace: system calls, errnos and signals.

A recording holds numbers, and is read on any machine: so nothing here asks the machine that it runs
on. The tables themselves are in the generated `scope_ebpf.syscall_tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from scope_ebpf import syscall_tables
from scope_ebpf.errors import ScopeError

SYSCALLS: Final[Mapping[str, Mapping[int, str]]] = MappingProxyType(
    {
        "x86_64": MappingProxyType(syscall_tables.X86_64),
        "i386": MappingProxyType(syscall_tables.I386),
        "aarch64": MappingProxyType(syscall_tables.AARCH64),
    }
)
"""Machine -> number -> name, up to Linux 6.18. i386 is what 32-bit programs call on x86-64."""

# What else uname, Debian and the kernel call these machines.
_ALIASES: Final = {"amd64": "x86_64", "arm64": "aarch64", "i586": "i386", "i686": "i386"}


def syscall_names(machine: str) -> Mapping[int, str]:
    """The names of the system calls of one machine, by number.

    `machine` is what `uname -m` prints there. Raises `ScopeError` for one without a table.

    >>> syscall_names("x86_64")[0]
    'read'
    >>> syscall_names("aarch64")[63]
    'read'
    """
    try:
        return SYSCALLS[_ALIASES.get(machine, machine)]
    except KeyError:
        known = ", ".join(SYSCALLS)
        raise ScopeError(f"no system call names for machine {machine!r}; known: {known}") from None


def syscall_name(number: int, machine: str) -> str:
    """The name of one system call; a number without a name gives a label that contains it.

    >>> syscall_name(257, "x86_64")
    'openat'
    >>> syscall_name(9999, "x86_64")
    'syscall_9999'
    """
    return syscall_names(machine).get(number, f"syscall_{number}")


def errno_name(number: int) -> str:
    """The name of an errno, given as such or as the negative result of a call.

    The numbers are those of x86 and arm64. They include the kernel's own codes from 512 on: a probe
    at the end of a call sees ERESTARTSYS where the program will see EINTR, or the call repeated.

    >>> errno_name(11)
    'EAGAIN'
    >>> errno_name(-512)
    'ERESTARTSYS'
    >>> errno_name(4000)
    'errno_4000'
    """
    return syscall_tables.ERRNOS.get(abs(number), f"errno_{abs(number)}")


def signal_name(number: int) -> str:
    """The name of a signal, as `kill -l` of bash prints it.

    32 and 33 have the names that they have inside glibc, which keeps them for cancelling threads
    and for changing the user id of all of them; musl uses these numbers otherwise.

    >>> signal_name(9)
    'SIGKILL'
    >>> signal_name(35)
    'SIGRTMIN+1'
    >>> signal_name(99)
    'signal_99'
    """
    return syscall_tables.SIGNALS.get(number, f"signal_{number}")
