"""Real clients talk to real PostgreSQL and MariaDB servers; the parsers must understand each turn."""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import psycopg
import psycopg2
import psycopg2.extensions
import pymysql  # type: ignore[import-untyped]
import pytest

from scope_ebpf.protocols import mysql, postgresql
from scope_ebpf.protocols.contract import Protocol, Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask, new_key

# Live: the servers refuse to run as root, and only root can start them as somebody else.
pytestmark = pytest.mark.live

HEAD_BYTES = 512
SECRET = "pl4nted-Secret"
NUMBER = 7316549
PASSWORD = "pw-Of-The-Shop"


@dataclass
class Turn:
    """What one side sent before the other side spoke."""

    role: Role
    head: bytes = b""
    total: int = 0

    def add(self, data: bytes) -> None:
        self.head = (self.head + data)[:HEAD_BYTES]
        self.total += len(data)


@dataclass
class Wire:
    """A TCP proxy that remembers the turns of all connections, in their order."""

    server_port: int
    turns: list[Turn] = field(default_factory=list)

    def __enter__(self) -> Wire:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._pass_on, args=[client], daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass_on(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.server_port))
        last = None
        with client, server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    role = Role.REQUEST if source is client else Role.RESPONSE
                    if last is None or last.role != role:
                        last = Turn(role)
                        self.turns.append(last)
                    last.add(data)
                    (server if source is client else client).sendall(data)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(
    user: str, prepare: Callable[[Path, int], list[list[str]]], probe: Callable[[int], object]
) -> Iterator[int]:
    """The port of a server in a directory of its own; the last of its commands is the server."""
    account = pwd.getpwnam(user)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="scope-sql-") as name:
        home = Path(name)
        os.chown(home, account.pw_uid, account.pw_gid)
        *before, server = prepare(home, port)
        with (home / "log").open("wb") as log:
            for command in before:
                subprocess.run(
                    command, check=True, stdout=log, stderr=log, cwd=home,
                    user=account.pw_uid, group=account.pw_gid, extra_groups=[],
                )  # fmt: skip
            process = subprocess.Popen(
                server, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home,
                user=account.pw_uid, group=account.pw_gid, extra_groups=[],
            )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    probe(port)
                    break
                except Exception:
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def postgresql_port() -> Iterator[int]:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("needs PostgreSQL (apt-get install postgresql)")

    def prepare(home: Path, port: int) -> list[list[str]]:
        (home / "password").write_text(PASSWORD)
        (home / "password").chmod(0o644)
        return [
            [
                str(programs[-1] / "initdb"), f"--pgdata={home}/data", "--username=shop",
                f"--pwfile={home}/password", "--auth=scram-sha-256", "--no-sync",
                "--encoding=UTF8", "--locale=C",
            ],
            [
                str(programs[-1] / "postgres"), "-D", f"{home}/data", "-p", str(port),
                "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={home}",
                "-c", "fsync=off",
            ],
        ]  # fmt: skip

    def probe(port: int) -> None:
        with connect2(port) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE products (id int PRIMARY KEY, name text)")
            cursor.execute("CREATE TABLE jobs (id serial PRIMARY KEY, state text)")
            cursor.execute("INSERT INTO jobs (state) VALUES ('new'), ('new')")
        connection.close()

    with running("postgres", prepare, probe) as port:
        yield port


def connect2(port: int) -> psycopg2.extensions.connection:
    return psycopg2.connect(
        host="127.0.0.1", port=port, user="shop", password=PASSWORD, dbname="postgres",
        sslmode="disable",
    )  # fmt: skip


