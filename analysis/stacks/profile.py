"""Weighted stacks, whatever they weigh: what flame graphs and the files of other viewers show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal[
    "group", "python", "package", "stdlib", "native", "network", "lock", "gil", "disk", "sleep",
    "runqueue", "wait", "note",
]  # fmt: skip
KINDS: Final[Mapping[Kind, str]] = {
    "group": "services, threads, requests",
    "python": "own code",
    "package": "installed packages",
    "stdlib": "standard library",
    "native": "native code",
    "network": "network",
    "lock": "locks",
    "gil": "the GIL",
    "disk": "disk",
    "sleep": "sleeping, children",
    "runqueue": "ready to run",
    "wait": "other waits",
    "note": "not known",
}
"""What each kind of frame is called where colours are explained."""

_PACKAGES: Final = re.compile(r".*/(?:site|dist)-packages/")
_STDLIB: Final = re.compile(r".*/(?:lib(?:64)?/python\d+(?:\.\d+)?t?|python\d+\.zip)/")


class Frame(NamedTuple):
    """One frame: a function at a line, or what stands for something else, such as a thread."""

    name: str
    kind: Kind
    file: str | None = None
    first_line: int | None = None  # of the function
    line: int | None = None  # at which it stood

    def merged(self) -> Frame:
        """The function, at whatever line it stood."""
        return self._replace(line=None) if self.line is not None else self

    def label(self) -> str:
        """`function (file:line)`; the line is the function's own where frames are merged.

        >>> Frame("view", "python", "/srv/shop/web.py", 12, 14).label()
        'view (shop/web.py:14)'
        >>> Frame("view", "python", "/srv/shop/web.py", 12, 14).merged().label()
        'view (shop/web.py:12)'
        """
        if self.file is None:
            return self.name
        line = self.line or self.first_line
        place = short_file(self.file)
        return f"{self.name} ({place}:{line})" if line else f"{self.name} ({place})"


def file_kind(file: str | None) -> Kind:
    """Whose code a file has.

    >>> file_kind("/usr/lib/python3.11/json/decoder.py"), file_kind("<frozen runpy>")
    ('stdlib', 'stdlib')
    >>> file_kind("/opt/venv/lib/python3.12/site-packages/flask/app.py"), file_kind("web.py")
    ('package', 'python')
    """
    if file is None:
        return "note"
    if _PACKAGES.match(file):
        return "package"
    return "stdlib" if _STDLIB.match(file) or file.startswith("<frozen ") else "python"


def short_file(file: str) -> str:
    """The part of a path that tells: from the package or module on, else its last folder.

    >>> short_file("/opt/venv/lib/python3.12/site-packages/flask/app.py"), short_file("/srv/a/b.py")
    ('flask/app.py', 'a/b.py')
    """
    match = _PACKAGES.match(file) or _STDLIB.match(file)
    if match:
        return file[match.end() :]
    return file if file.startswith("<") else "/".join(file.split("/")[-2:]).lstrip("/")


@dataclass(frozen=True)
class Profile:
    """What a flame graph shows.

    - `title`: what is shown, and of what
    - `stacks`: a weight in nanoseconds for each path of numbers of `frames`, outermost first, and how
      many samples or intervals are in it. No path comes twice
    - `by_line`: frames of a function that stood at different lines are different
    - `notes`: sentences about what is missing; `empty`: why there is nothing at all
    - `remark`: how the weights are to be read, shown with the picture; None: nothing special
    """

    title: str
    frames: list[Frame]
    stacks: dict[tuple[int, ...], tuple[int, int]]
    by_line: bool = False
    notes: tuple[str, ...] = ()
    empty: str | None = None
    remark: str | None = None

    @property
    def total_ns(self) -> int:
        """The sum of all weights."""
        return sum(weight for weight, _ in self.stacks.values())

    def shown_frames(self) -> tuple[list[int], list[Frame]]:
        """Frames as they are told apart: for each of `frames` a number, and the frames of these."""
        if self.by_line:
            return list(range(len(self.frames))), self.frames
        numbers: dict[Frame, int] = {}
        shown = [numbers.setdefault(frame.merged(), len(numbers)) for frame in self.frames]
        return shown, list(numbers)

    def shown_stacks(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """Stacks of the numbers of `shown_frames`."""
        if self.by_line:
            return self.stacks
        shown, _ = self.shown_frames()
        return added((tuple(shown[n] for n in path), *of) for path, of in self.stacks.items())


def added(
    weighed: Iterable[tuple[tuple[int, ...], int, int]],
) -> dict[tuple[int, ...], tuple[int, int]]:
    """Weights and numbers of samples, added up where the path is the same."""
    stacks: dict[tuple[int, ...], tuple[int, int]] = {}
    for path, weight, samples in weighed:
        before = stacks.get(path, (0, 0))
        stacks[path] = before[0] + weight, before[1] + samples
    return stacks


class Node:
    """A frame in a tree of calls, with the weight of all stacks that begin like this."""

    __slots__ = ("children", "frame", "lines", "own_ns", "samples", "weight_ns")

    def __init__(self, frame: int) -> None:
        self.frame = frame
        self.weight_ns = 0
        self.own_ns = 0
        self.samples = 0
        self.children: dict[int, Node] = {}
        self.lines: dict[int, int] = {}

    def by_weight(self) -> Iterator[Node]:
        """Its children, the heaviest first."""
        yield from sorted(self.children.values(), key=lambda node: (-node.weight_ns, node.frame))


def tree(profile: Profile) -> Node:
    """The stacks as a tree, below a root that is no frame; `lines`: nanoseconds at each line."""
    shown, _ = profile.shown_frames()
    lines = [frame.line for frame in profile.frames]
    root = Node(-1)
    for path, (weight, samples) in profile.stacks.items():
        at = root
        at.weight_ns += weight
        at.samples += samples
        for number in path:
            frame = shown[number]
            node = at.children.get(frame)
            if node is None:
                node = at.children[frame] = Node(frame)
            at = node
            at.weight_ns += weight
            at.samples += samples
            line = lines[number]
            if line is not None:
                at.lines[line] = at.lines.get(line, 0) + weight
        at.own_ns += weight
    return root
