"""Names of system calls, errnos and signals, against numbers known from elsewhere."""

from __future__ import annotations

import doctest
import errno
import os
import platform
import signal
import sys

import pytest

from scope_ebpf import syscalls
from scope_ebpf.errors import ScopeError
from scope_ebpf.syscalls import SYSCALLS, errno_name, signal_name, syscall_name, syscall_names

pytestmark = pytest.mark.pure

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs the errnos of Linux")
generic_errnos = pytest.mark.skipif(
    platform.machine() not in {"x86_64", "aarch64"}, reason="this machine has errnos of its own"
)

# From the manual pages and arch/*/syscall*.tbl. The first lines of each machine are those that a
# wrong choice of header switches would get wrong.
KNOWN = {
    "x86_64": {
        0: "read",
        1: "write",
        47: "recvmsg",
        202: "futex",
        232: "epoll_wait",
        257: "openat",
        262: "newfstatat",
        334: "rseq",
        335: "uretprobe",
        336: "uprobe",
        424: "pidfd_send_signal",
        447: "memfd_secret",
    },
    "i386": {
        0: "restart_syscall",
        3: "read",
        102: "socketcall",
        140: "_llseek",
        240: "futex",
        295: "openat",
        335: "rt_tgsigqueueinfo",
        336: "perf_event_open",
        386: "rseq",
        393: "semget",
        403: "clock_gettime64",
        422: "futex_time64",
    },
    "aarch64": {
        25: "fcntl",
        38: "renameat",
        43: "statfs",
        62: "lseek",
        71: "sendfile",
        79: "newfstatat",
        80: "fstat",
        98: "futex",
        113: "clock_gettime",
        163: "getrlimit",
        222: "mmap",
        223: "fadvise64",
        63: "read",
        64: "write",
        56: "openat",
        212: "recvmsg",
        260: "wait4",
        276: "renameat2",
        293: "rseq",
        447: "memfd_secret",
    },
}
SAME_EVERYWHERE = {
    435: "clone3",
    449: "futex_waitv",
    450: "set_mempolicy_home_node",
    451: "cachestat",
    452: "fchmodat2",
    453: "map_shadow_stack",
    456: "futex_requeue",
    458: "listmount",
    461: "lsm_list_modules",
    462: "mseal",
    466: "removexattrat",
    467: "open_tree_attr",
    468: "file_getattr",
    469: "file_setattr",
}


@pytest.mark.parametrize("machine", KNOWN)
def test_known_numbers_have_their_names(machine):
    names = syscall_names(machine)
    expected = KNOWN[machine] | SAME_EVERYWHERE
    assert {number: names[number] for number in expected} == expected


@pytest.mark.parametrize("machine", SYSCALLS)
def test_a_table_ends_at_the_newest_call_and_names_each_call_once(machine):
    names = syscall_names(machine)
    assert max(names) == 469
    assert len(set(names.values())) == len(names)
    # From 424 on, numbers are handed out for all machines together and without a gap.
    assert set(range(424, 470)) <= set(names)


def test_arm64_has_no_calls_of_32_bit_machines():
    assert not {name for name in syscall_names("aarch64").values() if name.endswith("time64")}
    assert 415 not in syscall_names("aarch64")


def test_other_names_of_a_machine():
    assert syscall_names("amd64") is SYSCALLS["x86_64"]
    assert syscall_names("arm64") is SYSCALLS["aarch64"]
    assert syscall_names("i686") is SYSCALLS["i386"]


def test_an_unknown_machine_is_refused_with_the_known_ones():
    with pytest.raises(ScopeError, match=r"'riscv64'; known: x86_64, i386, aarch64"):
        syscall_names("riscv64")


def test_a_call_newer_than_the_table_keeps_its_number():
    assert syscall_name(470, "x86_64") == "syscall_470"


@linux_only
@pytest.mark.skipif(platform.machine() not in SYSCALLS, reason="no table for this machine")
def test_this_machine_answers_to_the_numbers():
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).syscall
    numbers = {name: number for number, name in syscall_names(platform.machine()).items()}
    assert call(numbers["getpid"]) == os.getpid()
    assert call(numbers["getppid"]) == os.getppid()
    assert call(numbers["getuid"]) == os.getuid()
    assert call(numbers["close"], -1) == -1
    assert errno_name(ctypes.get_errno()) == "EBADF"


@linux_only
@generic_errnos
def test_errnos_agree_with_this_machine():
    # Python knows 35 as EDEADLOCK or EDEADLK, and 95 by two names: any name for the number is fine.
    here = {name: getattr(errno, name) for name in dir(errno) if name.startswith("E")}
    for number in errno.errorcode:
        assert here[errno_name(number)] == number


def test_errnos_that_only_a_tracer_sees():
    assert [errno_name(number) for number in (512, 513, 514, 516, 517)] == [
        "ERESTARTSYS",
        "ERESTARTNOINTR",
        "ERESTARTNOHAND",
        "ERESTART_RESTARTBLOCK",
        "EPROBE_DEFER",
    ]


def test_an_errno_may_be_given_as_the_result_of_a_call():
    assert errno_name(-11) == errno_name(11) == "EAGAIN"


@linux_only
def test_signals_agree_with_this_machine():
    here = signal.Signals.__members__
    for number in signal.valid_signals():
        name = signal_name(number)
        if name in here:
            assert here[name] == number
        else:
            # Python names only the ends of the real-time range, and SIGSTKFLT from 3.11 on.
            assert name.startswith(("SIGRTMIN+", "SIGRTMAX-")) or name == "SIGSTKFLT"


def test_every_signal_has_one_name():
    names = [signal_name(number) for number in range(1, 65)]
    assert len(set(names)) == 64
    assert all(name.startswith("SIG") for name in names)
    assert names[49 - 1] == "SIGRTMIN+15"
    assert names[50 - 1] == "SIGRTMAX-14"


def test_the_examples_in_the_docstrings():
    outcome = doctest.testmod(syscalls)
    assert outcome.attempted > 0
    assert outcome.failed == 0
