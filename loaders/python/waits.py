"""What a thread of another process does at the moment, as /proc tells it: runs, or waits for what.

A system call shows in /proc/PID/task/TID/syscall with its arguments, as long as the thread is blocked in
it; that file needs the privilege of ptrace, but neither stops nor attaches to anything.
"""

from __future__ import annotations

import os
import platform
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scope_ebpf.errors import ScopeError
from scope_ebpf.loaders.python.memory import AddressError, ProcessMemory
from scope_ebpf.loaders.targets import PROC, parse_stat
from scope_ebpf.syscalls import syscall_name

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "uninterruptible",
    "T": "stopped",
    "t": "traced",
    "Z": "ended",
    "X": "ended",
    "I": "idle",
    "P": "parked",
}
# include/uapi/linux/futex.h
_FUTEX_COMMAND = 0x7F
_FUTEX_WAITS = {0: "wait", 6: "lock", 9: "wait", 11: "wait", 13: "lock"}
_FUTEX_LOCKS = (6, 13)
# include/uapi/linux/fcntl.h
_F_SETLKW = (7, 38)  # and F_OFD_SETLKW
_TIMER_ABSTIME = 1
_CLOCKS = {0: time.CLOCK_REALTIME, 1: time.CLOCK_MONOTONIC, 7: time.CLOCK_BOOTTIME}
_POLL = struct.Struct("<ihh")
_MOST_POLLED = 64
_SHOWN_POLLED = 3
_FD_READS = {
    "read", "readv", "pread64", "preadv", "preadv2", "recvfrom", "recvmsg", "recvmmsg", "getdents64",
}  # fmt: skip
_FD_WRITES = {
    "write", "writev", "pwrite64", "pwritev", "pwritev2", "sendto", "sendmsg", "sendmmsg", "sendfile",
    "splice", "copy_file_range",
}  # fmt: skip
_FD_OTHERS = {
    "fsync": "waits until {} is on the disk",
    "fdatasync": "waits until {} is on the disk",
    "accept": "waits for a connection on {}",
    "accept4": "waits for a connection on {}",
    "connect": "connects {}",
    "flock": "waits for the lock of {}",
    "ftruncate": "truncates {}",
    "fallocate": "allocates {}",
    "ioctl": "controls {}",
}
_CHILD_WAITS = {"wait4", "waitid"}
_SIGNAL_WAITS = {"pause", "rt_sigsuspend", "rt_sigtimedwait"}
_TCP_LISTEN = "0A"


@dataclass(frozen=True)
class Activity:
    """What a thread does.

    Attributes:
        state: running, sleeping, uninterruptible, stopped, traced or ended; unknown.
        syscall: the name of the call in which it is blocked; None: in none, or it may not be known.
        wait: in plain words, None while it runs.
        address: of the futex for which it waits; 0: for none.
        arguments: of the call.
    """

    state: str
    syscall: str | None = None
    wait: str | None = None
    address: int = 0
    arguments: tuple[int, ...] = ()


