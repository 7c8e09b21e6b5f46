"""A flame graph as one SVG file: any browser shows it, without a network.

The outermost frames are at the top, the widest on the left. A click zooms, `/` searches, and Esc
shows all again; where scripts do not run, it is a picture.
"""

from __future__ import annotations

import colorsys
import unicodedata
import zlib
from collections.abc import Iterator
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from scope_ebpf.analysis.export.flamegraph_script import SCRIPT, STYLE
from scope_ebpf.analysis.stacks.profile import KINDS, Frame, Kind, Node, Profile, tree

WIDTH: Final = 1200
MARGIN: Final = 10
ROW: Final = 18
LEGEND: Final = 49
LEGEND_ROW: Final = 17
BOTTOM: Final = 26
PAD: Final = 3
CHAR: Final = 7  # of a monospaced font of 11 px, in whole pixels as some draw it
# What is thinner than this share cannot be seen, and more boxes than this stop a browser.
THINNEST: Final = 1 / 10_000
MOST: Final = 20_000
_MOST_LINES: Final = 4

# Hue, saturation, lightness. Warm: code, cold: waiting, without a colour: neither.
_COLOURS: Final[dict[Kind, tuple[float, float, float]]] = {
    "group": (0.58, 0.10, 0.84),
    "python": (0.09, 0.88, 0.66),
    "package": (0.145, 0.72, 0.68),
    "stdlib": (0.055, 0.35, 0.76),
    "native": (0.01, 0.68, 0.68),
    "network": (0.46, 0.42, 0.66),
    "lock": (0.76, 0.42, 0.76),
    "gil": (0.89, 0.62, 0.76),
    "disk": (0.60, 0.55, 0.70),
    "sleep": (0.66, 0.30, 0.86),
    "runqueue": (0.27, 0.45, 0.68),
    "wait": (0.52, 0.22, 0.76),
    "note": (0.0, 0.0, 0.92),
}
_SHADES: Final = 0.045


def flamegraph_svg(profile: Profile) -> Iterator[str]:
    """The picture, in parts."""
    root = tree(profile)
    _, frames = profile.shown_frames()
    weights = _weights(root)
    least_ns = root.weight_ns * THINNEST
    if len(weights) > MOST:
        least_ns = max(least_ns, weights[MOST] + 1)
    rows = [*_places(root, least_ns)]
    drawn = {frames[node.frame].kind for node, _, _ in rows}
    legend, top = _legend([kind for kind in KINDS if kind in drawn])
    height = top + ROW * (max((depth for _, _, depth in rows), default=0) + 1) + BOTTOM
    left_out = ""
    if len(weights) > len(rows):
        share = 100 * least_ns / max(root.weight_ns, 1)
        left_out = (
            f"{len(weights) - len(rows):,} frames with less than {share:.2g} % of it are not drawn"
        )
    yield _beginning(profile, root, height, left_out)
    yield legend
    for node, start_ns, depth in rows:
        yield _box(frames[node.frame], node, start_ns, depth, top, root.weight_ns)
    yield f"<script><![CDATA[{SCRIPT}]]></script>\n</svg>\n"


def _places(root: Node, least_ns: float) -> Iterator[tuple[Node, int, int]]:
    """Each node that is drawn, where it starts and how deep it is; parents come first."""
    waiting = [(root, 0, -1)]
    while waiting:
        node, start_ns, depth = waiting.pop()
        if depth >= 0:
            yield node, start_ns, depth
        at, children = start_ns, []
        for child in node.by_weight():
            if child.weight_ns >= least_ns and child.weight_ns > 0:
                children.append((child, at, depth + 1))
            at += child.weight_ns
        waiting += reversed(children)


def _weights(root: Node) -> list[int]:
    """Of all nodes, the heaviest first."""
    weights: list[int] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        weights += [child.weight_ns for child in node.children.values()]
        waiting += node.children.values()
    return sorted(weights, reverse=True)


def _beginning(profile: Profile, root: Node, height: int, left_out: str) -> str:
    what = f"{duration(root.weight_ns)}, {root.samples:,} samples or intervals"
    if profile.remark:
        what += f"; {profile.remark}"
    if left_out:
        what += f"; {left_out}"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<svg id="scope-flame" xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" data-total="{root.weight_ns}" data-margin="{MARGIN}" '
        f'data-char="{CHAR}" data-pad="{PAD}">\n'
        f"<style>{STYLE}</style>\n"
        f'<rect id="paper" width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
        f'<text id="heading" x="{MARGIN}" y="22">{escape(fitting(shown(profile.title), 1050))}</text>\n'
        f'<text x="{MARGIN}" y="40" class="quiet">{escape(what)}</text>\n'
        f'<text id="search" class="button" x="{WIDTH - 320}" y="40">Search (/)</text>\n'
        f'<text id="reset" class="button" x="{WIDTH - 230}" y="40">Show all (Esc)</text>\n'
        f'<text id="matched" x="{WIDTH - 115}" y="40"></text>\n'
        f'<text id="details" x="{MARGIN}" y="{height - 8}"></text>\n'
    )