def connect3(port: int, **options) -> psycopg.Connection:
    return psycopg.connect(
        host="127.0.0.1", port=port, user="shop", password=PASSWORD, dbname="postgres",
        sslmode="disable", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mariadb_port() -> Iterator[int]:
    program, install = shutil.which("mariadbd"), shutil.which("mariadb-install-db")
    if program is None or install is None:
        pytest.skip("needs MariaDB (apt-get install mariadb-server-core)")

    def prepare(home: Path, port: int) -> list[list[str]]:
        data = f"--datadir={home}/data"
        (home / "init.sql").write_text(
            f"CREATE USER shop@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
            "GRANT ALL ON *.* TO shop@'127.0.0.1';\nCREATE DATABASE shop;\n"
        )
        (home / "init.sql").chmod(0o644)
        return [
            [install, "--no-defaults", data, "--auth-root-authentication-method=normal"],
            [
                program, "--no-defaults", data, f"--port={port}", "--bind-address=127.0.0.1",
                f"--socket={home}/socket", f"--init-file={home}/init.sql",
                f"--pid-file={home}/pid", "--skip-name-resolve",
            ],
        ]  # fmt: skip

    def probe(port: int) -> None:
        with my_connect(port) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE products (id int PRIMARY KEY, name text)")
            cursor.execute("CREATE TABLE jobs (id int PRIMARY KEY, state text)")
            cursor.execute("INSERT INTO jobs VALUES (1, 'new')")
            connection.commit()

    with running("mysql", prepare, probe) as port:
        yield port


def my_connect(port: int):
    return pymysql.connect(
        host="127.0.0.1", port=port, user="shop", password=PASSWORD, database="shop",
        ssl_disabled=True,
    )  # fmt: skip


@dataclass
class Understood:
    """What the parsers make of recorded turns, in clear and masked."""

    turns: list[Turn]
    requests: pl.DataFrame
    responses: pl.DataFrame

    def request(self, beginning: str) -> dict[str, object]:
        """The first request whose operation begins like this."""
        return self.requests.filter(
            pl.col("operation").str.starts_with(beginning)
        ).row(0, named=True)  # fmt: skip

    def answers(self, beginning: str) -> list[dict[str, object]]:
        """The responses right behind such requests."""
        of = self.requests.filter(pl.col("operation").str.starts_with(beginning))["turn"]
        return self.responses.filter(pl.col("turn").is_in((of + 1).implode())).to_dicts()


SAME_MASKED = ["turn", "operation", "requests", "answered", "waits", "queue_action", "queue"]


def understand(protocol: Protocol, turns: list[Turn], *secrets: str) -> Understood:
    """Recognise and parse all turns, then the same turns masked; nothing planted may be left."""
    heads = Heads.of(
        pl.Series([turn.head for turn in turns], dtype=pl.Binary),
        np.array([turn.total for turn in turns]),
    )
    roles = protocol.recognise(heads)
    expected = [turn.role for turn in turns]
    wrong = [(turn, role) for turn, role in zip(turns, roles, strict=True) if turn.role != role]
    # Logins of MySQL take several turns, some of which say nothing of their protocol.
    assert not [turn for turn, role in wrong if role != Role.NONE], wrong
    assert not [turn for turn, role in wrong if protocol.name == "postgresql"], wrong
    clear = parsed(protocol, heads, expected)
    masked_heads = mask(heads, protocol.keep(heads, roles), new_key())
    assert protocol.recognise(masked_heads).tolist() == roles.tolist()
    masked = parsed(protocol, masked_heads, expected)
    assert masked[0].select(SAME_MASKED).equals(clear[0].select(SAME_MASKED)), (masked, clear)
    same = ["turn", "status", "transaction", "defines", "queue"]
    assert masked[1].select(same).equals(clear[1].select(same)), (masked[1], clear[1])
    assert masked[1]["error"].is_null().to_list() == clear[1]["error"].is_null().to_list()
    left = masked_heads.data.tobytes()
    for secret in (SECRET, str(NUMBER), PASSWORD, *secrets):
        assert secret.encode() not in left
    assert any(SECRET.encode() in turn.head for turn in turns)
    return Understood(turns, *clear)


def parsed(
    protocol: Protocol, heads: Heads, roles: list[Role]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    asked = np.array([role == Role.REQUEST for role in roles])
    frames = []
    for mask_of, parse in ((asked, protocol.parse_requests), (~asked, protocol.parse_responses)):
        turn = pl.Series("turn", np.flatnonzero(mask_of))
        frames.append(parse(heads.take(mask_of)).with_columns(turn))
    return frames[0], frames[1]


def test_simple_queries_of_psycopg2(postgresql_port):
    with Wire(postgresql_port) as wire:
        connection = connect2(wire.port)
        cursor = connection.cursor()
        cursor.execute("INSERT INTO products VALUES (%s, %s)", [NUMBER, f"it's {SECRET} \\ x"])
        cursor.execute("SELECT id, name FROM products WHERE id IN %s", [(NUMBER, 1, 2)])
        assert cursor.fetchone() == (NUMBER, f"it's {SECRET} \\ x")
        with pytest.raises(psycopg2.errors.UniqueViolation):
            cursor.execute("INSERT INTO products VALUES (%s, %s)", [NUMBER, SECRET])
        connection.rollback()
        connection.close()
    found = understand(postgresql.PROTOCOL, wire.turns)
    assert found.request("startup")["answered"]
    select = found.request("SELECT id")
    assert select["operation"] == "SELECT id, name FROM products WHERE id IN (?)"
    assert f"IN ({NUMBER}, 1, 2)" in str(select["detail"])
    (answer,) = found.answers("SELECT id")
    assert (answer["status"], answer["transaction"]) == ("SELECT 1", "T")
    push = found.request("INSERT")
    assert push["operation"] == "INSERT INTO products VALUES (?)"
    assert (push["queue_action"], push["queue"], push["element"]) == ("push", "products", None)
    good, bad = found.answers("INSERT")
    assert (good["status"], good["error"], good["transaction"]) == ("INSERT 0 1", None, "T")
    assert (bad["status"], bad["transaction"]) == ("23505", "E")
    assert str(bad["error"]).startswith("23505 duplicate key value violates unique constraint")
    assert found.answers("ROLLBACK")[0]["transaction"] == "I"
    assert found.request("Terminate")["answered"] is False


def test_prepared_statements_of_psycopg(postgresql_port):
    with (
        Wire(postgresql_port) as wire,
        connect3(wire.port, prepare_threshold=1, autocommit=True) as connection,
    ):
        for number in (NUMBER, 2, 3):
            connection.execute(
                "SELECT name FROM products WHERE id = %s OR name = %s", [number, SECRET]
            )
    found = understand(postgresql.PROTOCOL, wire.turns)
    queries = found.requests.filter(pl.col("uses").is_not_null() | pl.col("defines").is_not_null())
    text = "SELECT name FROM products WHERE id = ? OR name = ?"
    first, *later = queries.to_dicts()
    assert (first["operation"], first["defines"], first["uses"]) == (text, "", None)
    defined = [row["defines"] for row in later if row["defines"]]
    used = [row["uses"] for row in later if row["uses"]]
    assert len(defined) == 1
    assert used and set(used) == set(defined)
    executed = found.request("EXECUTE")
    assert executed["operation"] == f"EXECUTE {defined[0]}"
    assert executed["detail"] is None
    assert [row["status"] for row in found.answers("EXECUTE")] == ["SELECT 0"] * len(used)


def test_copy_in_both_directions(postgresql_port):
    with (
        Wire(postgresql_port) as wire,
        connect3(wire.port, autocommit=True) as connection,
        connection.cursor() as cursor,
    ):
        with cursor.copy("COPY products FROM STDIN") as copy:
            for number in range(1000):
                copy.write_row((NUMBER + number, SECRET))
        with cursor.copy(f"COPY (SELECT * FROM products WHERE id >= {NUMBER}) TO STDOUT") as out:
            assert len(list(out.rows())) == 1000
        connection.execute("DELETE FROM products")
    found = understand(postgresql.PROTOCOL, wire.turns)
    assert found.request("COPY products")["operation"] == "COPY products FROM STDIN"
    assert found.answers("COPY products")[0]["status"] == "OK"
    assert found.answers("COPY data")[0]["status"] == "COPY 1000"
    out_text = "COPY (SELECT * FROM products WHERE id >= ?) TO STDOUT"
    assert found.request("COPY (")["operation"] == out_text
    assert found.answers("COPY (")[0]["error"] is None
    assert found.answers("DELETE")[0]["status"] == "DELETE 1000"


def test_notifications_and_a_job_table(postgresql_port):
    pop = (
        "UPDATE jobs SET state = 'taken' WHERE id = (SELECT id FROM jobs WHERE state = 'new' "
        "ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 1) RETURNING id"
    )
    with Wire(postgresql_port) as wire, connect3(wire.port, autocommit=True) as listener:
        listener.execute("LISTEN Mails")
        with connect3(wire.port, autocommit=True) as connection:
            connection.execute(f"NOTIFY Mails, 'job {SECRET}'")
            connection.execute(f"SELECT pg_notify('mails', 'two {SECRET}')")
            connection.execute("SELECT pg_notify(%s, %s)", ["mails", f"three {SECRET}"])
            assert connection.execute(pop).fetchone()
        told = [notice.payload for notice in listener.notifies(timeout=5, stop_after=3)]
    assert told == [f"job {SECRET}", f"two {SECRET}", f"three {SECRET}"]
    found = understand(postgresql.PROTOCOL, wire.turns)
    assert found.request("LISTEN")["queue_action"] == "subscribe"
    assert found.request("LISTEN")["queue"] == "mails"
    published = found.requests.filter(queue_action="publish")
    assert published["element"].to_list() == told
    assert published["queue"].to_list() == ["mails"] * 3
    heard = found.responses.filter(pl.col("queue").is_not_null())
    assert heard["queue"].unique().to_list() == ["mails"]
    assert heard["element"][0] == told[0]
    taken = found.request("UPDATE jobs")
    assert (taken["queue_action"], taken["queue"]) == ("pop", "jobs")
    assert found.answers("UPDATE jobs")[0]["status"] == "UPDATE 1"


def test_pipelines_of_psycopg(postgresql_port):
    with Wire(postgresql_port) as wire, connect3(wire.port) as connection:
        with connection.pipeline():
            for number in range(5):
                connection.execute(
                    "INSERT INTO products VALUES (%s, %s)", [NUMBER + number, SECRET]
                )
        connection.rollback()
    found = understand(postgresql.PROTOCOL, wire.turns)
    insert = found.request("INSERT")
    assert insert["operation"] == "INSERT INTO products VALUES (?)"
    assert insert["requests"] in range(2, 8)
    assert found.answers("INSERT")[0]["status"] == "INSERT 0 1"


def test_queries_of_pymysql(mariadb_port):
    with (
        Wire(mariadb_port) as wire,
        my_connect(wire.port) as connection,
        connection.cursor() as cursor,
    ):
        name = f'it\'s {SECRET} \\ "x"'
        cursor.execute("INSERT INTO products VALUES (%s, %s)", [NUMBER, name])
        cursor.execute("SELECT id, name FROM `products` WHERE id IN %s", [(NUMBER, 1)])
        assert cursor.fetchone() == (NUMBER, name)
        cursor.execute(f"SELECT '{SECRET}', {NUMBER}")
        with pytest.raises(pymysql.err.IntegrityError):
            cursor.execute("INSERT INTO products VALUES (%s, %s)", [NUMBER, SECRET])
        cursor.execute("SELECT id FROM jobs WHERE state = 'new' LIMIT 1 FOR UPDATE SKIP LOCKED")
        connection.ping()
        connection.select_db("shop")
        connection.rollback()
    found = understand(mysql.PROTOCOL, wire.turns)
    assert found.request("login")["answered"]
    select = found.request("SELECT id, name")
    assert select["operation"] == "SELECT id, name FROM `products` WHERE id IN (?)"
    assert found.answers("SELECT id, name")[0]["status"] == "OK"
    good, bad = found.answers("INSERT")
    assert (good["status"], good["error"], good["transaction"]) == ("OK", None, "T")
    assert bad["status"] == "23000"
    assert str(bad["error"]).startswith("1062 Duplicate entry")
    taken = found.request("SELECT id FROM jobs")
    assert (taken["queue_action"], taken["queue"]) == ("pop", "jobs")
    assert found.answers("Ping")[0]["status"] == "OK"
    assert found.answers("ROLLBACK")[0]["transaction"] == "I"
    assert found.request("Quit")["answered"] is False


def test_prepared_statements_of_mysql(mariadb_port):
    """pymysql has no prepared statements, so their packets are sent through it by hand."""
    with Wire(mariadb_port) as wire, my_connect(wire.port) as connection:
        text = f"SELECT name FROM products WHERE id = ? OR name = '{SECRET}'"
        connection._execute_command(0x16, text)
        header = connection._read_packet()._data
        for _ in range(4):  # one parameter, one column, and the ends of both
            connection._read_packet()
        number = int.from_bytes(header[1:5], "little")
        values = b"\x00\x01" + b"\x03\x00" + NUMBER.to_bytes(4, "little")
        for _ in range(2):
            connection._execute_command(
                0x17, header[1:5] + b"\x00" + (1).to_bytes(4, "little") + values
            )
            while connection._read_packet()._data[0] != 0xFE:
                pass
            connection._read_packet()
        connection._execute_command(0x19, header[1:5])
        connection.ping()
    found = understand(mysql.PROTOCOL, wire.turns)
    operation = "SELECT name FROM products WHERE id = ? OR name = ?"
    assert found.request("SELECT name")["operation"] == operation
    assert found.answers("SELECT name")[0]["defines"] == str(number)
    executed = found.requests.filter(operation="EXECUTE ?")
    assert executed["uses"].to_list() == [str(number)] * 2
    assert [row["status"] for row in found.answers("EXECUTE")] == ["OK"] * 2
    assert found.answers("Ping")[0]["status"] == "OK"
