"""The job that every kind of queue has done, and how RQ, Celery and Dramatiq know it."""

from __future__ import annotations

import threading
from typing import Any

import redis

from tests.live.programs.queue_notes import DATABASE_URL, REDIS_URL, noted

CHANNEL = "orders"
_own = threading.local()


def note_in_redis(job_id: str) -> None:
    """Do a job: one command over this thread's own connection."""
    with noted("job", job_id):
        client: Any = getattr(_own, "redis", None)
        if client is None:
            client = _own.redis = redis.Redis.from_url(REDIS_URL)
            client.ping()
        with noted("call", job_id):
            client.set(f"done:{job_id}", 1)


def note_in_table(connection: Any, job_id: str) -> None:
    """Do a job: one statement over the connection."""
    with noted("job", job_id), connection.cursor() as cursor, noted("call", job_id):
        cursor.execute("INSERT INTO done VALUES (%s)", (job_id,))


def celery_app() -> Any:
    """Celery with its task."""
    import celery  # type: ignore[import-untyped]

    app = celery.Celery("queue_jobs", broker=REDIS_URL)
    app.conf.worker_prefetch_multiplier = 1
    app.conf.task_ignore_result = True
    app.conf.worker_hijack_root_logger = False
    app.task(name="note")(note_in_redis)
    return app


def dramatiq_actor(kind: Any = None) -> Any:
    """Dramatiq's actor, with a broker of its own kind."""
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    dramatiq.set_broker((kind or RedisBroker)(url=REDIS_URL))
    return dramatiq.actor(actor_name="note")(note_in_redis)


def connect(driver: str) -> Any:
    """A connection to PostgreSQL that commits each statement, by psycopg or psycopg2."""
    if driver == "psycopg2":
        import psycopg2

        connection = psycopg2.connect(DATABASE_URL)
        connection.autocommit = True
        return connection
    import psycopg

    return psycopg.connect(DATABASE_URL, autocommit=True)
