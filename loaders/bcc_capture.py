"""The capture's probes under BCC: the same interface as libbpf.BpfObject has, as far as the capture uses it.

For kernels that come without type information (BTF) but with headers. The programs are those of libbpf,
compiled at run time (bcc_source.py); what libbpf does by iterators comes from /proc (bcc_life.py).
"""

import ctypes as c
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scope_ebpf import records
from scope_ebpf.errors import LoadError, UsageError
from scope_ebpf.families import BCC_FAMILIES as FAMILIES
from scope_ebpf.loaders import bcc
from scope_ebpf.loaders.bcc_life import Life
from scope_ebpf.loaders.bcc_source import BccSource, joined, translate
from scope_ebpf.loaders.kernel import kernel_version
from scope_ebpf.loaders.libbpf import Uprobe
from scope_ebpf.loaders.ring import array_in

SOURCE = "bcc/capture.h"
# From this version on sched_switch tells the state of who leaves (commit fa2c3254d7cf).
SWITCH_TELLS_STATE = (5, 18)
GLOBALS_MAP = "scope_global"
# Programs that others call, by the map that leads to them.
STAGES = {"on_message": "stages"}
ITERATORS = ("on_mark_tasks", "on_list_files", "on_list_open")
# What the capture attaches and BCC lacks: iterators, and what forgets the addresses of tasks.
NOT_THERE = (*ITERATORS, "on_free")
# Globals of probes that are not there: user space may write them all the same.
UNUSED_GLOBALS = ("tls_wanted", "hits_wanted", "calls_wanted")


def check_options(families: Sequence[str], *, probes: bool, calls: bool) -> None:
    """Refuse what BCC cannot have.

    Raises:
        UsageError: naming it.
    """
    missing = [family for family in families if family not in FAMILIES]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"{', '.join(missing)} {verb} not recorded with --loader bcc, which has"
            f" {', '.join(FAMILIES)}; choose among these with --families"
        )
    if probes or calls:
        raise UsageError(
            f"{'--probe' if probes else '--calls'} needs --loader libbpf; with bcc, write a program for"
            " --bcc-probe"
        )


