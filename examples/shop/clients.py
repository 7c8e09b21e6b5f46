"""How the services reach what they ask: PostgreSQL, Redis and each other.

`SHOP_DATABASE_URL`, `SHOP_REDIS_URL`, `SHOP_INVENTORY_URL` and `SHOP_PAYMENT_URL` say where these
are; service.py sets what a service needs. With truth.py on, its clients are used instead.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg2
import psycopg2.extensions
import redis
import requests
import truth
from redis.backoff import NoBackoff
from redis.retry import Retry

_ANSWER_SECONDS = 5
_thread = threading.local()


def database() -> psycopg2.extensions.connection:
    """Return this thread's own connection; make it again when the server has closed the last."""
    connection: psycopg2.extensions.connection | None = getattr(_thread, "connection", None)
    if connection is None or connection.closed:
        connection = psycopg2.connect(
            os.environ["SHOP_DATABASE_URL"],
            connect_timeout=_ANSWER_SECONDS,
            application_name="shop",
            cursor_factory=truth.Cursor if truth.ON else None,
        )
        # Single statements need no BEGIN and COMMIT; `transaction` sends its own.
        connection.autocommit = True
        _thread.connection = connection
    return connection


def read(sql: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
    """Run one statement outside any transaction and return its rows."""
    with database().cursor() as cursor:
        cursor.execute(sql, values)
        rows: list[tuple[Any, ...]] = cursor.fetchall()
        return rows


@contextmanager
def transaction() -> Iterator[psycopg2.extensions.cursor]:
    """Run the block in a transaction: committed at its end, rolled back when it raises."""
    with database().cursor() as cursor:
        cursor.execute("BEGIN")
        try:
            yield cursor
        except BaseException:
            # When the server has gone, so has the transaction.
            with suppress(psycopg2.Error):
                cursor.execute("ROLLBACK")
            raise
        cursor.execute("COMMIT")


def redis_client() -> "redis.Redis":
    """Return a client of Redis.

    The connection is made by each worker at its first command, so nothing is shared across fork.
    """
    factory = truth.Redis if truth.ON else redis.Redis
    # Once more and at once when Redis has closed the connection; by itself, the client would go on
    # trying for seconds when there is no Redis.
    return factory.from_url(
        os.environ["SHOP_REDIS_URL"],
        socket_timeout=_ANSWER_SECONDS,
        retry=Retry(NoBackoff(), 1),
    )


def ask(
    service: str, method: str, path: str, body: Mapping[str, int] | None = None
) -> requests.Response:
    """Ask another service over this thread's kept connection; RequestException if it is down."""
    session: requests.Session | None = getattr(_thread, "session", None)
    if session is None:
        session = truth.Session() if truth.ON else requests.Session()
        # Proxies and .netrc of whoever started the shop are not for services of this machine.
        session.trust_env = False
        _thread.session = session
    url = os.environ[f"SHOP_{service.upper()}_URL"] + path
    return session.request(method, url, json=body, timeout=_ANSWER_SECONDS)
