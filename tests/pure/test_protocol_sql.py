"""Literals in SQL text: masked where they stand, folded away in operations."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scope_ebpf.protocols import sql
from scope_ebpf.protocols.heads import Heads

pytestmark = pytest.mark.pure


def heads_of(*texts: str) -> Heads:
    values = [text.encode() for text in texts]
    return Heads.of(pl.Series(values, dtype=pl.Binary), np.zeros(len(values), np.int64))


def folded(text: str, dialect: sql.Dialect = sql.POSTGRESQL) -> tuple[object, ...]:
    heads = heads_of("17", text, "'x")  # neighbours must not matter
    return sql.fold(heads.data, heads.begins, heads.begins + heads.lengths, dialect).row(1)


def shown(text: str, dialect: sql.Dialect = sql.POSTGRESQL) -> str:
    """The text with `~` for each byte that must not be stored."""
    heads = heads_of("a'", text, "b'")
    kept = sql.visible(heads.data, heads.begins, heads.begins + heads.lengths, dialect)
    data = np.where(kept, heads.data, ord("~")).astype(np.uint8)
    return data[heads.begins[1] : heads.begins[2]].tobytes().decode()


@pytest.mark.parametrize(
    ("text", "operation"),
    [
        ("SELECT a1 FROM t2 WHERE x = 17 AND y=-1.5", "SELECT a1 FROM t2 WHERE x = ? AND y=?"),
        ("select 'it''s',\n E'a\\'b' -- why 'not\n from t;", "select ?, ? from t"),
        ("SELECT $1, $fn$ it's $fn$", "SELECT ?, ?"),
        ("SELECT $$a'b$$, 'c' FROM t", "SELECT ?, ? FROM t"),
        ('SELECT "Order 66" FROM "it\'s" WHERE a = \'x\'', 'SELECT "Order 66" FROM "it\'s" WHERE a = ?'),
        ("SELECT 1 WHERE a in (1, 'b' ,$3)", "SELECT ? WHERE a in (?)"),
        ("SELECT 1 WHERE a IN (1, 2, 3", "SELECT ? WHERE a IN (?"),
        ("INSERT INTO t VALUES (1, 'a'), (2, 'b'), (3", "INSERT INTO t VALUES (?)"),
        ("INSERT INTO t VALUES (1, now()), (2, now())", "INSERT INTO t VALUES (?, now())"),
        ("/* id=5 */ SELECT 1", "SELECT ?"),
        ("SELECT /* a /* b */ c */ 1", "SELECT"),
        ("SELECT 'cut", "SELECT ?"),
        ("SELECT a FROM t WHERE b = ?x7f.?q AND c = '?abc'", "SELECT a FROM t WHERE b = ? AND c = ?"),
        ("BEGIN", "BEGIN"),
        ("", None),
    ],
)  # fmt: skip
def test_operations(text, operation):
    assert folded(text)[0] == operation


def test_operations_of_mysql():
    text = "SELECT `a 1`, \"s\\\"x\", _binary'y' FROM t # why\nWHERE a=5--3 AND b='x\\'y'"
    assert folded(text, sql.MYSQL)[0] == "SELECT `a 1`, ?, ? FROM t WHERE a=?--? AND b=?"


def test_long_operations_are_cut():
    assert (
        folded("SELECT " + "a, " * 200)[0] == ("SELECT " + "a, " * 200)[: sql.OPERATION_CHARACTERS]
    )


@pytest.mark.parametrize(
    ("text", "action", "queue"),
    [
        ("LISTEN Mails", "subscribe", "mails"),
        ('LISTEN "Mails";', "subscribe", "Mails"),
        ("NOTIFY mails, 'x'", "publish", "mails"),
        ("SELECT pg_notify('mails', 'x')", "publish", None),
        ("SELECT id FROM jobs ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED", "pop", "jobs"),
        (
            "WITH n AS (SELECT id FROM a.jobs FOR UPDATE SKIP LOCKED) DELETE FROM x USING n",
            "pop",
            "a.jobs",
        ),
        ('INSERT INTO "Big Jobs" (a) VALUES (1)', "push", "Big Jobs"),
        ("SELECT 'SKIP LOCKED' FROM t", None, None),
        ("UNLISTEN mails", None, None),
    ],
)
def test_queues(text, action, queue):
    assert folded(text)[1:] == (action, queue)


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("a1 = 17, b = '17'", "a1 = ~~, b = '~~'"),
        ("'a\\' OR secret", "'~~~~~~~~~~~~~"),  # standard_conforming_strings may be off
        ("E'a\\' b' OR c", "E'~~~~~' OR c"),
        ("x -- a\ny", "x --~~\ny"),
        ("/*a*/ b /*c", "/*~*/ b /*~"),
        ("$f$ it's $f$ x", "$f$~~~~~~~~~~~"),
        ("$$it's$$ x", "$$~~~~$$ x"),
        ("$1 a$2", "$1 a$2"),
        ('"not closed 1', '"~~~~~~~~~~~~'),
        ("pg_notify('ch', 'x')", "pg_notify('ch', '~')"),
        ("not_notify('ch', 'x')", "not_notify('~~', '~')"),
    ],
)
def test_what_may_be_stored(text, visible):
    assert shown(text) == visible


def test_double_quotes_are_strings_to_mysql():
    assert shown('a = "x y" -- z', sql.MYSQL) == 'a = "~~~" --~~'


def test_too_many_strings_hide_the_rest():
    text = "VALUES (" + "'a', " * 200 + "secret)"
    assert "secret" not in shown(text)
    assert folded(text)[0] == "VALUES (?"


PIECES = st.sampled_from(["a", " ", ", ", "x1", "= ", "(", ")", "\n", '"q"', "$1", "t.c", "+"])
LITERALS = st.sampled_from(
    ["'S'", "'S''S'", "E'S\\'S'", "$$S$$", "$t$S$t$", "/*S*/", "--S\n", "'\"S'", "'--S'"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PIECES, LITERALS), max_size=30), st.sampled_from(["", "'S", "/*S"]))
def test_no_literal_is_ever_kept(pieces, cut):
    text = " ".join([*pieces, cut])
    assert "S" not in shown(text)
    assert "S" not in str(folded(text)[0] or "")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(alphabet="ab1'\"`-/*#$\\E?\n .,(", max_size=60), max_size=5),
    st.sampled_from([sql.POSTGRESQL, sql.MYSQL]),
)
@example(["1$$", "E"], sql.POSTGRESQL)
def test_each_statement_stands_alone(texts, dialect):
    # Between statements stand the headers of messages.
    heads = heads_of(*[f"\0{text}\0" for text in texts])
    begins, stops = heads.begins + 1, heads.begins + heads.lengths - 1
    together = sql.fold(heads.data, begins, stops, dialect)
    for number, text in enumerate(texts):
        one = heads_of(text)
        alone = sql.fold(one.data, one.begins, one.begins + one.lengths, dialect)
        assert together.row(number) == alone.row(0)
