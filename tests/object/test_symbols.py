"""Names of native code: of a small program and a small library, and of what has none."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.symbols import MAPPINGS_AGAIN_SECONDS, Mapping, NativeFile, Symbols
from scope_ebpf.loaders.symbols import executable_mappings as mappings
from tests.live.recording import Target, compiled
from tests.pure.elf_files import CODE_OFFSET, library

pytestmark = pytest.mark.object

# Two names of one function; a hole between functions; one without a size, at the end of its section.
SOURCE = """
.text
.globl public_name, __own_name
.type public_name, @function
.type __own_name, @function
public_name:
__own_name:
    .fill 16, 1, 0x90
.size public_name, 16
.size __own_name, 16
    .fill 16, 1, 0x90
.type hidden, @function
hidden:
    .fill 16, 1, 0x90
.size hidden, 16
.section .other, "ax"
.globl in_assembler
.type in_assembler, @function
in_assembler:
    .fill 32, 1, 0x90
.section .last, "ax"
    .fill 32, 1, 0x90
.section .note.GNU-stack, "", @progbits
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """libexample.so, whose soname is another one."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder: Path = tmp_path_factory.mktemp("example")
    source, file = folder / "example.s", folder / "libexample.so"
    source.write_text(SOURCE)
    command = ["gcc", "-shared", "-nostdlib", "-Wl,-soname,libexample.so.1", "-o", str(file)]
    subprocess.run([*command, str(source)], check=True)
    return file


def offsets(file: Path) -> dict[str, int]:
    """Where functions are in a file whose sections are loaded where they are in it."""
    out = subprocess.run(["nm", file], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in out.splitlines())
    addresses = {row[2]: int(row[0], 16) for row in rows if len(row) == 3}
    headers = subprocess.run(["readelf", "-lW", file], capture_output=True, text=True, check=True)
    loads = [line.split() for line in headers.stdout.splitlines() if line.strip()[:5] == "LOAD "]
    start = next(int(row[2], 16) - int(row[1], 16) for row in loads if "E" in row[6:8])
    return {name: address - start for name, address in addresses.items()}


def test_functions_of_a_library(example):
    file, at = NativeFile(example), offsets(example)
    assert file.name == "libexample.so.1"
    start = at["public_name"]
    assert at["__own_name"] == start
    names = [file.function(offset) for offset in range(start, start + 48)]
    assert names == ["public_name"] * 16 + [None] * 16 + ["hidden"] * 16
    start = at["in_assembler"]
    assert file.function(start + 31) == "in_assembler"
    assert file.function(start + 32) is None  # another section
    assert file.function(1 << 40) is None


def test_a_stripped_library_has_what_it_exports(example, tmp_path):
    stripped, at = tmp_path / "libstripped.so", offsets(example)
    subprocess.run(["strip", "-o", stripped, example], check=True)
    file = NativeFile(stripped)
    assert file.function(at["public_name"]) == "public_name"
    assert file.function(at["hidden"]) is None


def test_files_without_symbols(tmp_path):
    file = NativeFile(library(tmp_path, bytes(64)))
    assert file.name == "library.so"
    assert file.function(CODE_OFFSET) is None
    text = tmp_path / "text"
    text.write_text("text")
    with pytest.raises(FormatError, match=r"cannot read .*: it is no ELF file"):
        NativeFile(text)
    with pytest.raises(FormatError, match="No such file"):
        NativeFile(tmp_path / "missing")


def test_mappings():
    text = """\
7f03-7f04 r-xp 00000000 00:00 0
7f00-7f01 r-xp 00001000 08:01 77   /srv/my app/libx.so (deleted)
7f01-7f02 r--p 00001000 08:01 77   /srv/my app/libx.so
7f05-7f06 r-xp 00000000 00:00 0    [vdso]
"""
    assert mappings(text) == [
        Mapping(0x7F00, 0x7F01, 0x1000, 77, "/srv/my app/libx.so (deleted)"),
        Mapping(0x7F03, 0x7F04, 0, 0, ""),
        Mapping(0x7F05, 0x7F06, 0, 0, "[vdso]"),
    ]


@pytest.mark.parametrize("namespace", [(), ("unshare", "--mount")])
def test_code_of_a_process(namespace, example, tmp_path):
    """Of all kinds; of a library that it loads later; of a file that is gone; and when it is gone itself."""
    if namespace and subprocess.run([*namespace, "true"], check=False).returncode:
        pytest.skip("needs root: a mount namespace")
    program, loaded = compiled("native", tmp_path), tmp_path / "libexample.so"
    shutil.copy(example, loaded)
    symbols = Symbols()
    with Target(*namespace, program, loaded) as target:
        own, libc, made, vdso, stack = target.note()

        def name(address: int) -> str | None:
            return symbols.name(target.pid, address)

        assert name(own) == name(own + 1) == "native own_function"
        assert name(libc) == f"{libc_name()} getppid"
        assert name(made) == name(made + 4095) == "[jit]"
        assert name(vdso) == "[vdso]"
        assert name(stack) is None
        assert name(0) is None
        time.sleep(MAPPINGS_AGAIN_SECONDS)
        target.process.stdin.write("x\n")  # type: ignore[union-attr]
        public, assembler = target.note()
        assert name(public) == "libexample.so.1 public_name"
        assert name(assembler + 5) == "libexample.so.1 in_assembler"
        loaded.unlink()
        symbols.forget(target.pid)
        assert name(public) == "libexample.so"  # what had the name may be another one
        assert Symbols().name(target.pid, own) == "native own_function"
    time.sleep(MAPPINGS_AGAIN_SECONDS)
    symbols.forget(target.pid)
    assert name(own) is None


def libc_name() -> str:
    return "libc.so.6" if platform.libc_ver()[0] == "glibc" else "libc.musl-x86_64.so.1"
