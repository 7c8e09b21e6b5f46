"""meta.json: what a recording is of, how complete it is, and what is needed to read its tables.

The file carries a checksum of its content: a flipped bit in a clock offset or a count would
otherwise give wrong times or rows that nobody notices.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import types
import typing
import zlib
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from scope_ebpf.errors import FormatError, RecordingError
from scope_ebpf.recording.directory import META_FILE
from scope_ebpf.recording.schema import FORMAT_VERSION

# Ranges that reading enforces. A count fits what Parquet and JavaScript's readers call an integer.
Count = Annotated[int, range(2**63)]
Signed = Annotated[int, range(-(2**63), 2**63)]

# A command line per target makes some kilobytes; more than this is not ours and not worth parsing.
_MAX_BYTES: Final = 64 << 20
_NEXT_STEP: Final = "copy the recording again from where it was made"

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine that was recorded."""

    name: str
    kernel: str  # uname -r
    machine: str  # uname -m: tells which table of system calls applies
    boot_id: str
    cpus: Count


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What to add to the recording's times, which are CLOCK_MONOTONIC; sampled at the start."""

    realtime_offset_ns: Signed  # gives nanoseconds since 1970, UTC
    boottime_offset_ns: Signed  # gives CLOCK_BOOTTIME, which goes on during suspend


@dataclass(frozen=True, kw_only=True)
class Target:
    """A process that the recording was asked for. Its children are in the table `processes`."""

    tgid: Count
    comm: str
    cmdline: list[str]


@dataclass(frozen=True, kw_only=True)
class OwnTable:
    """A table that a program of the user's filled (--bcc-probe)."""

    name: str
    source: str  # the program's file
    output: str  # the map in it that the rows were submitted to
    columns: list[list[str]]  # name and type of each: recording.own_tables.COLUMN_TYPES


@dataclass(frozen=True, kw_only=True)
class TableCount:
    """Events of one table: emitted by the kernel = rows + dropped + lost.

    Of `processes`, `interpreters`, `flows`, `connections`, `stacks` and `codes`, what still counts is
    written again before older rows are dropped.
    """

    rows: Count  # in segments that have their final name
    lost: Count
    dropped: Count = 0  # rows of older segments, which the quota removed
    first_segment: Count = 1  # the number of the oldest one that was not removed


