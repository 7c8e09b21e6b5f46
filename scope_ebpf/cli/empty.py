"""Why a recording has no requests or spans, or tells less of them: one sentence for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scope_ebpf.recording.reader import Recording


def what_is_less(recording: Recording) -> str | None:
    """What is known less well because families were left out; None: nothing."""
    families = recording.meta.families
    if "syscalls" not in families:
        return (
            "system calls were not recorded: what belongs to which request within a process is"
            " a guess at most; record with syscalls in --families"
        )
    if "offcpu" not in families:
        return (
            "off-CPU time was not recorded: where the time went is not known;"
            " record with offcpu in --families"
        )
    return None


def why_empty(recording: Recording) -> str:
    """The likely reason, and what to do."""
    meta = recording.meta
    if "messages" not in meta.families:
        return (
            f"the recording holds no messages (only {', '.join(meta.families)}); "
            "record with messages in --families"
        )
    if meta.payload_bytes == 0:
        return (
            "the recording holds no heads of payloads, which tell the protocol; "
            "record with --payload-bytes 512"
        )
    if recording.rows("messages") == 0:
        return "the traced processes neither sent nor received anything while they were recorded"
    return (
        "no traced process handled a request of a protocol that is known, or its connections were "
        "not seen; `scope-ebpf summary REC` shows what was traced and what was lost"
    )
