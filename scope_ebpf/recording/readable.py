"""What reading adds to the stored columns: names for numbers, all as lazy expressions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import IntEnum
from functools import cache
from typing import Final

import polars as pl

from scope_ebpf.records import (
    CallStatus,
    ContextKind,
    ProcessEvent,
    RecordLimits,
    SampleReason,
)
from scope_ebpf.syscalls import errno_name, signal_name, syscall_names

_COMPAT: Final = int(RecordLimits.COMPAT_SYSCALL)
# A result in this range is -errno; anything else, also a high address, is a success (MAX_ERRNO of
# the kernel's include/linux/err.h).
_MAX_ERRNO: Final = 4095
_LAST_SIGNAL: Final = 64

# include/linux/sched.h. TASK_IDLE is a wait that counts for no load, TASK_DEAD the last moment.
_TASK_IDLE: Final = 0x402
_TASK_DEAD: Final = 0x80
_RTLOCK_WAIT_OR_FROZEN: Final = 0x1000 | 0x8000
# fs/proc/array.c shows the highest of these bits.
_STATE_LETTERS: Final = {0x40: "P", 0x20: "Z", 0x10: "X", 0x8: "t", 0x4: "T", 0x2: "D", 0x1: "S"}

CONTEXT: Final = pl.lit(0, dtype=pl.UInt64).alias("context")
"""The logical context where none was recorded: the thread itself."""


def _labels(values: type[IntEnum], prefix: str) -> list[str]:
    """The names by number. A number that is free gets a label that says so."""
    names = {int(value): value.name.removeprefix(prefix).lower() for value in values}
    return [names.get(number, f"unknown_{number}") for number in range(max(names) + 1)]


_STATUS: Final = _labels(CallStatus, "STATUS_")
_EVENT: Final = _labels(ProcessEvent, "PROCESS_")
_REASON: Final = _labels(SampleReason, "SAMPLE_")
_CONTEXT_KIND: Final = _labels(ContextKind, "CONTEXT_")

STATUS: Final = pl.Enum(_STATUS)
EVENT: Final = pl.Enum(_EVENT)
REASON: Final = pl.Enum(_REASON)
CONTEXT_KIND: Final = pl.Enum(_CONTEXT_KIND)
DIRECTION: Final = pl.Enum(["send", "receive"])
STATE: Final = pl.Enum(["R", "I", *_STATE_LETTERS.values()])


def _labelled(number: pl.Expr, labels: pl.Enum) -> pl.Expr:
    """The label with this number, as the physical value of an Enum; null for one without a label.

    replace_strict would say the same, but takes the whole column into memory before it gives the
    first row, also in the streaming engine (pola-rs/polars#24393).
    """
    physical = pl.UInt8 if len(labels.categories) < 256 else pl.UInt16
    return number.cast(physical, strict=False).cat.to(labels, strict=False)


def status() -> pl.Expr:
    """`status` as text: how much of a call or interval was seen."""
    return _labelled(pl.col("status"), STATUS)


def event() -> pl.Expr:
    """`event` as text: what happened to the process or thread."""
    return _labelled(pl.col("event"), EVENT)


def reason() -> pl.Expr:
    """`reason` as text: why a stack was taken."""
    return _labelled(pl.col("reason"), REASON)


def context_kind() -> pl.Expr:
    """`kind` as text: how a logical context came about."""
    return _labelled(pl.col("kind"), CONTEXT_KIND)


def signal() -> pl.Expr:
    """`signal_name`: the signal that ended a process; null for none."""
    return _labelled(pl.col("signal"), _signals()).cast(pl.String).alias("signal_name")


def error() -> pl.Expr:
    """`error`: the errno name of a failed call; null for a call that did not fail."""
    number = pl.when(pl.col("result").is_between(-_MAX_ERRNO, -1)).then(-pl.col("result"))
    return _labelled(number, _errors()).cast(pl.String).alias("error")


def syscall_name(number: str, machine: str) -> pl.Expr:
    """The name of the system call whose number the column `number` holds; null for null.

    `machine` is the recorded one, as in meta.json. A 32-bit call on x86-64 is named by the table of
    i386. A number that its table does not have gives `syscall_N`, or `compat_syscall_N`.
    """
    column = pl.col(number)
    native, compat = _syscalls(machine)
    return (
        pl.when(column < _COMPAT)
        .then(_labelled(column, native).cast(pl.String))
        .otherwise(_labelled(column - _COMPAT, compat).cast(pl.String))
        .alias(number)
    )


def syscall_numbers(machine: str, names: Collection[str]) -> list[int]:
    """The numbers of some system calls, also of 32-bit ones, as a recording has them.

    To choose rows by them is much faster than by names.
    """
    native, compat = _tables(machine)
    numbers = [number for number, name in native.items() if name in names]
    return numbers + [_COMPAT + number for number, name in compat.items() if name in names]


def _tables(machine: str) -> tuple[Mapping[int, str], Mapping[int, str]]:
    """The native table of system calls, and that of 32-bit ones."""
    compat = syscall_names("i386") if machine in {"x86_64", "amd64"} else {}
    return syscall_names(machine), compat


@cache
def _signals() -> pl.Enum:
    return pl.Enum([signal_name(number) for number in range(_LAST_SIGNAL + 1)])


@cache
def _errors() -> pl.Enum:
    return pl.Enum([errno_name(number) for number in range(_MAX_ERRNO + 1)])


@cache
def _syscalls(machine: str) -> tuple[pl.Enum, pl.Enum]:
    native, compat = _tables(machine)
    return (
        pl.Enum([native.get(number, f"syscall_{number}") for number in range(_COMPAT)]),
        pl.Enum([compat.get(number, f"compat_syscall_{number}") for number in range(_COMPAT)]),
    )


def direction() -> pl.Expr:
    """`direction` of a message, seen from the thread that made the call."""
    return (
        pl.when("receive")
        .then(pl.lit("receive", dtype=DIRECTION))
        .otherwise(pl.lit("send", dtype=DIRECTION))
        .alias("direction")
    )


def stream() -> pl.Expr:
    """`stream` of a message: the connection's stream in the direction of the message."""
    return pl.when("receive").then("receive_stream").otherwise("send_stream").alias("stream")


def state() -> pl.Expr:
    """`state` as the letter that ps shows."""
    bits = pl.col("state")
    cases = [(bits & _TASK_IDLE == _TASK_IDLE, "I")]
    cases += [(bits & bit != 0, letter) for bit, letter in _STATE_LETTERS.items()]
    cases += [(bits & _TASK_DEAD != 0, "X"), (bits & _RTLOCK_WAIT_OR_FROZEN != 0, "D")]
    cases += [(bits.is_not_null(), "R")]
    # The first case that holds wins.
    letters = [pl.when(case).then(pl.lit(letter, dtype=STATE)) for case, letter in cases]
    return pl.coalesce(letters).alias("state")
