"""Makes objects of every layout, and tells where each is and what it holds, as one line of JSON."""

from __future__ import annotations

import json
import sys
import weakref
from typing import Any


class Plain:
    """Instances share their keys."""

    def __init__(self, count):
        self.first = count
        self.second = "two"


class Grown(Plain):
    """Instances have a dict of their own."""


class Text(str):
    """A str whose characters are elsewhere."""


class Number(int):
    """An int with attributes."""


def dictionary(count, keys):
    """A dict that had more."""
    made = {keys(i): i for i in range(count + 5)}
    for i in range(0, count + 5, 3):
        del made[keys(i)]
    return made


values = [
    "", "a", "plain ASCII" * 30, "\xe9t\xe9", "\u017een\u011b", "\U0001f40d snake", "\0", "x" * 5000,
    Text("of a class"), Text("na\xefve"), sys.intern("interned"), "\udc80",
    0, 1, -1, 255, -300, 2**30 - 1, 2**30, -(2**30), 2**63, -(2**64) - 17, 2**900, Number(12345),
    True, False, None, 0.0, -1.5, 1e300, b"", b"\0\xff" * 40,
]  # fmt: skip
plain, grown, deleted = Plain(11), Grown(22), Plain(33)
grown.__dict__["more"] = 1
for number in range(40):
    setattr(grown, f"extra{number}", number)
del deleted.second
dead = weakref.ref(Plain(1))
containers = {
    "list": [1, "two", 3.0],
    "empty list": [],
    "tuple": (1, "two", None),
    "empty tuple": (),
    "set": {1, 2, 3, 400, 500},
    "long set": set(range(1000)) - set(range(0, 1000, 2)),
    "frozenset": frozenset("abc"),
}
dicts = {
    "strings": dictionary(10, str),
    "numbers": dictionary(10, int),
    "mixed": {1: "a", "b": 2},
    "empty": {},
    "300 keys": dictionary(300, str),
    "70000 keys": {i: i for i in range(300)},
    "split": vars(Plain(44)),
    "module": {"a": 1, "\xe9": 2},
}
reference = weakref.ref(plain)
held: dict[str, Any] = {}
note = {
    "values": [
        [
            id(v),
            type(v).__name__,
            v.hex()
            if isinstance(v, bytes)
            else str(v).encode("utf-8", "backslashreplace").decode(),
        ]
        for v in values
    ],
    "containers": {n: [id(c), sorted(map(id, c))] for n, c in containers.items()},
    "dicts": {n: [id(d), [[id(k), id(v)] for k, v in d.items()]] for n, d in dicts.items()},
    "attributes": [
        [id(plain), "first", id(plain.first)],
        [id(plain), "second", id(plain.second)],
        [id(plain), "third", None],
        [id(grown), "extra39", id(vars(grown)["extra39"])],
        [id(deleted), "first", id(deleted.first)],
        [id(deleted), "second", None],
    ],
    "references": [[id(reference), id(plain)], [id(dead), id(None)]],
    "none": id(None),
}
print("ready", flush=True)
sys.stdin.read(1)
print(json.dumps(note), flush=True)
sys.stdin.read(1)
