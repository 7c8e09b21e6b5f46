"""Files that commands write their results to."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from scope_ebpf.errors import ScopeError


def check_free(file: Path, *, force: bool) -> None:
    """Raise ScopeError unless a result may be written to this path."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ScopeError(f"cannot write {file}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise ScopeError(f"cannot write {file}: it is a directory")
    if stat.S_ISREG(mode) and not force:
        raise ScopeError(f"will not overwrite without --force: {file}")


@contextmanager
def created(file: Path, *, force: bool) -> Iterator[BinaryIO]:
    """The file, written aside: what was there stays as it is until the new one is complete."""
    try:
        if file.exists() and not file.is_file():  # a pipe or device: nothing to be replaced
            with file.open("wb") as stream:
                yield stream
            return
        final = file.resolve()  # what a link points to is replaced, not the link
        part = final.with_name(f".{final.name}.part.{os.getpid()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(part, flags, 0o600), "wb") as stream:
                yield stream
            check_free(final, force=force)  # somebody may have been faster
            part.replace(final)
        finally:
            with suppress(FileNotFoundError):
                part.unlink()
    except OSError as error:
        raise ScopeError(f"cannot write {file}: {error.strerror or error}") from error
