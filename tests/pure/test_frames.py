"""Stacks as functions, files and lines."""

from __future__ import annotations

import dis
import sys
import textwrap
import types

import polars as pl
import pytest

from scope_ebpf.analysis.stacks.frames import FRAMES, resolve
from tests.pure.recordings import at
from tests.pure.stacks import StackStory

pytestmark = pytest.mark.pure

MAIN, VIEW, QUERY = 2**46, 2**46 + 512, 2**46 + 1024


def rows(frames: pl.DataFrame, *columns: str) -> list[tuple[object, ...]]:
    return frames.select(columns).rows()


def test_a_stack_becomes_functions_and_lines(tmp_path):
    story = StackStory()
    story.code(7, MAIN, "main", "/srv/main.py", 1)
    story.code(7, VIEW, "Shop.view", "/srv/views.py", 30)
    story.stack(7, 77, [(VIEW, 4), (MAIN, 0)])
    frames = resolve(story.record(tmp_path / "a.scope"))
    assert frames.schema == FRAMES
    assert rows(frames, "depth", "function", "file", "first_line", "line") == [
        (0, "Shop.view", "/srv/views.py", 30, 34),
        (1, "main", "/srv/main.py", 1, 1),
    ]
    assert not frames["truncated"].any()


def test_a_code_address_that_is_used_again_is_another_function(tmp_path):
    story = StackStory()
    # in the table in another order than in time
    story.code(7, VIEW, "third", first_line=300, time_ns=200)
    story.code(7, VIEW, "first", first_line=100, time_ns=10)
    story.code(7, VIEW, "second", first_line=200, time_ns=100)
    for stack, time_ns in ((1, 5), (2, 10), (3, 99), (4, 100), (5, 5_000)):
        story.stack(7, stack, [(VIEW, 1)], time_ns)
    frames = resolve(story.record(tmp_path / "a.scope"))
    assert rows(frames, "stack", "function", "line") == [
        (1, None, None),  # nothing was described yet
        (2, "first", 101),
        (3, "first", 101),
        (4, "second", 201),
        (5, "third", 301),
    ]


def test_a_stack_that_is_described_again_stays_what_it_was(tmp_path):
    story = StackStory()
    story.code(7, VIEW, "first", time_ns=1)
    story.stack(7, 1, [(VIEW, 1)], 2)
    story.code(7, VIEW, "second", time_ns=3)
    story.stack(7, 1, [(VIEW, 1)], 4)
    assert rows(resolve(story.record(tmp_path / "a.scope")), "function") == [("first",)]


def test_what_was_lost_is_null(tmp_path):
    story = StackStory()
    story.code(7, MAIN, None, None)
    story.stack(7, 1, [(VIEW, 1), (MAIN, 0)])
    frames = resolve(story.record(tmp_path / "a.scope"))
    assert rows(frames, "depth", "function", "file", "line") == [
        (0, None, None, None),
        (1, None, None, 10),
    ]


def test_a_forked_worker_has_codes_of_its_own(tmp_path):
    story = StackStory()
    story.code(7, VIEW, "before the fork")
    story.code(8, VIEW, "in the worker", first_line=50)
    for tgid in (7, 8, 9):
        story.stack(tgid, 1, [(VIEW, 0)])
    assert rows(resolve(story.record(tmp_path / "a.scope")), "tgid", "function") == [
        (7, "before the fork"),
        (8, "in the worker"),
        (9, None),
    ]


def test_only_what_is_wanted_is_resolved(tmp_path):
    story = StackStory()
    story.code(7, VIEW, "view")
    story.stack(7, 1, [(VIEW, 0)])
    story.stack(7, 2, [(VIEW, 1)])
    recording = story.record(tmp_path / "a.scope")
    wanted = pl.DataFrame(
        {"tgid": [7, 7], "stack": [2, 999]}, schema={"tgid": pl.UInt32, "stack": pl.UInt64}
    )
    assert rows(resolve(recording, wanted), "stack", "line") == [(2, 11)]
    assert resolve(recording, wanted.clear()).is_empty()


def test_the_deepest_stack_is_whole_and_says_that_there_is_more(tmp_path):
    story = StackStory()
    story.code(7, VIEW, "recurse")
    story.stack(7, 1, [(VIEW, 1)] * 128, truncated=True)
    story.stack(7, 2, [(VIEW, 1)] * 128)
    frames = resolve(story.record(tmp_path / "a.scope"))
    first, second = frames.filter(pl.col("stack") == 1), frames.filter(pl.col("stack") == 2)
    assert first["depth"].to_list() == [*range(128)]
    assert first.filter("truncated")["depth"].to_list() == [127]
    assert second.height == 128
    assert not second["truncated"].any()


def test_an_empty_recording_has_no_frames(tmp_path):
    frames = resolve(StackStory().record(tmp_path / "a.scope"))
    assert frames.schema == FRAMES
    assert frames.is_empty()


def test_a_real_code_object_of_this_interpreter_has_its_real_lines(tmp_path):
    source = textwrap.dedent(
        """
        def view(items):
            total = 0

            for item in items:
                total += item

            return total
        """
    )
    constants = compile(source, "view.py", "exec").co_consts
    code = next(each for each in constants if isinstance(each, types.CodeType))
    newer = sys.version_info >= (3, 11)
    first_instruction = 184 if newer else 0
    starts = [*dis.findlinestarts(code)]
    story = StackStory()
    story.row("codes", time_ns=at(0), tgid=7, code=VIEW, name=code.co_name, file=code.co_filename,
              first_line=code.co_firstlineno, lines=code.co_linetable,
              version=sys.version_info[0] << 8 | sys.version_info[1],
              first_instruction=first_instruction)  # fmt: skip
    for stack, (offset, _) in enumerate(starts):
        story.stack(7, stack, [(VIEW, offset + first_instruction if newer else offset // 2)])
    frames = resolve(story.record(tmp_path / "a.scope"))
    assert len(starts) > 4
    assert frames["line"].to_list() == [line for _, line in starts]
