"""Probes as users write them, and what they are taken for."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from scope_ebpf import probe_specs
from scope_ebpf.cli.options import Families, Probe
from scope_ebpf.errors import UsageError
from scope_ebpf.families import EXTRA_FAMILIES, FAMILIES
from scope_ebpf.probe_specs import TYPES, ProbeSpec, parse_probe
from scope_ebpf.records import PythonLimits

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("text", "label", "rest"),
    [
        ("usdt:/a/b:p:n", "p:n", (Path("/a/b"), "p", "n", 0, None)),
        ("usdt:/a:b/c:p:n(int)", "p:n", (Path("/a:b/c"), "p", "n", 0, (TYPES["int"],))),
        ("uprobe:/a/b.so.1:f", "b.so.1:f", (Path("/a/b.so.1"), "", "f", 0, None)),
        ("uprobe:/a/b:f()", "b:f", (Path("/a/b"), "", "f", 0, ())),
        ("uprobe:/a/b:f+0x12", "b:f+0x12", (Path("/a/b"), "", "f", 0x12, None)),
        ("uprobe:/a/b:f+18", "b:f+0x12", (Path("/a/b"), "", "f", 0x12, None)),
        ("uprobe:/a/b:0x401000", "b:0x401000", (Path("/a/b"), "", "", 0x401000, None)),
        ("uprobe:/a/b:_ZN3foo3barEv( str )", "b:_ZN3foo3barEv",
         (Path("/a/b"), "", "_ZN3foo3barEv", 0, (TYPES["str"],))),
        (" uretprobe:/a/b:f(ptr)", "b:f:return", (Path("/a/b"), "", "f", 0, (TYPES["ptr"],))),
        ("uprobe:b:0xfg", "b:0xfg", (Path("b"), "", "0xfg", 0, None)),
    ],
)  # fmt: skip
def test_forms(text, label, rest):
    spec = parse_probe(text)
    assert spec.label == label
    assert (spec.path, spec.provider, spec.name, spec.offset, spec.types) == rest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no probe"),
        ("kprobe:/a:f", "did you mean uprobe or uretprobe"),
        ("uprobe", "is no probe"),
        ("uprobe:/a/b", "does not name a file and a place"),
        ("uprobe:/a/b:", "does not name a file and a place"),
        ("usdt:/a/b:n", "does not name a file and a place"),
        ("usdt:/a/b::n", "does not name a file and a place"),
        ("uprobe::f", "does not name a file and a place"),
        ("uprobe:/a:f(int", "written at its end"),
        ("uprobe:/a:f(int))", "written at its end"),
        ("uprobe:/a:f(int)x", "written at its end"),
        ("uprobe:/a:f(itn)", "did you mean int"),
        ("uprobe:/a:f(,)", "there is no type ''"),
        ("uprobe:/a:f(" + ",".join(["int"] * 9) + ")", "8 arguments are recorded at most"),
        ("uprobe:/a:f(" + ",".join(["str"] * 5) + ")", "4 texts are recorded at most"),
        ("uprobe:/a:f+", "an offset is expected"),
        ("uprobe:/a:f+g", "an offset is expected"),
        ("uprobe:/a:401000", "like 0x401000"),
        ("uretprobe:/a:f(int,int)", "one result"),
        ("uretprobe:/a:f+4", "only a whole function returns"),
        ("uretprobe:/a:0x12", "only a whole function returns"),
    ],
)
def test_mistakes(text, words):
    with pytest.raises(UsageError) as caught:
        parse_probe(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_are_those_of_the_probes():
    """Written twice, since help must not wait for numpy."""
    assert probe_specs.MOST_ARGUMENTS == PythonLimits.HIT_ARGUMENTS
    assert probe_specs.MOST_TEXTS == PythonLimits.HIT_TEXTS


def test_the_option():
    spec = Probe().convert("uprobe:/a:f", None, None)
    assert isinstance(spec, ProbeSpec)
    assert Probe().convert(spec, None, None) is spec


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("postgres", ("processes", "postgres")),
        ("runtime,syscalls", ("processes", "syscalls", "runtime")),
        ("+postgres", (*FAMILIES, "postgres")),
        ("+runtime, +postgres", (*FAMILIES, *EXTRA_FAMILIES)),
        ("+syscalls", FAMILIES),
        (",".join(FAMILIES), FAMILIES),
    ],
)
def test_families(text, chosen):
    assert Families().convert(text, None, None) == chosen


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("postgre", "there is no family postgre; choose from"),
        ("+postgre", "there is no family postgre; choose from"),
        ("+", "there is no family"),
        ("", "in an empty list"),
        ("syscalls,+postgres", "write a + before each"),
    ],
)
def test_families_that_are_refused(text, words):
    with pytest.raises(click.BadParameter, match=None) as caught:
        Families().convert(text, None, None)
    assert words in str(caught.value)
