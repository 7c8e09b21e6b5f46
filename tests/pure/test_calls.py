"""attach --calls: names of functions, what arguments are shown as, and how they are masked."""

from __future__ import annotations

import struct

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_ebpf import records
from scope_ebpf.cpython.offsets import layout_of
from scope_ebpf.errors import UsageError
from scope_ebpf.loaders.python.calls import UNWATCHED, WatchedProcess, describe_cost
from scope_ebpf.loaders.python.functions import Function, Spec, parse_spec
from scope_ebpf.protocols.masking import new_key
from scope_ebpf.recording.calls import arguments, mask_arguments, python_calls_frame
from scope_ebpf.records import PythonLimits, ValueKind

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("text", "module", "path"),
    [
        ("app:index", "app", ("index",)),
        (" shop.views:Cart.checkout ", "shop.views", ("Cart", "checkout")),
        ("größe:maß", "größe", ("maß",)),
    ],
)
def test_names(text, module, path):
    assert parse_spec(text) == Spec(module, path)
    assert str(parse_spec(text)) == text.strip()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("app:*", "debug registers"),
        ("app.index", "no module and function"),
        ("app:", "no module and function"),
        (":index", "no module and function"),
        ("app:outer.<locals>.inner", "made anew"),
        ("a:b:c", "no module and function"),
        ("", "no module and function"),
    ],
)
def test_what_is_no_name(text, reason):
    with pytest.raises(UsageError, match=reason) as error:
        parse_spec(text)
    assert "write one as module:function" in str(error.value)


def hit(*values: tuple[ValueKind, int, bytes | None], duration_ns: int = 7) -> np.ndarray:
    """A record as the probe writes it: kind, value and text of each argument."""
    row = np.zeros(1, records.PYTHON_CALL)
    row["arguments"], row["duration_ns"] = len(values), duration_ns
    texts = [text for _, _, text in values if text is not None][:4]
    row["text_lengths"][0, : len(texts)] = [len(text) for text in texts]
    row["text"] = b"".join(texts)
    row["text_bytes"] = sum(map(len, texts))
    row["kinds"] = int.from_bytes(bytes(kind for kind, _, _ in values), "little")
    for index, (_, value, _) in enumerate(values):
        row["values"][0, index] = value
    return row


def test_arguments():
    kinds = ValueKind
    bits = struct.unpack("<Q", struct.pack("<d", -1.5))[0]
    row = hit(
        (kinds.VALUE_NONE, 0, None),
        (kinds.VALUE_BOOL, 1, None),
        (kinds.VALUE_INT, 2**64 - 5, None),
        (kinds.VALUE_FLOAT, bits, None),
        (kinds.VALUE_LATIN1, 9, "naïve".encode("latin-1")),
        (kinds.VALUE_UCS2, 2, "日本".encode("utf-16-le")),
        (kinds.VALUE_BYTES, 3, b"\0'x"),
        (kinds.VALUE_OBJECT, 0, b"shop.Cart\0garbage"),
    )
    assert arguments(row[0]) == [
        "None", "True", "-5", "-1.5", "'naïve'…", "'日本'", repr(b"\0'x"), "<shop.Cart>",
    ]  # fmt: skip
    others = hit((kinds.VALUE_UNBOUND, 0, None), (kinds.VALUE_LONG_INT, 7, None),
                 (kinds.VALUE_UNREADABLE, 0, None))  # fmt: skip
    assert arguments(others[0]) == ["…", "<int of 210 bits>", "…"]


def test_texts_beyond_those_that_have_room():
    row = hit(*[(ValueKind.VALUE_LATIN1, 1, b"x")] * 6)
    assert arguments(row[0]) == ["'x'"] * 4 + ["''…"] * 2


def test_rows():
    rows = np.concatenate(
        [hit(duration_ns=2**64 - 1), hit((ValueKind.VALUE_INT, 3, None), duration_ns=9)]
    )
    rows["time_ns"], rows["probe"] = [20, 10], [0, 1]
    frame = python_calls_frame(rows, np.array([1, 0], np.uint16), ("a:f", "b:g"))
    assert frame["time_ns"].to_list() == [10, 20]
    assert frame["probe"].to_list() == ["b:g", "a:f"]
    assert frame["duration_ns"].to_list() == [9, None]
    assert frame["arguments"].to_list() == [["3"], []]


def masked(*shown: str) -> list[str]:
    """What is left of some arguments."""
    rows = python_calls_frame(hit(), np.zeros(1, np.uint16), ("a:f",))
    column = pl.Series("arguments", [list(shown)], dtype=pl.List(pl.String))
    result = mask_arguments(rows.with_columns(column), new_key())["arguments"]
    return [str(text) for text in result[0]]


def test_what_is_masked():
    assert masked("None", "True", "False", "<shop.Cart>", "…") == [
        "None", "True", "False", "<shop.Cart>", "…",
    ]  # fmt: skip
    number, text, data = masked("4711", "'secret word'…", "b'secret'")
    assert number[0] == "?" and len(number) == 4 and number != "4711"
    assert text[:2] == "'?" and "secret" not in text and "word" not in text and " " in text
    assert data[:3] == "b'?" and "secret" not in data
    assert masked() == []


@given(st.lists(st.one_of(st.integers(), st.text(max_size=30), st.binary(max_size=30)), max_size=8))
def test_no_value_is_left(values):
    shown = [repr(value) for value in values]
    result = masked(*shown)
    assert len(result) == len(shown)
    for before, after in zip(shown, result, strict=True):
        words = "".join(each if each.isalnum() else " " for each in before).split()
        assert all(part not in after for part in words if len(part) > 3)


def test_versions():
    """What says how a call ended: a frame's own state, or from 3.11 on what is read of its code."""
    for minor in range(8, 16):
        layout = layout_of((3, minor, 1))
        in_frame = (layout.frame_state, layout.frame_blocks, layout.frame_block_stack)
        assert all(in_frame) == (minor <= 10)
        assert any(in_frame) == (minor <= 10)
        assert bool(layout.code_first_traceable) == (minor >= 11)
    assert (3, 11, 0) in UNWATCHED


def test_the_cost_is_said():
    plain = Function(Spec("a", ("f",)), 4096, 1, generator=False)
    generator = Function(Spec("a", ("g",)), 8192, 1, generator=True)
    first, second = describe_cost([WatchedProcess(1, (plain, generator), ())] * 2, 9400.0)
    assert first.startswith("--calls a:f: by hardware breakpoints")
    assert "28 us" in first and "nothing for other functions" in first
    assert "9 us" in second and "without a duration" in second


def test_room_for_kinds():
    assert records.PYTHON_CALL["kinds"].itemsize >= PythonLimits.HIT_ARGUMENTS
    assert 4 * PythonLimits.ARGUMENT_BYTES <= PythonLimits.HIT_TEXT_BYTES
