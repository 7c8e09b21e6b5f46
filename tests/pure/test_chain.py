"""Trees of spans, ids and the choice of requests."""

from __future__ import annotations

import random

import polars as pl
import pytest

from scope_ebpf.analysis.chain import TREE, find_span, request_tree, select_requests
from scope_ebpf.analysis.schema import span_text
from scope_ebpf.errors import UsageError
from tests.pure.shop_spans import (
    CART,
    CHECKOUT,
    KILLED,
    MS,
    edges,
    nth,
    request,
    requests,
    span,
    spans,
)

pytestmark = pytest.mark.pure
NO_EDGES = edges([])


def tree(span_id: int) -> pl.DataFrame:
    return request_tree(spans(), edges(), span_id)


def test_a_tree_comes_depth_first_in_the_order_of_time():
    found = tree(CHECKOUT)
    assert found.schema == TREE
    small = [nth(n) for n in range(2, 14)]
    assert found["span_id"].to_list() == [CHECKOUT, *small]
    assert found["depth"].to_list() == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5, 3, 4, 5]


def test_the_order_of_rows_does_not_matter():
    shuffled = spans().sample(fraction=1, shuffle=True, seed=7)
    assert request_tree(shuffled, edges(), CHECKOUT).equals(tree(CHECKOUT))


def test_a_span_within_has_only_what_is_below_it():
    found = tree(nth(8))
    assert found["span_id"].to_list() == [nth(8), nth(9), nth(10)]
    assert found["depth"].to_list() == [0, 1, 2]
    assert tree(nth(13))["span_id"].to_list() == [nth(13)]


def test_causes_other_than_the_parent_are_links():
    handler, call, fault = tree(CART).iter_rows(named=True)
    assert handler["links"] == [
        {"cause_id": nth(21), "edge": "caused_by", "evidence": "derived",
         "reason": "the last thing before it failed", "service": "web", "operation": "connect",
         "error": "ECONNREFUSED: nobody listens there"}
    ]  # fmt: skip
    (link,) = call["links"]
    assert (link["cause_id"], link["service"]) == (KILLED, "redis")
    # what broke is of no request, and comes below what it broke
    assert (fault["span_id"], fault["parent_id"], fault["edge"]) == (
        KILLED, call["span_id"], "caused_by",
    )  # fmt: skip
    assert fault["depth"] == call["depth"] + 1
    assert tree(CHECKOUT)["links"].list.len().sum() == 0


def test_a_cause_that_is_not_among_the_spans_is_still_a_link():
    far = [{"cause_id": 999, "effect_id": CART, "edge": "woken_by", "evidence": "guess",
            "reason": "time", "parent": False}]  # fmt: skip
    (link,) = request_tree(spans(), edges(far), CART)["links"][0].to_list()
    assert (link["cause_id"], link["edge"], link["service"]) == (999, "woken_by", None)


def test_what_lost_its_parent_follows_the_root():
    rows = [
        span(1, request_id=1, start_ns=50),
        span(2, request_id=1, parent_id=77, start_ns=10),
        span(3, request_id=1, parent_id=2, start_ns=20),
        span(4, request_id=1, parent_id=1, start_ns=60),
    ]
    found = request_tree(spans(rows), NO_EDGES, 1)
    assert list(zip(found["span_id"], found["depth"], strict=True)) == [
        (1, 0),
        (4, 1),
        (2, 0),
        (3, 1),
    ]
    # It is not below a span that is asked for.
    assert request_tree(spans(rows), NO_EDGES, 4)["span_id"].to_list() == [4]


def test_circles_end():
    rows = [
        span(1, request_id=1, parent_id=1),
        span(2, request_id=1, parent_id=3),
        span(3, request_id=1, parent_id=2),
    ]
    found = request_tree(spans(rows), NO_EDGES, 1)
    assert found["span_id"].to_list() == [1, 2, 3]
    assert request_tree(spans(rows), NO_EDGES, 3)["span_id"].to_list() == [3, 2]


def test_a_span_comes_once_also_if_it_is_there_twice():
    found = request_tree(pl.concat([spans(), spans()]), edges(), CHECKOUT)
    assert found.height == 13


def test_a_root_that_names_no_request_is_its_own():
    rows = [span(1, request_id=None), span(2, request_id=None)]
    assert request_tree(spans(rows), NO_EDGES, 1)["span_id"].to_list() == [1]


