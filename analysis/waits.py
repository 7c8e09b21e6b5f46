"""What a thread waits for while it is off the CPU, by its state and the call that it is in."""

from __future__ import annotations

from typing import Final

import polars as pl

from scope_ebpf.analysis import parts
from scope_ebpf.recording.readable import syscall_numbers

# Calls that wait for anything to happen, and for nothing in particular.
_IDLE: Final = ["pause", "rt_sigsuspend", "rt_sigtimedwait", "sigtimedwait", "sched_yield"]

NETWORK: Final = "network"
LOCK: Final = "lock"
DISK: Final = "disk"
SLEEP: Final = "sleep"
STOPPED: Final = "stopped"
UNKNOWN: Final = "unknown"
WAIT_KIND: Final = pl.Enum([NETWORK, LOCK, DISK, SLEEP, STOPPED, UNKNOWN])


def wait_kind(machine: str, timed_out: pl.Expr | None = None) -> pl.Expr:
    """`wait_kind` of rows of `Recording.offcpu`; `number` and `state` are needed.

    - `network`: it moves bytes, connects, or waits with poll and its like until that is possible.
      Which of these calls were on a file, the call alone does not tell: then they wait in state D
    - `lock`: futex and other locks, the GIL among them
    - `disk`: uninterruptible (state D), or in a call that waits for a disk. On a lock of the kernel
      that is not true, but the state does not tell
    - `sleep`: sleeping, waiting for a child or a signal; with `timed_out` also those polls in which
      nothing came
    - `stopped`: by a signal or a tracer
    """

    def calls(*kinds: int) -> pl.Expr:
        names = [name for kind in kinds for name in parts.CALLS[kind]]
        return pl.col("number").is_in(syscall_numbers(machine, names))

    state = pl.col("state").cast(pl.String)
    sleeps = calls(parts.AWAIT, parts.SLEEP, parts.CHILD)
    sleeps |= pl.col("number").is_in(syscall_numbers(machine, _IDLE))
    if timed_out is not None:
        sleeps |= calls(parts.POLL) & timed_out
    kinds = {
        STOPPED: state.is_in(["T", "t"]),
        DISK: ((state == "D") & ~calls(parts.CHILD).fill_null(value=False)) | calls(parts.DISK),
        SLEEP: sleeps | (state == "I"),
        NETWORK: calls(parts.MOVE, parts.POLL, parts.CONNECT),
        LOCK: calls(parts.LOCK),
    }
    # The first that holds wins; null, as of a row in no call, holds nowhere.
    cases = [pl.when(case).then(pl.lit(kind, dtype=WAIT_KIND)) for kind, case in kinds.items()]
    return pl.coalesce(*cases, pl.lit(UNKNOWN, dtype=WAIT_KIND)).alias("wait_kind")
