"""The recorder: drains a capture into a recording until something ends it.

Two threads. The main one drains the rings into memory and never waits for a disk; the other turns what was
drained into tables and writes them. What lies between is bounded: when the disk is too slow the rings fill
up, and the kernel counts what is lost.
"""

import ctypes
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.errors import TargetError
from scope_ebpf.families import TABLES
from scope_ebpf.loaders.capture import Batch, Capture, CaptureOptions
from scope_ebpf.loaders.hits import Places
from scope_ebpf.loaders.ring import Records
from scope_ebpf.loaders.targets import (
    LiveProcesses,
    Target,
    check_same,
    command_line,
    with_descendants,
)
from scope_ebpf.records import ProcessEvent

if TYPE_CHECKING:  # it imports polars, which takes 0.15 s: that is done while events already arrive
    from scope_ebpf.loaders.bcc_fields import OwnTable
    from scope_ebpf.loaders.bcc_programs import OwnPrograms
    from scope_ebpf.recording.store import Store

# The reader sleeps so long that the fullest ring fills up to FILL_GOAL, between these bounds.
POLL_SECONDS = (0.005, 0.1)
# A program that was running on another CPU when it was detached writes its record within this time.
SETTLE_SECONDS = 0.1
FILL_GOAL = 1 / 16
# A segment at least this often, so that kill -9 loses at most the last second; and not larger than this.
SEGMENT_SECONDS = 0.85
SEGMENT_SLOTS = 1 << 17
# Batches of up to SEGMENT_SLOTS that may wait for the writer.
WAITING_BATCHES = 8
STATUS_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """Everything that a recording needs to be told.

    Attributes:
        path: the recording's directory, which exists and is empty.
        options: what to capture.
        targets: the processes that were named; recording ends when none of them is left.
        command: how the recorder was called.
        duration: seconds to record; None for no limit.
        unredacted: store the heads of messages as they are.
        keep_bytes, keep_seconds: the quota: what is older than that goes; None: everything stays.
        shares_quota: recordings of earlier runs in the same folder count, and go first.
    """

    path: Path
    options: CaptureOptions
    targets: tuple[Target, ...]
    command: tuple[str, ...]
    duration: float | None = None
    unredacted: bool = False
    keep_bytes: int | None = None
    keep_seconds: float | None = None
    shares_quota: bool = False


@dataclass(frozen=True)
class Status:
    """Where a recording stands."""

    seconds: float
    rows: dict[str, int]
    lost: int
    bytes_on_disk: int
    cpu_percent: float


@dataclass(frozen=True)
class Marked:
    """Threads that were taken up while they ran, and the command lines of those that begin a process.

    The command lines are read at once: some of the processes are gone when the writer comes to them.
    `event`: whether they are new to the recording, or told again.
    """

    time_ns: int
    tasks: Records
    command_lines: dict[int, bytes]
    event: int = ProcessEvent.PROCESS_ALIVE


@dataclass
class Drained:
    """What goes to the writer at once."""

    hot: list[tuple[int, int, Records]] = field(default_factory=list)
    wide: list[tuple[int, int, Records]] = field(default_factory=list)
    marked: list[Marked] = field(default_factory=list)
    interpreters: list[dict[str, Any]] = field(default_factory=list)  # rows of that table
    notes: list[str] = field(default_factory=list)  # sentences for the recording
    # lost events by CPU and loss kind, since the batch before; and when that was
    lost: NDArray[np.uint64] | None = None
    # of the user's programs: number of the table, times if the kernel told them, records; and what was
    # lost by table and CPU
    own: list[tuple[int, NDArray[np.int64] | None, NDArray[Any]]] = field(default_factory=list)
    own_lost: NDArray[np.uint64] | None = None
    since_ns: int = 0
    slots: int = 0
    last: bool = False  # nothing comes after it
    told_again: bool = False  # from it on, nothing refers to what was told before

    def mark(self, tasks: Records, time_ns: int) -> None:
        """Take records of threads that were marked at that time, without those marked before."""
        self._mark(tasks[tasks["seen_before"] == 0], time_ns, ProcessEvent.PROCESS_ALIVE)

    def tell_again(self, tasks: Records, time_ns: int) -> None:
        """Take records of all threads that are recorded; nothing refers to earlier batches from now on."""
        self.told_again = True
        self.mark(tasks, time_ns)
        self._mark(tasks[tasks["seen_before"] != 0], time_ns, ProcessEvent.PROCESS_STILL)

    def _mark(self, tasks: Records, time_ns: int, event: ProcessEvent) -> None:
        if len(tasks):
            leaders = tasks["tgid"][tasks["tgid"] == tasks["tid"]].tolist()
            # a process that rewrote its title leaves zeros behind it
            lines = {tgid: command_line(tgid).rstrip(b"\0") for tgid in leaders}
            lines = {tgid: line + b"\0" for tgid, line in lines.items() if line}
            self.marked.append(Marked(time_ns, tasks, lines, event))

    def add(self, batch: Batch) -> None:
        """Take one round of draining."""
        self.hot += batch.hot
        self.wide += batch.wide
        self.slots += sum(len(slots) for _, _, slots in (*batch.hot, *batch.wide))

    def add_own(self, runs: list[tuple[int, NDArray[np.int64] | None, NDArray[Any]]]) -> None:
        """Take what the user's programs submitted."""
        self.own += runs
        self.slots += sum(len(rows) for _, _, rows in runs)


