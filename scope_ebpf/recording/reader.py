"""Opens recordings: each table as a polars LazyFrame with readable columns."""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from scope_ebpf.errors import RecordingError, UsageError
from scope_ebpf.recording import readable
from scope_ebpf.recording.directory import META_FILE, SUFFIX
from scope_ebpf.recording.flows import BIRTHS, ThreadContexts
from scope_ebpf.recording.meta import Meta, read_meta
from scope_ebpf.recording.own_tables import schema_of
from scope_ebpf.recording.schema import SCHEMAS
from scope_ebpf.recording.segments import (
    Segment,
    check_columns,
    count_rows,
    list_segments,
    reading,
    scan,
    verify_bytes,
)
from scope_ebpf.records import ProcessEvent

if TYPE_CHECKING:
    from scope_ebpf.analysis.chains import Chains

# What a message takes over from its connection. connections has no other row with this id.
_ENDPOINTS = ["kind", "local_address", "local_port", "local_path"]
_ENDPOINTS += ["remote_address", "remote_port", "remote_path"]
# How often a recording that drops its oldest segments meanwhile is opened.
_ATTEMPTS = 5


def open_recording(path: str | os.PathLike[str], *, verify: bool = True) -> Recording:
    """Open the recording at `path`, a directory NAME.scope, as it is now.

    One whose recorder was killed, or still runs, opens too: what its segments hold is there.

    `verify`: compare all bytes of a table with their checksums when the table is first used. That
    costs a fraction of reading them; without it, a flipped bit on the disk may give a wrong table.

    Raises `RecordingError` if there is no recording at `path`, it may not be read or it lacks a
    segment, and `FormatError` if its meta.json is damaged or of another version of the format.

    >>> open_recording("missing.scope")
    Traceback (most recent call last):
    scope_ebpf.errors.RecordingError: there is no recording missing.scope
    """
    given = Path(path)
    with reading(str(given)):
        _require_recording(given)
        absolute = given.absolute()
    try:
        str(absolute).encode("utf-8")
    except UnicodeEncodeError:
        raise RecordingError(
            f"the path {str(absolute)!r} is not UTF-8, and polars reads no other; rename it"
        ) from None
    for attempt in range(_ATTEMPTS):
        meta = read_meta(absolute)  # before the segments, so that they are at least what it counts
        try:
            tables = [*SCHEMAS, *(own.name for own in meta.own_tables)]
            segments = {
                table: list_segments(
                    absolute / table,
                    meta.tables[table].first_segment if table in meta.tables else 1,
                )
                for table in tables
            }
            break
        except RecordingError:
            # its recorder may be removing segments at this moment: old ones, or small ones
            if attempt == _ATTEMPTS - 1 or meta.complete:
                raise
    return Recording(absolute, meta, segments, verify=verify)


