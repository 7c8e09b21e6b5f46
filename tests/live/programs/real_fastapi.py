"""A FastAPI application on uvicorn that asks PostgreSQL and Redis: real_fastapi.py LOOP FD.

LOOP: asyncio or uvloop. REAL_DATABASE_URL and REAL_REDIS_URL say where the servers are. Each endpoint makes
CALLS[endpoint] calls, each with the request's id and its own number in the comment of a statement
or in a key: ID/NUMBER.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import redis
import redis.asyncio
import uvicorn
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse

CALLS = {"several": 4, "gather": 5, "background": 2, "sync": 2, "stream": 4}
POOL = 6
DATABASE_URL = os.environ["REAL_DATABASE_URL"]
REDIS_URL = os.environ["REAL_REDIS_URL"]
in_threads = redis.Redis.from_url(REDIS_URL)
cache = redis.asyncio.Redis.from_url(REDIS_URL)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Connect before the first request."""
    await cache.ping()
    async with asyncpg.create_pool(DATABASE_URL, min_size=POOL, max_size=POOL) as pool:
        app.state.database = pool
        print("ready", flush=True)
        yield
    await cache.aclose()


app = FastAPI(lifespan=lifespan)


async def query(rid: str, call: int) -> int:
    """One statement, which sleeps a moment."""
    async with app.state.database.acquire() as connection:
        number = await connection.fetchval(
            f"SELECT count(*) FROM pg_sleep(0.002), products /* {rid}/{call} */"
        )
    return int(number)


async def get(rid: str, call: int) -> None:
    """One look into the cache."""
    await cache.get(f"key:{rid}/{call}")


@app.get("/several/{rid}")
async def several(rid: str) -> dict[str, str]:
    """One after the other."""
    await query(rid, 0)
    await get(rid, 1)
    await asyncio.sleep(0.002)
    await query(rid, 2)
    await query(rid, 3)
    return {"id": rid}


@app.get("/gather/{rid}")
async def gather(rid: str) -> dict[str, str]:
    """At once."""
    await asyncio.gather(*(get(rid, call) for call in (0, 1, 2)), query(rid, 3), query(rid, 4))
    return {"id": rid}


@app.get("/background/{rid}")
async def background(rid: str, tasks: BackgroundTasks) -> dict[str, str]:
    """After the answer."""
    await get(rid, 0)
    tasks.add_task(get, rid, 1)
    return {"id": rid}


@app.get("/sync/{rid}")
def sync(rid: str) -> dict[str, str]:
    """In a thread of the pool."""
    for call in range(CALLS["sync"]):
        in_threads.get(f"key:{rid}/{call}")
    return {"id": rid}


@app.get("/stream/{rid}")
async def stream(rid: str) -> StreamingResponse:
    """Between the pieces of an answer."""

    async def pieces() -> AsyncIterator[str]:
        for call in range(CALLS["stream"]):
            await (query if call % 2 else get)(rid, call)
            yield f"{call} {rid}\n"

    return StreamingResponse(pieces(), media_type="text/plain")


if __name__ == "__main__":
    config = uvicorn.Config(app, loop=sys.argv[1], log_level="warning")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[2]))])
