"""What the doctor prints and exits with, for checks that were made up."""

from __future__ import annotations

import json
from dataclasses import replace

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from scope_ebpf.cli import doctor as command
from scope_ebpf.errors import FormatError, LoadError
from scope_ebpf.loaders import doctor, tls
from scope_ebpf.loaders.doctor import Check, available_bytes, families, listed
from scope_ebpf.loaders.privileges import CAPABILITIES, NEEDED, Capabilities

pytestmark = pytest.mark.pure

GOOD = [
    Check("libbpf", True, "libbpf v1.1"),
    Check("syscalls", True, "recorded 23 of 23 getppid calls", family=True),
    Check("offcpu", True, "recorded 23 of 23 sleeps", family=True),
    Check("tracefs", None, "not mounted"),
]
LIMITED = [Check("memory", False, "1 MiB available", "that is little", "free some"), *GOOD]
BROKEN = [
    *GOOD[:2],
    Check("offcpu", False, "cannot load it", "the kernel is old", "boot another", family=True),
]


def capabilities(effective: set[str], bounding: set[str]) -> Capabilities:
    held = frozenset(effective)
    return Capabilities(held, held, frozenset(), frozenset(bounding), frozenset())


def run(monkeypatch, checks, *arguments):
    monkeypatch.setattr(command, "examine", lambda: checks)
    return CliRunner().invoke(command.doctor, [*arguments])


@pytest.mark.parametrize(
    ("checks", "code", "verdict"),
    [
        (GOOD, 0, "Everything works: record with `sudo scope-ebpf attach --pid PID`."),
        (LIMITED, 0, "All probes work, within the limits named above (memory)."),
        (BROKEN, 1, "offcpu cannot be recorded here; the other families can."),
        (BROKEN[2:], 1, "Nothing can be recorded here before that is mended."),
    ],
)
def test_exit_code_and_verdict(monkeypatch, checks, code, verdict):
    result = run(monkeypatch, checks)
    assert result.exit_code == code
    assert result.output.splitlines()[-1] == verdict


def test_table(monkeypatch):
    assert run(monkeypatch, BROKEN).output == (
        "Needed\n"
        "  works  libbpf    libbpf v1.1\n"
        "\n"
        "Probes, tried just now\n"
        "  works  syscalls  recorded 23 of 23 getppid calls\n"
        "  FAILS  offcpu    cannot load it\n"
        "                   why: the kernel is old\n"
        "                   fix: boot another\n"
        "\n"
        "offcpu cannot be recorded here; the other families can.\n"
    )


def test_json(monkeypatch):
    result = run(monkeypatch, BROKEN, "--json")
    document = json.loads(result.output)
    assert result.exit_code == 1
    assert document["families"] == {"syscalls": True, "offcpu": False}
    assert document["checks"][2] == {
        "name": "offcpu",
        "works": False,
        "detail": "cannot load it",
        "cause": "the kernel is old",
        "fix": "boot another",
        "family": True,
    }


def test_help_ends_with_examples():
    text = CliRunner().invoke(command.doctor, ["--help"]).output
    assert "\n    sudo scope-ebpf doctor\n" in text.partition("Examples:")[2]


@given(st.text(min_size=1), st.integers(20, 300))
def test_any_text_fits_the_table(detail, width):
    for check in (replace(BROKEN[2], detail=detail, cause=detail, fix=detail), BROKEN[0]):
        assert command.render([check], width).endswith(command.verdict([check]))


def test_a_long_fact_is_wrapped_below_itself():
    text = click.unstyle(command.render([replace(GOOD[0], detail="word " * 40)], 60))
    rows = [row for row in text.splitlines() if "word" in row]
    assert len(rows) > 3
    assert all(len(row) <= 60 for row in rows)
    assert {row.index("word") for row in rows} == {rows[0].index("word")}


@pytest.mark.parametrize("absent", NEEDED)
def test_the_missing_capability_is_named(absent):
    check = doctor.check_capabilities(capabilities(set(NEEDED) - {absent}, set(CAPABILITIES)))
    assert check.works is False
    assert check.detail == f"{absent} is missing"
    assert "sudo" in check.fix


def test_capabilities_that_a_container_withholds():
    check = doctor.check_capabilities(capabilities(set(), {"CAP_SYS_PTRACE", "CAP_BPF"}))
    assert check.detail == f"{listed(NEEDED)} are missing"
    assert "--cap-add=PERFMON" in check.fix