class Use:
    """What this process takes: CPU time since the recording began, and memory at most."""

    def __init__(self) -> None:
        """The recording begins."""
        self._cpu_seconds = time.process_time()
        self._began = time.monotonic()

    def cpu_seconds(self) -> float:
        """CPU seconds so far, of all threads."""
        return time.process_time() - self._cpu_seconds

    def cpu_percent(self) -> float:
        """The same as percent of one CPU."""
        return 100 * self.cpu_seconds() / max(time.monotonic() - self._began, 1e-9)

    @staticmethod
    def peak_rss_bytes() -> int:
        """The largest resident set so far; the mapped rings count."""
        # not ru_maxrss: that goes on from what the process was before it executed Python, such as a large
        # parent that used vfork (setmax_mm_hiwater_rss in fs/exec.c)
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return 0


@contextmanager
def same_interrupt_handler() -> Iterator[None]:
    """Undo what importing polars does to SIGINT; works in any thread, as signal.signal() does not.

    polars sets a handler that makes whatever it is computing fail (polars-error/src/signals.rs): Ctrl-C would
    end the writer within a batch, and under `run`, where it is meant for the command, too.
    """
    get, set_again = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.argtypes, get.restype = [ctypes.c_int], ctypes.c_void_p
    set_again.argtypes, set_again.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    handler = get(signal.SIGINT)
    try:
        yield
    finally:
        set_again(signal.SIGINT, handler)


def own_programs(options: CaptureOptions) -> "OwnPrograms":
    """The user's programs for BCC, compiled and attached.

    Raises:
        UsageError, LoadError: one cannot be used.
    """
    from scope_ebpf.loaders.bcc_programs import OwnPrograms, Targets

    targets = Targets(options.everything, options.follow or options.cgroup is not None)
    return OwnPrograms(options.bcc_probes, targets, taken=TABLES)


