"""Why a recording tells nothing of stacks or of the GIL: one sentence each."""

from __future__ import annotations

from typing import Final

import polars as pl

from scope_ebpf.recording.reader import Recording

NO_PYTHON: Final = (
    "no Python process was looked into; "
    "`scope-ebpf summary REC` shows what was traced, and `scope-ebpf doctor` what works here"
)


def why_no_samples(recording: Recording) -> str:
    """Why there is no sample of what threads ran."""
    if "samples" in recording.meta.families and not recording.meta.sample_hz:
        return "the sampling clock was off; record with --sample-hz 99"
    if recording.rows("samples") == 0:
        return why_no_stacks(recording) or (
            "no thread of a traced Python process ran when the sampling clock ticked; "
            "record for longer, or with more load"
        )
    return "no sample is of a thread on the CPU; `scope-ebpf flame REC --offcpu` shows the waits"


def why_no_waits(recording: Recording) -> str:
    """Why there is no time off the CPU."""
    if "offcpu" in recording.meta.families:
        return "no traced thread was off the CPU; `scope-ebpf summary REC` shows what was lost"
    return _left_out(recording, "offcpu")


def why_no_gil(recording: Recording) -> str:
    """Why no thread waited for the GIL."""
    if "gil" not in recording.meta.families:
        return _left_out(recording, "gil")
    looked_into = recording.collect(recording.interpreters)
    if looked_into.is_empty():
        return NO_PYTHON
    if not looked_into["gil"].any():
        return f"waits for the GIL could not be told from others{_reason(looked_into)}"
    return "no thread waited for the GIL"


def why_no_stacks(recording: Recording) -> str | None:
    """Why there is no Python stack; None: they could be read."""
    if "samples" not in recording.meta.families:
        return _left_out(recording, "samples")
    looked_into = recording.collect(recording.interpreters)
    if looked_into.is_empty():
        return NO_PYTHON
    if not looked_into["stacks"].any():
        return f"Python stacks could not be read{_reason(looked_into)}"
    lost = recording.collect(
        recording.losses.filter(pl.col("table") == "samples").select(pl.col("lost").sum())
    ).item()
    return f"{lost:,} samples were lost; `scope-ebpf summary REC` shows when" if lost else None


def _reason(looked_into: pl.DataFrame) -> str:
    """The first reason that is known."""
    reasons = looked_into["reason"].drop_nulls().to_list()
    return f": {reasons[0]}" if reasons else ""


def _left_out(recording: Recording, family: str) -> str:
    return (
        f"the recording holds no {family} (only {', '.join(recording.meta.families)}); "
        f"record with {family} in --families"
    )
