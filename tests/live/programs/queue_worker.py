"""Does the jobs that queue_producer.py enqueues, until SIGTERM: queue_worker.py KIND.

KIND: rq, celery-prefork (2 processes), celery-solo, dramatiq (4 threads; 8 messages at once),
dramatiq-one (one at once), subscribe (Redis), listen (PostgreSQL, psycopg), listen2 (psycopg2), table
(2 threads, psycopg2), table3 (psycopg).
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import redis

from tests.live.programs.queue_jobs import (
    CHANNEL,
    celery_app,
    connect,
    dramatiq_actor,
    note_in_redis,
    note_in_table,
)
from tests.live.programs.queue_notes import REDIS_URL, noted

TAKE = """
    DELETE FROM jobs WHERE number = (
        SELECT number FROM jobs ORDER BY number FOR UPDATE SKIP LOCKED LIMIT 1
    ) RETURNING job
"""
POLL_SECONDS = 0.005

# Workers print much, and tests read this for one word.
_told = os.dup(1)
os.dup2(2, 1)


def ready(**_: Any) -> None:
    os.write(_told, b"ready\n")


def rq_work() -> None:
    import rq

    class Worker(rq.SimpleWorker):
        def bootstrap(self, *arguments: Any, **options: Any) -> Any:
            result = super().bootstrap(*arguments, **options)
            ready()
            return result

    Worker(["notes"], connection=redis.Redis.from_url(REDIS_URL)).work(logging_level="WARNING")


def celery_work(pool: str) -> None:
    from celery.signals import task_received, worker_ready  # type: ignore[import-untyped]

    def received(request: Any, **_: Any) -> None:
        with noted("take", request.id):
            pass

    worker_ready.connect(ready, weak=False)
    task_received.connect(received, weak=False)
    options = ["--pool", pool, "--concurrency", "2", "--loglevel", "WARNING"]
    options += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    celery_app().worker_main(["worker", *options])


def dramatiq_work(at_once: int) -> None:
    # before the import: how many messages it fetches at once
    os.environ["dramatiq_queue_prefetch"] = str(at_once)  # noqa: SIM112 (its name)
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    class Consumer(RedisBroker.consumer_class.fget(None)):  # type: ignore[misc]
        def __next__(self) -> Any:
            message = super().__next__()
            if message is not None:
                with noted("take", message.args[0]):
                    pass
            return message

    class Broker(RedisBroker):
        consumer_class = Consumer

    actor = dramatiq_actor(Broker)
    worker = dramatiq.Worker(actor.broker, worker_threads=4)
    worker.start()
    ready()
    threading.Event().wait()


def subscribe() -> None:
    channel = redis.Redis.from_url(REDIS_URL).pubsub(ignore_subscribe_messages=True)
    channel.subscribe(CHANNEL)
    channel.get_message(timeout=1)
    ready()
    for message in channel.listen():
        note_in_redis(message["data"].decode())


def listen() -> None:
    connection, own = connect("psycopg"), connect("psycopg")
    connection.execute(f"LISTEN {CHANNEL}")
    ready()
    for told in connection.notifies():
        note_in_table(own, told.payload)


def listen2() -> None:
    connection, own = connect("psycopg2"), connect("psycopg2")
    connection.cursor().execute(f"LISTEN {CHANNEL}")
    ready()
    while True:
        select.select([connection], [], [])
        connection.poll()
        while connection.notifies:
            note_in_table(own, connection.notifies.pop(0).payload)


def take(driver: str, started: Callable[[], object]) -> None:
    connection = connect(driver)
    cursor = connection.cursor()
    started()
    while True:
        cursor.execute(TAKE)
        found = cursor.fetchone()
        if found is None:
            time.sleep(POLL_SECONDS)
        else:
            note_in_table(connection, found[0])


def take_prepared() -> None:
    ready()
    # psycopg prepares what it executes often, and what is executed is only known if that was seen
    sys.stdin.read(1)
    take("psycopg", lambda: None)


def take_in_threads() -> None:
    barrier = threading.Barrier(3)
    for _ in range(2):
        threading.Thread(target=take, args=["psycopg2", barrier.wait], daemon=True).start()
    barrier.wait()
    ready()
    threading.Event().wait()


KINDS: dict[str, Callable[[], object]] = {
    "rq": rq_work,
    "celery-prefork": lambda: celery_work("prefork"),
    "celery-solo": lambda: celery_work("solo"),
    "dramatiq": lambda: dramatiq_work(8),
    "dramatiq-one": lambda: dramatiq_work(1),
    "subscribe": subscribe,
    "listen": listen,
    "listen2": listen2,
    "table": take_in_threads,
    "table3": take_prepared,
}


if __name__ == "__main__":
    KINDS[sys.argv[1]]()
