"""Load for the shop: a realistic mix of requests, bounded in number and in time.

Each client is one thread with one connection, which it keeps for as long as the server does
(gunicorn's sync workers close it after every answer, its threaded ones keep it). The same seed
asks for the same things in the same order per client, as long as the answers are the same.

    python examples/shop/load.py http://127.0.0.1:8000 --requests 2000 --clients 4
"""

import argparse
import dataclasses
import http.client
import json
import math
import random
import secrets
import signal
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from types import FrameType
from urllib.parse import urlsplit

# What schema.sql puts there: in stock, and orders to ask for before a client has its own.
PRODUCTS = 100
SEEDED_ORDERS = 20

DEFAULT_SECONDS = 10.0
MAX_SECONDS = 3600.0
MAX_REQUESTS = 1_000_000
MAX_CLIENTS = 256
NO_ANSWER = 0

# Of a hundred requests, what they ask for.
MIX = {"product": 70, "list": 15, "checkout": 10, "order": 5}

_ANSWER_SECONDS = 10.0
_AFTER_NO_ANSWER_SECONDS = 0.05
_JSON = {"Content-Type": "application/json"}


@dataclasses.dataclass(frozen=True)
class Sent:
    """One request that was sent with an id."""

    rid: str
    """The 32 hex digits of its `X-Request-Id`."""
    kind: str
    method: str
    path: str
    status: int
    """Of the answer; 0 is no answer."""
    start_ns: int
    end_ns: int
    """Both CLOCK_MONOTONIC."""


@dataclasses.dataclass(frozen=True)
class LoadResult:
    """What the load saw. Latencies are of answered requests and end with the last body byte."""

    requests: int
    """Requests made, answered or not."""
    kinds: dict[str, int]
    """Of these: product, list, checkout and order."""
    errors: dict[int, int]
    """Requests by status, for 400 and above; status 0 is a request without an answer."""
    seconds: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float
    complete: bool
    """False when the time or `stop` ended the run before the wanted number of requests."""
    sent: tuple[Sent, ...] = ()
    """All requests with their ids and statuses, if ids were asked for; by client, in order."""


def run_load(
    url: str,
    *,
    seconds: float | None = None,
    clients: int = 4,
    seed: int = 1,
    requests: int | None = None,
    think_seconds: float = 0.0,
    stop: threading.Event | None = None,
    mix: Mapping[str, int] = MIX,
    keep_alive: bool = True,
    with_ids: bool = False,
) -> LoadResult:
    """Run the load and wait for its end: after `seconds`, or after exactly `requests`.

    With `requests`, `seconds` is only the emergency brake (an hour unless given), without it the
    run takes 10 s unless given. `think_seconds` is each client's pause after an answer. Setting
    `stop` from elsewhere ends the run early; an interrupt ends it and is raised again. A request
    that was begun is awaited for at most 10 s. `mix` has the weight of each kind of request;
    without `keep_alive` each request is a new connection; `with_ids` sends a random
    `X-Request-Id` with each and tells all of them. Raises ValueError for limits that make no sense.
    """
    if seconds is None:
        seconds = DEFAULT_SECONDS if requests is None else MAX_SECONDS
    limit = MAX_REQUESTS if requests is None else requests
    where = urlsplit(url)
    if where.scheme != "http" or not where.hostname:
        raise ValueError(f"the url must look like http://127.0.0.1:8000, not {url!r}")
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"seconds must be above 0 and at most {MAX_SECONDS:g}")
    if not 1 <= clients <= MAX_CLIENTS:
        raise ValueError(f"clients must be from 1 to {MAX_CLIENTS}")
    if not 1 <= limit <= MAX_REQUESTS:
        raise ValueError(f"requests must be from 1 to {MAX_REQUESTS}")
    if not 0 <= think_seconds <= MAX_SECONDS:
        raise ValueError(f"think_seconds must be from 0 to {MAX_SECONDS:g}")
    if not mix.keys() <= MIX.keys() or min(mix.values(), default=0) < 0 or not sum(mix.values()):
        raise ValueError(f"the mix must give weights to some of {', '.join(MIX)}")
    stop = stop or threading.Event()
    started = time.monotonic()
    crew = [
        _Client(
            where.hostname,
            where.port or 80,
            random.Random(f"{seed}/{number}"),
            # Shares are settled beforehand: exact, repeatable, and nothing to lock per request.
            limit // clients + (number < limit % clients),
            started + seconds,
            think_seconds,
            stop,
            mix,
            keep_alive,
            with_ids,
        )
        for number in range(clients)
    ]
    threads = [threading.Thread(target=client.run, daemon=True) for client in crew]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join(_ANSWER_SECONDS)
        raise
    return _summed(crew, time.monotonic() - started, requests)


