"""What the running kernel has and how it is set, asked without loading anything."""

import ctypes as c
import functools
import os
import re
from pathlib import Path

from scope_ebpf.loaders.bindings import library
from scope_ebpf.loaders.perf import open_tracepoint

TRACEFS = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


def kernel_version(release: str | None = None) -> tuple[int, int]:
    """The first two numbers of a release, by default the running kernel's, for what its types do not tell.

    >>> kernel_version("6.1.0-56-cloud-amd64")
    (6, 1)
    """
    match = re.match(r"(\d+)\.(\d+)", os.uname().release if release is None else release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def counts_as_locked() -> bool:
    """Whether BPF counts against RLIMIT_MEMLOCK: before 5.11, for who has no CAP_SYS_RESOURCE."""
    return kernel_version() < (5, 11)


def perf_event_paranoid() -> str:
    """The kernel's setting of that name."""
    try:
        return Path("/proc/sys/kernel/perf_event_paranoid").read_text().strip()
    except OSError:
        return "unknown"


class KernelTypes:
    """The running kernel's own types and functions, without its modules'."""

    def __init__(self) -> None:
        """Read them; without BTF there are none."""
        self._lib = library()
        self._btf = self._lib.kernel_btf()

    def __del__(self) -> None:
        """Give the memory back."""
        if getattr(self, "_btf", None):
            self._lib.btf_free(self._btf)

    def has_function(self, name: str) -> bool:
        """Whether there is such a function."""
        return self._find(name, 12) > 0  # BTF_KIND_FUNC

    def has_struct(self, name: str) -> bool:
        """Whether there is such a struct."""
        return self._find(name, 4) > 0  # BTF_KIND_STRUCT

    def has_typedef(self, name: str) -> bool:
        """Whether there is such a typedef."""
        return self._find(name, 8) > 0  # BTF_KIND_TYPEDEF

    def offset(self, struct_name: str, member: str) -> int | None:
        """How many bytes into a struct a member lies; None if there is none, or it is a bit field."""
        number = self._find(struct_name, 4)
        if number <= 0:
            return None
        address = self._lib.btf_type(self._btf, number)
        _, info, _ = c.cast(address, c.POINTER(c.c_uint32 * 3)).contents
        count = info & 0xFFFF
        members = c.cast(address + 12, c.POINTER(c.c_uint32 * (3 * count))).contents
        for place in range(count):
            name, _, bits = members[3 * place : 3 * place + 3]
            # of a struct with bit fields the upper byte is their size
            size, bits = (bits >> 24, bits & 0xFFFFFF) if info >> 31 else (0, bits)
            if self._lib.btf_name(self._btf, name) == member.encode() and not size:
                return int(bits // 8)
        return None

    def tracepoint_arguments(self, name: str) -> int:
        """See the function of that name."""
        number = self._find(f"btf_trace_{name}", 8)  # BTF_KIND_TYPEDEF
        for _ in range(3):
            if number <= 0:
                return 0
            address = self._lib.btf_type(self._btf, number)
            _, info, number = c.cast(address, c.POINTER(c.c_uint32 * 3)).contents
            if (info >> 24) & 0x1F == 13:  # BTF_KIND_FUNC_PROTO
                return int(info & 0xFFFF) - 1
        return 0

    def _find(self, name: str, kind: int) -> int:
        return int(self._lib.btf_find(self._btf, name.encode(), kind)) if self._btf else 0


@functools.cache
def kernel_types() -> KernelTypes:
    """The types, read once (7 ms) until forget_kernel_types()."""
    return KernelTypes()


def forget_kernel_types() -> None:
    """Give their memory back, some megabytes; who asks again has them read again."""
    kernel_types.cache_clear()


@functools.cache
def has_multi_uprobes() -> bool:
    """Whether a link can hold uprobes by itself, without a perf event: since 6.6 (commit 89ae89f53d20).

    Taking away a perf event's uprobe costs the kernel a tenth of a second, one after the other.
    """
    return has_struct("bpf_uprobe_multi_link")


@functools.cache
def has_cookies() -> bool:
    """Whether a probe can be told where it was attached: since 5.15 (commit 82e6b1eee6a8).

    The link that keeps the cookie came with it.
    """
    return has_struct("bpf_perf_link")


@functools.cache
def has_struct(name: str) -> bool:
    """Whether the running kernel's BTF has a struct."""
    return kernel_types().has_struct(name)


def programs_are_preempted() -> bool:
    """Whether another task may run before a program at a tracepoint has ended.

    From 7.0 on tracepoints are guarded by srcu_fast_notrace (commit a46023d5616e), no more by disabled
    preemption. The type of that guard is in the kernel's BTF since then: 6.18 has none.
    """
    return kernel_types().has_typedef("class_srcu_fast_notrace_t")


def tracepoint_event_refusal(name: str) -> str:
    """Why perf opens no event for a tracepoint, as raw_syscalls/sys_enter; empty: it does."""
    for folder in TRACEFS:
        try:
            number = int((folder / "events" / name / "id").read_text())
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{folder} cannot be read: {error.strerror}; run as root"
        descriptor = open_tracepoint(number)
        if descriptor >= 0:
            os.close(descriptor)
            return ""
        return (
            f"perf refuses it: {os.strerror(-descriptor)}, with kernel.perf_event_paranoid ="
            f" {perf_event_paranoid()}; run as root, or `sysctl kernel.perf_event_paranoid=2`"
        )
    return "tracefs is not mounted; run `mount -t tracefs none /sys/kernel/tracing`"


@functools.cache
def tracepoint_arguments(name: str) -> int:
    """How many arguments a tracepoint's BTF prototype has, without the leading void pointer; 0: none.

    The kernel's BTF has a typedef `btf_trace_NAME` of a pointer to that prototype.
    """
    return kernel_types().tracepoint_arguments(name)


def possible_cpus() -> int:
    """One more than the highest CPU number that this host can have."""
    text = Path("/sys/devices/system/cpu/possible").read_text()
    return max(int(part.split("-")[-1]) for part in text.strip().split(",")) + 1
