"""Which system calls move messages on this machine, and how."""

import platform

from scope_ebpf.records import MessageClass
from scope_ebpf.syscalls import syscall_names

# How each system call moves messages, by name: see enum message_class in probes/events.h.
_C = MessageClass
MESSAGE_CALLS = {
    "read": _C.MESSAGE_BUFFER | _C.MESSAGE_RECEIVE,
    "write": _C.MESSAGE_BUFFER,
    "recvfrom": _C.MESSAGE_BUFFER | _C.MESSAGE_RECEIVE | _C.MESSAGE_FLAGS,
    "sendto": _C.MESSAGE_BUFFER | _C.MESSAGE_FLAGS,
    "readv": _C.MESSAGE_VECTOR | _C.MESSAGE_RECEIVE,
    "writev": _C.MESSAGE_VECTOR,
    "preadv2": _C.MESSAGE_VECTOR | _C.MESSAGE_RECEIVE,
    "pwritev2": _C.MESSAGE_VECTOR,
    "vmsplice": _C.MESSAGE_VECTOR,
    "recvmsg": _C.MESSAGE_HEADER | _C.MESSAGE_RECEIVE,
    "sendmsg": _C.MESSAGE_HEADER,
    "recvmmsg": _C.MESSAGE_HEADERS | _C.MESSAGE_RECEIVE,
    "sendmmsg": _C.MESSAGE_HEADERS,
    "sendfile": _C.MESSAGE_SENDFILE,
    "splice": _C.MESSAGE_SPLICE,
    # what makes a connection; open is among them for named pipes
    **dict.fromkeys(("accept", "accept4"), _C.MESSAGE_BIRTH_RESULT),
    **dict.fromkeys(("open", "openat", "openat2", "creat"), _C.MESSAGE_BIRTH_RESULT),
    "connect": _C.MESSAGE_BIRTH_FIRST,
    **dict.fromkeys(("pipe", "pipe2"), _C.MESSAGE_BIRTH_PAIR),
    "socketpair": _C.MESSAGE_BIRTH_FOURTH,
    **dict.fromkeys(("io_uring_setup", "io_uring_enter"), _C.MESSAGE_RING),
}


def message_classes() -> bytes:
    """The table that tells the probes how each system call number moves messages."""
    table = bytearray(512)
    for number, name in syscall_names(platform.machine()).items():
        if name in MESSAGE_CALLS and number < len(table):
            table[number] = MESSAGE_CALLS[name]
    return bytes(table)


def number_of(name: str) -> int:
    """The number of a system call."""
    table = syscall_names(platform.machine())
    return next(number for number, known in table.items() if known == name)
