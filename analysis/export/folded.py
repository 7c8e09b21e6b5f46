"""Stacks as lines of text, for flamegraph.pl, inferno and others: outermost frame first, weight last.

Format: Brendan Gregg's stackcollapse scripts, https://github.com/brendangregg/FlameGraph. It knows no
way to write a semicolon or a line's end in a name: they become `:` and a space.
"""

from __future__ import annotations

from collections.abc import Iterator

from scope_ebpf.analysis.stacks.profile import Profile, added

_ESCAPES = str.maketrans({";": ":", "\n": " ", "\r": " "})


def folded_lines(profile: Profile) -> Iterator[str]:
    """One line per stack, sorted: `web;MainThread;view (web.py:12) 1500`, in nanoseconds."""
    _, frames = profile.shown_frames()
    labels = [frame.label().translate(_ESCAPES) for frame in frames]
    # Different functions may have one label, and a stack has one line.
    numbers: dict[str, int] = {}
    same = [numbers.setdefault(label, len(numbers)) for label in labels]
    names = list(numbers)
    stacks = added(
        (tuple(same[frame] for frame in path), *of) for path, of in profile.shown_stacks().items()
    )
    lines = {";".join(names[name] for name in path): weight for path, (weight, _) in stacks.items()}
    for line in sorted(lines):
        yield f"{line} {lines[line]}\n"
