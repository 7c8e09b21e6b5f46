"""Tells secrets to PostgreSQL, Redis and a web service of its own, in every way there is.

    confidences.py FILE

FILE is JSON: `redis` and `postgres`, the ports; `secrets`, a word for each way by its name. A file
and not arguments, since command lines are recorded. The last line tells how many were told.
"""

import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psycopg
import psycopg2
import redis

PLAN = json.loads(Path(sys.argv[1]).read_text())
SECRETS = PLAN["secrets"]
TOLD: set[str] = set()


def secret(name: str) -> str:
    """One of the secrets, which is told now."""
    TOLD.add(name)
    return str(SECRETS[name])


class Answer(BaseHTTPRequestHandler):
    """Answers each request with secrets."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Read the body, answer with one."""
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"token": secret("response_body")})
        # in one piece: only the first bytes of a turn are recorded
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nContent-Type: application/json"
        cookie = f"Set-Cookie: session={secret('set_cookie')}; Path=/"
        self.wfile.write(f"{head}\r\n{cookie}\r\n\r\n{body}".encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def tell_web(port: int) -> None:
    """Requests with secrets where they usually are."""
    connection = socket.create_connection(("127.0.0.1", port))
    body = json.dumps({"card": secret("json_value"), "list": [secret("json_element")]})
    form = f"user=bob&password={secret('form_value')}"
    for path, header, name, content in (
        (f"/login?token={secret('query')}&next=/", "Authorization: Bearer ", "authorization", body),
        ("/users/17/orders", "Cookie: session=", "cookie", form),
        ("/items", "X-Api-Key: ", "header", body),
        ("/items", "User-Agent: client/", "user_agent", form),
    ):
        head = f"POST {path} HTTP/1.1\r\nHost: shop\r\n{header}{secret(name)}"
        length = f"Content-Length: {len(content)}"
        connection.sendall(f"{head}\r\n{length}\r\n\r\n{content}".encode())
        connection.recv(4096)
    connection.close()


def tell_redis(port: int) -> None:
    """Values, keys, elements of queues, arguments of commands, errors."""
    client, other = redis.Redis(port=port), redis.Redis(port=port)
    client.set(f"session:{secret('redis_key')}", secret("redis_value"), ex=60)
    client.get(f"session:{SECRETS['redis_key']}")
    client.hset("user:17", mapping={"name": "x", "password": secret("redis_field")})
    client.hgetall("user:17")
    client.mget("user_settings", f"session:{SECRETS['redis_key']}")
    client.eval(f"return '{secret('redis_script')}'", 1, "k", secret("redis_argument"))
    for _ in range(2):
        other.rpush("mails", json.dumps({"id": SECRETS["job_id"], "to": secret("redis_element")}))
        client.blpop(["mails"], timeout=5)
    with client.pipeline(transaction=True) as pipeline:
        pipeline.set("a", secret("redis_pipeline"))
        pipeline.rpush("rq:queue:default", SECRETS["job_id"])
        pipeline.get("a")
        pipeline.execute()
    client.lmove("rq:queue:default", "done", "LEFT", "RIGHT")
    for command in (("AUTH", "bob", secret("redis_password")), ("NOSUCH", secret("redis_unknown"))):
        try:
            client.execute_command(*command)
        except redis.RedisError:
            pass
        else:
            raise AssertionError(f"{command[0]} was taken")
    client.publish("events", secret("redis_message"))
    client.close()
    other.close()


def tell_postgres(port: int) -> None:
    """Literals, parameters, rows, COPY, errors."""
    where = f"host=127.0.0.1 port={port} user=tester dbname=postgres"
    simple = psycopg2.connect(where)
    simple.autocommit = True
    with simple.cursor() as cursor:
        cursor.execute("CREATE TEMP TABLE people (id text PRIMARY KEY, name text)")
        cursor.execute(f"INSERT INTO people VALUES ('{secret('sql_literal')}', NULL)")
        cursor.execute(f"SELECT E'a\\'{secret('sql_escaped')}', $x${secret('sql_dollar')}$x$")
        cursor.execute(f"SELECT id /* {secret('sql_comment')} */ FROM people")
        cursor.execute("UPDATE people SET name = %s", (secret("sql_interpolated"),))
        for statement in (
            f"INSERT INTO people VALUES ('{SECRETS['sql_literal']}')",
            f"SELECT CAST('{secret('sql_error')}' AS integer)",
        ):
            try:
                cursor.execute(statement)
            except psycopg2.Error:
                continue
            raise AssertionError(f"{statement} was taken")
    simple.close()
    with psycopg.connect(where) as extended:
        extended.execute("CREATE TEMP TABLE people (id text, name text)")
        for number in range(7):
            extended.execute(
                "INSERT INTO people VALUES (%s, %s)", (secret("sql_parameter"), str(number))
            )
        extended.execute("SELECT * FROM people WHERE id = %s", (SECRETS["sql_parameter"],))
        with extended.cursor().copy("COPY people FROM STDIN") as copy:
            copy.write_row((secret("sql_copy"), "x"))


def main() -> None:
    """Wait at the gate, then tell everything."""
    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read(1)
    tell_web(server.server_port)
    tell_redis(PLAN["redis"])
    tell_postgres(PLAN["postgres"])
    server.shutdown()
    server.server_close()
    TOLD.add("job_id")
    print(json.dumps({"told": sorted(TOLD)}), flush=True)


if __name__ == "__main__":
    main()
