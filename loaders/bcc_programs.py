"""Programs that users write for BCC: compiled, attached beside the capture, drained into their own tables.

What a program may do and how its tables come about: docs/probes.md.
"""

import ctypes as c
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.errors import LoadError, UsageError
from scope_ebpf.loaders import bcc, bcc_rings
from scope_ebpf.loaders.bcc_fields import OwnTable, check_layout, own_table, plain_code
from scope_ebpf.loaders.hits import no_such_file
from scope_ebpf.loaders.kernel import possible_cpus
from scope_ebpf.loaders.probed_files import ProbedFile
from scope_ebpf.loaders.usdt import read_sites

HEADER = Path(__file__).resolve().parent.parent / "probes" / "bcc" / "program.h"
LIFE = {
    "scope_on_fork": "sched_process_fork",
    "scope_on_exec": "sched_process_exec",
    "scope_on_exit": "sched_process_exit",
}
NOW, AFTER_EXEC = 1, 2  # values of scope_processes

_OUTPUT = re.compile(r"\bBPF_(PERF_OUTPUT|RINGBUF_OUTPUT)\s*\(\s*(\w+)\s*(?:,\s*([^)]*))?\)")
_PLACE = re.compile(r"\bSCOPE_(USDT|UPROBE|URETPROBE)\s*\(([^)]*)\)")
_PLACE_ARGUMENTS = {"USDT": 4, "UPROBE": 3, "URETPROBE": 3}


@dataclass(frozen=True)
class Targets:
    """Who is recorded, as a program asks it.

    Attributes:
        everything: the whole host but this process.
        children: those of recorded processes are recorded, too.
    """

    everything: bool = False
    children: bool = True


@dataclass(frozen=True)
class Place:
    """Where a function of a program goes: what one of the SCOPE_ macros says."""

    kind: str  # USDT, UPROBE or URETPROBE
    file: str
    name: str  # PROVIDER:NAME of a USDT probe, else a symbol
    function: str


@dataclass(frozen=True)
class Source:
    """A program's source, and what is found in it before it is compiled.

    Attributes:
        path: its file.
        code: without comments.
        outputs: name of each output map, and whether it is a perf buffer.
        places: where its functions go beside what BCC's names say.
    """

    path: Path
    text: str
    code: str
    outputs: tuple[tuple[str, bool], ...]
    places: tuple[Place, ...]


