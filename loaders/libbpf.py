"""BPF objects under libbpf: their globals, maps, programs, links and iterators."""

import ctypes as c
import errno
import functools
import mmap
import os
import resource
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from scope_ebpf.errors import LoadError
from scope_ebpf.loaders.bindings import bpf, library
from scope_ebpf.loaders.btf import Btf
from scope_ebpf.loaders.elf import ElfObject
from scope_ebpf.loaders.kernel import (
    counts_as_locked,
    has_multi_uprobes,
    perf_event_paranoid,
    possible_cpus,
)
from scope_ebpf.loaders.perf import open_cpu_clock

NO_FUNCTION = b"scope_ebpf has no such function"
CLOSING_THREADS = 16
# Of a map, to look at: more than any of ours has.
MOST_ELEMENTS = 1 << 18
# include/uapi/linux/bpf.h
BPF_LINK_CREATE, BPF_TRACE_UPROBE_MULTI = 28, 48
# struct bpf_prog_info up to recursion_misses, which is the last of these bytes
RECURSION_MISSES = 208
PROGRAM_INFO_BYTES = RECURSION_MISSES + 8
MULTI_UPROBE = struct.Struct("<4I4Q3I")
CAUSES = {
    errno.EPERM: "permission denied; run as root, or grant CAP_BPF and CAP_PERFMON",
    errno.EACCES: "the kernel's verifier refused it",
    errno.ENOENT: "this kernel does not have what it attaches to",
    errno.ESRCH: "this kernel does not have what it attaches to",
    errno.EOPNOTSUPP: "this kernel does not offer that kind of probe",
    524: "the kernel takes no probe at that instruction",  # ENOTSUPP, which is no errno of user space
    errno.ENOMEM: "there is not enough memory, or RLIMIT_MEMLOCK is too low (kernels before 5.11)",
    errno.E2BIG: "the program or map is larger than this kernel allows",
}


class Uprobe(NamedTuple):
    """A place in a file for a uprobe.

    Attributes:
        offset: in the file.
        cookie: what bpf_get_attach_cookie() tells the program there.
        semaphore: offset in the file of a counter that the kernel counts up while the uprobe is there, or 0.
    """

    offset: int
    cookie: int = 0
    semaphore: int = 0


class NotAllowedError(LoadError):
    """The kernel refuses for want of a capability."""


class PerfEventsRefusedError(LoadError):
    """The kernel opens no perf events for who has CAP_PERFMON only (Debian's and Ubuntu's patches)."""


def perf_events_refused(action: str) -> PerfEventsRefusedError:
    """What to say when the kernel opens no perf event for it."""
    return PerfEventsRefusedError(
        f"cannot {action}: kernel.perf_event_paranoid is {perf_event_paranoid()}, with which kernels of some"
        " distributions ask for CAP_SYS_ADMIN; run as root, or `sysctl kernel.perf_event_paranoid=2`"
    )


class _UprobeOptions(c.Structure):
    """struct bpf_uprobe_opts."""

    _fields_ = (
        ("size", c.c_size_t),
        ("semaphore", c.c_size_t),
        ("cookie", c.c_uint64),
        ("at_return", c.c_bool),
        ("function", c.c_char_p),
    )


def explain(number: int, log: list[str]) -> str:
    """A clause that says why libbpf failed: the error's cause and the telling line of its log."""
    cause = CAUSES.get(number, os.strerror(number))
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if number == errno.EPERM and limit != resource.RLIM_INFINITY and counts_as_locked():
        cause += (
            f"; or raise the limit of locked memory (ulimit -l), which is {limit >> 10} KiB: before Linux"
            " 5.11 BPF counts against it"
        )
    noise = ("processed ", "-- ", "verification time", "stack depth", "libbpf: -- ")
    lines = [
        line.strip().removeprefix("libbpf: ")
        for line in log
        if line.strip() and "CO-RE" not in line
    ]
    telling = [
        line
        for line in lines
        if not line.startswith(noise)
        and not line.endswith("failed to load object")
        and "failed to load: " not in line
        and "BPF program load failed" not in line
        and "failed to load object" not in line
        and "failed to perform CO-RE" not in line
    ]
    if not telling or number == errno.EPERM:
        return cause
    return f"{cause} ({telling[-1]}; {len(lines) - 1} more log lines)"


