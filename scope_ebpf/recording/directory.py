"""The directory of a recording, before anything is in it.

Apart from the rest so that nothing here needs polars: it takes 0.15 s to import, and the probes shall be at
work before.
"""

import os
import shutil
from pathlib import Path

from scope_ebpf.errors import RecordingError, UsageError

SUFFIX = ".scope"
META_FILE = "meta.json"
DIRECTORY_MODE = 0o700


def recording_path(name: str | Path) -> Path:
    """The directory of a recording of that name: with .scope at its end.

    Raises:
        UsageError: it is no name, such as an empty one or that of a parent directory.
    """
    path = Path(name)
    if path.name in ("", ".."):
        raise UsageError(
            f"cannot name a recording {str(name)!r}: that is no name of a file; give one such as"
            " shop.scope with -o"
        )
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def create_directory(path: Path, owner: tuple[int, int] | None = None) -> None:
    """Make the directory of a new recording, for its owner only.

    Raises:
        RecordingError: it exists, or cannot be made there.
    """
    try:
        path.mkdir(mode=DIRECTORY_MODE)
        if owner is not None and owner != (os.geteuid(), os.getegid()):
            try:
                # not through a link that somebody put there in the meantime
                os.chown(path, *owner, follow_symlinks=False)
            except OSError:
                path.rmdir()
                raise
    except FileExistsError as error:
        raise RecordingError(
            f"will not overwrite {path}: it exists; choose another name with -o, or remove it"
        ) from error
    except OSError as error:
        raise RecordingError(
            f"cannot create {path}: {error.strerror}; choose another place with -o"
        ) from error


def remove_unused(path: Path) -> None:
    """Take away the directory of a recording that did not begin."""
    if not (path / META_FILE).exists():
        shutil.rmtree(path, ignore_errors=True)
