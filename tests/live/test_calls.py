"""attach --calls: every call of a named Python function once, with its duration and arguments."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

from scope_ebpf.errors import LoadError
from scope_ebpf.loaders.perf import open_breakpoint
from scope_ebpf.loaders.python.calls import UNWATCHED, try_breakpoint
from tests.live.programs.called import COUNT, VALUES
from tests.live.pythons import Python, pythons
from tests.live.recording import PROGRAMS, Session, Target, attached, no_losses
from tests.live.roots import clear, running

pytestmark = pytest.mark.live

PROGRAM = PROGRAMS / "called.py"


@pytest.fixture(autouse=True, scope="module")
def _breakpoints():
    try:
        try_breakpoint()
    except LoadError as error:
        pytest.skip(str(error))


# those in which calls can be watched
KNOWN = [python for python in pythons() if python.version not in UNWATCHED]


@contextmanager
def started(python: Python, what: str) -> Iterator[Target]:
    """The program at its gate."""
    with Target(*running(python, PROGRAM, what)) as target:
        yield target
    clear(python)


def hits(session: Session) -> pl.DataFrame:
    """The rows, of which none was lost."""
    no_losses(session)
    return session.table("hits").sort("time_ns")


def watched(directory: Path, target: Target, name: str, *options: str):
    """Attach, and watch a function."""
    chosen = ["--calls", f"__main__:{name}", "--families", "processes"]
    return attached(directory, target, *chosen, *options or ["--unredacted"])


@pytest.mark.parametrize("python", KNOWN, ids=str)
def test_every_call_once(python, tmp_path):
    with (
        started(python, "work") as target,
        watched(tmp_path, target, "work") as session,
    ):
        note = target.work()
    rows = hits(session).with_columns(
        mode=pl.col("arguments").list.get(0).str.strip_chars("'"),
        number=pl.col("arguments").list.get(1).cast(pl.Int64),
        text=pl.col("arguments").list.get(2),
        end_ns=pl.col("time_ns") + pl.col("duration_ns"),
    )
    assert rows["probe"].unique().to_list() == ["__main__:work"]
    assert rows["arguments"].list.len().unique().to_list() == [3]
    # up to 3.10 the second raising of an exception is not seen
    again = pl.col("mode") == "finally" if python.version < (3, 11) else pl.lit(False)
    assert rows.filter(pl.col("duration_ns").is_null() != again).is_empty()
    count = dict(rows.group_by("mode").len().iter_rows())
    assert count == {
        "plain": COUNT, "sleep": COUNT, "raise": 2 * COUNT + 1, "warn": COUNT, "handle": COUNT,
        "finally": COUNT, "recurse": COUNT + 1, "thread": 2 * COUNT, "child": COUNT, "last": 1,
    }  # fmt: skip
    # each within the time in which its caller called it, and not much shorter
    for mode, number, _, begin, end in note["calls"]:
        mine = rows.filter(
            pl.col("mode") == mode, pl.col("number") == number,
            pl.col("time_ns").is_between(begin, end), pl.col("end_ns").fill_null(end).is_between(begin, end),
        )  # fmt: skip
        assert len(mine) == 1, (mode, number, begin, end, rows.filter(mode=mode, number=number))
    for mode, least in (("sleep", 5), ("raise", 1), ("warn", 2), ("handle", 2), ("finally", 3)):
        durations = rows.filter(mode=mode)["duration_ns"].drop_nulls()
        assert (durations >= least * 1_000_000).all()
    assert rows.filter(mode="plain")["text"].to_list() == [f"'text {n}'" for n in range(COUNT)]
    # recursion: each within the one before
    deep = rows.filter(mode="recurse")
    assert deep["number"].to_list() == list(range(COUNT, -1, -1))
    assert (deep["end_ns"].diff().drop_nulls() < 0).all()
    assert rows.filter(mode="thread")["tid"].n_unique() == 2
    assert rows.filter(mode="child")["tgid"].unique().to_list() != [session.target]


def shown(value: object) -> str:
    """How a value is shown."""
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "<int of 210 bits>"
    if value == "long" * 50:
        return repr("long" * 20) + "…"
    return "<list>" if isinstance(value, list) else repr(value)


@pytest.mark.parametrize("python", KNOWN, ids=str)
def test_values(python, tmp_path):
    with (
        started(python, "show") as target,
        watched(tmp_path, target, "show") as session,
    ):
        target.work()
    rows = hits(session)
    assert rows["arguments"].to_list() == [[shown(value), "'behind'"] for value in VALUES]


def test_values_are_masked(tmp_path):
    with (
        started(KNOWN[0], "show") as target,
        watched(tmp_path, target, "show", "--payload-bytes", "0") as session,
    ):
        target.work()
    rows = hits(session)
    first = rows["arguments"].list.get(0).to_list()
    for value, text in zip(VALUES, first, strict=True):
        if value is None or isinstance(value, (bool, list)) or text.startswith("<int of"):
            assert text == shown(value)
        elif value not in ("", b""):
            assert "?" in text
    assert rows["arguments"].list.get(1).n_unique() == 1
    everything = b"".join(path.read_bytes() for path in session.path.rglob("*") if path.is_file())
    assert b"behind" not in everything
    assert b"ascii'" not in everything


@pytest.mark.parametrize("python", KNOWN[-1:], ids=str)
@pytest.mark.parametrize(
    ("name", "arguments", "ends"),
    [
        ("Bigger.price", lambda n: ["<Bigger>", str(n)], True),
        ("Shop.total", lambda n: [str(n), "2"], True),
        ("Bigger.make", lambda n: ["<type>", "'x'"], True),
        ("Bigger.size", lambda n: ["<Bigger>"], True),
        ("steps", lambda n: [str(n)], False),
        ("waited", lambda n: [str(n)], False),
    ],
)
def test_kinds_of_functions(python, name, arguments, ends, tmp_path):
    with (
        started(python, "names") as target,
        watched(tmp_path, target, name) as session,
    ):
        target.work()
    rows = hits(session)
    assert rows["arguments"].to_list() == [arguments(n) for n in range(COUNT)]
    assert rows["duration_ns"].null_count() == (0 if ends else COUNT)
    assert any("without a duration" in line for line in session.talk) != ends


@pytest.mark.parametrize("follow", [True, False])
def test_children_and_a_call_without_end(follow, tmp_path):
    with (
        started(KNOWN[0], "endless") as target,
        watched(
            tmp_path, target, "work", "--unredacted", *[] if follow else ["--no-follow"]
        ) as session,
    ):
        target.open_gate()
        assert target.note() == "begun"
        time.sleep(0.3)
        session.stop()
        session.wait()
        target.work()
    rows = hits(session).with_columns(mode=pl.col("arguments").list.get(0))
    child, gate = rows.filter(mode="'child'"), rows.filter(mode="'gate'")
    assert len(child) == (COUNT if follow else 0)
    assert child["duration_ns"].null_count() == 0
    assert len(child) + 1 == len(rows)
    assert gate["duration_ns"].to_list() == [None]
    assert gate["tgid"].to_list() == [target.pid]


@pytest.mark.parametrize("python", KNOWN, ids=str)
def test_decorators_are_looked_through(python, tmp_path):
    with (
        started(python, "names") as target,
        watched(tmp_path, target, "wrapped") as session,
    ):
        target.work()
    assert hits(session)["arguments"].to_list() == [[str(n)] for n in range(COUNT)]


@pytest.mark.parametrize("python", KNOWN, ids=str)
def test_generators(python, tmp_path):
    with (
        started(python, "names") as target,
        watched(tmp_path, target, "steps") as session,
    ):
        target.work()
    assert hits(session)["arguments"].to_list() == [[str(n)] for n in range(COUNT)]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("__main__:wrok", "has no wrok (did you mean work?)"),
        ("__main__:Shop.prise", "__main__.Shop has no prise (did you mean price?)"),
        ("__main__:Shop", "it is a class; name one of its methods"),
        ("__main__:COUNT", "it is a int, not a function"),
        ("time:sleep", "it is written in C"),
        ("xml.dom:parse", "has not imported xml.dom"),
        ("jsn:dumps", "has not imported jsn (did you mean json?)"),
        ("__main__:*", "every function needs debug registers of its own"),
        ("work", "it names no module and function"),
    ],
)
def test_what_cannot_be_watched(name, reason, tmp_path):
    with started(KNOWN[-1], "show") as target:
        with (
            pytest.raises(AssertionError, match="ended with") as failure,
            attached(tmp_path, target, "--calls", name),
        ):
            pass
        target.work()
    text = str(failure.value)
    assert reason in text
    assert "Traceback" not in text
    assert not (tmp_path / "test.scope").exists()


def test_two_functions(tmp_path):
    with (
        started(KNOWN[-1], "names") as target,
        watched(
            tmp_path, target, "Shop.total", "--calls", "__main__:wrapped", "--unredacted"
        ) as session,
    ):
        target.work()
    found = hits(session)
    assert found["probe"].to_list() == ["__main__:Shop.total", "__main__:wrapped"] * COUNT
    assert found["duration_ns"].null_count() == 0
    first = found["arguments"].list.get(0).cast(pl.Int64)
    assert first.to_list() == [number for number in range(COUNT) for _ in range(2)]


def test_debug_registers_in_use(tmp_path):
    with started(KNOWN[-1], "show") as target:
        taken = [open_breakpoint(target.pid, 4096 + 8 * n, 8, writes=True) for n in range(4)]
        try:
            assert min(taken) >= 0
            with (
                pytest.raises(AssertionError, match="all debug registers are in use") as failure,
                watched(tmp_path, target, "show"),
            ):
                pass
        finally:
            for descriptor in taken:
                os.close(descriptor)
        target.work()
    assert "Traceback" not in str(failure.value)


def test_too_many(tmp_path):
    options = ["--calls", "__main__:work", "--calls", "__main__:show", "--calls", "__main__:call"]
    with started(KNOWN[-1], "show") as target:
        with (
            pytest.raises(AssertionError, match=r"; name [12]") as failure,
            attached(tmp_path, target, *options),
        ):
            pass
        target.work()
    assert "of the 4 debug registers" in str(failure.value)
