"""Memory of a live process, read from outside.

It is read through /proc/PID/mem, which belongs to the address space that the process had when it was
opened: neither the program that a process executes later nor another process that gets its number can
be taken for it. The kernel asks for the privilege (that of ptrace) when the file is opened, so what is
open can be read after a recorder has given its privileges up. Nothing is stopped, nothing attached.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scope_ebpf.errors import TargetError
from scope_ebpf.loaders.targets import PROC

IOV_MAX: Final = 1024  # ranges that one process_vm_readv takes
U32: Final = struct.Struct("<I")
I32: Final = struct.Struct("<i")
U64: Final = struct.Struct("<Q")
I64: Final = struct.Struct("<q")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class ProcessGoneError(TargetError):
    """The process ended, or executed another program."""


class NotPermittedError(TargetError):
    """The process may not be looked into."""


class AddressError(TargetError):
    """Nothing is mapped at an address of the process."""


class ProcessMemory:
    """The memory of one process."""

    def __init__(self, tgid: int) -> None:
        """Open it.

        Raises:
            ProcessGoneError: there is no such process.
            NotPermittedError: this process may not look into it.
        """
        self.tgid: Final = tgid
        try:
            self._file = os.open(PROC / str(tgid) / "mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise failure(tgid, error) from error

    def __enter__(self) -> ProcessMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; a second time does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def read(self, address: int, size: int) -> bytes:
        """Bytes of the process.

        Raises:
            AddressError: not all of them are mapped.
            ProcessGoneError: the process ended, or executed another program.
        """
        try:
            data = os.pread(self._file, size, address) if 0 <= address < 1 << 63 else b""
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EFAULT):
                raise failure(self.tgid, error) from error
            raise self._not_mapped(address, size) from error
        if len(data) == size:
            return data
        # an address space that is no more reads as an empty file
        if not data and address < 1 << 47 and not (PROC / str(self.tgid)).exists():
            raise ProcessGoneError(f"process {self.tgid} is gone")
        raise self._not_mapped(address, size)

    def u64(self, address: int) -> int:
        """An unsigned number of 8 bytes, as a pointer is; raises as read() does."""
        return int(U64.unpack(self.read(address, 8))[0])

    def i64(self, address: int) -> int:
        """A signed number of 8 bytes; raises as read() does."""
        return int(I64.unpack(self.read(address, 8))[0])

    def u32(self, address: int) -> int:
        """An unsigned number of 4 bytes; raises as read() does."""
        return int(U32.unpack(self.read(address, 4))[0])

    def i32(self, address: int) -> int:
        """A signed number of 4 bytes; raises as read() does."""
        return int(I32.unpack(self.read(address, 4))[0])

    def u8(self, address: int) -> int:
        """A byte; raises as read() does."""
        return self.read(address, 1)[0]

    def string(self, address: int, limit: int = 256) -> bytes:
        """A string of C, cut off at a limit; raises as read() does."""
        # a string at the end of a mapping: nothing behind the page may be asked for
        here = min(limit, 4096 - address % 4096)
        data = self.read(address, here)
        if b"\0" not in data and here < limit:
            data += self.read(address + here, limit - here)
        return data.partition(b"\0")[0]

    def read_many(self, addresses: npt.ArrayLike, size: int) -> np.ndarray[Any, Any]:
        """As many bytes at each of many addresses, as rows of an array of u1; one call reads 1024.

        Unlike what read() reads, they are those of the process that has the number now, and the privilege
        is needed at each call. Rows that cannot be read are zeros.
        """
        places = np.asarray(addresses, "<u8")
        rows = np.zeros((len(places), size), "u1")
        ranges = np.empty((len(places), 2), "<u8")
        ranges[:, 0], ranges[:, 1] = places, size
        start = 0
        while start < len(places):
            part = ranges[start : start + IOV_MAX]
            local = np.array([rows.ctypes.data + start * size, len(part) * size], "<u8")
            length = _libc.process_vm_readv(
                ctypes.c_int(self.tgid),
                ctypes.c_void_p(local.ctypes.data),
                ctypes.c_ulong(1),
                ctypes.c_void_p(part.ctypes.data),
                ctypes.c_ulong(len(part)),
                ctypes.c_ulong(0),
            )
            if length < 0 and ctypes.get_errno() != errno.EFAULT:
                error = ctypes.get_errno()
                raise failure(self.tgid, OSError(error, os.strerror(error)))
            read = max(length, 0) // size
            # it stops at the first range that cannot be read
            start += len(part) if read == len(part) else read + 1
        return rows

    def _not_mapped(self, address: int, size: int) -> AddressError:
        return AddressError(f"process {self.tgid} has no {size} bytes at {address:#x}")


def failure(tgid: int, error: OSError) -> TargetError:
    """What it means that a file of a process in /proc cannot be opened."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermittedError(
            f"cannot look into process {tgid}: {error.strerror}; run as root or grant CAP_SYS_PTRACE"
        )
    return ProcessGoneError(f"process {tgid} is gone")


# ---- what is mapped ----


@dataclass(frozen=True)
class Mapping:
    """One line of a /proc/PID/maps.

    Attributes:
        start: its first address.
        end: the address behind it.
        flags: such as r-xp.
        offset: in the file.
        device: of the file system, as the kernel writes it; 00:00 if no file is mapped.
        inode: of the file, 0 if there is none.
        path: as seen from here for a process in our file system, from its root for one in a container;
            also [heap] and such. Empty: nothing is told.
    """

    start: int
    end: int
    flags: str
    offset: int
    device: str
    inode: int
    path: str

    @classmethod
    def of_line(cls, line: str) -> Mapping:
        """The fields of a line.

        >>> Mapping.of_line("7f00-8f00 r-xp 00001000 08:01 77                 /usr/lib/a b.so").path
        '/usr/lib/a b.so'
        """
        part = line.rstrip("\n").split(maxsplit=5)
        start, _, end = part[0].partition("-")
        path = part[5] if len(part) == 6 else ""
        return cls(
            int(start, 16), int(end, 16), part[1], int(part[2], 16), part[3], int(part[4]), path
        )

    def open_path(self, tgid: int) -> Path:
        """Where the very file that is mapped can be opened, deleted or in a container as it may be.

        A link in /proc/PID/map_files needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (before Linux 5.9 the
        latter). Without either it is the file's path below the process's root, or ours, if that has this
        inode.
        """
        link = PROC / str(tgid) / "map_files" / f"{self.start:x}-{self.end:x}"
        with contextlib.suppress(OSError):  # also ESRCH, of a process that has just ended
            if link.exists():  # its inode may be told in another way, as on overlayfs
                return link
        for path in (PROC / str(tgid) / "root" / self.path.lstrip("/"), Path(self.path)):
            with contextlib.suppress(OSError):
                if path.stat().st_ino == self.inode:
                    return path
        return link


def read_maps(tgid: int) -> str:
    """The text of /proc/PID/maps.

    Raises:
        ProcessGoneError: there is no such process.
        NotPermittedError: this process may not read it.
    """
    try:
        return (PROC / str(tgid) / "maps").read_text(errors="surrogateescape")
    except OSError as error:
        raise failure(tgid, error) from error


def mappings(tgid: int) -> list[Mapping]:
    """What a process has mapped, by address; raises as read_maps() does."""
    return [Mapping.of_line(line) for line in read_maps(tgid).splitlines()]
