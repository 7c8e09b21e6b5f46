"""Real applications, whose calls must be below the request that made them.

FastAPI on uvicorn, with both event loops, asyncpg and redis.asyncio; Flask on gunicorn's gevent worker,
with psycopg2, redis and requests. PostgreSQL and Redis are real and recorded, too. What is right stands in
the bytes: every statement has the request's id in a comment, every key and path in itself.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.live.contexts import BACKLOG, Compared, Server, compare_spans, serving
from tests.live.recording import PROGRAMS, Session, Target, attached, no_losses
from tests.live.roots import ROOT

pytestmark = pytest.mark.live

SHOP = ROOT / "examples" / "shop"
REQUESTS = 43  # of each endpoint
CONCURRENCY = 20
START_SECONDS = 60.0
WARM_UP = 12
SECONDS = 30
# How many calls an endpoint makes, as the programs say themselves.
FASTAPI = {"several": 4, "gather": 5, "background": 2, "sync": 2, "stream": 4}
FLASK = {"pg": 3, "redis": 3, "http": 2, "mixed": 3}
APPLICATIONS = {"fastapi-asyncio": FASTAPI, "fastapi-uvloop": FASTAPI, "flask-gevent": FLASK}
LEAST_LINKED = {"fastapi-asyncio": 0.995, "fastapi-uvloop": 0.98, "flask-gevent": 0.995}
CASES = [(name, endpoint) for name, calls in APPLICATIONS.items() for endpoint in calls]
RID = r"[/: ](\d{6})(?:\b|/)"
CALL = r"[/: ]\d{6}/(\d+)"


@pytest.fixture(scope="module")
def servers() -> Iterator[Any]:
    """Redis and PostgreSQL as the shop starts them."""
    sys.path.insert(0, str(SHOP))
    try:
        starting = importlib.import_module("servers")
        supervision = importlib.import_module("supervision")
    finally:
        sys.path.remove(str(SHOP))

    class Servers(supervision.Supervisor):  # type: ignore[name-defined,misc]
        def start(self) -> None:
            self.redis = starting.start_redis(self, "redis-password")
            self.postgres = starting.start_postgres(self, "postgres-password", 40)

    with Servers(START_SECONDS) as running:
        yield running


@dataclass(frozen=True)
class Run:
    """One recording, and the ids of the requests by endpoint."""

    session: Session
    tgid: int
    asked: Mapping[str, range]


@pytest.fixture(scope="module")
def runs(servers, tmp_path_factory) -> dict[str, Run]:
    """Each application under load."""
    found = {}
    with serving("contexts_backend") as backend:
        environment = {
            **os.environ,
            "REAL_DATABASE_URL": servers.postgres,
            "REAL_REDIS_URL": servers.redis,
            "REAL_BACKEND_URL": f"http://127.0.0.1:{backend.port}",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for number, (name, calls) in enumerate(APPLICATIONS.items()):
            with application(name, environment) as server:
                ids = {
                    endpoint: range(first, first + REQUESTS)
                    for first, endpoint in zip(
                        range(number * 10_000 + 1000, 10**6, 1000), calls, strict=False
                    )
                }
                # connections are made, and code is loaded, before
                asyncio.run(ask(server.port, {endpoint: range(WARM_UP) for endpoint in calls}))
                path = tmp_path_factory.mktemp(name)
                others = [Running(pid) for pid in servers.pids.values()]
                targets: list[Any] = [server.target, backend.target, *others]
                with attached(path, targets, "--unredacted") as session:
                    asyncio.run(ask(server.port, ids))
                    session.stop()
                found[name] = Run(session, worker_of(server), ids)
    return found


@dataclass(frozen=True)
class Running:
    """A process of the shop's servers, as something to attach to."""

    pid: int


@contextmanager
def application(name: str, environment: Mapping[str, str]) -> Iterator[Server]:
    """Run one of the applications."""
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        fd, port = listener.fileno(), listener.getsockname()[1]
        if name == "flask-gevent":
            command = [sys.executable, "-m", "gunicorn", "--bind", f"fd://{fd}"]
            command += ["--config", "python:tests.live.programs.real_gunicorn"]
        else:
            loop = name.removeprefix("fastapi-")
            command = [sys.executable, str(PROGRAMS / "real_fastapi.py"), loop, str(fd)]
        with Target(*command, pass_fds=[fd], env=environment, cwd=ROOT) as target:
            yield Server(target, port)
            # as they are ended usually: gunicorn then ends its worker
            target.process.terminate()
            target.process.wait(SECONDS)


def worker_of(server: Server) -> int:
    """The process that answers: gunicorn's is a child."""
    children = f"/proc/{server.pid}/task/{server.pid}/children"
    with open(children) as file:
        pids = [int(pid) for pid in file.read().split()]
    return pids[0] if pids else server.pid


async def ask(port: int, ids: Mapping[str, range]) -> None:
    """Requests to all endpoints, mixed, so many at the same time; each answer has its request's id."""
    paths = [(endpoint, rid) for rids in zip(*ids.values(), strict=True)
             for endpoint, rid in zip(ids, rids, strict=True)]  # fmt: skip
    places = asyncio.Semaphore(CONCURRENCY)
    limits = httpx.Limits(max_connections=CONCURRENCY)
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(limits=limits, timeout=SECONDS, trust_env=False) as client:

        async def one(endpoint: str, rid: int) -> None:
            async with places:
                answer = await client.get(f"{base}/{endpoint}/{rid:06d}")
                assert answer.status_code == 200 and f"{rid:06d}" in answer.text, answer.text

        await asyncio.gather(*(one(*path) for path in paths))


@pytest.mark.parametrize("name", APPLICATIONS)
def test_nothing_was_lost(name, runs):
    no_losses(runs[name].session)


@pytest.mark.parametrize(("name", "endpoint"), CASES)
def test_calls_are_below_their_requests(name, endpoint, runs):
    run = runs[name]
    calls = dict.fromkeys(run.asked[endpoint], APPLICATIONS[name][endpoint])
    found: Compared = compare_spans(run.session.recording, run.tgid, calls, RID, CALL)
    assert (found.wrong, found.wrong_edges) == (0, 0), found.examples
    assert found.unseen == 0, found.examples
    assert found.share >= LEAST_LINKED[name], (found.share, found.examples)
