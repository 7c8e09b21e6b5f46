"""The part of a capture that follows CPython: probes in its files, and what the probes need to know of it.

Probes are attached once, when the recording begins, to the files of interpreters that the targets have
mapped or may start: later the privileges for that are gone. What a process's interpreter looks like is read
from its memory whenever one is met: at the beginning, and when a process executes another program. A fork
has its parent's, which the kernel side knows by itself.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scope_ebpf import records
from scope_ebpf.errors import FormatError, LoadError, ScopeError
from scope_ebpf.loaders.libbpf import BpfObject
from scope_ebpf.loaders.probed_files import MetFiles
from scope_ebpf.loaders.python.files import probed_files
from scope_ebpf.loaders.python.interpreters import (
    Interpreter,
    NotReady,
    Unsupported,
    find_interpreter,
)
from scope_ebpf.loaders.python.sites import PythonSite, file_sites
from scope_ebpf.loaders.python.states import has_own_pids
from scope_ebpf.loaders.ring import array_in
from scope_ebpf.loaders.shared_globals import SharedGlobals
from scope_ebpf.records import InterpreterFlags, PythonLimits

FAMILIES = ("samples", "contexts", "gil")
UPROBES = (
    "on_context_copied",
    "on_context_made",
    "on_put",
    "on_put_array",
    "on_got",
    "on_code_freed",
)
# What events of sites are for, and by which family they are wanted.
PROGRAM_OF = {
    "context_copied": ("contexts", "on_context_copied"),
    "context_made": ("contexts", "on_context_made"),
    "queue_put": ("contexts", "on_put"),
    "queue_got": ("contexts", "on_got"),
    "code_freed": ("samples", "on_code_freed"),
}
# A process that was taken up may load greenlets later: it is looked at again after this, and each time after
# twice as long, up to the second.
LATER_SECONDS = (0.5, 64.0)
# At the beginning and in each round of draining no more time than this goes into looking at processes.
FIRST_SECONDS = 0.2
ROUND_SECONDS = 0.02
# An interpreter that is just starting is looked at again after this, and given up after that.
AGAIN_SECONDS = 0.02
PATIENCE_SECONDS = 30.0


def program_for(site: PythonSite) -> str | None:
    """The program for a site; None: there is none for where the object is."""
    family_and_program = PROGRAM_OF.get(site.event)
    if family_and_program is None:
        return None
    program = family_and_program[1]
    if program == "on_put":
        if site.argument != 1:
            return None
        return "on_put_array" if site.indirect else "on_put"
    return program


class PythonWatch:
    """The interpreters among what is recorded."""

    def __init__(self, opened: BpfObject, shared: SharedGlobals, families: Iterable[str]) -> None:
        """Map what user space and the probes share; the object is loaded."""
        self._object = opened
        self._families = frozenset(families)
        size = records.INTERPRETER.itemsize
        stride = -(-size // 8) * 8  # an array's elements begin at multiples of 8 bytes
        count = int(PythonLimits.INTERPRETERS)
        memory = opened.map_memory("interpreters", count * stride, writable=True)
        self._interpreters = array_in(memory, records.INTERPRETER, count)
        self._wanted = shared["python_wanted"]
        self._changes = shared["interpreter_changes"]
        self._files = MetFiles()
        self._used = 0
        self._free: list[int] = []  # elements of processes that are gone
        self._taken_up = 0
        # when to look at a process, and until when it may still be starting
        self._due: dict[int, tuple[float, float]] = {}
        # processes without greenlets: their element, when to look again, and after how long then
        self._later: dict[int, tuple[int, float, float]] = {}

    def attach(self, tgids: Iterable[int], commands: Iterable[Path]) -> list[str]:
        """Attach probes to the interpreters that these processes use or may use.

        Returns sentences about what could not be attached.
        """
        notes = []
        for path in probed_files(tgids, commands):
            if not self._files.is_new(path):
                continue
            try:
                sites = file_sites(path)
            except FormatError:
                continue
            try:
                for site in sites:
                    program = program_for(site)
                    if program is None or PROGRAM_OF[site.event][0] not in self._families:
                        continue
                    self._object.attach_uprobe(
                        program, site.path, site.offset, at_return=site.at_return
                    )
                    if site.emulated is False:
                        notes.append(
                            f"each call of {site.function} in {path} costs 10 µs more: no place in it"
                            f" serves that the kernel emulates ({site.instruction} is single-stepped)"
                        )
            except LoadError as error:
                notes.append(f"contexts and work items of {path} are not told apart: {error}")
        self._wanted[0] = 1
        return notes

    def expect(self, tgids: Iterable[int]) -> None:
        """Look at these processes when there is time."""
        now = time.monotonic()
        self._due.update(dict.fromkeys(tgids, (now, now + PATIENCE_SECONDS)))

    def look(self, seconds: float = ROUND_SECONDS) -> list[dict[str, Any]]:
        """Look at what is due, for about that long; returns rows of `interpreters`.

        Who changed `interpreters_changed` has to have the running threads looked up again.
        """
        rows: list[dict[str, Any]] = []
        if not self._due and not self._later:
            return rows
        now = time.monotonic()
        until = now + seconds
        rows += self._look_again(now, until)
        for tgid, (due, patience) in list(self._due.items()):
            if due > now:
                continue
            if time.monotonic() > until:
                break
            del self._due[tgid]
            try:
                found = find_interpreter(tgid)
            except ScopeError:  # it is gone, or may not be looked at
                continue
            if isinstance(found, NotReady):
                if now < patience:
                    self._due[tgid] = (now + AGAIN_SECONDS, patience)
            elif isinstance(found, Unsupported):
                rows.append(row(tgid, reason=found.reason))
            elif found is not None:
                rows.append(self._take_up(found))
        return rows

    def _look_again(self, now: float, until: float) -> list[dict[str, Any]]:
        rows = []
        for tgid, (element, due, pause) in list(self._later.items()):
            if due > now:
                continue
            if time.monotonic() > until:
                break
            del self._later[tgid]
            try:
                found = find_interpreter(tgid)
            except ScopeError:
                continue
            if not isinstance(found, Interpreter):
                continue
            greenlets = int(found.record["flags"]) & InterpreterFlags.INTERPRETER_GREENLETS
            if greenlets:
                self._interpreters[element]["flags"] |= greenlets
                rows.append(self._row_of(found))
            else:
                longer = min(2 * pause, LATER_SECONDS[1])
                self._later[tgid] = (element, now + longer, longer)
        return rows

    def _take_up(self, found: Interpreter) -> dict[str, Any]:
        element = self._element()
        if element is None:
            reason = f"more than {PythonLimits.INTERPRETERS - 1} interpreters run at once"
            return row(found.tgid, path=found.path, reason=reason)
        self._taken_up += 1
        self._interpreters[element] = found.record
        if has_own_pids(found.tgid):  # its threads' numbers of themselves are not ours
            self._interpreters[element]["tstate_native_thread_id"] = 0
            self._interpreters[element]["thread_tid"] = 0
        self._object.update("pythons", found.tgid, element)
        self._changes[0] += 1
        if not found.greenlets and "contexts" in self._families:
            pause = LATER_SECONDS[0]
            self._later[found.tgid] = (element, time.monotonic() + pause, pause)
        return self._row_of(found)

    def _element(self) -> int | None:
        """An element of `interpreters` that no process has; None: there is none."""
        if self._used + 1 < PythonLimits.INTERPRETERS:
            self._used += 1
            return self._used
        if not self._free:
            held = set[int]()
            # twice: a fork may get its entry behind where the first look has come to
            for _ in range(2):
                values = self._object.elements("pythons", 4, 4)
                held.update(int.from_bytes(value, "little") for value in values)
            self._free = [each for each in range(1, self._used + 1) if each not in held]
            gone = set(self._free)
            self._later = {
                tgid: later for tgid, later in self._later.items() if later[0] not in gone
            }
        return self._free.pop() if self._free else None

    def _row_of(self, found: Interpreter) -> dict[str, Any]:
        flags = int(found.record["flags"])
        return row(
            found.tgid,
            version=".".join(map(str, found.version)),
            path=found.path,
            stacks=bool(flags & InterpreterFlags.INTERPRETER_STACKS),
            contexts=True,
            greenlets=bool(flags & InterpreterFlags.INTERPRETER_GREENLETS),
            gil=bool(flags & InterpreterFlags.INTERPRETER_GIL),
        )

    @property
    def changes(self) -> int:
        """Counts up whenever an interpreter was taken up."""
        return self._taken_up

    def stop(self) -> None:
        """Let the probes do nothing from now on."""
        self._wanted[0] = 0


def row(tgid: int, **known: Any) -> dict[str, Any]:
    """A row of `interpreters`, of which nothing else is known."""
    nothing = {
        "version": None,
        "path": None,
        **dict.fromkeys(("stacks", "contexts", "greenlets", "gil"), False),
        "reason": None,
    }
    return {"time_ns": time.monotonic_ns(), "tgid": tgid, **nothing, **known}


def executed(wide: NDArray[np.void]) -> list[int]:
    """The processes that executed a program, among a CPU's wide slots."""
    chosen = wide[wide["kind"] == records.RecordKind.RECORD_PROCESS]
    if not len(chosen):
        return []
    raw = chosen.view(np.uint8).reshape(len(chosen), chosen.dtype.itemsize)
    rows = np.ascontiguousarray(raw[:, : records.PROCESS.itemsize]).view(records.PROCESS)[:, 0]
    return [int(tgid) for tgid in rows["tgid"][rows["event"] == records.ProcessEvent.PROCESS_EXEC]]