class Waits:
    """Describes the threads of one process, with its descriptors looked up when needed."""

    def __init__(self, tgid: int, memory: ProcessMemory) -> None:
        """Nothing is read yet."""
        self._tgid = tgid
        self._memory = memory
        self._machine = platform.machine()
        self._sockets: Mapping[int, str] | None = None

    def activity(self, tid: int) -> Activity:
        """What a thread does now; the state is `ended` if it is gone."""
        folder = PROC / str(self._tgid) / "task" / str(tid)
        try:
            state = parse_stat((folder / "stat").read_text(errors="replace"))[1][0]
        except (OSError, ScopeError):
            return Activity("ended")
        name = _STATES.get(state, "unknown")
        try:
            words = (folder / "syscall").read_text().split()
        except OSError:  # a kernel without it, or no permission
            words = []
        if not words or words[0] == "running" or name == "running":
            return Activity("running" if words[:1] == ["running"] and state in "SR" else name)
        number = int(words[0])
        if number < 0:  # a page fault, or stopped by a signal
            return Activity(name, None, self._without_call(name, folder))
        arguments = tuple(int(word, 16) for word in words[1:7])
        call = syscall_name(number, self._machine)
        address = arguments[0] if call == "futex" else 0
        return Activity(name, call, self._wait(call, arguments), address, arguments)

    def _without_call(self, state: str, folder: Path) -> str | None:
        if state != "uninterruptible":
            return None
        with suppress(OSError):
            channel = (folder / "wchan").read_text()
            if channel not in ("", "0"):
                return f"waits in the kernel ({channel})"
        return "waits in the kernel"

    def _wait(self, call: str, arguments: tuple[int, ...]) -> str:
        first, second, third, *_ = arguments
        if call == "futex":
            return self._futex(arguments)
        if call in _FD_READS:
            return f"reads from {self.descriptor(first)}"
        if call in _FD_WRITES:
            where = first if call != "splice" else third
            return f"writes to {self.descriptor(where)}"
        if call in _FD_OTHERS:
            return _FD_OTHERS[call].format(self.descriptor(first))
        if call in ("poll", "ppoll"):
            return self._polls(first, second)
        if call in ("select", "pselect6"):
            return self._selects(arguments)
        if call.startswith(("epoll_wait", "epoll_pwait")):
            return self._epoll(first)
        if call in ("nanosleep", "clock_nanosleep"):
            return self._sleeps(call, arguments)
        if call in _CHILD_WAITS:
            pid = _signed(second if call == "waitid" else first)
            return f"waits for child process {pid}" if pid > 0 else "waits for a child process"
        if call in _SIGNAL_WAITS:
            return "waits for a signal"
        if call == "fcntl" and second in _F_SETLKW:
            return f"waits for the lock of {self.descriptor(first)}"
        return f"is in the system call {call}"

    def _futex(self, arguments: tuple[int, ...]) -> str:
        command = arguments[1] & _FUTEX_COMMAND
        if command not in _FUTEX_WAITS:
            return "is in the system call futex"
        limited = arguments[3] and command not in _FUTEX_LOCKS
        return f"waits for a lock{', with a time limit' if limited else ''}"

    def _polls(self, address: int, count: int) -> str:
        if not count:
            return "sleeps"
        try:
            data = self._memory.read(address, _POLL.size * min(count, _MOST_POLLED))
        except AddressError:
            return f"waits for {_many(count, 'descriptor')}"
        fds = [fd for fd, _, _ in _POLL.iter_unpack(data) if fd >= 0]
        return self._waits_for(fds, count)

    def _selects(self, arguments: tuple[int, ...]) -> str:
        count, *sets = arguments[:4]
        if not count or not any(sets):
            return "sleeps" if arguments[4] else "waits for a signal"
        fds: set[int] = set()
        size = (min(count, 1024) + 63) // 64 * 8
        for address in filter(None, sets):
            try:
                bits = int.from_bytes(self._memory.read(address, size), "little")
            except AddressError:
                return "waits for descriptors"
            fds |= {fd for fd in range(min(count, 1024)) if bits >> fd & 1}
        return self._waits_for(sorted(fds), len(fds))

    def _epoll(self, fd: int) -> str:
        try:
            text = (PROC / str(self._tgid) / "fdinfo" / str(fd)).read_text()
        except OSError:
            return f"waits for events of epoll fd {fd}"
        fds = [int(line.split()[1]) for line in text.splitlines() if line.startswith("tfd:")]
        # what wakes a loop up from other threads is in every loop, and tells nothing
        told = [fd for fd in fds if not self._own(fd)]
        return self._waits_for(told, len(told)) if told else "waits for a timer or a wake-up"

    def _own(self, fd: int) -> bool:
        """Whether a descriptor is an eventfd, or both ends of it are this process's, as far as is seen."""
        with suppress(OSError):
            link = os.readlink(PROC / str(self._tgid) / "fd" / str(fd))
            if link.startswith("anon_inode:[eventfd"):
                return True
            if link.startswith("socket:["):
                return self._find(int(link[8:-1])) == "unix socket"
        return False

    def _waits_for(self, fds: list[int], count: int) -> str:
        if not fds:
            return f"waits for {_many(count, 'descriptor')}"
        if count == 1:
            return f"waits for {self.descriptor(fds[0])}"
        shown = ", ".join(map(self.descriptor, sorted(fds)[:_SHOWN_POLLED]))
        more = count - len(fds[:_SHOWN_POLLED])
        return f"waits for any of {shown}{f' and {more} more' if more > 0 else ''}"

    def _sleeps(self, call: str, arguments: tuple[int, ...]) -> str:
        clock, flags, request = (1, 0, arguments[0]) if call == "nanosleep" else arguments[:3]
        try:
            seconds, nanoseconds = struct.unpack("<qq", self._memory.read(request, 16))
        except AddressError:
            return "sleeps"
        until = seconds + nanoseconds / 1e9
        if flags & _TIMER_ABSTIME and clock in _CLOCKS:
            return f"sleeps for {max(until - time.clock_gettime(_CLOCKS[clock]), 0):.1f} s more"
        return f"sleeps for {until:.1f} s"

    # ---- descriptors ----

    def descriptor(self, fd: int) -> str:
        """What a descriptor is, such as `fd 7 (TCP 127.0.0.1:5000 to 127.0.0.1:5432)`."""
        fd = _signed(fd)
        try:
            link = os.readlink(PROC / str(self._tgid) / "fd" / str(fd))
        except OSError:
            return f"fd {fd}"
        if link.startswith("socket:["):
            link = self._find(int(link[8:-1])) or "socket"
        elif link.startswith("pipe:["):
            link = "pipe"
        elif link.startswith("anon_inode:"):
            link = link[11:].strip("[]")
        return f"fd {fd} ({link})"

    def _find(self, inode: int) -> str | None:
        if self._sockets is None or inode not in self._sockets:
            self._sockets = _sockets(PROC / str(self._tgid) / "net")
        return self._sockets.get(inode)