class BpfObject:
    """One BPF object file: opened, then loaded, then its programs attached.

    A context manager: at the end every link is destroyed and the object closed, so that nothing stays
    in the kernel. The kernel does the same if the process dies.
    """

    def __init__(self, path: Path) -> None:
        """Open the object.

        Raises:
            LoadError: there is no such object, or libbpf cannot read it.
        """
        self.path = path
        self._elf, self.btf = _read(path)
        self._lib = library()
        self._lib.log.clear()
        self._object = self._lib.open_file(os.fsencode(path), None)
        if not self._object:
            raise self._failure(c.get_errno(), f"open {path.name}")
        self._links: dict[str, int] = {}
        self._descriptors: list[int] = []  # of links that are not libbpf's

    def __enter__(self) -> "BpfObject":
        """The object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach and unload everything."""
        self.close()

    def close(self) -> None:
        """Detach and unload everything; may be called again."""
        ends = [
            *(functools.partial(self._lib.link_destroy, link) for link in self._links.values()),
            *(functools.partial(os.close, descriptor) for descriptor in self._descriptors),
        ]
        self._links.clear()
        self._descriptors.clear()
        # the kernel waits for each uprobe until no CPU is inside of it, a tenth of a second: for all at once
        if ends:
            with ThreadPoolExecutor(min(len(ends), CLOSING_THREADS)) as pool:
                list(pool.map(lambda end: end(), ends))
        if self._object:
            self._lib.close(self._object)
            self._object = None

    def program_names(self) -> list[str]:
        """The names of all programs."""
        names: list[str] = []
        program = self._lib.next_program(self._object, None)
        while program:
            names.append(self._lib.program_name(program).decode())
            program = self._lib.next_program(self._object, program)
        return names

    def select(self, names: set[str]) -> None:
        """Load only these programs."""
        for name in self.program_names():
            self._lib.set_autoload(self._program(name), name in names)

    def set_constants(self, **values: bool | int | bytes) -> None:
        """Set `const volatile` globals, before load()."""
        variables = self.variables(".rodata")
        size = c.c_size_t()
        base = self._lib.initial_value(self._map(".rodata"), c.byref(size))
        for name, value in values.items():
            offset, width = variables[name]
            data = value if isinstance(value, bytes) else int(value).to_bytes(width, "little")
            if len(data) != width or offset + width > size.value:
                raise LoadError(f"cannot set {name} in {self.path.name}: it has {width} bytes")
            c.memmove(base + offset, data, width)

    def variables(self, section: str) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of each global in a section such as .bss."""
        return self._elf.variables(section)

    def resize(self, name: str, entries: int, value_bytes: int | None = None) -> None:
        """Set a map's element count and value size, before load()."""
        handle = self._map(name)
        self._check(self._lib.set_max_entries(handle, entries), f"resize the map {name}")
        if value_bytes is not None:
            self._check(self._lib.set_value_size(handle, value_bytes), f"resize the map {name}")

    def load(self) -> None:
        """Create the maps and load the selected programs.

        Raises:
            LoadError: with the kernel's reason.
        """
        self._pass_over_modules()
        self._lib.log.clear()
        self._check(self._lib.load(self._object), f"load {self.path.name}")

    def share_maps(self, loaded: "BpfObject", *apart: str) -> None:
        """Take the maps of another object of the same file that is loaded, before load().

        Args:
            loaded: the other object.
            apart: maps that this object makes for itself.

        Raises:
            LoadError: with the kernel's reason.
        """
        mine, theirs = None, None
        while mine := self._lib.next_map(self._object, mine):
            theirs = self._lib.next_map(loaded._object, theirs)
            name = self._lib.map_name(mine).decode()
            if name not in apart:
                result = self._lib.reuse_map(mine, self._lib.map_fd(theirs))
                self._check(result, f"share the map {name}")

    def _pass_over_modules(self) -> None:
        """Have libbpf look for types in the kernel itself only, if those of modules may not be read.

        Only CAP_SYS_ADMIN may list them. libbpf wants to for whatever the kernel itself lacks, such as a
        struct or function of newer kernels that the programs can do without, and before libbpf 1.3 (commit
        3f33f9a6b8f7) the whole object is refused if it may not. It tries once per object: here, where a
        failure means nothing.
        """
        if self._lib.next_btf(0, c.byref(c.c_uint32())) == -errno.EPERM:
            any_program = self._lib.next_program(self._object, None)
            self._lib.set_attach_target(any_program, 0, NO_FUNCTION)

    def attach(self, *names: str) -> None:
        """Attach programs where their sections say.

        Raises:
            LoadError: with the kernel's reason.
        """
        for name in names:
            self._lib.log.clear()
            link = self._lib.attach(self._program(name))
            if not link:
                self._check(-c.get_errno(), f"attach {name}")
            self._links[name] = link

    def expect_uprobes(self, *names: str) -> None:
        """Say which programs are for attach_uprobe(), before load()."""
        if has_multi_uprobes():
            for name in names:
                self._lib.expect_attach_type(self._program(name), BPF_TRACE_UPROBE_MULTI)

    def attach_uprobe(self, name: str, path: Path, offset: int, *, at_return: bool) -> None:
        """Attach a program to a function of a file, in every process that has it mapped; until close().

        Raises:
            LoadError: with the kernel's reason.
        """
        self.attach_uprobes(name, path, [Uprobe(offset)], at_return=at_return)

    def attach_uprobes(
        self, name: str, path: Path, places: Sequence[Uprobe], *, at_return: bool
    ) -> None:
        """Attach a program to places of a file, in every process that has it mapped; until close().

        Raises:
            LoadError: with the kernel's reason.
        """
        self._lib.log.clear()
        program, action = self._program(name), f"attach {name} to {path}"
        if has_multi_uprobes():
            descriptor = _multi_uprobe(self._lib.program_fd(program), path, places, at_return)
            self._check(descriptor, action)
            self._descriptors.append(descriptor)
            return
        every_process = -1
        for place in places:
            options = _UprobeOptions(
                c.sizeof(_UprobeOptions), place.semaphore, place.cookie, at_return, None
            )
            link = self._lib.attach_uprobe(
                program, every_process, os.fsencode(path), place.offset, c.byref(options)
            )
            if not link:
                if c.get_errno() == errno.EACCES:
                    raise perf_events_refused(action)
                self._check(-c.get_errno(), action)
            self._links[f"{name} {path} {place.offset} {place.cookie} {at_return}"] = link

    def attach_kprobe(self, name: str, function: str, *, at_return: bool) -> None:
        """Attach a program to a function of the kernel, besides where it is attached already.

        Raises:
            LoadError: with the kernel's reason.
        """
        self._lib.log.clear()
        link = self._lib.attach_kprobe(self._program(name), at_return, function.encode())
        if not link:
            self._check(-c.get_errno(), f"attach {name} to {function}")
        self._links[f"{name} {function}"] = link

    def attach_clock(self, name: str, frequency_hz: int) -> None:
        """Run a program so many times a second of CPU time on each CPU that is online; until close().

        Raises:
            LoadError: with the kernel's reason.
        """
        for cpu in range(possible_cpus()):
            descriptor = open_cpu_clock(cpu, frequency_hz)
            if descriptor == -errno.ENODEV:  # it is not online
                continue
            self._lib.log.clear()
            if descriptor == -errno.EACCES:
                raise perf_events_refused("open a sampling clock")
            self._check(descriptor, f"open a sampling clock on CPU {cpu}")
            self.attach_descriptor(name, descriptor)

    def attach_descriptor(self, name: str, descriptor: int) -> None:
        """Run a program at each event of a perf event, which is closed with the link or at a failure.

        Raises:
            LoadError: with the kernel's reason.
        """
        self._lib.log.clear()
        link = self._lib.attach_perf_event(self._program(name), descriptor)
        if not link:
            number = c.get_errno()
            os.close(descriptor)
            self._check(-number, f"attach {name}")
        self._links[f"{name} {descriptor}"] = link

    def detach(self, *names: str) -> None:
        """Detach programs."""
        for name in names:
            link = self._links.pop(name, None)
            if link:
                self._lib.link_destroy(link)

    def detach_all(self, names: Iterable[str]) -> None:
        """Detach programs wherever they are attached."""
        chosen = set(names)
        self.detach(*[link for link in self._links if link.split(" ")[0] in chosen])

    def iterate(self, name: str) -> bytes:
        """Run an attached iterator once and return all that it wrote."""
        descriptor = self._lib.iterate(self._lib.link_fd(self._links[name]))
        if descriptor < 0:
            self._check(descriptor, f"run {name}")
        with open(descriptor, "rb", buffering=0) as stream:
            return b"".join(iter(lambda: stream.read(1 << 16), b""))

    def misses(self, name: str) -> int:
        """How often the kernel left a program out, since it ran on that CPU already; 0: it tells not."""
        data, length = c.create_string_buffer(PROGRAM_INFO_BYTES), c.c_uint32(PROGRAM_INFO_BYTES)
        descriptor = self._lib.program_fd(self._program(name))
        if self._lib.object_info(descriptor, data, c.byref(length)) or length.value < len(data):
            return 0
        return int.from_bytes(data.raw[RECURSION_MISSES : RECURSION_MISSES + 8], "little")

    def map_fd(self, name: str) -> int:
        """The descriptor of a map."""
        return int(self._lib.map_fd(self._map(name)))

    def update(self, name: str, key: int, value: int, *, key_bytes: int = 4) -> None:
        """Set an element of a map with a number as key and a 32-bit value."""
        key_data = c.create_string_buffer(key.to_bytes(key_bytes, "little"), key_bytes)
        result = self._lib.map_update(self.map_fd(name), key_data, c.byref(c.c_uint32(value)), 0)
        self._check(result, f"update the map {name}")

    def update_all(self, name: str, elements: Sequence[bytes], first: int = 0) -> None:
        """Set elements of an array one after the other."""
        for key, element in enumerate(elements, first):
            result = self._lib.map_update(self.map_fd(name), c.byref(c.c_uint32(key)), element, 0)
            self._check(result, f"update the map {name}")

    def update_element(self, name: str, key: bytes, value: bytes) -> None:
        """Set an element of a map."""
        result = self._lib.map_update(self.map_fd(name), key, value, 0)
        self._check(result, f"update the map {name}")

    def elements(self, name: str, key_bytes: int, value_bytes: int) -> list[bytes]:
        """The values in a hash map.

        While somebody deletes elements, others may come more than once, since a key that is gone leads
        back to the first one; that ends after a while.
        """
        descriptor = self.map_fd(name)
        found: list[bytes] = []
        key, value = None, c.create_string_buffer(value_bytes)
        for _ in range(MOST_ELEMENTS):
            following = c.create_string_buffer(key_bytes)
            if self._lib.map_next_key(descriptor, key, following):
                return found
            if not self._lib.map_lookup(descriptor, following, value):
                found.append(value.raw)
            key = following
        return found

    def map_memory(self, name: str, length: int, *, writable: bool = False) -> mmap.mmap:
        """Map a BPF_F_MMAPABLE array's elements into this process."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        length = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            return mmap.mmap(self.map_fd(name), length, mmap.MAP_SHARED, protection)
        except OSError as error:
            raise LoadError(f"cannot map {name} into memory: {error.strerror}") from error

    def _program(self, name: str) -> int:
        program = self._lib.find_program(self._object, name.encode())
        if not program:
            raise LoadError(f"{self.path.name} has no program {name}: build the probes anew")
        return int(program)

    def _map(self, name: str) -> int:
        handle = self._lib.find_map(self._object, name.encode())
        if not handle:
            raise LoadError(f"{self.path.name} has no map {name}: build the probes anew")
        return int(handle)

    def _check(self, result: int, action: str) -> None:
        if result < 0:
            raise self._failure(-result, action)

    def _failure(self, number: int, action: str) -> LoadError:
        kind = NotAllowedError if number == errno.EPERM else LoadError
        return kind(f"cannot {action}: {explain(number, self._lib.log)}")


def _read(path: Path) -> tuple[ElfObject, Btf]:
    """An object file and its types; those that open it again, as the doctor does, read it once."""
    try:
        status = path.stat()
    except OSError:
        return _read_version(path, 0, 0)  # which says why it cannot
    return _read_version(path, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=2)
def _read_version(path: Path, _changed_ns: int, _inode: int) -> tuple[ElfObject, Btf]:
    elf = ElfObject(path)
    return elf, Btf.from_bytes(elf.section(".BTF"), str(path))


def _multi_uprobe(program_fd: int, path: Path, places: Sequence[Uprobe], at_return: bool) -> int:
    """bpf(BPF_LINK_CREATE), which libbpf 1.1 does not know for this: a descriptor, or -errno."""
    name, count = c.create_string_buffer(os.fsencode(path)), len(places)
    offsets = (c.c_uint64 * count)(*(place.offset for place in places))
    cookies = (c.c_uint64 * count)(*(place.cookie for place in places))
    semaphores = (c.c_uint64 * count)(*(place.semaphore for place in places))
    attributes = c.create_string_buffer(64)
    # program, target, type, flags; path, offsets, reference counters, cookies; count, flags, pid
    MULTI_UPROBE.pack_into(
        attributes, 0, program_fd, 0, BPF_TRACE_UPROBE_MULTI, 0,
        c.addressof(name), c.addressof(offsets), c.addressof(semaphores), c.addressof(cookies),
        count, int(at_return), 0,
    )  # fmt: skip
    return bpf(BPF_LINK_CREATE, attributes)
