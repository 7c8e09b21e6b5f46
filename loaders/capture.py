"""A capture: the probes loaded for chosen targets, and their rings."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from scope_ebpf import records
from scope_ebpf.errors import FormatError, LoadError
from scope_ebpf.families import FAMILIES
from scope_ebpf.loaders import extras, hits, tls
from scope_ebpf.loaders.cgroups import absence, descendants, mount_point
from scope_ebpf.loaders.choice import choose_loader
from scope_ebpf.loaders.hit_families import HIT_FAMILIES, add_family
from scope_ebpf.loaders.kernel import (
    forget_kernel_types,
    has_cookies,
    possible_cpus,
    programs_are_preempted,
    tracepoint_arguments,
    tracepoint_event_refusal,
)
from scope_ebpf.loaders.libbpf import (
    BpfObject,
    NotAllowedError,
    PerfEventsRefusedError,
    Uprobe,
)
from scope_ebpf.loaders.message_calls import message_classes, number_of
from scope_ebpf.loaders.newcomers import Newcomers
from scope_ebpf.loaders.probed_files import MetFiles
from scope_ebpf.loaders.python import calls, watch
from scope_ebpf.loaders.python.functions import Spec
from scope_ebpf.loaders.python.watch import PythonWatch
from scope_ebpf.loaders.ring import Records, array_in
from scope_ebpf.loaders.shared_globals import SharedGlobals
from scope_ebpf.loaders.transport import PerfBuffers, Transport, choose_transport
from scope_ebpf.probe_specs import ProbeSpec
from scope_ebpf.records import RecordLimits

LIFE_PROGRAMS = ("on_fork", "on_exec", "on_exit", "on_sched_switch")
CALL_PROGRAMS = ("on_sys_exit", "on_sys_enter")
# Where these can be preempted, and are left out for other threads meanwhile, others take their place: see
# probes/syscalls.h.
EVENT_PROGRAMS = frozenset(("on_exec", "on_exit", *CALL_PROGRAMS))
CGROUP_PROGRAMS = ("on_cgroup_mkdir", "on_cgroup_attach")
ITERATORS = ("on_mark_tasks", "on_list_open")
FILE_ITERATORS = ("on_list_files",)  # of the messages family
# Structs whose layout must be the one that Python reads.
RECORDS = (
    "call",
    "message",
    "offcpu",
    "tls",
    "payload",
    "process",
    "connection",
    "connect",
    "marked_task",
    "sample",
    "flow",
    "context",
    "handoff",
    "gil",
    "frame",
    "stack_part",
    "code_part",
    "hit",
    "python_call",
    "hit_probe",
    "hit_argument",
    "interpreter",
    "call_watch",
    "cpu_state",
)

# Ring sizes by default: a second of a fast burst on each CPU of a small host, less on each of a large
# one, where the work is spread.
HOT_BYTES_IN_ALL = 64 << 20
WIDE_BYTES_IN_ALL = 24 << 20
HOT_SLOTS = (1 << 14, 1 << 19)
WIDE_SLOTS = (1 << 10, 1 << 14)

# Walks of stacks that may be under way on a CPU: see probes/stacks.h.
WALKS = 2


@dataclass
class CaptureOptions:
    """What to record.

    Attributes:
        tgids: target processes; ignored for a cgroup or the whole host.
        after_exec: record the targets only after they execute another program.
        cgroup: a directory of the unified hierarchy whose members are recorded.
        everything: record the whole host, but not this process.
        follow: record the targets' children, too.
        families: which tables to fill, of FAMILIES and EXTRA_FAMILIES.
        probes: the user's own.
        bcc_probes: programs for BCC that the user wrote.
        commands: programs that the targets are about to execute: libraries are sought beside them.
        calls: Python functions whose calls are recorded; the number of a hit's probe is a place in it.
        payload_bytes: how much of a payload's head to keep; 0 for nothing.
        sample_hz: how often a second of CPU time the stack of a running thread is taken.
        long_wait_ns: a wait in a system call that is as long gets a stack.
        hot_slots, wide_slots: slots per CPU, powers of two; None for a size that fits the host.
        transport: how records come out of the kernel: `rings`, `perf`, or `auto` for the first that works.
        loader: libbpf, bcc, or auto: libbpf where the kernel has type information.
    """

    tgids: tuple[int, ...] = ()
    after_exec: bool = False
    cgroup: Path | None = None
    everything: bool = False
    follow: bool = True
    families: tuple[str, ...] = FAMILIES
    probes: tuple[ProbeSpec, ...] = ()
    bcc_probes: tuple[Path, ...] = ()
    commands: tuple[Path, ...] = ()
    calls: tuple[Spec, ...] = ()
    payload_bytes: int = 512
    sample_hz: int = 99
    long_wait_ns: int = 1_000_000
    hot_slots: int | None = None
    wide_slots: int | None = None
    transport: str = "auto"
    loader: str = "auto"


@dataclass
class Batch:
    """What one round of draining brought: runs of slots as (cpu, index of the first, records)."""

    hot: list[tuple[int, int, Records]] = field(default_factory=list)
    wide: list[tuple[int, int, Records]] = field(default_factory=list)

    @cached_property
    def executed(self) -> list[int]:
        """The processes that executed a program meanwhile."""
        return [tgid for _, _, slots in self.wide for tgid in watch.executed(slots)]


def ring_slots(in_all: int, slot_bytes: int, cpus: int, bounds: tuple[int, int]) -> int:
    """The power of two of slots per CPU that shares `in_all` bytes out between the CPUs, in bounds."""
    wanted = max(in_all // slot_bytes // cpus, 1)
    return max(bounds[0], min(bounds[1], 1 << (wanted.bit_length() - 1)))


class Capture:
    """Probes at work; a context manager that takes everything out of the kernel at its end."""

    def __init__(self, options: CaptureOptions) -> None:
        """Load the programs; nothing is attached yet.

        Raises:
            UsageError, FormatError: there is no place for one of the user's probes.
            LoadError: the kernel refuses, with the reason.
        """
        self.options = options
        self.cpus = possible_cpus()
        payload_room = -(-max(options.payload_bytes, 448) // 64) * 64
        self.wide_stride = RecordLimits.WIDE_HEADER_BYTES + payload_room
        self.hot_slots = options.hot_slots or ring_slots(
            HOT_BYTES_IN_ALL, RecordLimits.HOT_SLOT_BYTES, self.cpus, HOT_SLOTS
        )
        self.wide_slots = options.wide_slots or ring_slots(
            WIDE_BYTES_IN_ALL, self.wide_stride, self.cpus, WIDE_SLOTS
        )
        # what of the chosen families is missing, and why
        self.notes: list[str] = []
        self._libraries = MetFiles()
        self._newcomers: Newcomers | None = None
        self.places = hits.Places()
        for probe in options.probes:
            self.places.add_spec(probe)
        self.notes += self.places.notes
        self.loader = choose_loader(options.loader)
        if self.loader == "bcc":
            from scope_ebpf.loaders.bcc_capture import check_options

            check_options(options.families, probes=bool(options.probes), calls=bool(options.calls))
        self._rings: extras.RingWatch | None = None
        wanted = sorted(set(HIT_FAMILIES) & set(options.families))
        self._places_are_told = not (options.probes or wanted) or has_cookies()
        if not self._places_are_told:
            reason = "this kernel does not tell a probe where it is; that needs Linux 5.15"
            if options.probes:
                raise LoadError(f"cannot use --probe: {reason}; record without it")
            self.notes.append(f"{' and '.join(wanted)} cannot be recorded: {reason}")
        self._preempted = self.loader == "libbpf" and programs_are_preempted()
        refusal = tracepoint_event_refusal("raw_syscalls/sys_enter") if self._preempted else ""
        self._by_events = self._preempted and not refusal
        if refusal:
            self.notes.append(
                "calls are lost (and counted) while a thread waits for its CPU inside of a probe, since the"
                f" probes can be no perf events: {refusal}"
            )
        transports = choose_transport(options.transport)
        if self.loader == "bcc":  # compiling takes too long to try another one
            transports = transports[:1]
        try:
            self._open(transports[0])
        except LoadError as error:
            if len(transports) == 1 or isinstance(error, NotAllowedError):
                raise
            try:
                self._open(transports[1])
            except LoadError:
                raise error from None
            self.notes.append(
                f"records come through perf buffers, since rings do not work: {error}"
            )

    def _open(self, transport: type[Transport]) -> None:
        self._object = (
            bcc_object(transport) if self.loader == "bcc" else BpfObject(transport.object_path)
        )
        self._transport = transport(self._object, self.cpus)
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    @property
    def transport(self) -> str:
        """How records come out of the kernel: `rings` or `perf`."""
        return self._transport.name

    def __enter__(self) -> "Capture":
        """The capture itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach and unload."""
        self.close()

    def close(self) -> None:
        """Detach and unload; may be called again."""
        if self._rings is not None:
            self._rings.close()
        self._object.close()
        self._transport.close()

    def _programs(self) -> tuple[str, ...]:
        """The programs that the chosen families need, in the order in which they are attached.

        Births before the marking of what runs, so that no child slips through; entries after exits, so
        that no entry is seen without its exit.
        """
        families = self.options.families
        chosen: tuple[str, ...] = (*self._transport.programs, *self._as_events(LIFE_PROGRAMS))
        if self.options.cgroup is not None or self.options.everything:
            chosen += CGROUP_PROGRAMS
        if "offcpu" in families:
            chosen += ("on_sched_waking",)
        return chosen

    def _iterators(self) -> tuple[str, ...]:
        return ITERATORS + (FILE_ITERATORS if "messages" in self.options.families else ())

    def _records_hits(self) -> bool:
        chosen = bool(self.options.probes) or bool(set(HIT_FAMILIES) & set(self.options.families))
        return chosen and self._places_are_told

    def _records_calls(self) -> bool:
        return bool({"syscalls", "messages", *watch.FAMILIES} & set(self.options.families))

    def _call_programs(self) -> tuple[str, ...]:
        if not self._records_calls():
            return ()
        return self._as_events(CALL_PROGRAMS)

    def _as_events(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """What is loaded in the place of these."""
        if not self._by_events:
            return names
        return tuple(f"{name}_event" if name in EVENT_PROGRAMS else name for name in names)

    def _follows_python(self) -> bool:
        return bool(set(watch.FAMILIES) & set(self.options.families))

    def _load(self) -> None:
        options, families = self.options, self.options.families
        if self.loader == "libbpf":
            check_layout(self._object)
        self._object.select(
            {
                *self._programs(),
                *self._iterators(),
                *self._call_programs(),
                *(tls.PROGRAMS if "tls" in families else ()),
                *(watch.UPROBES if self._follows_python() else ()),
                *(("on_tick",) if "samples" in families else ()),
                *((hits.PROGRAM,) if self._records_hits() else ()),
                *(calls.PROGRAMS if options.calls else ()),
            }
        )
        self._object.expect_uprobes(*tls.PROGRAMS, *watch.UPROBES, hits.PROGRAM)
        self._object.set_constants(
            record_syscalls="syscalls" in families,
            record_messages="messages" in families,
            record_offcpu="offcpu" in families,
            record_samples="samples" in families,
            record_contexts="contexts" in families,
            record_gil="gil" in families,
            record_everything=options.everything,
            follow_children=options.follow or options.cgroup is not None,
            seek_cgroups=options.cgroup is not None,
            switch_tells_state=tracepoint_arguments("sched_switch") >= 4,
            programs_are_preempted=self._preempted,
            recorder_tgid=os.getpid(),
            payload_limit=options.payload_bytes,
            message_classes=message_classes(),
            long_wait_ns=options.long_wait_ns,
            futex_number=number_of("futex"),
            munmap_number=number_of("munmap"),
            ring_number=number_of("io_uring_enter"),
            aio_number=number_of("io_submit"),
        )
        self._object.resize("cpus", self.cpus)
        self._transport.prepare(
            hot_dtype(), self.hot_slots, wide_dtype(self.wide_stride), self.wide_slots
        )
        # one for programs and one for the clock that interrupts them
        self._object.resize("walks", self.cpus * WALKS)
        self._object.resize("gathered", self.cpus, max(2 * options.payload_bytes, 64))
        if not self._records_hits():
            for name in ("hit_probes", "hit_arguments", "hit_begins"):
                self._object.resize(name, 1)
        if not options.calls:
            for name in ("open_calls", "unwound_calls", "call_watches"):
                self._object.resize(name, 1)
        self._object.resize("transfers", 1)  # extras.RingWatch makes its own
        self._object.load()
        self._map_rings()
        self._pythons = (
            PythonWatch(self._object, self._shared, families) if self._follows_python() else None
        )

    def _map_rings(self) -> None:
        """Map the CPU states, the variables and both rings of each CPU."""
        self._states = array_in(
            self._object.map_memory("cpus", self.cpus * records.CPU_STATE.itemsize, writable=True),
            records.CPU_STATE,
            self.cpus,
        )
        self._shared = SharedGlobals(self._object)
        self._marks = self._shared["marks_wanted"]
        self._tellings = self._shared["tellings"]
        self._entries_seen = self._shared["entries_seen"]
        self._tls_wanted = self._shared["tls_wanted"]
        self._hits_wanted = self._shared["hits_wanted"]
        self._calls_wanted = self._shared["calls_wanted"]
        if self.loader == "libbpf" and "messages" in self.options.families:
            self._rings = extras.RingWatch(
                self._object, self._shared, self.cpus, self.options.payload_bytes
            )
        self.hot, self.wide = self._transport.open(self._states)

    def start(self) -> Records:
        """Attach the probes and take up what runs already.

        Returns:
            A records.MARKED_TASK per thread that is recorded from the start.
        """
        for tgid in self.options.tgids:
            kind = (
                records.TargetKind.TARGET_AFTER_EXEC
                if self.options.after_exec
                else records.TargetKind.TARGET_NOW
            )
            self._object.update("targets", tgid, kind)
        if self.options.cgroup is not None:
            for identity in descendants(self.options.cgroup):
                self._object.update("cgroups", identity, 1, key_bytes=8)
        self._object.attach(*self._programs(), *self._iterators())
        marked = [self._mark()]
        while True:
            # a child of a thread that was not marked yet may have been missed
            fresh = self._mark()
            fresh = fresh[fresh["seen_before"] == 0]
            if not len(fresh):
                break
            marked.append(fresh)
        tgids = {int(tgid) for tasks in marked for tgid in tasks["tgid"]}
        if "tls" in self.options.families:
            self._attach_tls(tgids)
        if self._pythons is not None:
            self.notes += self._pythons.attach(tgids, self.options.commands)
        if self.options.everything or self.options.cgroup is not None:
            self._newcomers = Newcomers()
            self._newcomers.know(tgids)
            if mount_point() is None:
                self.notes.append(
                    f"cgroups have no paths: {absence()[0]}, and paths are those of version 2; services"
                    " are named by their commands only"
                )
        if "samples" in self.options.families:
            try:
                self._object.attach_clock("on_tick", self.options.sample_hz)
            except PerfEventsRefusedError as error:
                # stacks of waits and messages need no clock
                self.notes.append(f"what runs on a CPU is not sampled: {error}")
        if self._records_hits():
            self._attach_hits(tgids)
        if self.options.calls:
            # once more: they may have changed since the user was told what it costs
            found = calls.find_calls(self.options.calls, sorted(tgids))
            calls.attach_calls(self._object, found)
            self._calls_wanted[0] = 1
        if self._records_calls():
            self._object.attach(*self._call_programs())
            self._entries_seen[0] = 1
        if self._rings is not None:
            # connections are met later: what moves from now on is counted
            self.notes += self._rings.watch(from_the_start=True)
        self._look_up_running()
        self._meet_connections()
        forget_kernel_types()
        return np.concatenate(marked)

    def _attach_tls(self, tgids: set[int]) -> None:
        """Probe the TLS libraries that these processes use or may use.

        One that cannot be probed does not end the recording of all the rest: it is noted.
        """
        for path in tls.find_libraries(tgids, self.options.commands):
            if not self._libraries.is_new(path):
                continue
            try:
                for site in tls.library_sites(path):
                    self._object.attach_uprobe(
                        site.program, path, site.offset, at_return=site.at_return
                    )
            except LoadError as error:
                self.notes.append(f"TLS through {path} is not recorded: {error}")
        self._tls_wanted[0] = 1

    def watch_files(self, batch: Batch) -> list[str]:
        """Put probes into files of programs that began in this batch; returns sentences about failures.

        For a cgroup and for the host; it needs the capabilities to attach.
        """
        if self._newcomers is None:
            return []
        self._newcomers.expect(batch.executed)
        tgid = self._newcomers.due()
        if tgid is None:
            return []
        before = len(self.notes)
        if "tls" in self.options.families:
            self._attach_tls({tgid})
        if self._pythons is not None:
            self.notes += self._pythons.attach({tgid}, ())
        return self.notes[before:]

    def find_pythons(self, tasks: Records) -> list[dict[str, Any]]:
        """Look for interpreters among processes that were marked; returns rows of `interpreters`.

        Of many processes the rest is looked at by watch_pythons().
        """
        if self._pythons is None:
            return []
        self._pythons.expect({int(tgid) for tgid in tasks["tgid"]})
        return self._look_at_pythons(watch.FIRST_SECONDS)

    def watch_pythons(self, batch: Batch) -> list[dict[str, Any]]:
        """Likewise among the processes that executed a program in this batch."""
        if self._pythons is None:
            return []
        self._pythons.expect(batch.executed)
        return self._look_at_pythons(watch.ROUND_SECONDS)

    def _look_at_pythons(self, seconds: float) -> list[dict[str, Any]]:
        assert self._pythons is not None
        before = self._pythons.changes
        rows = self._pythons.look(seconds)
        if self._pythons.changes != before:
            self._look_up_running()
        return rows

    def _attach_hits(self, tgids: set[int]) -> None:
        """Put the user's own probes where they belong, and those of families into the targets' programs.

        What a user asked for must work; what a family's files do not allow is noted.
        """
        asked = len(self.places.places)
        if self.options.after_exec:
            tgids = set()  # what they run now is not what will be recorded
        for family in HIT_FAMILIES:
            if family in self.options.families:
                self.notes += add_family(self.places, family, tgids, self.options.commands)
        places = self.places.places
        self._object.update_all(
            "hit_probes", [element.tobytes() for element in hits.probe_elements(places)]
        )
        for number, place in enumerate(places):
            elements = hits.argument_elements(place.arguments)
            self._object.update_all(
                "hit_arguments",
                [element.tobytes() for element in elements],
                number * len(elements),
            )
        for numbers in self.places.links():
            path, at_return = places[numbers[0]].path, places[numbers[0]].at_return
            uprobes = [Uprobe(places[n].offset, n, places[n].semaphore) for n in numbers]
            try:
                self._object.attach_uprobes(hits.PROGRAM, path, uprobes, at_return=at_return)
            except LoadError as error:
                if min(numbers) < asked:
                    raise
                self.notes.append(f"the probes of {path} are not used: {error}")
        self._hits_wanted[0] = 1

    def prepare_rings(self) -> None:
        """Load what is attached by watch_rings(), while there is the privilege for that; never raises."""
        if self._rings is not None:
            self._rings.prepare()

    def watch_rings(self) -> list[str]:
        """Attach what sees messages through io_uring, once a recorded thread is seen to have one.

        Returns:
            A sentence for the recording about what is seen of them from now on; else nothing.
        """
        return [] if self._rings is None else self._rings.watch()

    def mark_tasks(self) -> Records:
        """Take up every running thread that belongs to the targets; returns MARKED_TASK records."""
        marked = self._mark()
        if self._pythons is not None:
            self._pythons.expect(set(marked["tgid"][marked["seen_before"] == 0].tolist()))
        self._meet_connections()
        return marked

    def tell_again(self) -> None:
        """Have connections, stacks and code objects told again at their next sight.

        What is drained after the next drain() refers only to what is told from now on, but for calls that
        end at this moment on another CPU: then what was told before is not needed to read what comes.
        """
        self._tellings[0] += 1

    def _meet_connections(self) -> None:
        """Fix where the bytes of open connections are counted from; their calls are seen already."""
        if "messages" in self.options.families:
            self._object.iterate("on_list_files")

    def _mark(self) -> Records:
        data = self._object.iterate("on_mark_tasks")
        self._look_up_running()
        return np.frombuffer(data, dtype=records.MARKED_TASK)

    def _look_up_running(self) -> None:
        """Have the thread on each CPU looked up again: it may have been marked just now."""
        self._states["running"] = 0
        self._states["task"] = 0

    def marks_wanted(self) -> int:
        """How often so far the kernel saw something that mark_tasks() has to take up."""
        wanted = int(self._marks[0])
        if self._preempted:
            # a child of a recorded thread may not be recorded
            wanted += self._object.misses("on_fork")
        return wanted

    def drain(self) -> Batch:
        """Everything that is complete in the rings now.

        Per CPU first the hot ring, then the wide one: a payload is complete before its message is, so
        that the payloads of all drained messages are in this batch or were in an earlier one.
        """
        batch = Batch()
        for cpu in range(self.cpus):
            if (run := self.hot[cpu].drain()) is not None:
                batch.hot.append((cpu, *run))
            if (run := self.wide[cpu].drain()) is not None:
                batch.wide.append((cpu, *run))
        return batch

    def fill(self) -> float:
        """How full the fullest ring is, 0 to 1."""
        return max(float(ring.fill()) for ring in (*self.hot, *self.wide))

    def lost(self) -> NDArray[np.uint64]:
        """Lost so far, by CPU and records.LossKind: shape (cpus, LOSS_KINDS)."""
        return np.array(self._states["lost"], dtype=np.uint64)

    def skipped(self) -> list[str]:
        """After stop(): a sentence if the kernel did not run the probes each time; else nothing."""
        if self.loader != "libbpf" or not self._records_calls():
            return []
        ends, begins = map(self._object.misses, self._call_programs())
        if not begins + ends:
            return []
        return [
            f"the kernel left the probes out at {begins} beginnings and {ends} ends of system calls of this"
            " host, because it had preempted them: as many may be missing or without their other half"
        ]

    def open_calls(self) -> Records:
        """After stop(): watched calls that have not ended, as wide slots of HIT records."""
        found = calls.still_open(self._object) if self.options.calls else []
        data = b"".join(record.ljust(self.wide_stride, b"\0") for record in found)
        return np.frombuffer(data, dtype=wide_dtype(self.wide_stride))

    def stop(self) -> Records:
        """Detach the probes and return what is still open: CALL and OFFCPU records as hot slots.

        What completed before is still in the rings; drain once more.
        """
        # detaching uprobes takes a tenth of a second for each, while the rings would fill: close() does it
        self._tls_wanted[0] = self._hits_wanted[0] = self._calls_wanted[0] = 0
        if self._rings is not None:
            self._rings.stop()
        if self._pythons is not None:
            self._pythons.stop()
        for name in reversed(self._call_programs()):
            self._object.detach(name)
        data = self._object.iterate("on_list_open")
        self._object.detach(*self._programs(), *self._iterators())
        return np.frombuffer(data, dtype=hot_dtype())


def bcc_object(transport: type[Transport]) -> BpfObject:
    """What BCC compiles: it has what is used here of a BpfObject."""
    # here, so that others need not wait for it
    from scope_ebpf.loaders.bcc_capture import BccObject

    return cast(BpfObject, BccObject(perf=transport is PerfBuffers))


def check_layout(opened: BpfObject) -> None:
    """Refuse an object whose records are not the ones that this Python reads.

    Raises:
        FormatError: naming the first difference.
    """
    for name in RECORDS:
        if opened.btf.record_dtype(name) != getattr(records, name.upper()):
            raise FormatError(
                f"cannot use {opened.path.name}: its record {name} differs from this version's;"
                " build the probes anew with `make build`"
            )


def hot_dtype() -> np.dtype[Any]:
    """A hot slot before its kind is looked at: the first eight bytes and the rest."""
    return np.dtype(
        [
            ("sequence", "<u4"),
            ("number", "<u2"),
            ("kind", "u1"),
            ("flags", "u1"),
            ("start_ns", "<u8"),
            ("rest", f"V{RecordLimits.HOT_SLOT_BYTES - 16}"),
        ]
    )


def wide_dtype(stride: int) -> np.dtype[Any]:
    """A wide slot before its kind is looked at."""
    return np.dtype(
        [
            ("sequence", "<u4"),
            ("length", "<u2"),
            ("kind", "u1"),
            ("flags", "u1"),
            ("rest", f"V{stride - 8}"),
        ]
    )
