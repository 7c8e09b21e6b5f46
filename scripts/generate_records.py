#!/usr/bin/env python3
"""Write scope_ebpf/records.py from the BTF of probes/records.c.

Usage: scripts/generate_records.py build/records.o > scope_ebpf/records.py
"""

import sys
from pathlib import Path

import numpy as np

from scope_ebpf.loaders.btf import ENUM, STRUCT, Btf

HEAD = '''"""Records and constants that the probes and Python share.

Generated from probes/events.h by `make generate`; do not edit. The meaning of every field stands there.
"""

from enum import IntEnum, IntFlag
from typing import Any

import numpy as np

'''
FLAGS = {"record_flags", "interpreter_flags", "hit_flags"}


def class_name(name: str) -> str:
    """record_kind -> RecordKind."""
    return "".join(part.capitalize() for part in name.split("_"))


def enum_source(btf: Btf, name: str) -> str:
    """An IntEnum or IntFlag with the constants as C spells them."""
    base = "IntFlag" if name in FLAGS else "IntEnum"
    lines = [f"class {class_name(name)}({base}):", f'    """enum {name} of events.h."""', ""]
    lines += [f"    {key} = {value}" for key, value in btf.enum_values(name).items()]
    return "\n".join(lines)


def field_source(dtype: np.dtype[np.generic]) -> str:
    """How a field's format is written."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return f'("{base.str}", {shape})'
    return f'"{dtype.str}"'


def struct_source(name: str, dtype: np.dtype[np.void]) -> str:
    """A dtype constant."""
    assert dtype.names is not None and dtype.fields is not None
    rows = []
    for field in dtype.names:
        entry = dtype.fields[field][0]
        if entry.names is not None:
            rows.append(f'        ("{field}", {field.upper()}),')
        else:
            rows.append(f'        ("{field}", {field_source(entry)}),')
    body = "\n".join(rows)
    return f"{name.upper()}: np.dtype[Any] = np.dtype(\n    [\n{body}\n    ]\n)"


def main() -> None:
    """Print the module."""
    btf = Btf.from_object(Path(sys.argv[1]))
    anchored = [entry for name, entry in btf.variables().items() if name.startswith("anchor_")]
    enums = [entry.name for entry in anchored if entry.kind == ENUM]
    structs = [entry.name for entry in anchored if entry.kind == STRUCT]
    structs.sort(key=lambda name: name != "flight")  # it stands inside of cpu_state
    classes = "\n\n\n".join(enum_source(btf, name) for name in enums)
    dtypes = "\n".join(struct_source(name, btf.record_dtype(name)) for name in structs)
    print(f"{HEAD}\n{classes}\n\n\n{dtypes}")


if __name__ == "__main__":
    main()
