"""Line tables, against what each interpreter of this machine says of its own standard library."""

import json
import random
import subprocess
import time

import pytest

from scope_ebpf.cpython.lines import line_of, line_table
from tests.live.pythons import Python, pythons

pytestmark = pytest.mark.pure

# What a table must give is PyCode_Addr2Line's answer for every instruction, -1: no line.
# It runs in interpreters from 3.8 on.
ORACLE = r"""
import ctypes, json, os, sys, types

MODULES = "argparse ast asyncio/base_events asyncio/tasks collections/__init__ dataclasses decimal _pydecimal"
MODULES += " difflib email/message inspect json/decoder locale logging/__init__ mimetypes os pickle"
MODULES += " pickletools"
MODULES += " pydoc re/_compiler sre_compile statistics subprocess tarfile threading turtle typing zipfile"
MODULES += " unittest/mock test/test_grammar"
TRICKY = "\n\n\n".join([
    "def far():\n    x = (1,\n" + "\n" * 700 + "    f(2))\n    return x\n",
    "def back():\n    for i in f(\n" + "\n" * 300 + "        g()):\n        with h() as k: yield k\n",
    "async def a():\n    async with b() as c:\n        async for d in c:\n            await d\n",
    "def long():\n    return [" + "f(x, y) + 1, " * 700 + "]\n",
    "def t():\n    try:\n        f()\n    except E as e:\n        g()\n    finally:\n        h()\n",
    "class C:\n    x: int = 1\n    def f(self): return lambda: super()\n",
    "def empty():\n    '''doc'''\n", "l = lambda: (yield)\n", "\n" * 5000 + "z = [i for i in j]\n",
])
address_to_line = ctypes.pythonapi.PyCode_Addr2Line
address_to_line.argtypes = [ctypes.py_object, ctypes.c_int]
address_to_line.restype = ctypes.c_int

def codes(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)

def describe(code):
    answers = [address_to_line(code, at) for at in range(-2, len(code.co_code), 2)]
    lines = code.co_linetable if sys.version_info >= (3, 10) else code.co_lnotab
    return [code.co_name, code.co_firstlineno, lines.hex(), answers]

sources = [TRICKY]
for name in MODULES.split():
    path = os.path.join(os.path.dirname(os.__file__), name + ".py")
    if os.path.exists(path):
        with open(path, "rb") as file:
            sources.append(file.read())
for source in sources:
    for code in codes(compile(source, "x", "exec")):
        print(json.dumps(describe(code)))
"""


@pytest.mark.parametrize("python", pythons(), ids=str)
def test_all_lines_of_many_functions_are_those_of_the_interpreter(python: Python) -> None:
    version = python.version[0] << 8 | python.minor
    command = python.command("-W", "ignore", "-")
    listing = subprocess.run(
        command, input=ORACLE, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listing) > 1000
    checked = without_line = 0
    for text in listing:
        name, first_line, table, answers = json.loads(text)
        lines = bytes.fromhex(table)
        base = 104 if version >= 0x030B else 0
        unit = 2 if version == 0x030A else 1
        for at, answer in zip(range(-2, len(answers) * 2, 2), answers, strict=False):
            offset = base + at // unit
            got = line_of(offset, first_line, lines, version, base)
            assert (got if got is not None else -1) == answer, (name, first_line, at)
            checked += 1
            without_line += got is None
    assert checked > 100_000
    assert (without_line > 0) == (version >= 0x030A)


@pytest.mark.parametrize("version", [0x0308, 0x0309, 0x030A, 0x030B, 0x030D])
def test_a_cut_table_says_the_same_or_nothing(version: int) -> None:
    rng = random.Random(version)
    for _ in range(300):
        lines = _random_table(rng, version)
        whole = [line_of(at, 50, lines, version, 0) for at in range(0, 400, 2)]
        for length in range(len(lines)):
            prefix = [
                line_of(at, 50, lines[:length], version, 0, whole=False) for at in range(0, 400, 2)
            ]
            pairs = zip(prefix, whole, strict=True)
            assert all(cut is None or cut == full for cut, full in pairs), (lines.hex(), length)


def _random_table(rng: random.Random, version: int) -> bytes:
    """A table that a compiler could have made, up to steps of any size."""
    if version < 0x030B:
        return bytes(
            rng.randrange(0, 12) if i % 2 == 0 else rng.randrange(0, 256) for i in range(20)
        )
    parts = bytearray()
    for _ in range(10):
        kind = rng.choice([0, 5, 9, 10, 11, 12, 13, 14, 15])
        parts.append(0x80 | kind << 3 | rng.randrange(8))
        if kind < 10:
            parts.append(rng.randrange(128))
        elif kind < 13:
            parts += bytes([rng.randrange(128), rng.randrange(128)])
        elif kind in (13, 14):
            parts += rng.choice([b"\x02", b"\x46\x01", b"\x05", b"\x43\x41\x02"])
            parts += b"\x00\x41\x01\x02" if kind == 14 else b""
    return bytes(parts)


@pytest.mark.parametrize("version", [0x0308, 0x030A, 0x030B, 0x030E])
def test_garbage_gives_a_line_or_none(version: int) -> None:
    rng = random.Random(7)
    for _ in range(500):
        lines = rng.randbytes(rng.randrange(60))
        for offset in (0, 2, 100, 2**31, 2**32 - 1):
            line = line_of(offset, 1, lines, version, 100)
            assert line is None or 0 <= line < 2**31


def test_a_frame_that_has_not_begun_is_at_the_first_line() -> None:
    assert line_of(0xFFFFFFFF, 12, b"\x00\x05", 0x0308, 0) == 12
    assert line_of(0xFFFFFFFF, 12, b"\x02\x05", 0x030A, 0) == 12
    assert line_of(98, 12, b"\xd8\x00\x00", 0x030B, 100) == 12


def test_an_empty_table_of_310_has_no_lines() -> None:
    assert line_of(0, 12, b"", 0x0309, 0) == 12
    assert line_of(0, 12, b"", 0x030A, 0) is None
    assert line_of(100, 12, b"", 0x030B, 100) is None


def test_100_000_frames_take_less_than_a_second() -> None:
    codes = [
        (number, bytes([0x80 | 10 << 3, 0, 0, 0x88 | 10 << 3, 0, 0] * 40)) for number in range(1000)
    ]
    line_table.cache_clear()
    begin = time.perf_counter()
    for index in range(100_000):
        number, lines = codes[index % 1000]
        assert line_of(108, number, lines, 0x030B, 100) is not None
    assert time.perf_counter() - begin < 1