@dataclass(frozen=True, kw_only=True)
class RecorderUse:
    """What recording itself took."""

    tgid: Count
    cpu_seconds: float
    cpu_percent: float  # of one CPU, over the recording
    peak_rss_bytes: Count


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The content of meta.json. All times are CLOCK_MONOTONIC nanoseconds of the host."""

    format_version: Count = FORMAT_VERSION
    scope_ebpf_version: str
    complete: bool  # it ended properly; False while it runs, and after the recorder was killed
    host: Host
    clock: Clock
    started_ns: Count
    ended_ns: Count | None  # None while it runs
    command: list[str]  # how the recorder was called
    transport: str = "rings"  # how records came out of the kernel: rings or perf
    families: list[str]  # which groups of probes were on
    probes: list[str]  # that fill the table hits: what was asked for, and where it was found
    payload_bytes: Count  # how much of a payload was kept at most; 0: none
    sample_hz: Count  # how often a second of CPU time the stack of a running thread was taken
    long_wait_ns: Count  # waits in system calls that were as long got a stack
    redacted: bool  # payloads were masked before they were written
    scope: Literal["pids", "cgroup", "host"]
    cgroup: str | None
    targets: list[Target]
    tables: dict[str, TableCount]
    lost_tasks: Count  # threads that could not be taken up: nothing of them is recorded
    recorder: RecorderUse
    notes: list[str]  # plain sentences about what went wrong or was left out
    loader: str = "libbpf"  # what compiled and loaded the probes: libbpf or bcc
    own_tables: list[OwnTable] = field(default_factory=list)
    keep_bytes: Count | None = None  # the quota: older segments are removed when there is more,
    keep_ns: Count | None = None  # or when they are as old; None: no quota
    dropped_until_ns: Count | None = None  # of what was before this, nothing is left; None: all is

    shares_quota: bool = False  # the quota is for all recordings of its folder that say so

    @property
    def has_quota(self) -> bool:
        """Whether old segments may have been removed."""
        return self.keep_bytes is not None or self.keep_ns is not None


def read_meta(path: Path) -> Meta:
    """Read meta.json of the recording at `path`.

    Keys that this version does not know are ignored. Raises `RecordingError` if the file is missing
    or cannot be read, and `FormatError` if it is damaged or of another version of the format.

    >>> read_meta(Path("/nonexistent.scope"))
    Traceback (most recent call last):
    scope_ebpf.errors.RecordingError: /nonexistent.scope has no meta.json: it is not a recording
    """
    file = path / META_FILE
    content = _parse(_read(file), file)
    version = content.get("format_version")
    if type(version) is not int:
        raise _damaged(file, "it has no format_version")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format {version}, and this scope-ebpf reads format {FORMAT_VERSION}; "
            f"read it with {'a newer' if version > FORMAT_VERSION else 'an older'} scope-ebpf"
        )
    try:
        fits = content.pop("checksum", None) == _checksum(content)
    except RecursionError:
        fits = False
    if not fits:
        raise _damaged(file, "its checksum does not fit its content")
    meta = _build(Meta, content, "", file)
    if meta.ended_ns is not None and meta.ended_ns < meta.started_ns:
        raise _damaged(file, "ended_ns lies before started_ns")
    return meta


def write_meta(path: Path, meta: Meta, *, durable: bool = False) -> None:
    """Write meta.json of the recording at `path`: readers see the old one or the new one.

    `durable` waits until it would survive a power cut. That may take seconds on a busy disk, so it
    is for the first and the last writing, not for those between. Raises `RecordingError`.
    """
    content = asdict(meta)
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    file = path / META_FILE
    part = path / f".{META_FILE}.part"
    try:
        with suppress(FileNotFoundError):
            part.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(part, flags, 0o600), "w", encoding="ascii") as stream:
            stream.write(text)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        part.rename(file)
        if durable:
            _sync_directory(path)
    except OSError as error:
        raise RecordingError(f"cannot write {file}: {error.strerror}") from error


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read(file: Path) -> bytes:
    try:
        # O_NONBLOCK: a named pipe would make open() wait for ever.
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise _damaged(file, "it is not a regular file")
            data = stream.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise RecordingError(f"{file.parent} has no {META_FILE}: it is not a recording") from None
    except PermissionError as error:
        raise RecordingError(
            f"cannot read {file}: permission denied; recordings belong to who made them, "
            "often root: run with sudo, or change their owner"
        ) from error
    except OSError as error:
        raise RecordingError(f"cannot read {file}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise _damaged(file, f"it is larger than {_MAX_BYTES >> 20} MiB")
    return data


def _parse(data: bytes, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):  # bad UTF-8, bad JSON, a number of 5000 digits, [[[[…
        raise _damaged(file, "it is not JSON") from None
    if not isinstance(content, dict):
        raise _damaged(file, "it is not a JSON object")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(name)


def _checksum(content: dict[str, Any]) -> str:
    # Of the values, not of the bytes: white space and the order of keys carry no meaning.
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(canonical.encode('ascii')):08x}"


def _damaged(file: Path, why: str) -> FormatError:
    return FormatError(f"{file} is damaged: {why}; {_NEXT_STEP}")


def _build(into: type[T], value: object, where: str, file: Path) -> T:
    """A dataclass from a JSON object, with the types and ranges that its annotations demand."""
    if not isinstance(value, dict):
        raise _damaged(file, f"{where or 'it'} is not an object")
    hints = typing.get_type_hints(into, include_extras=True)
    arguments = {}
    for each in fields(into):  # type: ignore[arg-type]  # every caller passes a dataclass
        name = f"{where}.{each.name}" if where else each.name
        if each.name not in value:
            if each.default is not MISSING or each.default_factory is not MISSING:
                continue
            raise _damaged(file, f"{name} is missing")
        arguments[each.name] = _convert(hints[each.name], value[each.name], name, file)
    return into(**arguments)


def _convert(hint: Any, value: object, where: str, file: Path) -> Any:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, where, file)
    if origin is types.UnionType or origin is typing.Union:
        return None if value is None else _convert(parameters[0], value, where, file)
    if origin is list and isinstance(value, list):
        return [_convert(parameters[0], each, where, file) for each in value]
    if origin is dict and isinstance(value, dict):
        return {
            _text(name): _convert(parameters[1], each, f"{where}.{_text(name)}", file)
            for name, each in value.items()
        }
    if origin is Annotated:
        if type(value) is int and value in parameters[1]:  # bool is an int to isinstance
            return value
    elif origin is Literal:
        if isinstance(value, str) and value in parameters:
            return value
    elif hint is str and isinstance(value, str):
        return _text(value)
    elif hint is bool and isinstance(value, bool):
        return value
    elif (
        hint is float
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # JSON has 1e999, and integers of any length
    ):
        return float(value)
    raise _damaged(file, f"{where} has an impossible value")


def _text(value: str) -> str:
    # JSON can hold half a surrogate pair, as Python's names for undecodable bytes do, and nothing
    # can print that.
    return value.encode("utf-8", "backslashreplace").decode("utf-8")