def _sockets(folder: Path) -> dict[int, str]:
    """What each socket of a network namespace is, by inode; proc(5), /proc/net/tcp and unix."""
    found: dict[int, str] = {}
    for name in ("tcp", "tcp6", "udp", "udp6"):
        with suppress(OSError, ValueError, IndexError):
            for line in (folder / name).read_text().splitlines()[1:]:
                words = line.split()
                local, remote = _address(words[1]), _address(words[2])
                if words[3] == _TCP_LISTEN and name.startswith("tcp"):
                    text = f"{name[:3].upper()} {local}, listening"
                elif words[2].endswith(":0000"):
                    text = f"{name[:3].upper()} {local}"
                else:
                    text = f"{name[:3].upper()} {local} to {remote}"
                found[int(words[9])] = text
    with suppress(OSError, ValueError, IndexError):
        for line in (folder / "unix").read_text(errors="replace").splitlines()[1:]:
            words = line.split(None, 7)
            found[int(words[6])] = f"unix socket {words[7]}" if len(words) > 7 else "unix socket"
    return found


def _address(text: str) -> str:
    """An address as /proc/net has it.

    >>> _address("0100007F:1538"), _address("0000000000000000FFFF00000100007F:0050")
    ('127.0.0.1:5432', '127.0.0.1:80')
    """
    number, _, port = text.partition(":")
    # words of 4 bytes, each in the order of this machine
    data = b"".join(
        struct.pack("=I", int(number[at : at + 8], 16)) for at in range(0, len(number), 8)
    )
    if data.startswith(b"\0" * 10 + b"\xff\xff"):
        data = data[12:]
    if len(data) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, data)}:{int(port, 16)}"
    return f"[{socket.inet_ntop(socket.AF_INET6, data)}]:{int(port, 16)}"


def _signed(value: int) -> int:
    """An int of C in a register.

    >>> _signed(0xFFFFFFFF), _signed(7), _signed(2**64 - 1)
    (-1, 7, -1)
    """
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