class _Client:
    """One customer: its own connection, random sequence, share of the requests and tallies."""

    def __init__(
        self,
        host: str,
        port: int,
        choices: random.Random,
        share: int,
        deadline: float,
        think_seconds: float,
        stop: threading.Event,
        mix: Mapping[str, int],
        keep_alive: bool,
        with_ids: bool,
    ) -> None:
        self.sent: list[Sent] = []
        self.latencies_ms = array("d")
        self.kinds: Counter[str] = Counter()
        self.errors: Counter[int] = Counter()
        self._connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_SECONDS)
        self._choices = choices
        self._share = share
        self._deadline = deadline
        self._think_seconds = think_seconds
        self._stop = stop
        # In the order of MIX: the same dice mean the same requests, however the mix is written.
        self._mix = {kind: mix[kind] for kind in MIX if mix.get(kind)}
        self._keep_alive = keep_alive
        self._with_ids = with_ids
        self._orders: list[int] = []

    def run(self) -> None:
        try:
            for _ in range(self._share):
                if self._stop.is_set() or time.monotonic() >= self._deadline:
                    break
                self._one_request()
                if self._think_seconds:
                    self._stop.wait(self._think_seconds)
        finally:
            self._connection.close()

    def _one_request(self) -> None:
        kind, method, path, body = self._next()
        self.kinds[kind] += 1
        headers = dict(_JSON) if body else {}
        if not self._keep_alive:
            headers["Connection"] = "close"
        rid = ""
        if self._with_ids:
            # Not of the seeded sequence: no two requests of any two runs share an id.
            rid = headers["X-Request-Id"] = secrets.token_hex(16)
        begun_ns = time.monotonic_ns()
        status, answer = self._answer(method, path, body, headers)
        ended_ns = time.monotonic_ns()
        if self._with_ids:
            self.sent.append(Sent(rid, kind, method, path, status, begun_ns, ended_ns))
        if status == NO_ANSWER:
            self.errors[NO_ANSWER] += 1
            self._stop.wait(_AFTER_NO_ANSWER_SECONDS)
            return
        self.latencies_ms.append((ended_ns - begun_ns) / 1e6)
        if status >= 400:
            self.errors[status] += 1
        elif kind == "checkout":
            self._orders.append(json.loads(answer)["order"])

    def _answer(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException):
            # Never sent again: the number of requests must be what was asked for.
            self._connection.close()
            return NO_ANSWER, b""
        if not self._keep_alive:
            self._connection.close()
        return response.status, answer

    def _next(self) -> tuple[str, str, str, bytes | None]:
        choices = self._choices
        # One draw of random() for each request, so that a seed means what it always has.
        dice = choices.random() * sum(self._mix.values())
        kind = ""
        for kind, weight in self._mix.items():  # noqa: B007 (the last one takes what is left)
            dice -= weight
            if dice < 0:
                break
        if kind == "product":
            return kind, "GET", f"/products/{self._product()}", None
        if kind == "list":
            return kind, "GET", "/products", None
        if kind == "checkout":
            wanted = {"product": self._product(), "quantity": choices.randint(1, 3)}
            return kind, "POST", "/checkout", json.dumps(wanted).encode()
        order = choices.choice(self._orders) if self._orders else choices.randint(1, SEEDED_ORDERS)
        return kind, "GET", f"/orders/{order}", None

    def _product(self) -> int:
        # Squared, so that some products are popular: cache hits, and checkouts that queue.
        return 1 + int(PRODUCTS * self._choices.random() ** 2)


def _summed(crew: Sequence[_Client], seconds: float, wanted: int | None) -> LoadResult:
    kinds: Counter[str] = sum((client.kinds for client in crew), Counter())
    errors: Counter[int] = sum((client.errors for client in crew), Counter())
    latencies_ms = sorted(value for client in crew for value in client.latencies_ms)

    def percentile(share: float) -> float:
        if not latencies_ms:
            return math.nan
        return round(latencies_ms[math.ceil(share * len(latencies_ms)) - 1], 3)

    made = sum(kinds.values())
    return LoadResult(
        requests=made,
        kinds=dict(sorted(kinds.items())),
        errors=dict(sorted(errors.items())),
        seconds=round(seconds, 3),
        p50_ms=percentile(0.50),
        p90_ms=percentile(0.90),
        p99_ms=percentile(0.99),
        max_ms=percentile(1.0),
        complete=wanted is None or made == wanted,
        sent=tuple(each for client in crew for each in client.sent),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load and print its result as JSON; 1 when anything went wrong on the way."""
    parser = argparse.ArgumentParser(
        description="Put load on a running example shop.",
        epilog="example: python examples/shop/load.py http://127.0.0.1:8000 --requests 2000",
    )
    parser.add_argument("url", help="the shop's url, as service.py prints it")
    parser.add_argument("--requests", type=int, help="make exactly so many requests")
    parser.add_argument(
        "--seconds", type=float, help="end after so long (default: 10, an hour with --requests)"
    )
    parser.add_argument("--clients", type=int, default=4, help="connections (default: 4)")
    parser.add_argument("--seed", type=int, default=1, help="what to ask for (default: 1)")
    parser.add_argument(
        "--think-seconds", type=float, default=0.0, help="pause after an answer (default: 0)"
    )
    parser.add_argument(
        "--no-keep-alive", action="store_true", help="a new connection for each request"
    )
    parser.add_argument(
        "--ids", action="store_true", help="send an X-Request-Id each, and list what was sent"
    )
    options = parser.parse_args(arguments)
    stop = threading.Event()

    def end(_signum: int, _frame: FrameType | None) -> None:
        stop.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, end)
    try:
        result = run_load(
            options.url,
            seconds=options.seconds,
            clients=options.clients,
            seed=options.seed,
            requests=options.requests,
            think_seconds=options.think_seconds,
            stop=stop,
            keep_alive=not options.no_keep_alive,
            with_ids=options.ids,
        )
    except ValueError as error:
        parser.error(str(error))
    # JSON has no NaN: with no answer at all there are no percentiles.
    facts = {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in dataclasses.asdict(result).items()
        if key != "sent" or options.ids
    }
    print(json.dumps(facts))
    return 0 if result.complete and not result.errors else 1


if __name__ == "__main__":
    sys.exit(main())