class Recorder:
    """One recording, from attaching to the last segment."""

    def __init__(
        self,
        plan: Plan,
        *,
        on_attached: Callable[[], None] = lambda: None,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; nothing is loaded yet.

        Args:
            plan: what to record and where.
            on_attached: called once the probes are at work: the place to let a waiting target go.
            on_loaded: called when nothing is left to be loaded, before any thread is started: the place to
                drop privileges.
        """
        self.plan = plan
        self._on_attached, self._on_loaded = on_attached, on_loaded
        # a plain flag, not a threading.Event: its set() takes a lock that the interrupted thread may hold
        self._stopping = False
        self._queue: queue.Queue[Drained | None] = queue.Queue(WAITING_BATCHES)
        self._failure: BaseException | None = None
        self._store: Store | None = None
        self._imported = False
        self._lost = 0
        self._own: OwnPrograms | None = None
        self._own_lost = np.zeros((), np.uint64)  # so far, by table and CPU

    def stop(self) -> None:
        """End the recording in good order; may be called from a signal handler."""
        self._stopping = True

    def run(self, on_status: Callable[[Status], None] | None = None) -> None:
        """Record until stop(), the end of the duration, or the last target's exit.

        Args:
            on_status: called about twice a second, if given.

        Raises:
            LoadError, TargetError: nothing was recorded.
            RecordingError: recording ended early; what was written until then is whole.
        """
        with ExitStack() as stack:
            live = stack.enter_context(
                LiveProcesses(tuple(target.tgid for target in self.plan.targets))
            )
            if self.plan.options.bcc_probes:
                self._own = stack.enter_context(own_programs(self.plan.options))
            capture = stack.enter_context(Capture(self.plan.options))
            chosen = replace(self.plan.options, transport=capture.transport, loader=capture.loader)
            self.plan = replace(self.plan, options=chosen)
            started_ns = time.monotonic_ns()
            marked = capture.start()
            check_same(self.plan.targets)  # now, so that it holds for what came before, too
            if self.plan.targets and not len(marked):
                raise TargetError(
                    f"cannot attach to process {self.plan.targets[0].tgid}: it has ended meanwhile;"
                    " to record it from its start, use `scope-ebpf run`"
                )
            if self._own is not None:
                self._follow(self._own, marked)
                self._own.start()
            if self.plan.options.after_exec:
                marked = marked[:0]  # they are not recorded yet
            first = Drained(since_ns=started_ns)
            first.mark(marked, started_ns)
            first.interpreters = capture.find_pythons(marked)
            self._on_attached()
            options = self.plan.options
            # of a cgroup or the host, the privilege to load is kept: nothing is before it is needed
            if not options.everything and options.cgroup is None:
                self._prepare_rings(capture, first)
            self._on_loaded()
            use = Use()
            writer = threading.Thread(
                target=self._write,
                args=(
                    started_ns,
                    use,
                    tuple(capture.notes),
                    capture.places,
                    () if self._own is None else self._own.tables,
                ),
                name="scope-writer",
                daemon=True,
            )
            # Until polars's handler is undone, SIGINT waits: it would kill the process. The writer
            # and the threads of polars get this mask, too, and leave the signal to this thread.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                writer.start()
                self._drain(capture, live, first, use, on_status, held)
            except BaseException as error:
                self._fail(error)
            finally:
                self._queue.put(None)
                while writer.is_alive() and not self._imported:
                    time.sleep(POLL_SECONDS[0])
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
                writer.join()
        if self._failure is not None:
            raise self._failure

    def _prepare_rings(self, capture: Capture, pending: Drained) -> None:
        """Have them prepared, and drain meanwhile: it can take longer than a busy CPU's ring lasts."""
        preparing = threading.Thread(target=capture.prepare_rings, name="scope-io-uring")
        preparing.start()
        batches = []
        while preparing.is_alive():
            batches.append(capture.drain())
            time.sleep(POLL_SECONDS[0])
        preparing.join()
        for batch in batches:
            self._take(capture, batch, pending)

    @staticmethod
    def _take(capture: Capture, batch: Batch, pending: Drained) -> None:
        """Add what was drained, and look at the programs that began meanwhile."""
        pending.add(batch)
        pending.interpreters += capture.watch_pythons(batch)
        pending.notes += capture.watch_files(batch)

    def _drain(
        self,
        capture: Capture,
        live: LiveProcesses,
        pending: Drained,
        use: Use,
        on_status: Callable[[Status], None] | None,
        signals: set[int | signal.Signals],
    ) -> None:
        """The main thread's loop, and the end of the capture.

        `signals` are to be blocked once polars is imported, in place of those that are until then.
        """
        began = time.monotonic()
        # from zero, not from what it is now: that was lost since the attaching
        lost = np.zeros_like(capture.lost())
        next_segment, next_status = began, began + STATUS_SECONDS
        interval, marks = POLL_SECONDS[0], 0
        waiting = True
        while not self._stopping:
            time.sleep(interval)
            if waiting and self._imported:
                signal.pthread_sigmask(signal.SIG_SETMASK, signals)
                waiting = False
            fill = capture.fill()
            self._take(capture, capture.drain(), pending)
            if self._own is not None:
                fill = max(fill, self._own.fill())
                pending.add_own(self._own.drain())
            pending.notes += capture.watch_rings()
            interval = min(
                max(interval * FILL_GOAL / max(fill, 1e-6), POLL_SECONDS[0]), POLL_SECONDS[1]
            )
            now = time.monotonic()
            if capture.marks_wanted() != marks:
                marks = capture.marks_wanted()
                marked = capture.mark_tasks()
                pending.mark(marked, time.monotonic_ns())
                if self._own is not None:
                    self._own.follow(marked["tgid"][marked["seen_before"] == 0].tolist())
            if now >= next_segment or pending.slots >= SEGMENT_SLOTS:
                again = self._store is not None and self._store.wants_telling()
                if again:
                    capture.tell_again()
                    # what refers to what was told before that
                    pending.add(capture.drain())
                pending, lost = self._hand_over(capture, pending, lost)
                if again:
                    pending.tell_again(capture.mark_tasks(), time.monotonic_ns())
                next_segment = now + SEGMENT_SECONDS
            if on_status is not None and now >= next_status:
                on_status(self._status(now - began, use))
                next_status = now + STATUS_SECONDS
            if self.plan.duration is not None and now - began >= self.plan.duration:
                break
            if self.plan.targets and not live.any():
                break
        if self._own is not None:
            self._own.stop()
            pending.add_own(self._own.drain())
        still_open = capture.stop()
        pending.notes += capture.skipped()
        pending.add(capture.drain())
        settled = time.monotonic() + SETTLE_SECONDS
        while capture.fill() and time.monotonic() < settled:
            time.sleep(0.001)
            pending.add(capture.drain())
        if len(still_open):
            pending.hot.append((0, 0, still_open))
        if len(open_calls := capture.open_calls()):
            pending.wide.append((0, 0, open_calls))
        pending.last = True
        self._hand_over(capture, pending, lost)

    def _hand_over(
        self, capture: Capture, pending: Drained, lost: NDArray[np.uint64]
    ) -> tuple[Drained, NDArray[np.uint64]]:
        """Give a batch to the writer, and begin the next one."""
        lost_now = capture.lost()
        pending.lost = lost_now - lost
        self._lost += int(pending.lost.sum())
        if self._own is not None:
            own_lost = self._own.lost()
            pending.own_lost = own_lost - self._own_lost
            self._lost += int(pending.own_lost.sum())
            self._own_lost = own_lost
        self._queue.put(pending)
        return Drained(since_ns=time.monotonic_ns()), lost_now

    def _status(self, seconds: float, use: Use) -> Status:
        store = self._store
        return Status(
            seconds,
            {} if store is None else store.rows(),
            self._lost,
            0 if store is None else store.bytes_on_disk(),
            use.cpu_percent(),
        )

    def _follow(self, own: "OwnPrograms", marked: Records) -> None:
        """Tell the user's programs who is recorded, with children that were born meanwhile."""
        options = self.plan.options
        known: set[int] = set()
        fresh = set(marked["tgid"].tolist())
        while fresh:
            own.follow(fresh, after_exec=options.after_exec)
            known |= fresh
            # those of a process that is told now are told in the kernel
            found = with_descendants(options.tgids) if options.follow else []
            fresh = set(found) - known

    def _write(
        self,
        started_ns: int,
        use: Use,
        notes: tuple[str, ...],
        places: Places,
        own_tables: "tuple[OwnTable, ...]",
    ) -> None:
        """The writer thread: takes batches until None comes."""
        try:
            # More threads would encode a segment sooner, for more CPU time and memory in all.
            os.environ.setdefault("POLARS_MAX_THREADS", "1")
            # imported here, while the rings already fill: see above
            try:
                with same_interrupt_handler():
                    from scope_ebpf.recording.store import Store
            finally:
                self._imported = True

            self._store = Store(self.plan, started_ns, use, notes, places, own_tables)
        except BaseException as error:
            self._fail(error)
        while (batch := self._queue.get()) is not None:
            try:
                if self._store is not None:
                    self._store.save(batch)
            except BaseException as error:
                self._fail(error)
        try:
            if self._store is not None:
                self._store.finish(self._failure)
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Remember the first failure and end the recording; what still comes is only counted."""
        if self._failure is None:
            self._failure = error
        self.stop()
