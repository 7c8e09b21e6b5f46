"""Waits for the GIL: how long they were, and who held it."""

from __future__ import annotations

import polars as pl
import pytest

from tests.live.pythons import Python, pythons
from tests.live.recording import PROGRAMS, Target, attached, no_losses
from tests.live.roots import clear, running

pytestmark = pytest.mark.live


@pytest.mark.parametrize("python", pythons(), ids=str)
def test_waits_are_wall_time_without_cpu_time(python: Python, tmp_path):
    """Of two busy threads one waits while the other runs: for the GIL, or preempted by somebody else."""
    program = PROGRAMS / "busy_threads.py"
    with Target(*running(python, program)) as target, attached(tmp_path, target) as session:
        notes = {int(tid): note for tid, note in target.work().items()}
    clear(python)
    no_losses(session)
    gil, offcpu = session.table("gil"), session.table("offcpu")
    assert len(notes) == 2
    for tid, (begin, end, cpu) in notes.items():  # nanoseconds
        waits = gil.filter(pl.col("tid") == tid, pl.col("start_ns").is_between(begin, end))
        ends = pl.min_horizontal(pl.col("start_ns") + pl.col("duration_ns"), pl.lit(end))
        waited = int(waits.select((ends - pl.col("start_ns")).sum()).item())
        calls = waits["start_ns"].to_list()
        elsewhere = offcpu.filter(
            pl.col("tid") == tid,
            pl.col("start_ns").is_between(begin, end),
            pl.col("syscall_start_ns").is_null() | ~pl.col("syscall_start_ns").is_in(calls),
        )
        rest = int(elsewhere.select((ends - pl.col("start_ns")).sum()).item())
        wanted = end - begin - cpu
        assert wanted > 0.2 * (end - begin), "the threads did not compete"
        assert abs(waited + rest - wanted) <= 0.03 * wanted, (waited, rest, wanted)
        assert waited > 0.1 * wanted  # on a busy machine both are preempted most of the time
        (other,) = notes.keys() - {tid}
        # the first thread, which waits in join(), takes it now and then; each call lasts 5 ms at most
        held = waits.group_by("holder_tid").agg(pl.col("duration_ns").sum())
        by_other = int(held.filter(pl.col("holder_tid") == other)["duration_ns"].sum())
        assert by_other >= 0.9 * int(waits["duration_ns"].sum()), held
