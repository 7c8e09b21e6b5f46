"""Where uprobes go in a TLS library: small libraries with the shapes that OpenSSL's code has."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import SharedLibrary
from scope_ebpf.loaders.tls import (
    Site,
    common_callee,
    find_libraries,
    library_sites,
    mapped_files,
    sites,
)

pytestmark = pytest.mark.object

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64: its assembler")
WRAPPER = """
{name}:
    sub $0x18, %rsp
    mov $0x000000e8, %eax
    call {callee}
    add $0x18, %rsp
    ret
"""
INNER = """
{name}:
    {begin}
    push %r13
    push %rbx
    pop %rbx
    pop %r13
    ret
"""


def library(folder: Path, functions: dict[str, str], begin: str = "") -> SharedLibrary:
    """Exported wrappers by name, with the function that each calls."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    text = ".text\n" + "".join(
        INNER.format(name=name, begin=begin) for name in sorted(set(functions.values()))
    )
    for name, callee in functions.items():
        text += f".globl {name}\n.type {name}, @function\n"
        text += WRAPPER.format(name=name, callee=callee)
    source, file = folder / "ssl.s", folder / "libssl.so.3"
    source.write_text(text + '.section .note.GNU-stack,"",@progbits\n')
    subprocess.run(["gcc", "-shared", "-nostdlib", "-o", file, source], check=True)
    return SharedLibrary(file)


def code_at(found: SharedLibrary, site: Site) -> bytes:
    return found.code(site.offset, 2)


@X86
@pytest.mark.parametrize("begin", ["", "endbr64"])
def test_the_function_inside_of_both_forms(begin, tmp_path):
    names = {"SSL_read": "r", "SSL_read_ex": "r", "SSL_write": "w", "SSL_write_ex": "w"}
    found = library(tmp_path, names, begin)
    got = sites(found)
    assert [(site.program, site.at_return) for site in got] == [
        ("on_tls_read_ex", False), ("on_tls_return", True),
        ("on_tls_write_ex", False), ("on_tls_return", True),
    ]  # fmt: skip
    assert {code_at(found, site) for site in got} == {b"\x41\x55"}  # push %r13
    assert got[0].offset != got[2].offset
    assert library_sites(found.path) == got


@X86
def test_from_3_3_on_the_function_has_flags(tmp_path):
    names = {"SSL_read": "r", "SSL_read_ex": "r", "SSL_write": "w", "SSL_write_ex2": "w"}
    got = sites(library(tmp_path, {**names, "SSL_write_ex": "r"}))
    assert [site.program for site in got[2:]] == ["on_tls_write_flags", "on_tls_return"]


@X86
def test_forms_that_do_not_agree_are_probed_themselves(tmp_path):
    names = {"SSL_read": "r", "SSL_read_ex": "other", "SSL_write": "w"}
    found = library(tmp_path, names)
    assert common_callee(found, "SSL_read", "SSL_read_ex") is None
    places = {site.program: site.offset for site in sites(found) if not site.at_return}
    assert places == {
        "on_tls_read": found.function("SSL_read"),
        "on_tls_read_ex": found.function("SSL_read_ex"),
        "on_tls_write": found.function("SSL_write"),
    }
    assert sum(site.at_return for site in sites(found)) == 3


@X86
def test_another_library_has_no_places(tmp_path):
    assert sites(library(tmp_path, {"SSL_ImportFD": "r"})) == []


def test_a_file_without_anything_has_no_places(tmp_path):
    file = tmp_path / "libssl.so"
    file.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(57))
    assert sites(SharedLibrary(file)) == []


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\x02\x01\x01", b"text"])
def test_what_is_no_library(content, tmp_path):
    file = tmp_path / "libssl.so"
    file.write_bytes(content)
    with pytest.raises(FormatError, match="cannot read") as caught:
        SharedLibrary(file)
    assert "\n" not in str(caught.value)
    assert library_sites(file) == []
    assert library_sites(tmp_path) == []


def test_mapped_files():
    maps = """\
7f00-7f01 r--p 00000000 08:01 77   /usr/lib/libssl.so.3
7f01-7f02 r-xp 00001000 08:01 77   /usr/lib/libssl.so.3
7f02-7f03 r-xp 00001000 08:01 78   /srv/my app/libssl.so.3
7f03-7f04 rw-p 00000000 00:00 0
7f04-7f05 r-xp 00000000 00:00 0    [vdso]
7f05-7f06 r--p 00000000 08:01 79   /usr/lib/locale
"""
    assert mapped_files(maps) == {"/usr/lib/libssl.so.3", "/srv/my app/libssl.so.3"}


def test_libraries_of_a_package_beside_a_command(tmp_path):
    """Each file once, whatever names it has; commands need not exist."""
    packages = tmp_path / "lib/python3.99/site-packages"
    bundled = packages / "psycopg2_binary.libs/libssl-8bd944e8.so.3"
    bundled.parent.mkdir(parents=True)
    bundled.write_bytes(b"x")
    (tmp_path / "lib64").symlink_to("lib")
    (packages / "other.libs").mkdir()
    (packages / "other.libs/libssl.so").symlink_to(bundled)
    before = find_libraries([])
    found = find_libraries([], [tmp_path / "bin/gunicorn"])
    more = [path for path in found if path not in before]
    assert len(more) == 1
    assert more[0].samefile(bundled)


def test_processes_that_are_gone_are_left_out():
    with subprocess.Popen(["true"]) as gone:
        pass
    assert find_libraries([gone.pid]) == find_libraries([])
    assert set(find_libraries([])) <= set(find_libraries([os.getpid()]))
