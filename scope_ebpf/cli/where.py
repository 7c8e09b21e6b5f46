"""`--where EXPR`: an SQL expression over a table's columns."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scope_ebpf.errors import UsageError

if TYPE_CHECKING:
    import polars as pl


def filtered(frame: pl.LazyFrame, where: str, example: str) -> pl.LazyFrame:
    """The rows for which the expression is true.

    `example` is one that fits, for the message. Raises `UsageError` if it is no such expression;
    what shows only when it meets the rows is raised by collecting, and `refused` makes it readable.
    """
    import polars as pl

    polars_errors = (pl.exceptions.PolarsError, pl.exceptions.PanicException)
    try:
        condition = pl.sql_expr(where)
        used = condition.meta.root_names()
    except polars_errors as error:
        raise UsageError(
            f"--where is not an SQL expression: {first_line(error)}; write it like {example}"
        ) from None
    schema = frame.collect_schema()
    for name in used:
        if name.startswith("_POLARS_"):
            raise UsageError("--where cannot hold a query of its own; use open_recording in Python")
        if name not in schema:
            quotes = " (SQL has text in single quotes)" if f'"{name}"' in where else ""
            hint = close_names(name, schema.names())
            raise UsageError(f"--where: there is no column {hint}{quotes}")
    try:
        sample = pl.DataFrame(schema=schema).clear(3).select(condition)
        if sample.dtypes != [pl.Boolean]:
            raise UsageError(
                f"--where is not a condition: {where!r} is {sample.dtypes[0]}, not true or false; "
                "compare it with something"
            )
        if sample.height != 3:
            raise UsageError(
                f"--where gives the same for all rows: {where!r}; let it look at a row's columns"
            )
        return frame.filter(condition)
    except polars_errors as error:
        raise refused(error) from None


def refused(error: BaseException) -> UsageError:
    """The error for an expression that polars could not evaluate."""
    return UsageError(f"--where cannot be evaluated: {first_line(error)}")


def close_names(name: str, every: Sequence[str]) -> str:
    """The name in quotes, and which of `every` were probably meant."""
    close = difflib.get_close_matches(name.lower(), every, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(every)}"
    return f"{name!r}; {hint}"


def first_line(error: BaseException) -> str:
    """What an error of polars says, without its context."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