def test_any_parents_give_each_span_once():
    chance = random.Random(3)
    for _ in range(50):
        rows = [
            span(n, request_id=1, parent_id=chance.choice([None, *range(1, 12)]))
            for n in range(1, 10)
        ]
        found = request_tree(spans(rows), NO_EDGES, 1)
        assert sorted(found["span_id"]) == list(range(1, 10))
        assert found["span_id"][0] == 1


def test_deep_and_wide_trees_are_no_problem():
    deep = [span(n, request_id=1, parent_id=n - 1) for n in range(1, 20_000)]
    assert request_tree(spans(deep), NO_EDGES, 1)["depth"].max() == 19_998
    wide = [span(1, request_id=1)] + [span(n, request_id=1, parent_id=1) for n in range(2, 20_000)]
    assert request_tree(spans(wide), NO_EDGES, 1)["depth"].sum() == 19_998


def test_a_tree_of_no_span_is_refused():
    with pytest.raises(UsageError, match="no span has the id 0000000000000005"):
        tree(5)


@pytest.mark.parametrize(
    "text", ["3f2a91c0d4e5f607", "3F2A91C0D4E5F607", "0x3f2a91c0d", " 3f2a91c0d "]
)
def test_ids_are_found_by_their_beginning(text):
    assert find_span(spans(), text) == CHECKOUT


@pytest.mark.parametrize("span_id", [0, 2**64 - 1, 2**63])
def test_ids_of_any_size_are_found(span_id):
    frame = spans([span(span_id), span(12345)])
    assert find_span(frame, span_text(span_id)) == span_id


def test_an_id_that_is_whole_is_never_ambiguous():
    frame = spans([span(nth(1)), span(nth(1) + 1)])
    assert find_span(frame, span_text(nth(1))) == nth(1)


@pytest.mark.parametrize("text", ["", "3f2", "shop", "3f2a91c0d4e5f6070", "-1", "3f2g"])
def test_what_is_no_id_is_refused(text):
    with pytest.raises(UsageError, match=r"is not an id.*scope-ebpf requests REC"):
        find_span(spans(), text)


def test_an_unknown_id_is_refused():
    with pytest.raises(UsageError, match=r"no span has the id dead; .*scope-ebpf requests REC"):
        find_span(spans(), "dead")


def test_an_ambiguous_id_lists_what_it_may_be():
    with pytest.raises(UsageError) as caught:
        find_span(spans(), "3f2a91c0")
    assert str(caught.value) == (
        "2 spans have ids that begin with 3f2a91c0: 3f2a91c0d4e5f607 (nginx POST /checkout), "
        "3f2a91c0ffff0001 (web GET /cart); give more digits"
    )
    many = spans([span((0xABCD << 48) + n) for n in range(23)])
    with pytest.raises(UsageError, match=r"23 spans .* and 18 more; give more digits"):
        find_span(many, "abcd")


def test_requests_are_chosen():
    everything = requests()
    assert select_requests(everything).height == 5
    assert select_requests(everything, entry=True)["span_id"].to_list() == [CHECKOUT, CART]
    assert select_requests(everything, service="web")["span_id"].to_list() == [nth(3), CART]
    assert select_requests(everything, errors=True)["span_id"].to_list() == [CART]
    slow = select_requests(everything, slow=3)
    assert slow["duration_ns"].to_list() == [41_200_000, 40_200_000, 30_000_000]
    assert select_requests(everything, slow=1, service="inventory")["span_id"].to_list() == [nth(9)]


def test_requests_come_by_their_start():
    rows = [request(n, start_ns=start) for n, start in enumerate([30, 10, 20], start=1)]
    assert select_requests(requests(rows))["span_id"].to_list() == [2, 3, 1]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"status": "500"}, True),
        ({"status": "503"}, True),
        ({"status": "404"}, False),
        ({"status": "5000"}, False),
        ({"status": "OK", "error": "timeout"}, True),
        ({"status": None}, False),
        ({"status": None, "error": "connection reset"}, True),
        ({"protocol": "postgresql", "status": "500"}, False),
        ({"protocol": None, "status": "500"}, False),
    ],
)
def test_what_counts_as_failed(columns, expected):
    chosen = select_requests(requests([request(1, duration_ns=MS, **columns)]), errors=True)
    assert chosen.height == expected
