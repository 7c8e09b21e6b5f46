"""A Flask application for gunicorn's gevent workers; real_gunicorn.py is their configuration.

Asks PostgreSQL through psycopg2, whose waits are gevent's, Redis, and a backend of HTTP through requests:
REAL_DATABASE_URL, REAL_REDIS_URL and REAL_BACKEND_URL say where. Each endpoint makes CALLS[endpoint] calls,
which carry the request's id and their own number: ID/NUMBER.
"""

from __future__ import annotations

import os
from typing import Any

import gevent.queue
import gevent.socket
import psycopg2
import psycopg2.extensions
import redis
import requests
from flask import Flask

CALLS = {"pg": 3, "redis": 3, "http": 2, "mixed": 3}
POOL = 6
DATABASE_URL = os.environ["REAL_DATABASE_URL"]
BACKEND_URL = os.environ["REAL_BACKEND_URL"]
cache = redis.Redis.from_url(os.environ["REAL_REDIS_URL"])
session = requests.Session()
# More than it may keep would be new connections each time, with a warning.
session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=64))
database: Any = gevent.queue.Queue()
app = Flask(__name__)


def wait(connection: Any) -> None:
    """Have gevent wait for PostgreSQL, as psycogreen does."""
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        if state == psycopg2.extensions.POLL_READ:
            gevent.socket.wait_read(connection.fileno())
        else:
            gevent.socket.wait_write(connection.fileno())


def prepare() -> None:
    """Connect before the first request."""
    psycopg2.extensions.set_wait_callback(wait)
    for _ in range(POOL):
        connection = psycopg2.connect(DATABASE_URL)
        connection.autocommit = True
        database.put(connection)


def query(rid: str, call: int) -> None:
    """One statement, which sleeps a moment."""
    connection = database.get()
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM pg_sleep(0.002), products /* {rid}/{call} */")
        cursor.fetchall()
    database.put(connection)


def get(rid: str, call: int) -> None:
    """One look into the cache."""
    cache.get(f"key:{rid}/{call}")


def ask(rid: str, call: int) -> None:
    """One call of the backend."""
    assert session.get(f"{BACKEND_URL}/b/{rid}/{call}", timeout=20).text == f"{rid}\n"


KINDS = {"pg": (query,), "redis": (get,), "http": (ask,), "mixed": (query, get, ask)}


@app.get("/<kind>/<rid>")
def serve(kind: str, rid: str) -> dict[str, str]:
    """All of one endpoint's calls, one after the other."""
    functions = KINDS[kind]
    for call in range(CALLS[kind]):
        functions[call % len(functions)](rid, call)
    return {"id": rid}
