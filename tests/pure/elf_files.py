"""Small ELF files, made of bytes: code at one address, data at another."""

from __future__ import annotations

import struct
from pathlib import Path

CODE_AT, DATA_AT = 0x1000, 0x4000
HEADERS_AT, CODE_OFFSET, DATA_OFFSET = 64, 0x200, 0x2200
X86_64, AARCH64 = 62, 183
LOAD, DYNAMIC = 1, 2
EXECUTABLE, WRITABLE = 5, 6
RELATIVE = 8  # R_X86_64_RELATIVE


def library(
    folder: Path,
    code: bytes,
    data: bytes = b"",
    relocations: list[tuple[int, int, int]] | None = None,
    machine: int = X86_64,
) -> Path:
    """A library without sections: code at CODE_AT, data at DATA_AT (in the file at *_OFFSET).

    Args:
        relocations: (address, type, addend) of each.
    """
    assert len(code) <= DATA_OFFSET - CODE_OFFSET
    rows = b"".join(struct.pack("<QQq", *row) for row in relocations or [])
    data += bytes(-len(data) % 8)
    table_at = DATA_AT + len(data)
    tags_at = table_at + len(rows)
    # STRTAB, RELA, RELASZ, RELAENT, NULL
    tags = struct.pack("<10Q", 5, DATA_AT, 7, table_at, 8, len(rows), 9, 24, 0, 0)
    content = data + rows + tags
    segments = [
        (LOAD, EXECUTABLE, CODE_OFFSET, CODE_AT, len(code)),
        (LOAD, WRITABLE, DATA_OFFSET, DATA_AT, len(content)),
        (DYNAMIC, WRITABLE, DATA_OFFSET + tags_at - DATA_AT, tags_at, len(tags)),
    ]
    table = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, 8)
        for kind, flags, offset, address, size in segments
    )
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01" + bytes(9), 3, machine, 1, 0, HEADERS_AT, 0, 0,
        64, 56, len(segments), 64, 0, 0,
    )  # fmt: skip
    file = folder / "library.so"
    whole = (header + table).ljust(CODE_OFFSET, b"\0") + code
    file.write_bytes(whole.ljust(DATA_OFFSET, b"\0") + content)
    return file
