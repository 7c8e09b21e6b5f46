"""Files of profiles: what viewers read is well-formed, complete and exact."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_ebpf.analysis.export.flamegraph import MARGIN, MOST, PAD, WIDTH, flamegraph_svg
from scope_ebpf.analysis.export.folded import folded_lines
from scope_ebpf.analysis.export.speedscope import speedscope_json
from scope_ebpf.analysis.stacks.profile import KINDS, Frame, Profile, added

pytestmark = pytest.mark.pure

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "наследство;<script>&\"'\x1b[2J\n\u202e漢字\ud800]]>"


def profile(*stacks: tuple[list[Frame], int], by_line: bool = False) -> Profile:
    numbers: dict[Frame, int] = {}
    paths = [
        (tuple(numbers.setdefault(frame, len(numbers)) for frame in path), weight, 1)
        for path, weight in stacks
    ]
    return Profile("on the CPU", list(numbers), added(paths), by_line)


def group(name: str) -> Frame:
    return Frame(name, "group")


def at_line(line: int | None, name: str = "view", first_line: int | None = 12) -> Frame:
    return Frame(name, "python", "/srv/shop/web.py", first_line, line)


SMALL = profile(
    ([group("web"), group("main"), at_line(14), Frame("read", "network")], 700),
    ([group("web"), group("main"), at_line(15)], 200),
    ([group("web"), group("main"), at_line(14)], 100),
    ([group("db")], 3000),
)


def boxes(root: ET.Element) -> list[dict[str, Any]]:
    """The frames of a picture."""
    found = []
    for box in root.iter(f"{SVG}g"):
        rect, text, title = box.find(f"{SVG}rect"), box.find(f"{SVG}text"), box.find(f"{SVG}title")
        assert rect is not None and text is not None and title is not None
        found.append(
            {
                "start": int(box.attrib["data-s"]), "weight": int(box.attrib["data-w"]),
                "depth": int(box.attrib["data-d"]), "x": float(rect.attrib["x"]),
                "y": float(rect.attrib["y"]), "width": float(rect.attrib["width"]),
                "text": text.text or "", "title": title.text or "", "fill": rect.attrib["fill"],
            }
        )  # fmt: skip
    return found


def drawn(what: Profile) -> ET.Element:
    return ET.fromstring("".join(flamegraph_svg(what)).encode("utf-8"))  # noqa: S314 - it is ours


def check_nesting(found: list[dict[str, Any]]) -> None:
    """Each box is within one that is a row above it, and none overlaps another of its row."""
    for box in found:
        assert box["x"] >= MARGIN - 0.001
        assert box["x"] + box["width"] <= WIDTH - MARGIN + 0.001
        if box["depth"]:
            parents = [
                other for other in found
                if other["depth"] == box["depth"] - 1
                and other["start"] <= box["start"]
                and box["start"] + box["weight"] <= other["start"] + other["weight"]
            ]  # fmt: skip
            assert len(parents) == 1
            parent = parents[0]
            assert parent["y"] < box["y"]
            assert parent["x"] <= box["x"] + 0.001
            assert box["x"] + box["width"] <= parent["x"] + parent["width"] + 0.001
    rows = sorted(found, key=lambda box: (box["depth"], box["start"]))
    for one, other in itertools.pairwise(rows):
        if one["depth"] == other["depth"]:
            assert one["start"] + one["weight"] <= other["start"]


def test_a_picture_has_a_box_per_frame_and_merges_lines():
    found = boxes(drawn(SMALL))
    check_nesting(found)
    named = {box["title"].split("\n")[0]: box for box in found}
    assert {name: box["weight"] for name, box in named.items()} == {
        "db": 3000,
        "web": 1000,
        "main": 1000,
        "view (shop/web.py:12)": 1000,
        "read": 700,
    }
    assert len(found) == 5
    view = named["view (shop/web.py:12)"]["title"]
    assert "300 ns in itself" in view
    assert "/srv/shop/web.py" in view
    assert "at line 14 (80 %), 15 (20 %)" in view
    # the widest is first
    assert named["db"]["x"] == MARGIN
    assert named["db"]["width"] == pytest.approx(0.75 * (WIDTH - 2 * MARGIN))


def test_texts_fit_into_their_boxes():
    long = [([group("web"), at_line(14, "f" * size)], 10 * size) for size in range(1, 200)]
    for box in boxes(drawn(profile(*long))):
        assert len(box["text"]) * 7 <= max(box["width"] - 2 * PAD, 0)


def test_a_small_box_of_native_code_has_the_function_not_the_library():
    native = Frame("libpython3.12.so.1.0 PyLong_Add", "native")
    what = profile(([native], 100), ([group("web")], 900))
    assert [box["text"] for box in boxes(drawn(what))] == ["web", "PyLong_Add"]
    assert boxes(drawn(profile(([native], 1))))[0]["text"] == native.name


def test_a_picture_needs_nothing_from_elsewhere():
    text = "".join(flamegraph_svg(SMALL))
    addresses = re.findall(r"[a-z]+://[^\s\"'<]+", text)
    assert addresses == ["http://www.w3.org/2000/svg"]  # the name of the format, not fetched
    assert not re.search(r"\b(?:href|src|@import|url\()", text)


def test_names_of_traced_programs_stay_text():
    what = profile(([group(NASTY), at_line(3, NASTY)], 5))
    root = drawn(what)
    assert [*root.iter(f"{SVG}script")] == root.findall(f"{SVG}script")  # ours alone
    assert len(root.findall(f"{SVG}script")) == 1
    title = boxes(root)[0]["title"].split("\n")[0]
    assert title == "наследство;<script>&\"'\\x1b[2J\\n\\u202e漢字\\ud800]]>"


def test_thin_frames_are_counted_not_drawn():
    what = profile(([group("web")], 10**9), ([group("db"), group("thin")], 2))
    root = drawn(what)
    assert [box["title"].split("\n")[0] for box in boxes(root)] == ["web"]
    assert "2 frames with less than 0.01 % of it are not drawn" in "".join(root.itertext())


def test_a_picture_has_no_more_boxes_than_a_browser_can_show():
    # a hundred wide frames, and in each of them thousands that are all alike
    many = [([group(f"f{n % 100}"), group(f"g{n}")], 1000 + n % 7) for n in range(MOST + 5000)]
    found = boxes(drawn(profile(*many)))
    assert 100 <= len(found) <= MOST
    assert sum(box["depth"] == 0 for box in found) == 100
    assert all(box["weight"] > 0 for box in found)


def test_a_deep_stack_is_drawn_whole():
    path = [at_line(None, f"f{depth}") for depth in range(128)]
    found = boxes(drawn(profile((path, 7))))
    assert [box["depth"] for box in found] == [*range(128)]
    check_nesting(found)


def test_every_kind_has_a_colour_and_a_word():
    what = profile(*[([Frame(kind, kind)], 10) for kind in KINDS])
    root = drawn(what)
    assert len({box["fill"] for box in boxes(root)}) == len(KINDS)
    legend = "".join(root.itertext())
    assert all(word in legend for word in KINDS.values())


paths = st.lists(st.sampled_from(range(6)), min_size=1, max_size=6)


@given(st.lists(st.tuples(paths, st.integers(1, 10**12)), min_size=1, max_size=30))
def test_any_profile_nests_and_keeps_its_weight(stacks):
    what = profile(*[([group(f"f{n}") for n in path], weight) for path, weight in stacks])
    total = sum(weight for _, weight in stacks)
    found = boxes(drawn(what))
    check_nesting(found)
    assert int(drawn(what).attrib["data-total"]) == total
    folded = [line.rsplit(" ", 1) for line in folded_lines(what)]
    assert sum(int(weight) for _, weight in folded) == total
    assert len({path for path, _ in folded}) == len(folded)
    scope = json.loads(speedscope_json(what))["profiles"][0]
    assert sum(scope["weights"]) == scope["endValue"] == total


def test_folded_lines_are_as_flamegraph_pl_reads_them():
    assert [*folded_lines(SMALL)] == [
        "db 3000\n",
        "web;main;view (shop/web.py:12) 300\n",
        "web;main;view (shop/web.py:12);read 700\n",
    ]
    [line] = folded_lines(profile(([group("a;b\nc"), at_line(3, "漢")], 5)))
    assert line == "a:b c;漢 (shop/web.py:12) 5\n"
    # functions that look alike are one line
    here, there = Frame("f", "python", "/a/x/y.py", 1, 1), Frame("f", "python", "/b/x/y.py", 1, 1)
    assert [*folded_lines(profile(([here], 1), ([there], 2)))] == ["f (x/y.py:1) 3\n"]


def test_speedscope_files_follow_its_schema():
    nasty = profile(
        ([group(NASTY), at_line(3, NASTY), at_line(None, "x", None)], 5), ([group("a")], 2)
    )
    for what in (SMALL, nasty):
        text = speedscope_json(what).encode("utf-8", "backslashreplace")
        found = json.loads(text)
        check_speedscope(found)
        assert found["profiles"][0]["endValue"] == what.total_ns


def check_speedscope(found: dict[str, Any]) -> None:
    """The rules of file-format-schema.json (speedscope 1.25) for a file with a sampled profile."""
    assert found["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    assert set(found) <= {"$schema", "activeProfileIndex", "exporter", "name", "profiles", "shared"}
    assert set(found["shared"]) == {"frames"}
    for frame in found["shared"]["frames"]:
        assert set(frame) <= {"name", "file", "line", "col"}
        assert isinstance(frame["name"], str)
        assert isinstance(frame.get("file", ""), str)
        assert isinstance(frame.get("line", 1), int)
    for each in found["profiles"]:
        assert set(each) == {"type", "name", "unit", "startValue", "endValue", "samples", "weights"}
        assert each["type"] == "sampled"
        assert each["unit"] in {
            "bytes",
            "microseconds",
            "milliseconds",
            "nanoseconds",
            "none",
            "seconds",
        }
        assert len(each["samples"]) == len(each["weights"])
        places = Counter(number for path in each["samples"] for number in path)
        assert set(places) <= {*range(len(found["shared"]["frames"]))}
        assert all(math.isfinite(weight) and weight > 0 for weight in each["weights"])


def test_lines_that_are_told_apart_are_frames_of_their_own():
    stacks = [([at_line(14)], 3), ([at_line(15)], 4)]
    assert [*folded_lines(profile(*stacks, by_line=True))] == [
        "view (shop/web.py:14) 3\n",
        "view (shop/web.py:15) 4\n",
    ]
    frames = json.loads(speedscope_json(profile(*stacks, by_line=True)))["shared"]["frames"]
    assert [frame["line"] for frame in frames] == [14, 15]
    frames = json.loads(speedscope_json(profile(*stacks)))["shared"]["frames"]
    assert [frame["line"] for frame in frames] == [12]
