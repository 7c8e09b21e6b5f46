"""Two ways of records out of the kernel: rings in mapped memory, and perf ring buffers.

Each has an object of its own, compiled from the same probes (probes/rings.h, probes/perf.h).
"""

import ctypes as c
import errno
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scope_ebpf.loaders.bindings import bpf
from scope_ebpf.loaders.libbpf import BpfObject
from scope_ebpf.loaders.perf_ring import PerfMemory, PerfRing, ring_bytes, sample_bytes
from scope_ebpf.loaders.ring import Records, SlotRing, array_in

PROBES = Path(__file__).resolve().parent.parent / "probes"
OBJECT = PROBES / "capture.bpf.o"
PERF_OBJECT = PROBES / "capture_perf.bpf.o"

# As in probes/perf.h: a CPU's stages, and how many records all of them hold.
STAGES, STAGED_HOT, STAGED_WIDE = 6, 16, 4 * 8 + 2 * 256

# include/uapi/linux/bpf.h
BPF_PROG_LOAD, BPF_PROG_TYPE_SOCKET_FILTER = 5, 1
# r0 = 0; *(u64 *)(r10 - 8) = r0; r1 = 1; r1 = atomic_fetch_add((u64 *)(r10 - 8), r1); exit
FETCH_AND_ADD = struct.pack(
    "<" + "BBhi" * 5,
    *(0xB7, 0x00, 0, 0),
    *(0x7B, 0x0A, -8, 0),
    *(0xB7, 0x01, 0, 1),
    *(0xDB, 0x1A, -8, 1),
    *(0x95, 0x00, 0, 0),
)
PROGRAM = struct.Struct("<2I2Q2IQ2I")

Rings = Sequence[SlotRing] | Sequence[PerfRing]


class Transport(ABC):
    """Hot and wide records of each CPU, from one opened object."""

    name: ClassVar[str]
    object_path: ClassVar[Path]
    programs: ClassVar[tuple[str, ...]] = ()  # that it needs itself

    def __init__(self, opened: BpfObject, cpus: int) -> None:
        """Nothing is prepared yet."""
        self._object = opened
        self._cpus = cpus

    @abstractmethod
    def prepare(
        self, hot: np.dtype[Any], hot_slots: int, wide: np.dtype[Any], wide_slots: int
    ) -> None:
        """Set sizes for records of these types, before the object is loaded."""

    @abstractmethod
    def open(self, states: Records) -> tuple[Rings, Rings]:
        """After loading: the hot and the wide rings by CPU; `states` are the CPUs' cpu_state.

        Raises:
            LoadError: with the kernel's reason.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up what is not the object's; may be called again."""


class MappedRings(Transport):
    """Rings in arrays that are mapped into this process."""

    name = "rings"
    object_path = OBJECT

    def prepare(
        self, hot: np.dtype[Any], hot_slots: int, wide: np.dtype[Any], wide_slots: int
    ) -> None:
        """See Transport."""
        self._kinds = (("hot", hot, hot_slots), ("wide", wide, wide_slots))
        self._object.set_constants(hot_slots=hot_slots, wide_slots=wide_slots)
        self._object.resize("hot", self._cpus * hot_slots)
        self._object.resize("wide", self._cpus * wide_slots, wide.itemsize)

    def open(self, states: Records) -> tuple[Rings, Rings]:
        """See Transport."""
        hot, wide = (self._rings(states, *kind) for kind in self._kinds)
        return hot, wide

    def close(self) -> None:
        """See Transport: nothing is."""

    def _rings(
        self, states: Records, name: str, dtype: np.dtype[Any], slots: int
    ) -> list[SlotRing]:
        count = self._cpus * slots
        memory = self._object.map_memory(name, count * dtype.itemsize)
        everything = array_in(memory, dtype, count)
        return [
            SlotRing(
                everything[cpu * slots : (cpu + 1) * slots],
                states[f"{name}_head"][cpu : cpu + 1],
                states[f"{name}_tail"][cpu : cpu + 1],
            )
            for cpu in range(self._cpus)
        ]


class PerfBuffers(Transport):
    """Perf ring buffers, two per CPU that is online."""

    name = "perf"
    object_path = PERF_OBJECT
    programs = ("on_free",)

    def __init__(self, opened: BpfObject, cpus: int) -> None:
        """Nothing is open yet."""
        super().__init__(opened, cpus)
        self._memories: list[PerfMemory] = []

    def prepare(
        self, hot: np.dtype[Any], hot_slots: int, wide: np.dtype[Any], wide_slots: int
    ) -> None:
        """See Transport: as much memory as the same number of slots in MappedRings."""
        self._kinds = tuple(
            (name, dtype, ring_bytes(slots * dtype.itemsize))
            for name, dtype, slots in (("hot", hot, hot_slots), ("wide", wide, wide_slots))
        )
        rooms = [size // sample_bytes(dtype.itemsize) for _, dtype, size in self._kinds]
        self._object.set_constants(
            hot_slots=rooms[0],
            wide_slots=rooms[1],
            wide_bytes=wide.itemsize,
            possible_cpus=self._cpus,
        )
        self._object.resize("hot", self._cpus)
        self._object.resize("wide", self._cpus)
        self._object.resize("stagings", self._cpus)
        self._object.resize("staged_hot", self._cpus * STAGES * STAGED_HOT)
        self._object.resize("staged_wide", self._cpus * STAGED_WIDE, wide.itemsize)

    def open(self, states: Records) -> tuple[Rings, Rings]:
        """See Transport."""
        hot, wide = (self._rings(states, *kind) for kind in self._kinds)
        return hot, wide

    def _rings(self, states: Records, name: str, dtype: np.dtype[Any], size: int) -> list[PerfRing]:
        rings = []
        for cpu in range(self._cpus):
            memory = PerfMemory(cpu, size)
            self._memories.append(memory)
            if memory.descriptor >= 0:
                self._object.update(name, cpu, memory.descriptor)
            rings.append(PerfRing(*memory.arrays(), dtype, states[f"{name}_tail"][cpu : cpu + 1]))
        return rings

    def close(self) -> None:
        """See Transport."""
        for memory in self._memories:
            memory.close()


def choose_transport(wanted: str) -> tuple[type[Transport], ...]:
    """The transports to try, one after the other, for `auto`, `rings` or `perf`."""
    if wanted == "rings":
        return (MappedRings,)
    if wanted == "perf" or not has_fetching_atomics():
        return (PerfBuffers,)
    return (MappedRings, PerfBuffers)


def has_fetching_atomics() -> bool:
    """Whether the kernel takes a program with an atomic fetch-and-add; tried by loading one.

    A kernel that refuses for want of permission counts as one that has it: loading the probes then says so.
    """
    code, licence = c.create_string_buffer(FETCH_AND_ADD), c.create_string_buffer(b"GPL")
    attributes = c.create_string_buffer(128)
    PROGRAM.pack_into(
        attributes, 0, BPF_PROG_TYPE_SOCKET_FILTER, len(FETCH_AND_ADD) // 8,
        c.addressof(code), c.addressof(licence), 0, 0, 0, 0, 0,
    )  # fmt: skip
    descriptor = bpf(BPF_PROG_LOAD, attributes)
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor != -errno.EINVAL
