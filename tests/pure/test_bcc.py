"""BCC without a kernel: where it is found, what its words become, and types of columns."""

import numpy as np
import polars as pl
import pytest

from scope_ebpf.errors import FormatError, LoadError, UsageError
from scope_ebpf.families import TABLES
from scope_ebpf.loaders import bcc, bcc_rings
from scope_ebpf.loaders.bcc_capture import check_options
from scope_ebpf.loaders.bcc_fields import check_layout, own_table, plain_code
from scope_ebpf.loaders.bcc_life import parse_call
from scope_ebpf.loaders.bcc_programs import Place, find_places, read_source, table_names
from scope_ebpf.loaders.bcc_source import joined, translate
from scope_ebpf.loaders.choice import choose_loader
from scope_ebpf.loaders.kernel import kernel_version
from scope_ebpf.recording.own_tables import own_frame, schema_of
from scope_ebpf.recording.schema import SCHEMAS

pytestmark = pytest.mark.pure

FIELDS = [
    "time#u64", "tid#u32", "flag#bool", "comm#char[16]", "raw#u8[4]", "pid#pid_t", "port#__be16",
    "small#s8", "where#struct sock *", "kind#enum some", "names#char [2][8]", "big#unsigned long long",
]  # fmt: skip
SOURCE = """
struct row { u64 value; };
BPF_PERF_OUTPUT(rows);   // BPF_PERF_OUTPUT(no);
/* BPF_RINGBUF_OUTPUT(neither, 8); */
BPF_RINGBUF_OUTPUT( more , 1 << 3 );
SCOPE_USDT("/usr/bin/x", "provider", "name", on_it)
"""


# ---- the struct ----


def test_columns():
    table = own_table("p_rows", "p.c", "rows", FIELDS, timed=True)
    assert dict(table.columns) == {
        "time_ns": "Int64", "time": "UInt64", "tid": "UInt32", "flag": "Boolean", "comm": "String",
        "raw": "List(UInt8)", "pid": "Int32", "port": "UInt16", "small": "Int8", "where": "UInt64",
        "kind": "Int32", "names": "List(String)", "big": "UInt64",
    }  # fmt: skip
    assert schema_of(table.columns)["names"] == pl.List(pl.String)


def test_layout_is_that_of_the_compiler():
    # as gcc lays out: 8, 4, 1, 16 from 13 on, 4 from 29 on, 4 from 36 on, 2, 1, 8 from 48 on, …
    dtype = own_table("p_rows", "p.c", "rows", FIELDS, timed=False).dtype
    assert dtype.fields is not None
    offsets = {name: dtype.fields[name][1] for name in dtype.names or ()}
    assert offsets == {
        "time": 0, "tid": 8, "flag": 12, "comm": 13, "raw": 29, "pid": 36, "port": 40, "small": 42,
        "where": 48, "kind": 56, "names": 60, "big": 80,
    }  # fmt: skip
    assert dtype.itemsize == 88


def test_time_of_the_struct_counts():
    table = own_table("p_rows", "p.c", "rows", ["time_ns#u64", "tid#u32"], timed=True)
    assert table.columns == (("time_ns", "Int64"), ("tid", "UInt32"))


@pytest.mark.parametrize(
    "kind", ["struct task_struct", "union x", "double", "u32[2][2]", "__int128", "u8[0]"]
)
def test_types_without_a_column(kind):
    with pytest.raises(UsageError, match="the field it of what is submitted to rows is"):
        own_table("p_rows", "p.c", "rows", [f"it#{kind}"], timed=True)


def test_nothing_is_submitted():
    with pytest.raises(UsageError, match="nothing is submitted to rows"):
        own_table("p_rows", "p.c", "rows", [], timed=True)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("struct x {\n u8 a; } __attribute__((packed));", "packed"),
        ("struct x {\n u32 a : 3; };", "bit"),
    ],
)
def test_places_that_bcc_does_not_tell(code, word):
    with pytest.raises(UsageError, match=rf"p.c:2: a struct .*{word}"):
        check_layout("p.c", code)
    check_layout("p.c", plain_code(f"/* {code} */ int x = a ? 1 : 2;"))


def test_rows():
    table = own_table("p_rows", "p.c", "rows", FIELDS, timed=True)
    records = np.zeros(2, table.dtype)
    records["comm"] = [b"caf\xc3\xa9", b"bad\xff"]
    records["raw"] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    records["names"] = [[b"one", b"two"], [b"", b"x"]]
    records["small"] = [-1, 2]
    records["big"] = [2**64 - 1, 0]
    # behind the zero that ends a text may be anything
    view = records.view(np.uint8).reshape(2, -1)
    view[0, 13 + 6 : 13 + 9] = list(b"xyz")
    frame = own_frame(table, [(np.array([20, 10]), records)])
    assert frame.schema == schema_of(table.columns)
    assert frame["time_ns"].to_list() == [10, 20]
    assert frame["comm"].to_list() == ["bad\\xff", "café"]
    assert frame["raw"].to_list() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert frame["names"].to_list() == [["", "x"], ["one", "two"]]
    assert frame["small"].to_list() == [2, -1]
    assert frame["big"].to_list() == [0, 2**64 - 1]


