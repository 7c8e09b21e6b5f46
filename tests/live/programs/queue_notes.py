"""What the programs around queues note of themselves: lines of JSON that tests compare with.

The environment says where: QUEUE_LOG is the file, QUEUE_REDIS_URL and QUEUE_DATABASE_URL the servers.
A line has `kind`, the job's `job_id`, `tgid`, `tid`, `start_ns` and `end_ns` (CLOCK_MONOTONIC). Kinds:

    put     a producer handed the job over
    take    a worker that has its processes or threads do jobs got it
    job     it was done
    call    what the job itself asked for
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

REDIS_URL = os.environ["QUEUE_REDIS_URL"]
DATABASE_URL = os.environ["QUEUE_DATABASE_URL"]
JOBS = 23

# Inherited by forks: each line is one write that appends.
_LOG = os.open(os.environ["QUEUE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


@contextmanager
def noted(kind: str, job_id: str) -> Iterator[None]:
    """Note the block."""
    start_ns = time.monotonic_ns()
    yield
    line = {
        "kind": kind,
        "job_id": job_id,
        "tgid": os.getpid(),
        "tid": threading.get_native_id(),
        "start_ns": start_ns,
        "end_ns": time.monotonic_ns(),
    }
    os.write(_LOG, json.dumps(line).encode() + b"\n")
