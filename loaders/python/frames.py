"""The Python stack of each thread of another process, while it goes on.

A thread that does not hold the GIL does not change its stack. That of the one which holds it is read until
two readings agree: which frames, and where each stands, but for the innermost one, whose place may be
either. A stack that does not hold still for so long is shown as it was read last, and marked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from scope_ebpf.cpython.lines import line_of
from scope_ebpf.cpython.offsets import CODE_TAG, NO_SHIM
from scope_ebpf.cpython.shims import is_init_cleanup
from scope_ebpf.loaders.python.objects import Objects, Unreadable

_MOST_FRAMES = 1 << 16
# Of the data stack, newest chunks first: CPython makes chunks of 16 KiB (DATA_STACK_CHUNK_SIZE), each of
# at least twice what it needs. What is not copied is read frame by frame.
_MOST_CHUNKS = 1 << 12
_MOST_CHUNK_BYTES = 1 << 20
_MOST_STACK_BYTES = 1 << 26
_CHUNKS_AGAIN = 2
_SAME_FRAMES = 8
_TRIES = 400
_TRY_SECONDS = 0.2
_PAUSE_SECONDS = 0.0001
_LONGEST_LINES = 1 << 20
_CODE_CACHE = 1 << 16


@dataclass(frozen=True)
class Place:
    """A frame as it was read."""

    frame: int  # addresses of the frame
    code: int  # and of its code object
    offset: int  # see scope_ebpf.cpython.lines


@dataclass(frozen=True)
class Code:
    """What a code object says of itself."""

    name: str | None  # co_qualname; up to 3.10 co_name
    file: str | None
    first_line: int
    lines: bytes
    first_instruction: int


@dataclass(frozen=True)
class Frame:
    """A frame for people."""

    name: str | None  # None: could not be read
    file: str | None
    line: int | None  # None: it has none, or could not be read


@dataclass
class Stack:
    """The Python frames of a thread, innermost first."""

    frames: list[Frame] = field(default_factory=list)
    torn: bool = False  # it ran on while it was read: not sure to have been so at any moment
    cut: bool = False  # there are more frames further out, or they could not be read


@dataclass(frozen=True)
class ThreadState:
    """A PyThreadState, and the PyInterpreterState that it belongs to."""

    address: int
    interpreter: int


@dataclass
class _Walked:
    """Frames as one reading has them, innermost first."""

    places: list[Place]
    cut: bool  # there may be more

    @cached_property
    def index(self) -> dict[int, int]:
        """Where each frame is in the list."""
        return {place.frame: at for at, place in enumerate(self.places)}

    def agrees(self, other: _Walked) -> bool:
        """Whether both show one stack; its innermost frame may have gone on within its code."""
        if self.cut and len(self.places) < _MOST_FRAMES:
            return False
        return self.places[1:] == other.places[1:] and [
            (place.frame, place.code) for place in self.places[:1]
        ] == [(place.frame, place.code) for place in other.places[:1]]


class Frames:
    """Reads the stacks of one process."""

    def __init__(self, objects: Objects) -> None:
        """Nothing is read yet."""
        self._objects = objects
        self._layout = objects.layout
        self._version = self._layout.version[0] << 8 | self._layout.version[1]
        self._codes: dict[tuple[int, int, int], Code] = {}

    # ---- stacks ----

    def stack(self, tstate: int) -> Stack:
        """The Python stack of a thread, from the address of its thread state."""
        end = time.monotonic() + _TRY_SECONDS
        walked = _Walked([], True)
        for turn in range(_TRIES):
            try:
                # the first time all of it; of a stack that changes, what is far out stays as it is
                most = _MOST_CHUNKS if turn == 0 else _CHUNKS_AGAIN
                first, copies = self._copy(tstate, most)
                again, copies_again = self._copy(tstate, most)
                one = self._walk(first, copies, walked)
                walked = self._walk(again, copies_again, one)
                if one.agrees(walked) and (
                    not self._layout.heap_frames or again == self._innermost(tstate)
                ):
                    return self._described(walked, torn=False)
            except Unreadable:
                pass
            if time.monotonic() > end:
                break
            time.sleep(_PAUSE_SECONDS)
        return self._described(walked, torn=True)

    def at(self, address: int) -> Frame:
        """One frame, as that of a generator.

        Raises:
            Unreadable: there is none.
        """
        data = self._objects.bytes_at(address, self._layout.frame_bytes)
        return self.describe(self._place(address, data))

    def _described(self, walked: _Walked, torn: bool) -> Stack:
        frames = [self.describe(place) for place in walked.places]
        return Stack(
            [each for each in frames if not is_init_cleanup(each.name, each.file)], torn, walked.cut
        )

    def _innermost(self, thread: int) -> int:
        frame = self._objects.word(thread + self._layout.tstate_frame)
        if self._layout.cframe_frame is not None:
            frame = self._objects.word(frame + self._layout.cframe_frame)
        return frame

    def _copy(self, thread: int, most: int) -> tuple[int, dict[int, bytes]]:
        """The innermost frame, and copies of the newest chunks of the thread's data stack by address."""
        copies: dict[int, bytes] = {}
        frame = self._innermost(thread)
        layout, objects = self._layout, self._objects
        # up to 3.10 frames are objects
        if layout.tstate_datastack_chunk is not None and layout.tstate_datastack_top is not None:
            chunk = objects.word(thread + layout.tstate_datastack_chunk)
            top = objects.word(thread + layout.tstate_datastack_top)
            total = 0
            for _ in range(most):
                if not chunk or total > _MOST_STACK_BYTES:
                    break
                size = top - chunk
                if not 0 <= size <= _MOST_CHUNK_BYTES:
                    break
                data = objects.bytes_at(chunk, max(size, 8))
                copies[chunk] = data
                total += size
                # _PyStackChunk: previous, size, top (in words of `data`)
                chunk = int.from_bytes(data[:8], "little")
                if not chunk:
                    break
                used = objects.word(chunk + (layout.chunk_top or 0))
                top = chunk + (layout.chunk_data or 0) + 8 * used
        return frame, copies

    def _walk(self, frame: int, copies: Mapping[int, bytes], earlier: _Walked) -> _Walked:
        """The frames from the innermost one on.

        Where it comes out of what was copied, and the last frames stood the same in an earlier walk, the rest
        is taken from there: a frame further out cannot go on before those within it have ended. In the copies
        that is not enough: a function that has returned and called itself again as often looks the same, but
        what is further out may have been read between the two.
        """
        layout = self._layout
        size, owner_at = layout.frame_bytes, layout.frame_owner
        first_shim = NO_SHIM if layout.first_shim is None else layout.first_shim
        starts = sorted(copies, reverse=True)
        places: list[Place] = []
        seen: set[int] = set()
        while frame:
            if frame in seen or len(seen) >= _MOST_FRAMES or frame % 8:
                return _Walked(places, True)
            seen.add(frame)
            data, copied = b"", False
            for start in starts:
                if start <= frame < start + len(copies[start]):
                    data, copied = copies[start][frame - start : frame - start + size], True
                    break
            if len(data) < size:
                try:
                    data = self._objects.bytes_at(frame, size)
                except Unreadable:
                    return _Walked(places, True)
            if owner_at is None or data[owner_at] < first_shim:
                place = self._place(frame, data)
                if not place.code:  # it was left, or is about to be entered
                    return _Walked(places, True)
                places.append(place)
                at = earlier.index.get(frame, -1) + 1
                if (
                    not copied
                    and at >= _SAME_FRAMES
                    and places[-_SAME_FRAMES:] == earlier.places[at - _SAME_FRAMES : at]
                ):
                    return _Walked(places + earlier.places[at:], earlier.cut)
            frame = _word(data, layout.frame_previous)
        return _Walked(places, False)

    def _place(self, frame: int, data: bytes) -> Place:
        code = _word(data, self._layout.frame_code) & ~CODE_TAG
        instruction = _word(data, self._layout.frame_instruction)
        heap = self._layout.heap_frames
        return Place(frame, code, instruction & 0xFFFFFFFF if heap else instruction - code)

    # ---- code objects ----

    def describe(self, place: Place) -> Frame:
        """What a frame is, in names."""
        try:
            code = self._code(place.code)
        except Unreadable:
            return Frame(None, None, None)
        line = line_of(
            place.offset, code.first_line, code.lines, self._version, code.first_instruction
        )
        return Frame(code.name, code.file, line)

    def _code(self, address: int) -> Code:
        layout, objects = self._layout, self._objects
        if objects.full_type_name(address) != "code":
            raise Unreadable(f"no code object at {address:#x}")
        name_at = layout.code_name if layout.code_qualname is None else layout.code_qualname
        name = objects.word(address + name_at)
        lines = objects.word(address + layout.code_lines)
        # code objects are recycled: what they refer to tells them apart
        key = (address, name, lines)
        if key not in self._codes:
            if len(self._codes) >= _CODE_CACHE:
                self._codes.clear()
            self._codes[key] = Code(
                self._text(name),
                self._text(objects.word(address + layout.code_file)),
                objects.number(address + layout.code_first_line, 4),
                objects.data(lines, _LONGEST_LINES),
                layout.code_instructions or 0,
            )
        return self._codes[key]

    def _text(self, address: int) -> str | None:
        try:
            return self._objects.text(address)
        except Unreadable:
            return None


def _word(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")