@pytest.mark.parametrize(
    ("absent", "blames"),
    [("CAP_BPF", True), ("CAP_PERFMON", True), ("CAP_SYS_PTRACE", False)],
)
def test_only_what_loading_needs_explains_a_refusal(absent, blames):
    check = doctor.check_capabilities(capabilities(set(NEEDED) - {absent}, set(CAPABILITIES)))
    assert doctor._explains_refusals(check) is blames


def test_an_error_becomes_fact_cause_and_fix(monkeypatch):
    def refuse(_family, _transport):
        raise LoadError("cannot load x.bpf.o: this kernel is old; boot another")

    monkeypatch.setattr(doctor, "record_workload", refuse)
    check = doctor.check_family("syscalls")
    assert (check.detail, check.cause, check.fix) == (
        "cannot load x.bpf.o",
        "this kernel is old",
        "boot another",
    )
    blamed = doctor.check_family("syscalls", Check("capabilities", False, "CAP_BPF is missing"))
    assert (blamed.detail, blamed.cause) == (
        "cannot load x.bpf.o",
        "capabilities: CAP_BPF is missing",
    )


@pytest.mark.parametrize(
    ("family", "found", "works"),
    [
        ("syscalls", 23, True),
        ("syscalls", 22, False),
        ("syscalls", 24, False),
        ("processes", 1, True),
        ("processes", 0, False),
        ("offcpu", 22, False),
        ("offcpu", 25, True),
    ],
)
def test_what_was_recorded_is_counted(monkeypatch, family, found, works):
    monkeypatch.setattr(doctor, "record_workload", lambda _family, _transport: found)
    check = doctor.check_family(family)
    assert check.works is works
    assert check.detail.startswith(f"recorded {found} ")


def test_without_a_tls_library_there_is_nothing_to_record(monkeypatch):
    monkeypatch.setattr(
        doctor, "record_workload", lambda _family, _transport: pytest.fail("it was recorded")
    )
    monkeypatch.setattr(tls, "find_libraries", lambda _tgids: [])
    check = doctor.check_family("tls")
    assert (check.works, check.family) == (True, True)
    assert "no libssl" in check.detail


def test_strangers_are_not_recorded_from_a_pid_namespace(monkeypatch):
    monkeypatch.setattr(
        doctor, "record_workload", lambda _family, _transport: pytest.fail("it was recorded")
    )
    check = doctor.check_family("syscalls", Check("pid namespace", False, "not the host's"))
    assert (check.works, check.detail) == (False, "not tried")


@pytest.mark.parametrize(
    ("text", "told", "has_fix"),
    [
        ("none [integrity] confidentiality\n", "integrity", False),
        ("none integrity [confidentiality]\n", "confidentiality", True),
    ],
)
def test_lockdown(tmp_path, text, told, has_fix):
    path = tmp_path / "lockdown"
    path.write_text(text)
    check = doctor.tell_lockdown(path)
    assert check.works is None
    assert check.detail.startswith(told)
    assert bool(check.fix) is has_fix
    assert doctor.tell_lockdown(tmp_path / "absent").works is None


def test_memory():
    assert doctor.check_memory("MemAvailable:   8000000 kB\n").works is True
    check = doctor.check_memory("MemTotal: 1 kB\nMemAvailable:     80000 kB\n")
    assert (check.works, check.detail.split(" MiB")[0]) == (False, "78")


@given(st.text() | st.text().map(lambda text: f"MemAvailable: {text}"))
def test_any_meminfo_is_read_or_refused(text):
    try:
        assert available_bytes(text) >= 0
    except FormatError:
        assert doctor.check_memory(text).works is False


def test_breakpoints(monkeypatch):
    monkeypatch.setattr(doctor, "try_breakpoint", lambda: 2345.0)
    check = doctor.tell_breakpoints()
    assert (check.works, check.cause, check.fix) == (None, "", "")
    assert "2.3 us each" in check.detail

    def refuse() -> float:
        raise LoadError("cannot watch calls: permission denied; run as root")

    monkeypatch.setattr(doctor, "try_breakpoint", refuse)
    check = doctor.tell_breakpoints()
    assert (check.works, check.detail) == (None, "cannot watch calls")
    assert (check.cause, check.fix) == ("permission denied", "run as root")


def test_tracefs(tmp_path):
    path = tmp_path / "mounts"
    path.write_text("nodev /sys/kernel/tracing tracefs rw 0 0\n")
    assert doctor.tell_tracefs(path).detail.startswith("mounted at /sys/kernel/tracing")
    path.write_text("")
    assert doctor.tell_tracefs(path).detail.startswith("not mounted")


def test_families():
    assert families(BROKEN) == {"syscalls": True, "offcpu": False}
