"""How each program of the shop is started, and when it is ready."""

import http.client
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from installed import (
    ShopError,
    nginx_program,
    postgres_programs,
    redis_program,
    rq_program,
)
from processes import Process, service_account
from supervision import HOST, Supervisor, write_private

_HERE = Path(__file__).resolve().parent
# All services open files for themselves in the checkout, and as root would leave bytecode there.
_PYTHON_ENVIRONMENT = {"PYTHONDONTWRITEBYTECODE": "1"}


def start_postgres(supervisor: Supervisor, password: str, connections: int) -> str:
    """Start PostgreSQL with the shop's tables; returns the url of the database."""
    programs = postgres_programs()
    account = service_account("postgres", "nobody")
    home = supervisor.make_home("postgres", account)
    password_file = home / "password"
    write_private(password_file, password + "\n", account)
    data = home / "data"
    # No --auth=trust: another user of this machine would be the database's superuser.
    supervisor.run(
        "initdb",
        [
            programs / "initdb",
            f"--pgdata={data}",
            "--username=shop",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
        ],
        home,
        account,
    )
    settings = {
        "listen_addresses": HOST,
        "unix_socket_directories": "",
        "max_connections": str(20 + connections),
        "shared_buffers": "32MB",
    }

    def start(port: int) -> Process:
        command: list[str | Path] = [programs / "postgres", "-D", data, "-p", str(port)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        # SIGINT is its fast shutdown: SIGTERM would wait until every client has gone.
        return supervisor.spawn(
            "postgres", command, home, account, ends=(signal.SIGINT, signal.SIGQUIT)
        )

    def ready(process: Process, _port: int) -> bool:
        # The postmaster writes its state to line 8, which is what pg_ctl waits for as well.
        try:
            lines = (data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) > 7 and lines[0] == str(process.pid) and lines[7].strip() == "ready"

    port = supervisor.start_on_free_port("postgres", start, ready)
    psql: list[str | Path] = [programs / "psql", "-X", "-q", "-w", "-h", HOST]
    psql += ["-v", "ON_ERROR_STOP=1", "-p", str(port), "-U", "shop"]
    create = [*psql, "-d", "postgres", "-c", "CREATE DATABASE shop"]
    fill = [*psql, "-d", "shop", "--single-transaction", "-f", _HERE / "schema.sql"]
    for command in (create, fill):
        supervisor.run("psql", command, supervisor.directory, None, {"PGPASSWORD": password})
    return f"postgresql://shop:{password}@{HOST}:{port}/shop"


def start_redis(supervisor: Supervisor, password: str) -> str:
    """Start Redis; returns the url of its database."""
    program = redis_program()
    account = service_account("redis", "nobody")
    home = supervisor.make_home("redis", account)
    config = home / "redis.conf"

    def start(port: int) -> Process:
        # A file, because a password among the arguments would be seen by `ps`.
        lines = [f"bind {HOST}", f"port {port}", f"requirepass {password}"]
        lines += [f"dir {home}", 'save ""', "appendonly no", "daemonize no", 'logfile ""']
        lines += ["maxmemory 64mb", "maxmemory-policy allkeys-lru"]
        write_private(config, "\n".join(lines) + "\n", account)
        return supervisor.spawn("redis", [program, config], home, account)

    def ready(_process: Process, port: int) -> bool:
        try:
            with socket.create_connection((HOST, port), timeout=1) as connection:
                connection.sendall(f"AUTH {password}\r\n".encode())
                return connection.recv(64).startswith(b"+OK")
        except OSError:
            return False

    port = supervisor.start_on_free_port("redis", start, ready)
    return f"redis://:{password}@{HOST}:{port}/0"


@dataclass(frozen=True)
class Service:
    """A started service under gunicorn, which may not be ready yet."""

    process: Process
    port: int

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    def healthy(self) -> bool:
        """Whether it answers, and what it needs as well."""
        return answers_health(self.port)


def start_gunicorn(
    supervisor: Supervisor,
    name: str,
    application: str,
    environment: Mapping[str, str],
    *,
    workers: int,
    threads: int,
    keep_alive_seconds: int = 2,
) -> Service:
    """Start one of the applications of this folder; `name` is what `pids` calls it."""
    # Bound here and handed over: with a port that is only probably free, the health check
    # could be answered by somebody else's shop.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        command: list[str | Path] = [sys.executable, "-m", "gunicorn"]
        command += ["--config", _HERE / "gunicorn.conf.py"]
        command += ["--chdir", _HERE, "--bind", f"fd://{listener.fileno()}"]
        command += ["--workers", str(workers), "--threads", str(threads)]
        command += ["--keep-alive", str(keep_alive_seconds)]
        process = supervisor.spawn(
            name,
            [*command, application],
            supervisor.directory,
            None,
            {**_PYTHON_ENVIRONMENT, **environment},
            pass_fds=(listener.fileno(),),
        )
    return Service(process, port)


def start_nginx(supervisor: Supervisor, upstream_port: int, *, keep_alive: bool) -> int:
    """Start nginx in front of a service; returns its port.

    `keep_alive` is about the connections to the service: kept and HTTP/1.1, or as nginx does
    without being told, one HTTP/1.0 connection for each request.
    """
    program = nginx_program()
    # Not root: its port is above 1023, and all that it writes is in its home.
    account = service_account("www-data", "nginx", "nobody")
    home = supervisor.make_home("nginx", account)
    config, pid_file = home / "nginx.conf", home / "nginx.pid"
    template = (_HERE / "nginx.conf").read_text()

    def start(port: int) -> Process:
        text = template
        for key, value in {
            "@HOME@": str(home),
            "@LISTEN@": f"{HOST}:{port}",
            "@UPSTREAM@": f"{HOST}:{upstream_port}",
            "@KEPT@": "keepalive 32;" if keep_alive else "",
            "@VERSION@": "1.1" if keep_alive else "1.0",
            "@CONNECTION@": '""' if keep_alive else "close",
        }.items():
            text = text.replace(key, value)
        write_private(config, text, account)
        # Its own default for messages before the configuration is read is a file of root.
        command: list[str | Path] = [program, "-p", home, "-c", config, "-e", "stderr"]
        # SIGQUIT would wait for its clients.
        return supervisor.spawn("nginx", command, home, account)

    def ready(process: Process, port: int) -> bool:
        # It writes the file when it has bound its port: nobody else answers there then.
        try:
            bound = pid_file.read_text().strip() == str(process.pid)
        except OSError:
            return False
        return bound and answers_health(port)

    return supervisor.start_on_free_port("nginx", start, ready)


def start_mail_worker(
    supervisor: Supervisor, environment: Mapping[str, str], *, simple: bool
) -> Process:
    """Start the RQ worker that sends the order mails; `simple` does not fork for each job."""
    command: list[str | Path] = [rq_program(), "worker", "--path", _HERE, "--config", "rq_settings"]
    if simple:
        command += ["--worker-class", "rq.SimpleWorker"]
    process = supervisor.spawn(
        "worker",
        command,
        supervisor.directory,
        None,
        {**_PYTHON_ENVIRONMENT, "PYTHONPATH": str(_HERE), **environment},
        # A first SIGTERM lets it finish its job, a second one ends the job.
        ends=(signal.SIGTERM, signal.SIGTERM),
    )
    supervisor.wait_ready(process, lambda: "listening on" in process.log_tail().lower())
    return process


def start_receiver(supervisor: Supervisor, spans: Path) -> str:
    """Start the receiver of OpenTelemetry's spans; returns its url."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((HOST, 0))
        listener.listen(64)
        port: int = listener.getsockname()[1]
        command: list[str | Path] = [sys.executable, _HERE / "otel.py"]
        command += ["--fd", str(listener.fileno()), spans]
        # It listens already, so there is nothing to wait for.
        supervisor.spawn(
            "receiver",
            command,
            supervisor.directory,
            None,
            _PYTHON_ENVIRONMENT,
            pass_fds=(listener.fileno(),),
        )
    return f"http://{HOST}:{port}"


def answers_health(port: int) -> bool:
    """Whether `GET /health` is answered with 200."""
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def kill(pid: int) -> None:
    """Kill one of the shop's processes as if it had crashed."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        raise ShopError(f"cannot kill process {pid}: it is not there any more") from None
