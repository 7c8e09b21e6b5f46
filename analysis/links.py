"""Edges of the causal graph while spans are still known by their rows."""

from __future__ import annotations

from typing import Final

import polars as pl

# `cause` and `effect`: rows of drafts. `parent`: the cause may become the effect's parent.
LINKS: Final = pl.Schema(
    {
        "cause": pl.Int64(),
        "effect": pl.Int64(),
        "edge": pl.String(),
        "evidence": pl.String(),
        "reason": pl.String(),
        "parent": pl.Boolean(),
    }
)


def link(
    pairs: pl.DataFrame,
    edge: str | pl.Expr,
    evidence: str | pl.Expr,
    reason: str | pl.Expr,
    *,
    parent: bool = True,
) -> pl.DataFrame:
    """Links with the schema LINKS from `cause` and `effect` of each row of `pairs`.

    What is given as text is the same for all; an expression tells it for each row.
    """

    def told(value: str | pl.Expr) -> pl.Expr:
        return pl.lit(value) if isinstance(value, str) else value

    return pairs.select(
        "cause",
        "effect",
        edge=told(edge),
        evidence=told(evidence),
        reason=told(reason),
        parent=pl.lit(value=parent),
    ).cast(LINKS)
