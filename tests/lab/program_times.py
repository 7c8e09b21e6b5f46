"""How long BPF programs ran while something was done, as the kernel counts it: whoever loaded them.

The statistics are on only in the block, and the programs are kept by a descriptor until they are read: so
those of a recorder that ended meanwhile can be read, too.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.leftovers import identities

_libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
RUN_TIME = 0  # enum bpf_stats_type: BPF_STATS_RUN_TIME
# struct bpf_prog_info up to and with `name`
NAME_OFFSET, INFO_BYTES = 64, 80


@dataclass(frozen=True)
class Program:
    """What one program did.

    Attributes:
        name: of which the kernel keeps 15 letters.
        runs: how often it ran.
        ns: how long in all, with what interrupted it.
    """

    name: str
    runs: int
    ns: int


@contextmanager
def program_times(before: set[int]) -> Iterator[list[Program]]:
    """The list is filled at the end of the block: programs that are loaded now and are not in `before`."""
    found: list[Program] = []
    held = {number: _libbpf.bpf_prog_get_fd_by_id(number) for number in identities("prog") - before}
    try:
        statistics = _libbpf.bpf_enable_stats(RUN_TIME)
        assert statistics >= 0, os.strerror(ctypes.get_errno())
        try:
            yield found
        finally:
            os.close(statistics)
        for number, descriptor in held.items():
            assert descriptor >= 0, number
            text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
            runs, ns = (
                int(value)
                for name in ("run_cnt", "run_time_ns")
                for value in re.findall(rf"^{name}:\t(\d+)$", text, re.MULTILINE)
            )
            found.append(Program(program_name(descriptor), runs, ns))
    finally:
        for descriptor in held.values():
            os.close(descriptor)


def program_name(descriptor: int) -> str:
    """The name of a program."""
    info, size = ctypes.create_string_buffer(INFO_BYTES), ctypes.c_uint32(INFO_BYTES)
    assert _libbpf.bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size)) == 0
    return info.raw[NAME_OFFSET:].split(b"\0")[0].decode()
