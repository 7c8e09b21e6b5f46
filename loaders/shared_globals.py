"""Global variables of the probes, in memory that both sides see."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.loaders.libbpf import BpfObject


class SharedGlobals:
    """The variables in .bss of a loaded object."""

    def __init__(self, opened: BpfObject) -> None:
        """Map them.

        Raises:
            LoadError: with the kernel's reason.
        """
        self._places = opened.variables(".bss")
        length = max(sum(place) for place in self._places.values())
        self._memory = opened.map_memory(".bss", length, writable=True)

    def __getitem__(self, name: str) -> NDArray[np.unsignedinteger[Any]]:
        """A variable that is a number, as an array of one element: what is set there, the probes see."""
        offset, width = self._places[name]
        return np.frombuffer(self._memory, np.dtype(f"<u{width}"), 1, offset)
