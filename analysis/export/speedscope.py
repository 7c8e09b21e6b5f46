"""Stacks as a file for https://www.speedscope.app: one sampled profile, weights in nanoseconds.

Format: https://www.speedscope.app/file-format-schema.json (also in speedscope's npm package).
"""

from __future__ import annotations

import json
from typing import Any

from scope_ebpf.analysis.stacks.profile import Frame, Profile
from scope_ebpf.version import __version__

SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def speedscope_json(profile: Profile) -> str:
    """The profile; stacks come by their names, so that the left-to-right order is the same each time."""
    _, frames = profile.shown_frames()
    stacks = profile.shown_stacks()
    names = [frame.label() for frame in frames]
    paths = sorted(stacks, key=lambda path: [names[frame] for frame in path])
    weights = [stacks[path][0] for path in paths]
    return json.dumps(
        {
            "$schema": SCHEMA,
            "exporter": f"scope-ebpf {__version__}",
            "name": profile.title,
            "activeProfileIndex": 0,
            "shared": {"frames": [_frame(frame) for frame in frames]},
            "profiles": [
                {
                    "type": "sampled",
                    "name": profile.title,
                    "unit": "nanoseconds",
                    "startValue": 0,
                    "endValue": sum(weights),
                    "samples": paths,
                    "weights": weights,
                }
            ],
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


def _frame(frame: Frame) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": frame.name}
    if frame.file is not None:
        shown["file"] = frame.file
        if line := frame.line or frame.first_line:
            shown["line"] = line
    return shown
