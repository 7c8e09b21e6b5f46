"""Links what came out of a queue or channel with who put it in."""

from __future__ import annotations

from typing import Final

import polars as pl

# What may be the id of a job: a UUID, a long run of word characters, or a masked one (a token).
_ID: Final = (
    r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
    r"|\?[0-9A-Za-z]{19,}|[0-9A-Za-z_-]{20,}"
)
# The same message begins a little later in a request than in a reply, so the end of a truncated
# reply may have been cut from the request.
_CUT_BYTES: Final = 64

LINKS: Final = pl.Schema({"delivery": pl.UInt32(), "producer": pl.UInt32(), "reason": pl.String()})


def link_queues(producers: pl.DataFrame, deliveries: pl.DataFrame) -> pl.DataFrame:
    """Find for each delivery the request that produced it.

    `producers`, requests that may have put something in: `row`, `start_ns`, `tgid`, `tid`, `queue`
    and `element` (null: not known), `pushes` (whether it is known to put something in), `text`
    (its head). `deliveries`, what came out: `row`, `received_ns`, `queue`, `element`, `text`,
    `truncated`.

    Returns `delivery` and `producer` (their `row`) and the `reason`, one row per link. Linked are:
    the same element of the same queue, if only one was outstanding; and a delivery all of
    whose ids were in one earlier request, and in no other one. All of it is derived from payloads.
    """
    by_element = _by_element(producers, deliveries)
    left = deliveries.join(by_element, left_on="row", right_on="delivery", how="anti")
    return pl.concat([by_element, _by_ids(producers, left)])


def _by_element(producers: pl.DataFrame, deliveries: pl.DataFrame) -> pl.DataFrame:
    keys = ["queue", "element"]
    put = producers.filter(pl.col("pushes")).drop_nulls(keys).sort("start_ns")
    put = put.select("row", "start_ns", *keys).with_columns(
        pl.col("start_ns").shift(-1).over(keys).alias("next_ns"),
        pl.int_range(pl.len()).over(keys).alias("nth"),
    )
    got = deliveries.drop_nulls(keys).sort("received_ns")
    got = got.select("row", "received_ns", *keys).with_columns(
        pl.int_range(pl.len()).over(keys).alias("nth")
    )
    # The n-th that came out is the n-th that was put in, and it was out before the next came in.
    pairs = got.join(put, on=[*keys, "nth"], suffix="_put").filter(
        (pl.col("start_ns") <= pl.col("received_ns"))
        & (pl.col("next_ns").is_null() | (pl.col("next_ns") > pl.col("received_ns")))
    )
    return _links(pairs.rename({"row": "delivery", "row_put": "producer"}), "same element")


def _by_ids(producers: pl.DataFrame, deliveries: pl.DataFrame) -> pl.DataFrame:
    whole = (
        pl.when("truncated")
        .then(pl.col("text").str.head(pl.col("text").str.len_chars().cast(pl.Int64) - _CUT_BYTES))
        .otherwise("text")
    )
    wanted = ids_in(deliveries, whole).rename({"row": "delivery"})
    if wanted.is_empty():
        return pl.DataFrame(schema=LINKS)
    offered = ids_in(producers, pl.col("text")).rename({"row": "producer"})
    offered = offered.join(wanted.select("id").unique(), on="id", how="semi").join(
        producers.select(pl.col("row").alias("producer"), "start_ns", "tgid", "tid", "pushes"),
        on="producer",
    )
    received = deliveries.select(pl.col("row").alias("delivery"), "received_ns")
    # the id that the fewest requests hold: joining on a common one would pair everything
    rare = offered.group_by("id").agg(pl.len().alias("holders"))
    by_rarest = (
        wanted.join(rare, on="id")
        .sort("holders", "id")
        .unique("delivery", keep="first", maintain_order=True)
        .filter(pl.col("holders") <= _MOST_HOLDERS)
        .select("delivery", "id")
    )
    pairs = (
        by_rarest.join(offered, on="id")
        .join(received, on="delivery")
        .filter(pl.col("start_ns") < pl.col("received_ns"))
    )
    # every id of the delivery must be in the request
    needed = wanted.group_by("delivery").agg(pl.len().alias("needed"))
    shared = (
        pairs.select("delivery", "producer")
        .join(wanted, on="delivery")
        .join(offered.select("producer", "id"), on=["producer", "id"])
        .group_by("delivery", "producer")
        .agg(pl.len().alias("shared"))
        .join(needed, on="delivery")
        .filter(pl.col("shared") == pl.col("needed"))
    )
    pairs = pairs.join(shared, on=["delivery", "producer"], how="semi")
    # One request that is known to put something in; or, if none is, all of one thread.
    flow = pl.struct("tgid", "tid")
    chosen = (
        pairs.sort("start_ns")
        .group_by("delivery")
        .agg(
            pl.col("pushes").sum().alias("pushing"),
            pl.col("producer").filter("pushes").last().alias("pusher"),
            flow.n_unique().alias("flows"),
            pl.col("producer").last().alias("latest"),
        )
        .with_columns(
            pl.when(pl.col("pushing") == 1)
            .then("pusher")
            .when((pl.col("pushing") == 0) & (pl.col("flows") == 1))
            .then("latest")
            .alias("producer")
        )
        .drop_nulls("producer")
    )
    return _links(chosen, "job id in both payloads")


# An id that so many requests hold is none of a job.
_MOST_HOLDERS: Final = 16


def ids_in(frame: pl.DataFrame, text: pl.Expr) -> pl.DataFrame:
    """`row` and `id`: each different text that may be an id in each text of a frame with `row`."""
    return (
        frame.select("row", text.str.extract_all(_ID).list.unique().alias("id"))
        .explode("id", empty_as_null=True)
        .drop_nulls("id")
    )


def _links(pairs: pl.DataFrame, reason: str) -> pl.DataFrame:
    return pairs.select(
        pl.col("delivery").cast(pl.UInt32),
        pl.col("producer").cast(pl.UInt32),
        pl.lit(reason).alias("reason"),
    )
