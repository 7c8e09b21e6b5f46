"""Recordings that share a folder and a quota: those of earlier runs go before the newest one's rows do."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from scope_ebpf.errors import RecordingError, ScopeError
from scope_ebpf.recording.directory import SUFFIX
from scope_ebpf.recording.meta import Meta, read_meta

BLOCK_BYTES = 512  # of st_blocks, whatever the file system's are


@dataclass(frozen=True)
class Earlier:
    """A recording of an earlier run."""

    path: Path
    ended_realtime_ns: int
    disk_bytes: int


def earlier_recordings(folder: Path, without: Path) -> list[Earlier]:
    """The recordings that were made for this folder's quota, the oldest first.

    Others in the folder were put there by somebody, and are left alone: so is what cannot be read.
    """
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        if path == without or path.is_symlink():
            continue
        try:
            meta = read_meta(path)
        except ScopeError:
            continue
        if meta.shares_quota:
            found.append(Earlier(path, _ended(path, meta), disk_bytes(path)))
    return sorted(found, key=lambda earlier: earlier.ended_realtime_ns)


def remove(earlier: Earlier) -> None:
    """Remove a recording of an earlier run.

    Raises:
        RecordingError: it cannot be removed.
    """
    try:
        # without its meta.json, which goes first, what may be left of it is no recording
        (earlier.path / "meta.json").unlink(missing_ok=True)
        shutil.rmtree(earlier.path)
    except OSError as error:
        raise RecordingError(
            f"cannot remove {earlier.path}: {error.strerror}; the quota cannot be kept"
        ) from error


def _ended(path: Path, meta: Meta) -> int:
    if meta.ended_ns is not None:
        return meta.ended_ns + meta.clock.realtime_offset_ns
    try:
        return (path / "meta.json").stat().st_mtime_ns
    except OSError:
        return time.time_ns()


def disk_bytes(path: Path) -> int:
    """What the files below a folder take on the disk."""
    total = 0
    # not Path.rglob(): before Python 3.13 it fails when a folder is removed meanwhile, by another recorder
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * BLOCK_BYTES
            except OSError:  # removed meanwhile
                continue
    return total