def read_source(path: Path) -> Source:
    """Read a program.

    Raises:
        UsageError: there is no such file, or it has nothing to record.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot read the BCC program {path}: {error.strerror}; give the path of a C file"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no text; give the path of a C file") from error
    code = plain_code(text)
    outputs = tuple((match[2], match[1] == "PERF_OUTPUT") for match in _OUTPUT.finditer(code))
    if not outputs:
        raise UsageError(
            f"{path.name} has no BPF_PERF_OUTPUT or BPF_RINGBUF_OUTPUT, so it would record nothing; declare"
            " one, and submit a struct to it"
        )
    check_layout(path.name, code)
    return Source(path, text, code, outputs, tuple(find_places(path.name, code)))


def find_places(source: str, code: str) -> list[Place]:
    """What the SCOPE_ macros of a program ask for.

    Raises:
        UsageError: one cannot be understood.

    >>> find_places("p.c", 'SCOPE_UPROBE("/lib/libz.so", "inflate", on_inflate)')
    [Place(kind='UPROBE', file='/lib/libz.so', name='inflate', function='on_inflate')]
    """
    found = []
    for match in _PLACE.finditer(code):
        parts = [part.strip() for part in match[2].split(",")]
        texts = [part[1:-1] for part in parts[:-1] if re.fullmatch(r'"[^"\\]+"', part)]
        if len(parts) != _PLACE_ARGUMENTS[match[1]] or len(texts) != len(parts) - 1:
            raise UsageError(
                f'{source}: cannot understand {match[0]}; write SCOPE_USDT("FILE", "PROVIDER", "NAME",'
                ' FUNCTION) or SCOPE_UPROBE("FILE", "SYMBOL", FUNCTION)'
            )
        found.append(Place(match[1], texts[0], ":".join(texts[1:]), parts[-1]))
    return found


def table_names(sources: Sequence[Source], taken: Iterable[str]) -> dict[tuple[Path, str], str]:
    """The table of each output: the file's name without its end, _, and the map's name.

    Raises:
        UsageError: two would have the same name, or that of a table that every recording has.
    """
    names: dict[tuple[Path, str], str] = {}
    for source in sources:
        stem = re.sub(r"\W+", "_", source.path.name.split(".")[0].lower()).strip("_") or "program"
        for output, _ in source.outputs:
            name = f"{stem}_{output.lower()}"
            if name in names.values() or name in taken:
                raise UsageError(
                    f"{source.path}: its table {name} would have the name of another one; rename the file"
                    " or the map"
                )
            names[source.path, output] = name
    return names


@dataclass
class _Output:
    """An output of a program at work."""

    table: OwnTable
    rings: Sequence[bcc_rings.PerfRing | bcc_rings.KernelRing]
    lost: NDArray[np.uint64]  # by CPU, in shared memory
    lost_before: NDArray[np.uint64]  # when the recording began
    misfits: int = 0


class Program:
    """One compiled and attached program."""

    def __init__(
        self, source: Source, names: dict[tuple[Path, str], str], targets: Targets
    ) -> None:
        """Compile, load and attach it; what it submits is thrown away until start().

        Raises:
            UsageError: its source is not right.
            LoadError: BCC or the kernel refuse it.
        """
        self.source = source
        self._cpus = possible_cpus()
        self.follows = re.search(r"\bscope_is_recorded\s*\(", source.code) is not None
        self._everything = targets.everything
        self.outputs: list[_Output] = []
        self._life: list[int] = []  # descriptors of the programs that follow processes
        module = bcc.load_bcc()
        defines = {
            "SCOPE_CPUS": self._cpus,
            "SCOPE_OUTPUTS": 64,
            "SCOPE_EVERYTHING": int(targets.everything),
            "SCOPE_CHILDREN": int(targets.children),
            "SCOPE_RECORDER": os.getpid(),
            **({"SCOPE_FOLLOWS": 1} if self.follows else {}),
        }
        text = HEADER.read_text() + f'#line 1 "{source.path.name}"\n' + source.text
        self._bpf: Any = bcc.compile_program(
            text,
            source.path.name,
            [f"-D{name}={value}" for name, value in defines.items()],
            self._usdt(module),
        )
        try:
            self._lib: Any = module.lib
            self._attach()
            self._open_outputs(names)
        except BaseException:
            self.close()
            raise

    def _usdt(self, module: ModuleType) -> list[Any]:
        """BCC's contexts of the USDT probes that the source names; it attaches them itself."""
        contexts: dict[str, Any] = {}
        for place in self.source.places:
            if place.kind != "USDT":
                continue
            self._check_usdt(place)
            with bcc.captured_errors():
                try:
                    if place.file not in contexts:
                        contexts[place.file] = module.USDT(path=place.file)
                    contexts[place.file].enable_probe(place.name, place.function)
                except (Exception, SystemExit) as error:
                    raise LoadError(
                        f"cannot use {self.source.path.name}: BCC takes no {place.name} of {place.file};"
                        f" try --probe usdt:{place.file}:{place.name}"
                    ) from error
        return list(contexts.values())

    def _check_usdt(self, place: Place) -> None:
        name, file = self.source.path.name, Path(place.file)
        if not file.is_file():
            raise UsageError(f"{name}: {no_such_file(file)}")
        sites = [
            site
            for site in read_sites(ProbedFile(file))
            if f"{site.provider}:{site.name}" == place.name
        ]
        if not sites:
            raise UsageError(
                f"{name}: {file} has no USDT probe {place.name}; `scope-ebpf probes {file}` lists those that"
                " it has"
            )
        if any(site.semaphore for site in sites):
            raise UsageError(
                f"{name}: {place.name} has a semaphore, which BCC would write into the memory of processes;"
                f" record it with --probe usdt:{file}:{place.name} instead"
            )

    def _attach(self) -> None:
        name = self.source.path.name
        for place in self.source.places:
            if place.kind == "USDT":
                continue
            attach = (
                self._bpf.attach_uprobe if place.kind == "UPROBE" else self._bpf.attach_uretprobe
            )
            with bcc.captured_errors() as said:
                try:
                    attach(name=place.file, sym=place.name, fn_name=place.function)
                    continue
                except (Exception, SystemExit) as error:
                    problem = error
            raise bcc.explain(name, str(problem), said()) from problem
        if not self.follows:
            return
        for function, tracepoint in LIFE.items():
            loaded = bcc.load_function(self._bpf, function, name)
            link = bcc.attach_raw_tracepoint(loaded.fd, tracepoint)
            if link < 0:
                raise LoadError(
                    f"cannot follow processes for {name}: {os.strerror(-link)}; leave"
                    " scope_is_recorded() away, or use a kernel since 4.17"
                )
            self._life.append(link)

    def _open_outputs(self, names: dict[tuple[Path, str], str]) -> None:
        lib, module = self._lib, self._bpf.module
        name_of = lib[
            "bpf_table_name"
        ]  # a function of our own: BCC's Python does not say what it returns
        name_of.argtypes, name_of.restype = [c.c_void_p, c.c_size_t], c.c_char_p
        numbers = {
            name_of(module, number).decode(): number for number in range(lib.bpf_num_tables(module))
        }
        maps = {name: lib.bpf_table_fd_id(module, number) for name, number in numbers.items()}
        # BCC makes the maps in the order of the numbers that it gave them, from the lowest, -n, to -1
        order = sorted(maps, key=lambda name: -maps[name])
        if order[:1] != ["scope_lost"]:
            raise LoadError(
                "cannot use this BCC: it numbers maps otherwise than version 0.26; report it as a bug"
            )
        lost = np.frombuffer(
            mmap.mmap(maps["scope_lost"], -(-64 * self._cpus * 8 // mmap.PAGESIZE) * mmap.PAGESIZE),
            np.uint64,
            64 * self._cpus,
        ).reshape(64, self._cpus)
        for output, is_perf in self.source.outputs:
            fields = [
                lib.bpf_perf_event_field(module, output.encode(), number).decode()
                for number in range(lib.bpf_perf_event_fields(module, output.encode()))
            ]
            table = own_table(
                names[self.source.path, output],
                self.source.path.name,
                output,
                fields,
                timed=is_perf,
            )
            rings: Sequence[bcc_rings.PerfRing | bcc_rings.KernelRing]
            if is_perf:
                rings = bcc_rings.open_rings(self._cpus)
                for ring in rings:
                    self._set(maps[output], c.c_int(ring.cpu), c.c_int(ring.descriptor))
            else:
                size = int(lib.bpf_table_max_entries_id(module, numbers[output]))
                rings = [bcc_rings.KernelRing(maps[output], size)]
            row = lost[order.index(output) - 1]
            self.outputs.append(_Output(table, rings, row, np.zeros_like(row)))
        self._processes = maps.get("scope_processes")

    def _set(self, descriptor: int, key: Any, value: Any) -> None:
        if error := bcc.update_element(descriptor, key, value):
            raise LoadError(
                f"cannot set up {self.source.path.name}: {os.strerror(-error)}; report it as a bug"
            )

    def follow(self, tgids: Iterable[int], *, after_exec: bool = False) -> None:
        """Have scope_is_recorded() say yes in these processes; `after_exec`: once they execute a program."""
        if self._processes is None or self._everything:
            return
        for tgid in tgids:
            self._set(
                self._processes, c.c_uint32(tgid), c.c_uint32(AFTER_EXEC if after_exec else NOW)
            )

    def start(self) -> None:
        """From here on what is submitted counts."""
        for output in self.outputs:
            output.lost_before = output.lost.copy()
            for ring in output.rings:
                ring.drain()

    def detach(self) -> None:
        """Take it out of the kernel; what is in the rings stays."""
        while self._life:
            os.close(self._life.pop())
        bcc.clean_up(self._bpf)

    def close(self) -> None:
        """Take it out of the kernel, and give up its rings."""
        self.detach()
        for output in self.outputs:
            for ring in output.rings:
                ring.close()


class OwnPrograms:
    """All programs of a recording; a context manager."""

    def __init__(self, paths: Sequence[Path], targets: Targets, taken: Iterable[str]) -> None:
        """Compile and attach them; `taken` are names that their tables cannot have.

        Raises:
            UsageError, LoadError: one cannot be used.
        """
        sources = [read_source(path) for path in paths]
        names = table_names(sources, taken)
        self.programs: list[Program] = []
        try:
            for source in sources:
                self.programs.append(Program(source, names, targets))
        except BaseException:
            self.close()
            raise
        self._outputs = [output for program in self.programs for output in program.outputs]
        self.tables = tuple(output.table for output in self._outputs)

    def __enter__(self) -> "OwnPrograms":
        """The programs themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take them out of the kernel."""
        self.close()

    def follow(self, tgids: Iterable[int], *, after_exec: bool = False) -> None:
        """Have scope_is_recorded() say yes in these processes."""
        chosen = list(tgids)
        for program in self.programs:
            program.follow(chosen, after_exec=after_exec)

    def start(self) -> None:
        """From here on what is submitted counts."""
        for program in self.programs:
            program.start()

    def drain(self) -> list[tuple[int, NDArray[np.int64] | None, NDArray[Any]]]:
        """What is there now: number of the table, times if the kernel tells them, and records."""
        found: list[tuple[int, NDArray[np.int64] | None, NDArray[Any]]] = []
        for number, output in enumerate(self._outputs):
            for ring in output.rings:
                data = ring.drain()
                runs: Iterable[tuple[NDArray[np.int64] | None, bcc_rings.Bytes]]
                if isinstance(ring, bcc_rings.PerfRing):
                    # the kernel pads what it takes to eight bytes
                    runs, spare = bcc_rings.perf_records(data), 7
                else:
                    runs, spare = ((None, run) for run in bcc_rings.ring_records(data)), 0
                for times, run in runs:
                    records = bcc_rings.fitting(run, output.table.dtype, spare)
                    if records is None:
                        output.misfits += len(run)
                    else:
                        found.append((number, times, records))
        return found

    def fill(self) -> float:
        """How full the fullest ring is, 0 to 1."""
        return max((ring.fill() for output in self._outputs for ring in output.rings), default=0.0)

    def lost(self) -> NDArray[np.uint64]:
        """Lost since start(), by table and CPU.

        Records of another length than the struct's cannot be read: they count as lost on CPU 0.
        """
        rows = [output.lost - output.lost_before for output in self._outputs]
        for row, output in zip(rows, self._outputs, strict=True):
            row[0] += np.uint64(output.misfits)
        return np.array(rows, dtype=np.uint64)

    def stop(self) -> None:
        """Take the programs out of the kernel; drain once more after that."""
        for program in self.programs:
            program.detach()

    def close(self) -> None:
        """Take everything out of the kernel; may be called again."""
        while self.programs:
            self.programs.pop().close()