class BccObject:
    """The capture's programs, compiled by BCC; a context manager."""

    path = Path("BCC's capture")

    def __init__(self, *, perf: bool = False) -> None:
        """Nothing is compiled yet.

        Args:
            perf: records go through perf ring buffers, not through mapped rings.

        Raises:
            LoadError: BCC or the kernel's headers are not there, or it cannot work on this kernel.
        """
        bcc.check_kernel(os.uname().release)
        bcc.load_bcc()
        bcc.check_headers()
        self._perf = perf
        self._selected: set[str] = set()
        self._constants: dict[str, int] = {}
        self._message_classes = b""
        self._sizes: dict[str, int] = {}
        self._value_bytes: dict[str, int] = {}
        self._source = BccSource("")
        self._bpf: Any = None
        self._links: dict[str, int] = {}
        self._numbers: dict[str, dict[int, int]] = {"targets": {}, "cgroups": {}}
        self._life: Life | None = None

    def __enter__(self) -> "BccObject":
        """The object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach and unload everything."""
        self.close()

    def close(self) -> None:
        """Detach and unload everything; may be called again."""
        self.detach(*self._links)
        self._life = None
        if self._bpf is not None:
            bcc.clean_up(self._bpf)
            self._bpf = None

    def select(self, names: set[str]) -> None:
        """Load only these programs."""
        self._selected = names

    def expect_uprobes(self, *names: str) -> None:
        """There are none."""

    def set_constants(self, **values: bool | int | bytes) -> None:
        """Set what is constant in the programs, before load()."""
        values["switch_tells_state"] = kernel_version() >= SWITCH_TELLS_STATE
        for name, value in values.items():
            if isinstance(value, bytes):
                self._message_classes = value
            else:
                self._constants[name] = int(value)

    def resize(self, name: str, entries: int, value_bytes: int | None = None) -> None:
        """Set a map's element count and value size, before load()."""
        self._sizes[name] = entries
        if value_bytes is not None:
            self._value_bytes[name] = value_bytes

    def _translated(self) -> BccSource:
        """The programs' source."""
        defined = {"SCOPE_BCC": True, "PERF_TRANSPORT": self._perf, "OLD_KERNELS": False}
        text = joined(SOURCE, defined)
        return translate(text, self._constants, self._sizes, self._value_bytes, perf=self._perf)

    def load(self) -> None:
        """Compile, create the maps and load the selected programs.

        Raises:
            LoadError: with the compiler's or the kernel's reason.
        """
        self._source = self._translated()
        try:
            self._bpf = bcc.compile_program(self._source.text, "the probes", ["-DSCOPE_BCC"])
        except UsageError as error:  # it is our source
            wrong = LoadError(f"{error}")
            wrong.said = error.said
            raise wrong from error
        for name in self._source.programs:
            if name in self._selected:
                self._load_program(name)
        if self._constants["record_messages"]:
            for name, table in STAGES.items():
                self._set(table, c.c_int(0), c.c_int(self._load_stage(name).fd))
        for number, value in enumerate(self._message_classes):
            # io_uring is met for the sake of programs that BCC does not have
            if value not in (0, records.MessageClass.MESSAGE_RING):
                self._set("message_class_table", c.c_uint32(number), c.c_uint8(value))
        cpus = self._sizes["cpus"]
        states = array_in(
            self.map_memory("cpus", cpus * records.CPU_STATE.itemsize), records.CPU_STATE, cpus
        )
        self._life = Life(self._bpf["tasks"], self._constants, self._numbers, states)

    def _load_stage(self, name: str) -> Any:
        """A program of messages: BCC puts all its functions into one, which older verifiers give up on."""
        try:
            return self._load_program(name)
        except LoadError as error:
            wrong = LoadError(
                f"cannot record messages with BCC on Linux {os.uname().release}: its verifier does not get"
                " through the program; choose --families processes,syscalls,offcpu"
            )
            wrong.said = error.said
            raise wrong from error

    def _load_program(self, name: str) -> Any:
        return bcc.load_function(self._bpf, name, "the probes")

    def _set(self, table: str, key: Any, value: Any) -> None:
        if error := bcc.update_element(self.map_fd(table), key, value):
            raise LoadError(f"cannot update the map {table}: {os.strerror(-error)}")

    def variables(self, section: str) -> Mapping[str, tuple[int, int]]:
        """Offset and size in bytes of each global."""
        known = dict(self._source.globals)
        for name in UNUSED_GLOBALS:
            known[name] = (8 * len(known), 4)
        return known

    def map_fd(self, name: str) -> int:
        """The descriptor of a map."""
        return int(self._bpf[name].get_fd())

    def map_memory(self, name: str, length: int, *, writable: bool = False) -> mmap.mmap:
        """Map an array's elements into this process."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        name = GLOBALS_MAP if name == ".bss" else name
        try:
            return mmap.mmap(self.map_fd(name), length, mmap.MAP_SHARED, protection)
        except OSError as error:
            raise LoadError(f"cannot map {name} into memory: {error.strerror}") from error

    def attach(self, *names: str) -> None:
        """Attach programs to their tracepoints; there are no iterators.

        Raises:
            LoadError: with the kernel's reason.
        """
        for name in names:
            if name in NOT_THERE:
                continue
            loaded = self._load_program(name)
            link = bcc.attach_raw_tracepoint(loaded.fd, self._source.programs[name])
            if link < 0:
                raise LoadError(f"cannot attach {name}: {os.strerror(-link)}")
            self._links[name] = link

    def detach(self, *names: str) -> None:
        """Detach programs."""
        for name in names:
            if name in self._links:
                os.close(self._links.pop(name))

    def iterate(self, name: str) -> bytes:
        """What the iterator of that name would write."""
        assert self._life is not None
        if name == "on_mark_tasks":
            return self._life.mark()
        if name == "on_list_open":
            return self._life.still_open()
        return b""  # which files are open is told by their first use

    def update(self, name: str, key: int, value: int, *, key_bytes: int = 4) -> None:
        """Set an element of a map with a number as key and a 32-bit value."""
        self._numbers.setdefault(name, {})[key] = value
        kind = c.c_uint32 if key_bytes == 4 else c.c_uint64
        self._set(name, kind(key), c.c_uint32(value))

    def attach_uprobes(
        self, name: str, path: Path, places: Sequence[Uprobe], *, at_return: bool
    ) -> None:
        """Not offered.

        Raises:
            LoadError: always.
        """
        raise LoadError(f"cannot attach {name} to {path}: --loader bcc has no uprobes of our own")
