"""The built object's side of the user's own probes: maps as user space fills them."""

from __future__ import annotations

import pytest

from scope_ebpf import records
from scope_ebpf.loaders import hits
from scope_ebpf.loaders.btf import Btf
from scope_ebpf.loaders.capture import RECORDS
from scope_ebpf.loaders.elf import ElfObject
from scope_ebpf.loaders.transport import OBJECT
from scope_ebpf.records import PythonLimits, RecordLimits

pytestmark = pytest.mark.object


@pytest.mark.parametrize("name", ["hit", "hit_probe", "hit_argument"])
def test_layouts(name):
    assert Btf.from_object(OBJECT).record_dtype(name) == getattr(records, name.upper())
    assert name in RECORDS  # so that loading compares it, too


def test_the_program_and_its_switch_are_there():
    opened = ElfObject(OBJECT)
    assert "hits_wanted" in opened.variables(".bss")
    assert opened.variables(".maps").keys() >= {"hit_probes", "hit_arguments", "hit_begins"}
    assert hits.PROGRAM.encode() in OBJECT.read_bytes()


def test_a_hit_fits_into_the_smallest_wide_slot():
    """Also the verifier counts on that: texts are written behind the fixed part."""
    assert records.HIT.itemsize <= RecordLimits.WIDE_HEADER_BYTES + 448
    fields = records.HIT.fields
    assert fields is not None
    begin = fields["text"][1]
    last = records.HitLimits.HIT_TEXT_LAST + records.HitLimits.HIT_TEXT_MORE
    assert begin + max(last, PythonLimits.HIT_TEXT_BYTES) <= RecordLimits.WIDE_HEADER_BYTES + 448
