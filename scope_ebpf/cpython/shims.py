"""Frames of CPython that are no function of anybody's, and yet look like one."""

from typing import Final

INIT_CLEANUP: Final = "__init__"
"""Name, and file, of `_Py_InitCleanup`, which from 3.13 on stands between a class that is called and its
__init__ once that call was specialised (Python/specialize.c; it begins in no line)."""


def is_init_cleanup(name: str | None, file: str | None) -> bool:
    """Whether a frame is that one; the file of a function would be a path or in angle brackets."""
    return name == file == INIT_CLEANUP
