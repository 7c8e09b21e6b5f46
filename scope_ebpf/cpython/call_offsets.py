"""What the watching of calls needs beyond offsets.Layout, by version: see probes/calls.h.

The offsets are those of the installed headers of 3.8.18, 3.9.18, 3.10.13, 3.11.7, 3.12.1 and 3.13.0
(Include/funcobject.h, Include/cpython/funcobject.h, frameobject.h, code.h). In 3.14 and 3.15
function_dict is the same: a live test looks through a decorator in every version.
"""

from dataclasses import dataclass

# Include/code.h: CO_GENERATOR, CO_COROUTINE, CO_ITERABLE_COROUTINE, CO_ASYNC_GENERATOR
GENERATOR_FLAGS = 0x20 | 0x80 | 0x100 | 0x200


@dataclass(frozen=True)
class CallOffsets:
    """Offsets in bytes; 0: this version does not have or need it."""

    function_dict: int
    # of 3.11: _co_firsttraceable, read when a frame that an exception left is taken over
    code_first_traceable: int = 0
    # of frame objects, up to 3.10
    frame_blocks: int = 0  # f_iblock
    frame_block_stack: int = 0
    frame_state: int = 0  # f_executing, 3.10: f_state


_HEAP = CallOffsets(function_dict=72, frame_blocks=112, frame_block_stack=120, frame_state=116)
_BY_MINOR = {
    8: _HEAP,
    9: _HEAP,
    10: CallOffsets(function_dict=88, frame_blocks=104, frame_block_stack=112, frame_state=108),
    11: CallOffsets(function_dict=88, code_first_traceable=168),
    12: CallOffsets(function_dict=88),
    13: CallOffsets(function_dict=88),
    14: CallOffsets(function_dict=88),
    15: CallOffsets(function_dict=88),
}
KNOWN = f"3.{min(_BY_MINOR)} to 3.{max(_BY_MINOR)}"


def call_offsets(version: tuple[int, int, int]) -> CallOffsets | None:
    """The offsets for a version; None if calls cannot be watched in it.

    3.11.0 gives a frame's references back while it still is the current one (changed in 3.11.1 by
    https://github.com/python/cpython/issues/99729), so its calls would seem not to end.

    >>> call_offsets((3, 11, 7)).code_first_traceable, call_offsets((3, 7, 0))
    (168, None)
    """
    if version == (3, 11, 0):
        return None
    return _BY_MINOR.get(version[1]) if version[0] == 3 else None
