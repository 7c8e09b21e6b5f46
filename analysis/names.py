"""What processes and threads are called."""

from __future__ import annotations

from typing import Final

import polars as pl

from scope_ebpf.analysis.services import add_services, service_lives
from scope_ebpf.errors import UsageError
from scope_ebpf.recording.reader import Recording

THREAD: Final = ["tgid", "tid"]
_LATEST: Final = (1 << 63) - 1


def thread_names(recording: Recording, threads: pl.DataFrame) -> pl.DataFrame:
    """Names of threads: `tgid`, `tid`, `service` and `thread`, one row per row of `threads`.

    `threads` has `tgid` and `tid`, each pair once; the order stays. A service is named as everywhere
    (see `service_names`), a thread by its last comm. What has no name has its number.

    With a column `start_ns`, since when each thread is meant, in each row: a number may have been used
    again, and be there more than once. Then it is also in the result.
    """
    processes = recording.collect(recording.processes)
    keys = [*THREAD, "start_ns"] if "start_ns" in threads.columns else THREAD
    named = processes.filter(pl.col("comm").is_not_null() & (pl.col("comm") != "")).sort(
        "time_ns", maintain_order=True
    )
    begins = pl.col("event").cast(pl.String).is_in(["alive", "fork", "thread"])
    own = (
        named.with_columns(life=begins.cast(pl.UInt32).cum_sum().over(THREAD))
        .group_by(*THREAD, "life", maintain_order=True)
        .agg(pl.col("time_ns").first().alias("named_ns"), pl.col("comm").last().alias("thread"))
        .drop("life")
    )
    # the row that names a thread may come after its first call
    first = pl.struct(THREAD).is_first_distinct()
    own = own.with_columns(named_ns=pl.when(first).then(-_LATEST).otherwise("named_ns"))
    # A thread that nobody named has its process's name, as in ps.
    leader = own.filter(pl.col("tgid") == pl.col("tid")).select("tgid", "named_ns", leader="thread")
    targets = pl.DataFrame(
        [(target.tgid, target.comm or None) for target in recording.meta.targets],
        schema={"tgid": pl.UInt32, "target": pl.String},
        orient="row",
    ).unique("tgid", keep="last")
    joined = threads.select(keys)
    if keys == THREAD:
        joined = joined.with_columns(start_ns=pl.lit(_LATEST))
    joined = _last_named(joined, own, THREAD)
    joined = _last_named(joined, leader, ["tgid"])
    joined = joined.join(targets, on="tgid", how="left", maintain_order="left")
    joined = add_services(joined, service_lives(processes), "start_ns")
    comm = pl.coalesce("thread", "leader", "target")
    return joined.select(
        *keys,
        service=pl.coalesce("service", "target", pl.format("process {}", "tgid")),
        thread=pl.coalesce(comm, pl.format("thread {}", "tid")),
    )


def _last_named(threads: pl.DataFrame, names: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    """`threads`, in their order, with the names that their numbers had at `start_ns`."""
    return (
        threads.with_row_index("order")
        .sort("start_ns")
        .join_asof(
            names.sort("named_ns"), left_on="start_ns", right_on="named_ns", by=keys,
            check_sortedness=False,
        )
        .sort("order")
        .drop("order", "named_ns")
    )  # fmt: skip


def processes_of(
    recording: Recording, service: str | None = None, tgid: int | None = None
) -> list[int] | None:
    """The tgids that a service has, or `tgid` if it was recorded; None: nothing was asked.

    Raises `UsageError` if there is no such process.
    """
    if service is None and tgid is None:
        return None
    processes = recording.collect(recording.processes)
    names = service_lives(processes)
    if tgid is not None:
        if tgid not in set(names["tgid"]) | {target.tgid for target in recording.meta.targets}:
            raise UsageError(
                f"no process {tgid} was recorded; `scope-ebpf summary REC` shows what was traced"
            )
        names = names.filter(pl.col("tgid") == tgid) if service is not None else names
        if service is None:
            return [tgid]
    found = names.filter(pl.col("service") == service)["tgid"].to_list()
    if not found:
        every = ", ".join(names["service"].unique().sort().to_list())
        what = f"process {tgid} is of {every or 'no service'}" if tgid is not None else (
            f"there are {every}" if every else "there are none"
        )  # fmt: skip
        raise UsageError(f"no process that was recorded is of the service {service!r}; {what}")
    return found
