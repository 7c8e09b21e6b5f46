"""Redaction: secrets told to PostgreSQL, Redis and a web service are nowhere in the recording."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from scope_ebpf.protocols.contract import Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.redis import PROTOCOL as REDIS
from tests.live.recording import Session, attached, python_target

pytestmark = pytest.mark.live

# One for each way in which the program tells one.
WAYS = (
    "response_body set_cookie json_value json_element form_value authorization cookie header"
    " user_agent query redis_key redis_value redis_field redis_script redis_argument"
    " redis_element redis_pipeline redis_password redis_unknown redis_message sql_literal"
    " sql_escaped sql_dollar sql_comment sql_interpolated sql_error sql_parameter sql_copy job_id"
)
READY_SECONDS = 30


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextmanager
def program(*command: object, port: int, user: str | None = None) -> Iterator[int]:
    """A server that takes connections on a port of this machine; its pid."""
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        user=user,
        group=None if user is None else pwd.getpwnam(user).pw_gid,
        extra_groups=None if user is None else [],
    )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, f"{command[0]} does not listen"
                time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, tuple[int, int]]]:
    """PostgreSQL and Redis, as (pid, port)."""
    initdb = Path(subprocess.check_output(["pg_config", "--bindir"], text=True).strip()) / "initdb"
    if not initdb.exists():
        initdb = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), initdb)
    redis_server = shutil.which("redis-server")
    if redis_server is None or not initdb.exists():
        pytest.skip("needs redis-server and PostgreSQL's initdb")
    user = "nobody" if os.geteuid() == 0 else None
    # not pytest's own directory, which other users cannot enter
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        if user is not None:
            shutil.chown(home, user)
        data, postgres, redis = home / "data", free_port(), free_port()
        subprocess.run(
            [initdb, f"--pgdata={data}", "--username=tester", "--auth=trust", "--no-sync"],
            check=True,
            user=user,
            cwd="/",
            stdout=subprocess.DEVNULL,
        )
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        server: list[object] = [initdb.with_name("postgres"), "-D", data, "-p", postgres]
        server += settings
        with (
            program(*server, port=postgres, user=user) as postgres_pid,
            program(redis_server, "--port", redis, "--save", "", "--bind", "127.0.0.1", port=redis)
            as redis_pid,
        ):  # fmt: skip
            # listening is not yet being ready for queries
            probe = [str(initdb.with_name("pg_isready")), "-h", "127.0.0.1", "-p", str(postgres)]
            deadline = time.monotonic() + READY_SECONDS
            while subprocess.run(probe, check=False, stdout=subprocess.DEVNULL).returncode:
                assert time.monotonic() < deadline, "PostgreSQL does not get ready"
                time.sleep(0.05)
            yield {"postgres": (postgres_pid, postgres), "redis": (redis_pid, redis)}


def record(
    directory: Path, servers: dict[str, tuple[int, int]], *options: str
) -> tuple[Session, dict[str, str]]:
    """Record the program while it tells its secrets, and both servers."""
    # letters and digits, so that every way takes them as they are
    told = {name: f"Zq{secrets.token_hex(10)}" for name in WAYS.split()}
    plan: dict[str, Any] = {name: port for name, (_, port) in servers.items()}
    file = directory / "plan.json"
    file.write_text(json.dumps({**plan, "secrets": told}))
    with python_target("confidences", file) as target:
        pids = [part for pid, _ in servers.values() for part in ("--pid", str(pid))]
        with attached(directory, target, *pids, *options) as session:
            session.note = target.work()
            session.stop()
    assert session.note["told"] == sorted(told)
    return session, told


def everything(session: Session) -> dict[str, bytes]:
    """All that the recording holds, by file: Parquet decoded, each value after a line feed."""
    content = {}
    for file in sorted(session.path.rglob("*")):
        if file.suffix == ".parquet":
            frame = pl.read_parquet(file)
            values = [
                value if isinstance(value, bytes) else str(value).encode()
                for column in frame.iter_columns()
                if column.dtype in (pl.Binary, pl.String)
                for value in column.drop_nulls().to_list()
            ]
            content[str(file)] = b"\n".join(values) + file.read_bytes()
        elif file.is_file():
            content[str(file)] = file.read_bytes()
    return content


def found(session: Session, told: dict[str, str]) -> set[str]:
    """Which ways' secrets are in the recording, whole or in a large part."""
    files = everything(session).values()
    return {
        name
        for name, word in told.items()
        for piece in (word[2:14], word[10:])
        if any(piece.encode() in data for data in files)
    }


def test_no_secret_is_in_a_recording(tmp_path, servers):
    session, told = record(tmp_path, servers)
    assert found(session, told) == set()
    assert session.recording.meta.redacted
    assert not any("unredacted" in line for line in session.talk)
    payloads = session.table("messages")["payload"].drop_nulls()
    text = b"\n".join(payloads.to_list())
    # masked, but not thrown away: what tells one request from another in kind is there
    for clear in (b"POST /login?", b"INSERT INTO people", b"RPUSH", b"rq:queue:default", b"BLPOP"):
        assert clear in text, clear


def test_unredacted_recordings_hold_them_and_warn(tmp_path, servers):
    session, told = record(tmp_path, servers, "--unredacted")
    # all that the heads reach
    assert found(session, told) == set(told)
    assert not session.recording.meta.redacted
    assert any(line.startswith("warning: --unredacted") for line in session.talk)


def test_an_id_has_the_same_token_at_both_ends_of_a_queue(tmp_path, servers):
    session, _ = record(tmp_path, servers)
    rows = session.table("messages").filter(pl.col("payload").is_not_null())
    heads = Heads.of(rows["payload"], rows["length_bytes"].to_numpy().astype(np.int64))
    roles = REDIS.recognise(heads)
    requests = REDIS.parse_requests(heads.take(roles == Role.REQUEST))
    responses = REDIS.parse_responses(heads.take(roles == Role.RESPONSE))
    pushed = requests.filter(pl.col("queue_action") == "push").drop_nulls("element")
    popped = set(responses["element"].drop_nulls())
    assert set(pushed["queue"]) == {"mails", "rq:queue:default"}
    for queue in ("mails", "rq:queue:default"):
        elements = set(pushed.filter(pl.col("queue") == queue)["element"])
        assert len(elements) == 1, "the same job, seen at both ends of the connection"
        assert elements <= popped