def test_unknown_type_of_a_column():
    with pytest.raises(FormatError, match="'x Complex'"):
        schema_of([["x", "Complex"]])


# ---- the source ----


def test_source(tmp_path):
    file = tmp_path / "My-Probe.bpf.c"
    file.write_text(SOURCE)
    source = read_source(file)
    assert source.outputs == (("rows", True), ("more", False))
    assert source.places == (Place("USDT", "/usr/bin/x", "provider:name", "on_it"),)
    assert list(table_names([source], TABLES).values()) == ["my_probe_rows", "my_probe_more"]
    with pytest.raises(UsageError, match="its table my_probe_rows would have the name"):
        table_names([source], ["my_probe_rows"])


@pytest.mark.parametrize("text", ["", "int x;", "// BPF_PERF_OUTPUT(x);"])
def test_source_that_records_nothing(tmp_path, text):
    file = tmp_path / "p.c"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"p\.c has no BPF_PERF_OUTPUT"):
        read_source(file)


def test_no_source(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_source(tmp_path / "p.c")
    (tmp_path / "p.c").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="no text"):
        read_source(tmp_path / "p.c")


@pytest.mark.parametrize(
    "code", ['SCOPE_UPROBE("/x", f)', "SCOPE_USDT(/x, p, n, f)", 'SCOPE_UPROBE("/x", "y", "z", f)']
)
def test_places_that_cannot_be_understood(code):
    with pytest.raises(UsageError, match="cannot understand SCOPE_"):
        find_places("p.c", code)


# ---- what BCC says ----


def test_compile_error():
    said = "warning: x\nmy.c:7:7: error: no member named 'b' in 'struct d'\n  d.b = 1;\n1 error generated.\n"
    error = bcc.explain("my.c", "Failed to compile BPF module <text>", said)
    assert isinstance(error, UsageError)
    assert str(error) == "cannot compile my.c: the compiler found an error; mend what it says:"
    assert error.said[0] == "my.c:7:7: error: no member named 'b' in 'struct d'"


def test_verifier_error():
    said = "0: (b7)\n22: (7b) *(u64 *)(r6 +5) = r1\nR6 invalid mem access 'scalar'\nprocessed 23 insns\n\n"
    problem = "Failed to load BPF program b'on_x': Permission denied"
    error = bcc.explain("my.c", problem, said)
    assert isinstance(error, LoadError)
    assert str(error) == "cannot use my.c: failed to load BPF program 'on_x': Permission denied"
    assert error.said[-1] == "R6 invalid mem access 'scalar'"


def test_no_headers():
    error = bcc.explain("my.c", "Failed to compile", "Unable to find kernel headers. Try …\n")
    assert isinstance(error, LoadError)
    assert "apt install linux-headers-" in str(error)


def test_bcc_is_sought(tmp_path):
    with pytest.raises(LoadError, match="not installed; run `sudo apt install python3-bpfcc`"):
        bcc.find_bcc([tmp_path])
    other = tmp_path / "other" / "bcc"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    with pytest.raises(LoadError, match="another project of that name, from PyPI"):
        bcc.find_bcc([tmp_path, other.parent])
    real = tmp_path / "real" / "bcc"
    real.mkdir(parents=True)
    (real / "libbcc.py").touch()
    assert bcc.find_bcc([other.parent, real.parent]) == real


# ---- rings ----