class Recording:
    """A recording on disk: what it is of (`meta`), and its tables.

    Times in columns `…_ns` are CLOCK_MONOTONIC nanoseconds of the recorded host; add
    `meta.clock.realtime_offset_ns` for nanoseconds since 1970 (UTC). Rows come in the order
    in which they were stored, which is nearly, but not exactly, that of their first column: sort if
    it matters. `tgid` is what users call a PID; `tid` is a thread.

    The first use of a table checks its segments, and raises `FormatError` or `RecordingError` if
    they are damaged, missing or of other columns; `check` does so for all tables at once.

    >>> recording = open_recording("shop.scope")  # doctest: +SKIP
    >>> slow = recording.syscalls.filter(pl.col("duration_ns") > 1_000_000)  # doctest: +SKIP
    >>> recording.collect(slow.select("name", "duration_ns"))  # doctest: +SKIP
    """

    def __init__(
        self,
        path: Path,
        meta: Meta,
        segments: Mapping[str, Sequence[Segment]],
        *,
        verify: bool,
    ) -> None:
        """Use `open_recording`."""
        self.path = path
        self.meta = meta
        self._segments = dict(segments)
        own = {table.name: schema_of(table.columns) for table in meta.own_tables}
        self._schemas: dict[str, pl.Schema] = {**own, **SCHEMAS}
        self._verify = verify
        self._checked: set[str] = set()
        self._rows: dict[str, int] = {}
        self._built: Chains | None = None
        self._building = threading.Lock()
        self._contexts: ThreadContexts | None = None
        self._loading = threading.Lock()

    def __repr__(self) -> str:
        return f"<Recording {self.path}>"

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of all tables: those that every recording has, then those of the user's programs."""
        own = [table.name for table in self.meta.own_tables]
        return (*SCHEMAS, *(name for name in own if name not in SCHEMAS))

    def table(self, name: str) -> pl.LazyFrame:
        """The table of this name, with the columns that the property of the same name documents.

        Tables of the user's programs (`meta.own_tables`) have the columns of the struct in their source,
        and `time_ns`, when each row was submitted, if the kernel told that.

        Raises `UsageError` if there is no such table.
        """
        if name not in self._schemas:
            close = difflib.get_close_matches(name, self.tables, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self.tables)}"
            raise UsageError(f"there is no table {name!r}; {hint}")
        if name not in SCHEMAS:
            return self._stored(name)
        frame = getattr(self, name)
        assert isinstance(frame, pl.LazyFrame)
        return frame

    @property
    def processes(self) -> pl.LazyFrame:
        """One row per event in a process's or thread's life.

        - `time_ns`; `event`: `alive` (it ran when the recording, or what is left of it, began),
          `fork`, `thread`, `exec`, `moved` (to another cgroup), `exit` (of the whole process) or
          `thread_exit`
        - `tgid`, `tid`, `parent_tgid`; `parent_tid`: for fork and thread the thread that made it,
          for exec the tid before
        - `comm`; `command_line`: shell-quoted, null if not known; `command_line_bytes`: of the
          whole one, which may be longer than what is kept
        - `cgroup`: path in the unified hierarchy, null if not found; `cgroup_id`
        - `exit_code`: of an exit, null if a signal ended it; `signal`, `signal_name`: that signal
        - `start_boottime_ns`: CLOCK_BOOTTIME when it was made; with `tgid` it names it for good
        """
        stored = self._stored("processes")
        if self.meta.has_quota:
            # what was told again counts where what was told first was dropped
            life = ("tgid", "tid", "start_boottime_ns")
            again = pl.col("event") == int(ProcessEvent.PROCESS_STILL)
            first = pl.col("time_ns") == pl.col("time_ns").min().over(life)
            alive = pl.lit(int(ProcessEvent.PROCESS_ALIVE), pl.UInt8)
            stored = stored.filter(~again | first).with_columns(
                event=pl.when(again).then(alive).otherwise("event")
            )
        frame = stored.with_columns(readable.event(), readable.signal())
        return frame.select(_with_after(stored, {"signal": ["signal_name"]}))

    @property
    def syscalls(self) -> pl.LazyFrame:
        """One row per completed system call, and per call that was open when the recording ended.

        The calls that the kernel makes for probes, uretprobe and uprobe, are left out.

        - `start_ns`, `duration_ns`
        - `tgid`, `tid`; `context`: the logical context in which the thread was, such as an asyncio
          task: its id in `contexts`; 0: the thread itself, or not known
        - `number`: as the kernel counts, plus 0x8000 for a 32-bit call; `name`: such as `openat`
        - `result`: as the kernel returned it, -errno on errors; `error`: such as `ENOENT`, or null
        - `arg0`, `arg1`, `arg2`: the first arguments, as they are in the registers
        - `status`: `complete`, `began_before` (it ran when the recording began: start is when it
          was first seen), `open` (it ran when the recording ended: duration is up to there),
          `throughout` (both), `no_return` (the thread ended inside it) or `refused` (seccomp or a
          tracer refused it); null if unknown
        - `cpu`: where it ended
        """
        stored = self._stored("syscalls")
        frame = stored.with_columns(
            self._context(pl.col("start_ns")),
            self.syscall_name("number").alias("name"),
            readable.error(),
            readable.status(),
        )
        after = {"tid": ["context"], "number": ["name"], "result": ["error"]}
        return frame.select(_with_after(stored, after))

    @property
    def messages(self) -> pl.LazyFrame:
        """One row per read or write on a socket or pipe, with the connection that it was on.

        - `start_ns`, `duration_ns`, `tgid`, `tid`, `context`, `number`, `name`, `status`, `cpu`: as
          in `syscalls`; `fd`. Through io_uring these are of the transfer, not of the call in which it
          was asked for: `fd` is null, and where tracepoints saw it `duration_ns` is 0
        - `direction`: `send` or `receive`; `peek`: a receive that left the bytes where they are
        - `turn`: the first message of a turn of its connection
        - `length_bytes`; `stream_end`: the bytes are those from `stream_end - length_bytes` up to
          it in `stream`, which names one direction of a connection, the same at both ends;
          `exact`: `stream_end` is comparable with the other end's
        - `connection`: its id in `connections`; from there `kind`, `local_address`, `local_port`,
          `local_path`, `remote_address`, `remote_port`, `remote_path`. These and `stream` are null
          if the connection's own row was lost
        - `payload`: the head of the bytes at the start of a turn, else null
        """
        stored = self._stored("messages")
        ends = self._stored("connections").select(
            "connection", *_ENDPOINTS, "send_stream", "receive_stream"
        )
        # unique: whatever connections holds, a message must never become two.
        frame = stored.join(
            ends.unique("connection", keep="last", maintain_order=True),
            on="connection",
            how="left",
            maintain_order="left",
        ).with_columns(
            self._context(pl.col("start_ns")),
            self.syscall_name("number").alias("name"),
            readable.direction(),
            readable.stream(),
            readable.status(),
        )
        after = {
            "tid": ["context"],
            "number": ["name"],
            "fd": ["direction"],
            "length_bytes": ["stream"],
            "connection": _ENDPOINTS,
        }
        return frame.select(name for name in _with_after(stored, after) if name != "receive")

    @property
    def connections(self) -> pl.LazyFrame:
        """One row per end of a connection, at its first message; a pipe has one for both ends.

        - `time_ns`; `connection`: its id, unique within the recording
        - `kind`: `tcp`, `udp`, `unix`, `pipe`, or the address family's name
        - `tgid`: who was seen to use it first
        - `local_address`, `local_port`, `remote_address`, `remote_port`: null for what has none
        - `local_path`, `remote_path`: of Unix sockets; an abstract one begins with @
        - `inode`; `peer_inode`: Unix, null while the other end was not accepted
        - `netns`: inode of the network namespace
        - `send_stream`, `receive_stream`: name the bytes of one direction, the same at both ends
        """
        stored = self._stored("connections")
        if self.meta.has_quota:
            # they are told again, too
            return stored.unique("connection", keep="first", maintain_order=True)
        return stored

    @property
    def connects(self) -> pl.LazyFrame:
        """One row per call of connect() on an internet or Unix socket, whatever came of it.

        - `start_ns`, `duration_ns`, `tgid`, `tid`, `context`, `status`, `cpu`: as in `syscalls`,
          where the call has a row, too; `fd`, null through io_uring
        - `kind`: as in `connections`
        - `remote_address`, `remote_port`, `remote_path`: what the program passed; null for what has
          none, and all null if it disconnected or passed something else
        - `inode`: of the socket, as in `connections`
        - `result`: 0 or -errno; `error`: such as `ECONNREFUSED`, or null. `EINPROGRESS`: what came
          of it later is not told here
        """
        stored = self._stored("connects")
        frame = stored.with_columns(
            self._context(pl.col("start_ns")), readable.error(), readable.status()
        )
        return frame.select(_with_after(stored, {"tid": ["context"], "result": ["error"]}))

    @property
    def tls(self) -> pl.LazyFrame:
        """One row per call of SSL_read or SSL_write (or their _ex forms) that moved plain text.

        - `start_ns`, `duration_ns`, `tgid`, `tid`, `context`, `cpu`: as in `syscalls`. A change of
          the context is only seen at a system call, perhaps the first one within SSL_write: so
          `context` is that at the end of the call
        - `ssl`: address of the SSL object in the process; a later connection may have the same
        - `direction`: `send` or `receive`
        - `turn`: the first of a turn of that SSL object
        - `length_bytes`: of plain text; what it was on the wire is in `messages`
        - `payload`: the head of the plain text at the start of a turn, else null
        """
        stored = self._stored("tls")
        ended_ns = pl.col("start_ns") + pl.col("duration_ns")
        frame = stored.with_columns(self._context(ended_ns), readable.direction())
        after = {"tid": ["context"], "ssl": ["direction"]}
        return frame.select(name for name in _with_after(stored, after) if name != "receive")

    @property
    def offcpu(self) -> pl.LazyFrame:
        """One row per interval that a thread was off the CPU.

        - `start_ns`; `duration_ns` = `waiting_ns` (until something woke it) + `runnable_ns` (ready
          to run, waiting for a CPU)
        - `tgid`, `tid`; `context`: that of the call that it was in; outside of calls 0, which says
          no more than that it is not known
        - `state`: as ps shows it: R (preempted, or it yielded), S (interruptible), D
          (uninterruptible), I (idle kernel thread), T (stopped), t (traced), X, Z, P;
          `state_bits`: the kernel's own task state
        - `number`, `name`: the system call that it was in, null for none; `syscall_start_ns`: the
          `start_ns` of that call in `syscalls`
        - `waker_tgid`, `waker_tid`: who ran where the wakeup came from, null if nothing woke it;
          `waker_number`, `waker_name`: the call that the waker was in, null for none or not traced.
          A waker in a call is evidence, no proof: an interrupt may have done it
        - `status` as in `syscalls`, or `end_late` (its end was not seen: the duration is up to the
          thread's next call); `cpu`: where it came back
        """
        stored = self._stored("offcpu")
        frame = stored.with_columns(
            (pl.col("duration_ns") - pl.col("runnable_ns")).alias("waiting_ns"),
            self._context(pl.col("syscall_start_ns")),
            pl.col("state").alias("state_bits"),
            readable.state(),
            self.syscall_name("number").alias("name"),
            self.syscall_name("waker_number").alias("waker_name"),
            readable.status(),
        )
        after = {
            "duration_ns": ["waiting_ns"],
            "tid": ["context"],
            "state": ["state_bits"],
            "number": ["name"],
            "waker_number": ["waker_name"],
        }
        return frame.select(_with_after(stored, after))

    @property
    def interpreters(self) -> pl.LazyFrame:
        """One row per CPython process that was met and looked into; a fork is like its parent.

        - `time_ns`, `tgid`; `version`: such as 3.11.2; `path`: of the file with the interpreter, as
          the process sees it
        - `stacks`, `contexts`, `greenlets`, `gil`: whether its stacks can be read, its logical
          contexts and its greenlets are told apart, and waits for its GIL are seen
        - `reason`: why something of that is missing; null: nothing is
        """
        stored = self._stored("interpreters")
        if self.meta.has_quota:
            told = [name for name in SCHEMAS["interpreters"] if name != "time_ns"]
            return stored.unique(told, keep="first", maintain_order=True)
        return stored

    @property
    def samples(self) -> pl.LazyFrame:
        """One row per stack that was taken.

        - `time_ns`: when; of a call or interval its `start_ns`, which joins it with the row of
          `syscalls`, `messages` or `offcpu` of the same `tgid` and `tid`
        - `tgid`, `tid`; `context`: as in `syscalls`
        - `reason`: `cpu` (it ran when the sampling clock ticked), `wait` (it was off the CPU in a
          system call for long), `message` (the first message of a turn) or `fault` (it waited for
          a page); null if unknown
        - `duration_ns`: of the call or interval; at a tick of the clock 0
        - `stack`: its id in `stacks`; null: it could not be read, or it is no Python thread
        - `native`: at a tick the native function that ran; null: not known
        - `cpu`
        """
        stored = self._stored("samples")
        return stored.with_columns(readable.reason())

    @property
    def stacks(self) -> pl.LazyFrame:
        """One row per different stack of a process; the same one may come more than once.

        - `time_ns`: when it was first seen; `tgid`; `stack`: its id
        - `codes`: `code` of each frame in `codes`, the innermost first; `offsets`: of each frame's
          instruction, which with the code's `lines` tells the line
        - `truncated`: there are more frames further out
        """
        return self._stored("stacks")

    @property
    def codes(self) -> pl.LazyFrame:
        """One row per code object; a later one may have the same address.

        For a stack the latest one of its process before it counts.

        - `time_ns`: when it was first seen; `tgid`; `code`: its address
        - `name`: co_qualname, up to CPython 3.10 co_name; `file`; null: could not be read
        - `first_line`; `lines`: co_linetable, up to 3.9 co_lnotab, cut where it is very long
        - `version`: of CPython, 0x030b is 3.11; `first_instruction`: offset of the bytecode in the
          code object
        """
        return self._stored("codes")

    @property
    def contexts(self) -> pl.LazyFrame:
        """One row per logical context that was made, or met.

        - `time_ns`, `tgid`, `tid`: when and where it was made
        - `context`: its id, unique within the recording, never 0
        - `parent`: the one that was current where it was made; 0: the thread itself, or not known
        - `kind`: `copied` (a copy of its parent: a task, a callback), `new` (made empty, or copied
          from one that did not run), `met` (it existed when its process was met) or `greenlet`;
          null if unknown
        """
        stored = self._stored("contexts")
        return stored.with_columns(readable.context_kind())

    @property
    def flows(self) -> pl.LazyFrame:
        """One row per change of a thread's logical context, as far as its calls show it.

        - `start_ns`: of the first call in it; `tgid`, `tid`
        - `context`: its id in `contexts`; 0: the thread itself
        """
        return self._stored("flows")

    @property
    def handoffs(self) -> pl.LazyFrame:
        """One row per work item that was put into or taken out of a queue between threads.

        - `time_ns`, `tgid`, `tid`; `context`: that of the thread at that moment
        - `put`: it was put in; else it was got
        - `item`: address of the object, which a later one may have again
        - `queue`: address of the queue, of what was put
        """
        return self._stored("handoffs")

    @property
    def gil(self) -> pl.LazyFrame:
        """One row per system call that waited for the GIL; it is in `syscalls`, too.

        - `start_ns`, `duration_ns`, `tgid`, `tid`, `status`, `cpu`: as in `syscalls`
        - `holder_tid`: the thread that held it when the wait ended; null: not known
        """
        stored = self._stored("gil")
        return stored.with_columns(readable.status())

    @property
    def hits(self) -> pl.LazyFrame:
        """One row per hit of a probe that the user chose; meta.json says what the probes are.

        - `time_ns`: when; of what has a duration, its begin
        - `duration_ns`: of a call that was seen from its begin to its end, else null
        - `tgid`, `tid`; `context`: as in `syscalls`
        - `probe`: its name; `arguments`: as text, each as its type asks; null: could not be read
        - `cpu`
        """
        return self._stored("hits")

    @property
    def losses(self) -> pl.LazyFrame:
        """One row per CPU, table and second in which events were lost; no row: nothing was.

        - `time_ns`: begin of the second; `cpu`
        - `table`: a table, `payloads` (only the head of a message's bytes is missing) or `tasks`
          (threads that could not be taken up: nothing of them is recorded)
        - `lost`: how many events
        """
        return self._stored("losses")

    def messages_matched(self) -> pl.LazyFrame:
        """Sends with the receives that got their bytes: `scope_ebpf.analysis.schema.MATCHED`.

        One row per overlap of a send's bytes with a receive's, and one per message without any,
        with the reason in `unmatched`.
        """
        from scope_ebpf.analysis.matching import match_recording
        from scope_ebpf.analysis.schema import MATCHED

        return pl.defer(lambda: match_recording(self), schema=MATCHED)

    def spans(self) -> pl.LazyFrame:
        """What each process did for others and asked of others: `scope_ebpf.analysis.schema.SPANS`.

        One row per request as its server handled it (`server`), per request as its client made it
        (`client`), per job or message that was worked on (`consumer`) and per process that broke
        (`fault`), sorted by `start_ns`, each with the parent that caused it as far as that is known.
        Computed when it is first collected, and kept.

        >>> slow = recording.spans().filter(pl.col("duration_ns") > 1e8)  # doctest: +SKIP
        """
        from scope_ebpf.analysis.schema import SPANS

        return pl.defer(lambda: self._chains().spans, schema=SPANS)

    def edges(self) -> pl.LazyFrame:
        """What led to what, and how that is known: `scope_ebpf.analysis.schema.EDGES`.

        One row per causal edge between two spans: the parents of `spans`, and edges beside them,
        such as from a fault to what failed because of it.
        """
        from scope_ebpf.analysis.schema import EDGES

        return pl.defer(lambda: self._chains().edges, schema=EDGES)

    def requests(self) -> pl.LazyFrame:
        """One row per request that a server handled and per job: `scope_ebpf.analysis.schema.REQUESTS`.

        With where the time of the handling thread went. Sorted by `start_ns`.
        """
        from scope_ebpf.analysis.requests import find_requests
        from scope_ebpf.analysis.schema import REQUESTS

        return pl.defer(lambda: find_requests(self, self._chains()), schema=REQUESTS)

    def _chains(self) -> Chains:
        # collect_all computes several frames at once, in threads
        with self._building:
            if self._built is None:
                from scope_ebpf.analysis.chains import build_chains

                self._built = build_chains(self)
            return self._built

    @property
    def running(self) -> bool:
        """Whether its recorder still runs, as far as this machine can tell."""
        if self.meta.complete:
            return False
        import psutil  # only unfinished recordings need it

        started = (self.meta.started_ns + self.meta.clock.realtime_offset_ns) / 1e9
        try:
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            recorder = psutil.Process(self.meta.recorder.tgid)
            # A later process may have got the same number.
            return boot_id == self.meta.host.boot_id and recorder.create_time() < started + 1
        except (OSError, ValueError, OverflowError, psutil.Error):
            return False

    @property
    def since_ns(self) -> int:
        """Since when it tells everything: from its start, or from where its quota has left it."""
        return self.meta.dropped_until_ns or self.meta.started_ns

    def rows(self, name: str) -> int:
        """How many rows a table has on disk; only Parquet footers are read."""
        segments = self._listed(name)
        if name not in self._rows:
            self._rows[name] = count_rows(segments, self._schemas[name])
        return self._rows[name]

    def size_bytes(self, name: str) -> int:
        """How many bytes the segments of a table take on disk."""
        return sum(segment.size_bytes for segment in self._segments[name])

    def check(self, *tables: str, verify: bool = True) -> None:
        """Check the segments of some tables, or of all, so that reading cannot give a wrong one.

        Compares all bytes with the checksums (unless `verify` is False), the columns in the footers
        with the format and, if the recording ended properly, the number of rows with meta.json's.
        Raises `FormatError` or `RecordingError`, which name the file and what to do.
        """
        for table in tables or self.tables:
            segments = self._listed(table)
            if verify:
                verify_bytes(segments, complete=self.meta.complete)
            check_columns(segments, self._schemas[table])
            counted = self.meta.tables.get(table)
            expected = counted.rows if counted else 0
            if self.meta.complete and self.rows(table) != expected:
                raise RecordingError(
                    f"{self.path / table} has {self.rows(table)} rows, and {META_FILE} counts "
                    f"{expected}: segments are missing at its end; copy the recording again"
                )
            self._checked.add(table)

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """Collect a frame made from this recording's tables.

        Raises `RecordingError` where polars would raise errors of its own, or panic.
        """
        with reading(str(self.path)):
            return frame.collect()

    def _stored(self, table: str) -> pl.LazyFrame:
        segments = self._listed(table)
        if table not in self._checked:
            self.check(table, verify=self._verify)
        return scan(segments, self._schemas[table])

    def _listed(self, table: str) -> Sequence[Segment]:
        """The segments of a table; for those that its recorder has merged meanwhile, the new ones."""
        segments = self._segments[table]
        if self.meta.complete or all(segment.file.exists() for segment in segments):
            return segments
        try:
            found = list_segments(self.path / table, segments[0].number)
        except RecordingError as error:
            now = read_meta(self.path).tables.get(table)
            if now is None or now.first_segment <= segments[0].number:
                return segments  # reading them will say what is missing
            raise RecordingError(
                f"{self.path} has dropped the oldest rows of {table} since it was opened, to keep its"
                " quota; open it again"
            ) from error
        self._segments[table] = [each for each in found if each.number <= segments[-1].last]
        self._checked.discard(table)
        self._rows.pop(table, None)
        return self._segments[table]

    def thread_contexts(self) -> ThreadContexts | None:
        """The logical context of each thread at any time; None: no thread was in one."""
        flows = self._stored("flows")
        if self.rows("flows") == 0:
            return None
        with self._loading:
            if self._contexts is None:
                births = self.processes.filter(pl.col("event").is_in(BIRTHS))
                self._contexts = ThreadContexts(
                    self.collect(flows), self.collect(births.select("tgid", "tid", "time_ns"))
                )
            return self._contexts

    def _context(self, time_ns: pl.Expr) -> pl.Expr:
        """The logical context of the threads `tgid`, `tid` at a time; a null time: 0."""
        contexts = self.thread_contexts()
        return readable.CONTEXT if contexts is None else contexts.expression(time_ns)

    def syscall_name(self, number: str) -> pl.Expr:
        """The name of the system call whose number is in the column `number`; null for null."""
        return readable.syscall_name(number, self.meta.host.machine)


