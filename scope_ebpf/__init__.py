"""Traces running Python services from outside their processes, with eBPF.

>>> from scope_ebpf import open_recording
>>> recording = open_recording("shop.scope")  # doctest: +SKIP
>>> recording.syscalls.filter(tgid=1234).collect()  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from scope_ebpf.errors import ScopeError

if TYPE_CHECKING:
    from scope_ebpf.recording.reader import Recording, open_recording

__all__ = ["Recording", "ScopeError", "open_recording"]


def __getattr__(name: str) -> object:
    # Not at the top: it imports polars, and `scope-ebpf --help` should not wait for that.
    if name in {"Recording", "open_recording"}:
        from scope_ebpf.recording import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