def perf_sample(time_ns: int, data: bytes) -> bytes:
    """A sample as the kernel writes it: the raw part is padded so that all is a multiple of eight."""
    size = -(-(len(data) + 4) // 8) * 8 - 4
    length = 20 + size
    head = (9).to_bytes(4, "little") + b"\0\0" + length.to_bytes(2, "little")
    return (
        head + time_ns.to_bytes(8, "little") + size.to_bytes(4, "little") + data.ljust(size, b"\0")
    )


def test_perf_records():
    lost = (2).to_bytes(4, "little") + b"\0\0" + (24).to_bytes(2, "little") + bytes(16)
    data = perf_sample(1, b"a" * 12) + perf_sample(2, b"b" * 12) + lost + perf_sample(3, b"c" * 20)
    runs = list(bcc_rings.perf_records(np.frombuffer(data, np.uint8)))
    assert [times.tolist() for times, _ in runs] == [[1, 2], [3]]
    assert [bytes(row)[:12] for _, rows in runs for row in rows] == [
        b"a" * 12,
        b"b" * 12,
        b"c" * 12,
    ]
    dtype = np.dtype("<u4,<u4,<u4")
    assert bcc_rings.fitting(runs[0][1], dtype, 7) is not None
    assert bcc_rings.fitting(runs[1][1], dtype, 7) is None


def test_ring_records():
    def record(data: bytes, flags: int = 0) -> bytes:
        return (
            (len(data) | flags).to_bytes(4, "little")
            + bytes(4)
            + data.ljust(-(-len(data) // 8) * 8, b"\0")
        )

    data = record(b"x" * 12) + record(b"y" * 12, bcc_rings.RING_DISCARD) + record(b"z" * 12)
    data += record(b"w" * 4) + record(b"v" * 4, bcc_rings.RING_BUSY) + record(b"u" * 4)
    runs = list(bcc_rings.ring_records(np.frombuffer(data, np.uint8)))
    assert [bytes(row) for rows in runs for row in rows] == [b"x" * 12, b"z" * 12, b"w" * 4]


# ---- the capture ----


def test_options():
    check_options(("processes", "offcpu"), probes=False, calls=False)
    with pytest.raises(UsageError, match="tls, gil are not recorded with --loader bcc"):
        check_options(("processes", "tls", "gil"), probes=False, calls=False)
    with pytest.raises(UsageError, match="--calls needs --loader libbpf"):
        check_options(("processes",), probes=False, calls=True)
    assert choose_loader("bcc") == "bcc"


def test_kernels_that_preempt_programs_are_refused():
    with pytest.raises(LoadError, match=r"on Linux 7\.3\.4: since 7\.0 .*; use --loader libbpf"):
        bcc.check_kernel("7.3.4")
    bcc.check_kernel("6.18.44")


def test_flags_for_newer_headers():
    assert bcc.header_flags("6.18.1") == []
    assert bcc.header_flags("6.19.0") == ["-fms-extensions"]


def test_kernel_version():
    assert kernel_version("5.10.0-46-cloud-amd64") == (5, 10)
    assert kernel_version("6.12+deb13") == (6, 12)


def test_call_of_a_sleeper():
    assert parse_call(["0", "0x3", "0x7f00", "0x1000", "0x0", "0x0", "0x0", "0x1", "0x2"]) == [
        0,
        3,
        32512,
        4096,
    ]
    assert parse_call(["running"]) is None
    assert parse_call(["-1", "0x1", "0x2"]) is None


def test_translation_of_all_probes():
    """Whatever is in the probes has a form for BCC."""
    defined = {"SCOPE_BCC": True, "PERF_TRANSPORT": False, "OLD_KERNELS": False}
    source = translate(
        joined("bcc/capture.h", defined),
        {"record_syscalls": 1, "recorder_tgid": 5},
        {"cpus": 2, "hot": 64},
        {"wide": 576, "gathered": 1024},
    )
    assert source.programs["on_sys_exit"] == "sys_exit"
    assert "#define recorder_tgid ((__u32)5ULL)" in source.text
    assert "#define record_syscalls ((bool)1ULL)" in source.text
    assert 'BPF_F_TABLE("array", __u32, struct hot_slot, hot, 64, BPF_F_MMAPABLE);' in source.text
    assert "bpf_core_" not in source.text.replace("bpf_core_type_size", "")
    assert {"entries_seen", "marks_wanted"} <= set(source.globals)


def test_translation_for_perf_buffers():
    """Programs send what they have staged when they end, and none needs an atomic with a result."""
    defined = {"SCOPE_BCC": True, "PERF_TRANSPORT": True, "OLD_KERNELS": False}
    source = translate(
        joined("bcc/capture.h", defined),
        {},
        {"cpus": 2},
        {"staged_wide": 576, "gathered": 1024},
        perf=True,
    )
    assert "BPF_PERF_OUTPUT(hot);" in source.text and "BPF_PERF_OUTPUT(wide);" in source.text
    assert "hot.perf_submit(context, record, HOT_SLOT_BYTES)" in source.text
    programs = source.text.split("\nint on_exit(")[1].split("\n}")[0]
    assert "begin_level(LEVEL_PROGRAM);" in programs
    assert "end_level(ctx, LEVEL_PROGRAM, before, send_few);" in programs
    assert "begin_level" not in source.text.split("\nint on_sched_waking(")[1].split("\n}")[0]
    assert "__sync_lock_test_and_set" not in source.text


def test_tables_are_all_named():
    assert list(SCHEMAS) == list(TABLES)


def test_headers_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path / "nowhere"))
    with pytest.raises(
        LoadError, match=r"the headers of Linux .* are not installed; run `sudo apt"
    ):
        bcc.check_headers()
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))
    bcc.check_headers()
