"""Whether this guest computes: QEMU 7.2 emulates an instruction wrongly with which polars sums groups.

Recordings are right in such a guest, and so is what is counted by filters; what `summary` adds up is not.
"""

import random
from functools import cache

import polars as pl

WRONG = "optional: QEMU emulates the instructions wrongly with which polars sums groups"


@cache
def sums_are_right() -> bool:
    """Try it: some hundred random groups."""
    generator = random.Random(1)
    for _ in range(60):
        count = generator.randint(1, 3000)
        keys = [generator.randint(0, 5) for _ in range(count)]
        values = [generator.randint(0, 1 << 44) for _ in range(count)]
        frame = pl.DataFrame({"key": keys, "value": values})
        summed = frame.group_by("key").agg(pl.col("value").sum())
        expected = dict.fromkeys(keys, 0)
        for key, value in zip(keys, values, strict=True):
            expected[key] += value
        if dict(summed.iter_rows()) != expected:
            return False
    return True
