"""Enqueues jobs with ids of their own: queue_producer.py KIND [steps].

KIND: rq, celery, dramatiq, publish (Redis), notify or table (PostgreSQL). Behind the gate only, with
`steps` behind it for each job; then it tells the ids.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Callable

import redis

from tests.live.programs.queue_jobs import (
    CHANNEL,
    celery_app,
    connect,
    dramatiq_actor,
    note_in_redis,
)
from tests.live.programs.queue_notes import JOBS, REDIS_URL, noted


def rq_put() -> Callable[[str], object]:
    import rq

    queue = rq.Queue("notes", connection=redis.Redis.from_url(REDIS_URL))
    name = f"{note_in_redis.__module__}.{note_in_redis.__name__}"
    return lambda job_id: queue.enqueue(name, job_id, job_id=job_id)


def celery_put() -> Callable[[str], object]:
    app = celery_app()
    task = app.tasks["note"]
    return lambda job_id: task.apply_async((job_id,), task_id=job_id)


def dramatiq_put() -> Callable[[str], object]:
    actor = dramatiq_actor()
    send: Callable[[str], object] = actor.send
    return send


def publish() -> Callable[[str], object]:
    client = redis.Redis.from_url(REDIS_URL)
    client.ping()
    return lambda job_id: client.publish(CHANNEL, job_id)


def notify() -> Callable[[str], object]:
    cursor = connect("psycopg").cursor()
    return lambda job_id: cursor.execute("SELECT pg_notify(%s, %s)", (CHANNEL, job_id))


def table() -> Callable[[str], object]:
    cursor = connect("psycopg2").cursor()
    return lambda job_id: cursor.execute("INSERT INTO jobs (job) VALUES (%s)", (job_id,))


KINDS: dict[str, Callable[[], Callable[[str], object]]] = {
    "rq": rq_put,
    "celery": celery_put,
    "dramatiq": dramatiq_put,
    "publish": publish,
    "notify": notify,
    "table": table,
}


def main() -> None:
    put = KINDS[sys.argv[1]]()
    steps = sys.argv[2:] == ["steps"]
    print("ready", flush=True)
    os.read(0, 1)
    ids = [str(uuid.uuid4()) for _ in range(JOBS)]
    for job_id in ids:
        with noted("put", job_id):
            put(job_id)
        if steps:
            os.read(0, 1)
    print(json.dumps(ids), flush=True)
    # what it recorded last is only complete while it lives
    os.read(0, 1)


if __name__ == "__main__":
    main()
