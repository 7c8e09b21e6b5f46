"""What processes and threads are called."""

from __future__ import annotations

from typing import Final

import polars as pl

from scope_ebpf.analysis.services import service_names
from scope_ebpf.errors import UsageError
from scope_ebpf.recording.reader import Recording

THREAD: Final = ["tgid", "tid"]


def thread_names(recording: Recording, threads: pl.DataFrame) -> pl.DataFrame:
    """Names of threads: `tgid`, `tid`, `service` and `thread`, one row per row of `threads`.

    `threads` has `tgid` and `tid`, each pair once; the order stays. A service is named as everywhere
    (see `service_names`), a thread by its last comm. What has no name has its number.
    """
    processes = recording.collect(recording.processes)
    named = processes.filter(pl.col("comm").is_not_null() & (pl.col("comm") != "")).sort(
        "time_ns", maintain_order=True
    )
    own = named.unique(THREAD, keep="last", maintain_order=True).select(*THREAD, thread="comm")
    # A thread that nobody named has its process's name, as in ps.
    leader = own.filter(pl.col("tgid") == pl.col("tid")).select("tgid", leader="thread")
    targets = pl.DataFrame(
        [(target.tgid, target.comm or None) for target in recording.meta.targets],
        schema={"tgid": pl.UInt32, "target": pl.String},
        orient="row",
    ).unique("tgid", keep="last")
    joined = threads.select(THREAD)
    joined = joined.join(own, on=THREAD, how="left", maintain_order="left")
    for names in (leader, targets, service_names(processes)):
        joined = joined.join(names, on="tgid", how="left", maintain_order="left")
    comm = pl.coalesce("thread", "leader", "target")
    return joined.select(
        *THREAD,
        service=pl.coalesce("service", "target", pl.format("process {}", "tgid")),
        thread=pl.coalesce(comm, pl.format("thread {}", "tid")),
    )


def processes_of(
    recording: Recording, service: str | None = None, tgid: int | None = None
) -> list[int] | None:
    """The tgids that a service has, or `tgid` if it was recorded; None: nothing was asked.

    Raises `UsageError` if there is no such process.
    """
    if service is None and tgid is None:
        return None
    processes = recording.collect(recording.processes)
    names = service_names(processes)
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