def _legend(kinds: list[Kind]) -> tuple[str, int]:
    """What the colours mean, in as many rows as that needs, and where the frames begin."""
    parts = []
    x, y = float(MARGIN), LEGEND
    for kind in kinds:
        size = 15 + CHAR * len(KINDS[kind])
        if x + size > WIDTH - MARGIN:
            x, y = float(MARGIN), y + LEGEND_ROW
        parts.append(
            f'<rect x="{x:g}" y="{y}" width="11" height="11" fill="{_colour(kind)}"/>'
            f'<text x="{x + 15:g}" y="{y + 10}" class="quiet">{escape(KINDS[kind])}</text>\n'
        )
        x += size + 16
    return "".join(parts), y + LEGEND_ROW + 10


def _box(frame: Frame, node: Node, start_ns: int, depth: int, top: int, total_ns: int) -> str:
    room = WIDTH - 2 * MARGIN
    # Edges are rounded, not widths: so a frame never reaches out of the one that it is in.
    left = round(start_ns * room / total_ns, 2)
    right = round((start_ns + node.weight_ns) * room / total_ns, 2)
    x, y, width = MARGIN + left, top + depth * ROW, right - left
    label = shown(frame.label())
    # where a box is too small for `libc.so.6 memcpy`, the function tells more than the library
    short = label.partition(" ")[2] if frame.kind == "native" else ""
    text = fitting(label, width)
    if short and text != label:
        text = fitting(short, width)
    return (
        f'<g class="f" data-s="{start_ns}" data-w="{node.weight_ns}" data-d="{depth}"'
        f"{f' data-n={quoteattr(short)}' if short else ''}>"
        f"<title>{escape(_about(frame, label, node, total_ns))}</title>"
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}" rx="1" '
        f"fill={quoteattr(_colour(frame.kind, frame.file or frame.name))}/>"
        f'<text x="{x + PAD:.2f}" y="{y + 12.5}">{escape(text)}</text></g>\n'
    )


def _about(frame: Frame, label: str, node: Node, total_ns: int) -> str:
    """What is shown of a frame when the mouse is over it; the first line is its name."""
    share = 100 * node.weight_ns / total_ns
    lines = [label, f"{duration(node.weight_ns)}, {share:.1f} %, {node.samples:,} samples"]
    if node.own_ns and node.own_ns != node.weight_ns:
        lines.append(f"{duration(node.own_ns)} in itself")
    if frame.file is not None:
        lines.append(shown(frame.file))
    if frame.line is None and node.lines:
        most = sorted(node.lines.items(), key=lambda at: (-at[1], at[0]))
        where = [f"{line} ({100 * ns / node.weight_ns:.0f} %)" for line, ns in most[:_MOST_LINES]]
        lines.append(f"at line {', '.join(where)}{', …' if len(most) > _MOST_LINES else ''}")
    return "\n".join(lines)


def duration(ns: int) -> str:
    """As the commands show it.

    >>> duration(12_345_678), duration(61_200_000_000), duration(812)
    ('12.3 ms', '61.2 s', '812 ns')
    """
    for factor, unit in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if ns >= factor * 0.9995:
            number = ns / factor
            return f"{number:,.{2 if number < 9.995 else 1 if number < 99.95 else 0}f} {unit}"
    return f"{ns} ns"


def shown(text: str) -> str:
    r"""Text that XML can hold and that shows what it is: control characters are escaped.

    >>> shown("a\x1b[2J\ud800")
    'a\\x1b[2J\\ud800'
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def fitting(label: str, width: float) -> str:
    """As much of a label as fits into a box; nothing if that would be two letters or fewer.

    >>> fitting("view (web.py:12)", 60), fitting("view", 60), fitting("view", 20)
    ('view (…', 'view', '')
    """
    cells = int((width - 2 * PAD) / CHAR)
    if cells < 3:
        return ""
    sizes = [2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in label]
    if sum(sizes) <= cells:
        return label
    used, kept = 1, 0  # one for the ellipsis
    while used + sizes[kept] <= cells:
        used += sizes[kept]
        kept += 1
    return label[:kept] + "…"


def _colour(kind: Kind, name: str = "") -> str:
    """Of one kind, files and functions differ a little, and each looks the same in every picture."""
    hue, saturation, lightness = _COLOURS[kind]
    shade = (zlib.crc32(name.encode("utf-8", "replace")) % 1000 / 500 - 1) if name else 0
    red, green, blue = colorsys.hls_to_rgb(hue, min(lightness + shade * _SHADES, 1), saturation)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