def _with_after(stored: pl.LazyFrame, after: Mapping[str, Sequence[str]]) -> list[str]:
    """The stored columns, each followed by those that reading adds to it."""
    columns = []
    for name in stored.collect_schema():
        columns += [name, *after.get(name, ())]
    return columns


def _require_recording(path: Path) -> None:
    """Raise `RecordingError`, with what was probably meant, unless `path` has a meta.json."""
    if (path / META_FILE).exists():
        return
    # A file or a table within one; a folder of recordings; a name that is nearly right.
    near = [path.parent] if (path.parent / META_FILE).exists() else []
    if path.is_dir():
        near += sorted(path.glob(f"*{SUFFIX}"))
        problem = f"{path} is not a recording: it has no {META_FILE}"
    elif path.exists():
        problem = f"{path} is not a recording: it is a file, and a recording is a directory"
    else:
        problem = f"there is no recording {path}"
        if path.name:
            near += [path.with_name(path.name + SUFFIX), path.with_name(path.stem)]
        others = [other.name for other in path.parent.glob(f"*{SUFFIX}")]
        near += [path.with_name(name) for name in difflib.get_close_matches(path.name, others, n=1)]
    for candidate in near:
        if (candidate / META_FILE).exists():
            raise RecordingError(f"{problem}; did you mean {candidate}?")
    raise RecordingError(problem)
