"""Capabilities and the invoking user, from texts that anybody may have written."""

from __future__ import annotations

import doctest
import os
import pwd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_ebpf.errors import FormatError, ScopeError
from scope_ebpf.loaders import privileges
from scope_ebpf.loaders.privileges import (
    CAPABILITIES,
    NEEDED,
    NO_UID,
    SETS,
    User,
    invoking_account,
    invoking_user,
    missing,
    names_of,
    parse_id,
    parse_status,
)

pytestmark = pytest.mark.pure

# From a shell of this kernel's root under `capsh --drop=cap_sys_resource`, Linux 6.18.
STATUS = """Name:\tgrep
Umask:\t0022
Uid:\t0\t0\t0\t0
CapInh:\t0000000000000000
CapPrm:\t000001fffeffffff
CapEff:\t000000c000080004
CapBnd:\t000001fffeffffff
CapAmb:\t0000000000000000
NoNewPrivs:\t0
Seccomp:\t0
"""


def status_of(sets: dict[str, str]) -> str:
    return "Name:\tx\n" + "".join(f"{key}:\t{value}\n" for key, value in sets.items())


def test_examples():
    assert doctest.testmod(privileges).failed == 0


def test_numbers_are_those_of_the_kernel():
    # include/uapi/linux/capability.h
    known = {0: "CHOWN", 2: "DAC_READ_SEARCH", 8: "SETPCAP", 19: "SYS_PTRACE", 21: "SYS_ADMIN"}
    known |= {24: "SYS_RESOURCE", 37: "AUDIT_READ", 38: "PERFMON", 39: "BPF"}
    known |= {40: "CHECKPOINT_RESTORE"}
    assert {number: CAPABILITIES[number] for number in known} == {
        number: f"CAP_{name}" for number, name in known.items()
    }
    assert len(CAPABILITIES) == 41


def test_a_real_status():
    sets = parse_status(STATUS)
    assert sets.effective == set(NEEDED)
    assert set(CAPABILITIES) - sets.permitted == {"CAP_SYS_RESOURCE"}
    assert sets.bounding == sets.permitted
    assert sets.inheritable == sets.ambient == frozenset()


def test_before_ambient_sets():
    assert parse_status(STATUS.replace("CapAmb", "Other")).ambient == frozenset()


@pytest.mark.parametrize("key", [key for key in SETS if key != "CapAmb"])
def test_a_set_that_is_missing_is_named(key):
    with pytest.raises(FormatError, match=key):
        parse_status(STATUS.replace(key, "Other"))


@pytest.mark.parametrize("value", ["", "0x10", "-1", "1_0", "g", "0" * 17, "\u0661", "1 1", "+1"])
def test_what_is_no_number_is_refused(value):
    sets = dict.fromkeys(SETS, "0") | {"CapEff": value}
    with pytest.raises(FormatError, match="CapEff"):
        parse_status(status_of(sets))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=5, max_size=5))
def test_sets_are_read_as_they_were_written(masks):
    text = status_of(dict(zip(SETS, (f"{mask:016x}" for mask in masks), strict=True)))
    sets = parse_status(text)
    for mask, name in zip(masks, SETS.values(), strict=True):
        found = getattr(sets, name)
        assert found == names_of(mask)
        assert len(found) == mask.bit_count()
        assert privileges._mask(found) == mask


@given(st.text() | st.lists(st.sampled_from([*SETS, ":", "\t", "\n", "0", "f", "x"])).map("".join))
def test_any_text_is_read_or_refused(text):
    try:
        sets = parse_status(text)
    except FormatError:
        return
    assert all(len(getattr(sets, name)) <= 64 for name in SETS.values())


@pytest.mark.parametrize("absent", NEEDED)
def test_one_that_is_missing_is_named_alone(absent):
    assert missing(set(NEEDED) - {absent}, highest=40) == (absent,)


def test_what_stands_in():
    assert missing({"CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"}, highest=40) == ()
    assert missing(set(), highest=40) == NEEDED
    # Linux 5.7 knows neither CAP_BPF nor CAP_PERFMON
    assert missing(set(), highest=37) == (
        "CAP_SYS_ADMIN",
        "CAP_SYS_PTRACE",
        "CAP_DAC_READ_SEARCH",
    )


@given(st.sets(st.sampled_from(CAPABILITIES)), st.integers(30, 40))
def test_granting_what_is_missing_is_enough(held, highest):
    assert missing(held | set(missing(held, highest=highest)), highest=highest) == ()


@given(st.integers(0, NO_UID - 1))
def test_ids(number):
    assert parse_id(str(number)) == number
    for damaged in (f"-{number}", f" {number}", f"{number}\n", f"{number}.0", f"{number}_0"):
        assert parse_id(damaged) is None


@given(st.none() | st.text(max_size=20) | st.integers().map(str))
def test_no_text_makes_an_id_out_of_range(text):
    number = parse_id(text)
    assert number is None or (0 <= number < NO_UID and int(text) == number)


@given(
    st.dictionaries(st.sampled_from(["SUDO_UID", "SUDO_GID", "SUDO_USER"]), st.text(max_size=12))
)
def test_garbage_from_sudo_gives_ones_own_user(environment):
    own = User(0, os.getegid())
    user = invoking_user(environment, uid=0)
    uid, gid = parse_id(environment.get("SUDO_UID")), parse_id(environment.get("SUDO_GID"))
    assert user == (own if uid is None or gid is None else (uid, gid))


def test_only_root_believes_sudo():
    environment = {"SUDO_UID": "1000", "SUDO_GID": "100"}
    assert invoking_user(environment, uid=0) == (1000, 100)
    assert invoking_user(environment, uid=1001) == (1001, os.getegid())
    assert invoking_user({"SUDO_UID": "1000"}, uid=0) == (0, os.getegid())


def test_account(monkeypatch):
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    ids = {"SUDO_UID": str(nobody.pw_uid), "SUDO_GID": str(nobody.pw_gid)}
    account = invoking_account(ids)
    assert (account.name, account.home) == ("nobody", nobody.pw_dir)
    assert nobody.pw_gid in account.groups


def test_account_without_an_entry(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    account = invoking_account({"SUDO_UID": "4294967001", "SUDO_GID": "12"})
    assert account == privileges.Account(User(4294967001, 12), None, "/", "/bin/sh", (12,))


@pytest.mark.parametrize("absent", privileges.NEEDED)
def test_what_is_missing_is_said_with_what_it_is_for(absent, monkeypatch):
    monkeypatch.setattr(privileges, "highest_capability", lambda: 40)
    held = set(privileges.NEEDED) - {absent}
    with pytest.raises(
        ScopeError, match=f"^cannot record: {absent} is missing, which .*; run as root"
    ):
        privileges.require(held, "record")
    privileges.require(privileges.NEEDED, "record")
    with pytest.raises(
        ScopeError, match=r"CAP_BPF is missing, .* \(and CAP_PERFMON, CAP_SYS_PTRACE, "
    ):
        privileges.require((), "record")
